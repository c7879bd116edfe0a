"""Experts as PEFT's ``target_parameters`` has them: the factors of all experts in a parameter are two tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from delora.formats.nearest import Approximation
from delora.hosts import Slot
from delora.layer import Placed
from delora.parts import joined_slices
from delora.updates import LowRank

__all__ = ["Stacked", "by_wrapper", "low_rank"]


@dataclass(frozen=True)
class Stacked:
    """The factors of all experts in one parameter: ``down [experts * r, in]``, ``up [out, r * experts]``.

    >>> Stacked("experts.down_proj", 2, nn.Linear(3, 8).weight, nn.Linear(8, 5).weight).rank
    2
    """

    parameter: str
    rank: int
    down: Tensor
    up: Tensor


def by_wrapper(slots: Mapping[str, Placed], form: Approximation) -> dict[str, Stacked]:
    """The factors of experts by the name that PEFT gives to the wrapper of their parameter.

    Of several parameters of one module, the wrapper of the last is outermost; a rank that is smaller than the largest of a
    parameter is filled up with zeros.

    Raises:
        ValueError: PEFT cannot adapt a parameter, or its change is not low-rank.

    >>> by_wrapper({}, Approximation())
    {}
    """
    modules: dict[str, dict[str, list[Placed]]] = {}
    for name, placed in slots.items():
        slot: Slot = placed.base
        if slot.layout.experts is not True:
            raise ValueError(
                f"{name} is a parameter that a {type(slot.owner).__name__} or its parent reads, which PEFT cannot adapt; "
                "delora.merge writes it into the weights"
            )
        modules.setdefault(name.removesuffix(f".{slot.name}"), {}).setdefault(slot.key, []).append(placed)
    stacked = {}
    for module, parameters in modules.items():
        owner = next(iter(parameters.values()))[0].base.owner
        for depth, key in enumerate(key for key in reversed(owner._parameters) if key in parameters):
            stacked[module + ".base_layer" * depth] = _one(f"{module}.{key}", owner, parameters[key], form)
    return stacked


def _one(parameter: str, owner: nn.Module, members: list[Placed], form: Approximation) -> Stacked:
    W = members[0].base.layout.apart(owner, getattr(owner, members[0].base.key))
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for index, factors in low_rank(parameter, members).items():
        factors = form.of(f"{parameter}.{index}", factors)
        pair = (factors.down.T, factors.up.T) if members[0].base.layout.transposed else (factors.up, factors.down)
        # PEFT takes B A for the stored matrix or, of a module that says so, for its transpose.
        found[index] = (pair[1].T, pair[0].T) if getattr(owner, "is_transposed", False) else pair
    rank = max(up.shape[1] for up, _ in found.values())
    first_up, first_down = next(iter(found.values()))
    up = first_up.new_zeros(len(first_up), rank, len(W))
    down = first_up.new_zeros(len(W), rank, first_down.shape[1])
    for i, (u, d) in found.items():
        up[:, : u.shape[1], i] = u
        down[i, : len(d)] = d
    return Stacked(parameter, rank, down.flatten(0, 1), up.flatten(1))


def low_rank(parameter: str, members: list[Placed]) -> dict[int, LowRank]:
    """The change of each expert in a parameter as [out, in] factors, those of its slices joined.

    Raises:
        ValueError: a change is not low-rank.

    >>> low_rank("experts.down_proj", [])
    {}
    """
    each: dict[int, list[tuple[Slot, LowRank]]] = {}
    for placed in members:
        factors = placed.low_rank()
        if factors is None:
            raise ValueError(f"{parameter}: {placed.method} is not a low-rank change; delora.merge writes it into the weights")
        each.setdefault(placed.base.index, []).append((placed.base, factors))
    return {index: cast(LowRank, joined_slices(parts)) for index, parts in each.items()}
