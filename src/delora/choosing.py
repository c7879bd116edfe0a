"""The dial after training: the best strength of a trained adapter, by scores that a user gives."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from delora.methods.base import is_number
from delora.models import adapters, refuse_inside

__all__ = ["STRENGTHS", "Choice", "Tried", "choose_strength"]

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)


@dataclass(frozen=True)
class Tried:
    """A strength with what was measured there; ``forgotten`` is None where that was not asked for.

    >>> Tried(0.5, 0.8, None).score
    0.8
    """

    strength: float
    score: float
    forgotten: float | None


@dataclass(frozen=True)
class Choice:
    """The strength that was chosen, and the curve: all that were tried, from the lowest to the highest.

    >>> print(Choice(0.5, [Tried(0.0, 0.5, 10.0), Tried(0.5, 0.75, 11.0), Tried(1.0, 0.8, 13.0)], budget=12.0))
    strength   score  forgotten
           0     0.5         10
         0.5    0.75         11  <- chosen
           1     0.8         13  over the budget of 12
    """

    strength: float
    tried: list[Tried]
    budget: float | None = None

    def note(self, tried: Tried) -> str:
        """What there is to say of one of those that were tried."""
        if tried.strength == self.strength:
            return "<- chosen"
        return "" if _fits(tried, self.budget) else f"over the budget of {self.budget:.6g}"

    def __str__(self) -> str:
        measured = any(each.forgotten is not None for each in self.tried)
        lines = ["strength   score" + ("  forgotten" if measured else "")]
        for each in self.tried:
            forgotten = "" if each.forgotten is None else f"  {each.forgotten:9.5g}"
            lines.append(f"{each.strength:8.5g}  {each.score:6.5g}{forgotten}  {self.note(each)}".rstrip())
        return "\n".join(lines)


def choose_strength(
    model: nn.Module,
    score: Callable[[nn.Module], Any],
    *,
    strengths: Iterable[float] = STRENGTHS,
    forgotten: Callable[[nn.Module], Any] | None = None,
    budget: float | None = None,
    whole: bool = False,
) -> Choice:
    """Set the active adapter to the strength with the best score, among those that forget no more than a budget allows.

    Nothing is trained: at each strength, as `strength` sets it, the model is scored in evaluation mode and without gradients.
    Of equal scores the strength nearest to 1 is taken, which is what was trained; a score that is not finite is never chosen.
    `save` writes what was chosen.

    Args:
        model: a model with a trained adapter.
        score: a function of the model, such as its accuracy on validation data: the higher, the better. Where several
            processes have a part of the data each, it must return the same number on all.
        strengths: those to try; 1 is what was trained, 0 the base.
        forgotten: a function of the model, such as its perplexity on other text or its distance from the base: the lower, the
            better.
        budget: the most that ``forgotten`` may come to.
        whole: also turn the modules that were trained whole (``also_train``). As a rule they keep their strength: what such a
            module was before it was trained, a new head above all, may be random and another one wherever the adapter is
            loaded.

    Raises:
        ValueError, TypeError: no adapter is active; its layers have different strengths; no strength can be chosen; or an
            argument is wrong. Then, and where ``score`` or ``forgotten`` raises an error, the strength is what it was.

    >>> import delora
    >>> model = delora.inject(nn.Sequential(nn.Linear(4, 4)), delora.ETHER(), ["0"])
    >>> def distance(model):
    ...     return delora.distances(model)["0"]
    >>> limit = 0.6 * distance(model)
    >>> delora.choose_strength(model, score=distance, strengths=[0, 0.5, 1], forgotten=distance, budget=limit).strength
    0.5
    """
    refuse_inside(model, "choose_strength")
    placed = adapters(model)
    turned = {layer: each.adapter for layer, each in placed.items() if whole or not each.whole}
    before = {layer: adapter.strength for layer, adapter in turned.items()}
    if not turned:
        raise ValueError(f"all {len(placed)} layers were trained whole, such as {next(iter(placed))!r}: whole=True turns these")
    if len(set(before.values())) > 1:
        low, high = min(before, key=before.__getitem__), max(before, key=before.__getitem__)
        raise ValueError(
            f"the layers have different strengths, {before[low]:g} in {low!r} and {before[high]:g} in {high!r}, and one for "
            "all would undo that: call delora.strength(model, 1) first"
        )
    values = list(strengths)
    if not values:
        raise ValueError("strengths: there is none to try; give numbers, such as [0, 0.5, 1]")
    for s in values:
        if not is_number(s) or s < 0:
            raise ValueError(f"strengths: {s!r} must be a finite number, at least 0")
    if budget is not None and not is_number(budget):
        raise ValueError(f"budget = {budget!r}: must be a finite number")
    if budget is not None and forgotten is None:
        raise ValueError(f"budget = {budget!r}, but nothing says what is forgotten: give forgotten=, a function of the model")
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            tried = []
            for s in sorted({float(s) for s in values}):
                for adapter in turned.values():
                    adapter.strength = s
                lost = None if forgotten is None else _number(forgotten(model), "forgotten")
                tried.append(Tried(s, _number(score(model), "score"), lost))
        chosen = _best(tried, budget)
    except BaseException:
        for layer, adapter in turned.items():
            adapter.strength = before[layer]
        raise
    finally:
        for module, training in modes:
            module.training = training
    for adapter in turned.values():
        adapter.strength = chosen.strength
    return Choice(chosen.strength, tried, budget)


def _number(value: Any, what: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{what} returned {type(value).__name__}: it must return one number ({error})") from error


def _fits(tried: Tried, budget: float | None) -> bool:
    return budget is None or (tried.forgotten is not None and tried.forgotten <= budget)  # NaN is not


def _best(tried: Sequence[Tried], budget: float | None) -> Tried:
    """The best of those that fit; of equal ones the one nearest to what was trained, and of two as near the lower."""
    fitting = [each for each in tried if _fits(each, budget)]
    if not fitting:
        losses = {each.strength: math.nan if each.forgotten is None else each.forgotten for each in tried}
        least = min(losses, key=lambda s: math.inf if math.isnan(losses[s]) else losses[s])
        raise ValueError(
            f"no strength of {', '.join(f'{s:g}' for s in losses)} forgets as little as the budget of {budget:g}: the least is "
            f"{losses[least]:g}, at strength {least:g}; raise the budget, or try lower strengths"
        )
    finite = [each for each in fitting if math.isfinite(each.score)]
    if not finite:
        raise ValueError(
            f"no score is finite at strengths {', '.join(f'{each.strength:g}' for each in fitting)}: look at what score returns"
        )
    return max(finite, key=lambda each: (each.score, -abs(each.strength - 1)))
