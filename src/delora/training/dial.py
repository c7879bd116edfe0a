"""The strength of a finished experiment's adapter, chosen on the task's validation data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import delora
from delora.choosing import Choice
from delora.diagnostics import Recorder
from delora.errors import UserError
from delora.models import adapters
from delora.training.config import Experiment
from delora.training.experiments import check, delivered
from delora.training.runs import ADAPTER, RunError, exclusive
from delora.training.task import Task

__all__ = ["DISTANCE", "Tuned", "tune"]

DISTANCE = "|dW|/|W|"
FORMS = ("merged", "peft", "diffusers")  # what a delivery makes of the adapter, at the strength that it has then


@dataclass(frozen=True)
class Tuned:
    """The adapter, the choice, the names of what was measured, the strength before, and the folders that still have that one.

    >>> Tuned(Path("runs/mine/adapter"), Choice(0.5, []), "accuracy", DISTANCE, 1.0, []).choice.strength
    0.5
    """

    adapter: Path
    choice: Choice
    metric: str
    forgets: str
    before: float
    stale: list[Path]


def tune(
    task: Task, experiment: Experiment, out: Path, strengths: Sequence[float], budget: float | None, write: bool = True
) -> Tuned:
    """Choose the strength of the adapter that an experiment delivered into ``out``, and, if ``write``, save it there.

    The score is what chose the run's epoch or setting. What is forgotten is the task's own measure or, if it has none, the
    mean distance of the adapted layers from the base. The runs' own adapters stay as they were trained.

    Raises:
        UserError: the experiment is not finished; its task has no score on validation data; or no strength can be chosen.
            Nothing is written then.
    """
    with exclusive(out):
        each = delivered(experiment, out)
        measured = task.validation(each, check(task, each))
        model = delora.load(task.base(each), out / ADAPTER, methods=each.adapter.classes())
        model.to(torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")
        before = {a.strength for a in adapters(model).values() if not a.whole}
        try:
            choice = delora.choose_strength(
                model, measured.score, strengths=strengths, forgotten=measured.forgotten or distance, budget=budget
            )
        except UserError:
            raise
        except ValueError as error:
            raise RunError(f"{out / ADAPTER}: {error}") from error
        changed = choice.strength not in before
        if write and changed:
            delora.save(model, out / ADAPTER)
        stale = [out / form for form in FORMS if changed and (out / form).is_dir()]
        return Tuned(out / ADAPTER, choice, measured.metric, measured.forgets or DISTANCE, before.pop(), stale)


def distance(model: nn.Module) -> float:
    """The mean |dW|/|W| of the adapted layers.

    >>> model = delora.inject(nn.Sequential(nn.Linear(4, 4)), delora.LoRA(r=2), ["0"])
    >>> distance(model)
    0.0
    """
    mean = Recorder(model).distance()
    if mean is None:
        raise ValueError("the adapter's method has no distance from the base, and the task measures nothing else")
    return mean
