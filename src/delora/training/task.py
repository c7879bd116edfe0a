"""What a task is: a module with everything that is particular to one kind of experiment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from torch import nn

import delora
from delora.outside import OutsideError
from delora.training.config import ConfigError, Experiment
from delora.training.runs import Result, RunContext

__all__ = ["Agreement", "Kind", "Task", "Validation"]

Agreement = tuple[dict[str, int], int]
Kind = Literal["classes", "text", "picture"]
SELECTION = "The best epoch, and the best setting of a row, were chosen on the validation part alone."


@dataclass(frozen=True)
class Validation:
    """What a task measures of a model on its validation data: ``score``, the higher the better, called ``metric``.

    ``forgotten``, called ``forgets``, is what the model lost of what it could do before, the lower the better; None where the
    task has no such measure.

    >>> Validation("accuracy", lambda model: 0.5).score(nn.Linear(2, 2))
    0.5
    """

    metric: str
    score: Callable[[Any], float]
    forgets: str | None = None
    forgotten: Callable[[Any], float] | None = None


@dataclass(frozen=True)
class Task:
    """The functions and constants of a task's module, under their names there. The module must have the first four.

    ``Settings`` is a subclass of `Experiment` with a table for what is particular to the task. Functions:

    * ``check(experiment) -> data``: raises an error, in words, for anything that would make a run fail; returns its data.
    * ``base(experiment) -> model``: the frozen model that contains the adapter's targets.
    * ``run(experiment, context, data) -> Result``: one run, from the model to its scores; an interrupted run is resumed.
    * ``deliver(experiment, run, data, out) -> (agreement, n)``: writes the run's adapter, and what is made of it, into ``out``;
      returns for each how many of the ``n`` test predictions equal the run's. Default: writes the adapter alone.
    * ``evaluate(experiment, folder) -> (scores, n)``: the scores of the adapter or model in a folder, on ``n`` examples.
    * ``validation(experiment, data) -> Validation``: what a strength is chosen by after training (``delora tune-strength``).
    * ``respond(experiment, adapter) -> (kind, model, answer)``: what ``delora app`` shows; ``answer(prompt)`` is {class:
      probability}, a text or a picture of the frozen model, as ``kind`` says ("classes", "text", "picture"). The adapter in the
      folder ``adapter`` is loaded into the model afterwards; what lies beside it, such as a chat template, is the task's.
    * ``columns(experiment) -> names``: scores that a table shows beside the reported one.
    * ``snapshots(run) -> {step: picture}``: pictures that a run made while it trained.

    Constants: ``SELECTION``, the sentence of a report on how a setting was chosen; ``NOT_SHARES``, the beginnings of the names
    of scores that are not shares and not shown in percent; ``PARALLEL``, whether several processes can run it together;
    ``DRAWS``, whether its adapters are of a text-to-image pipeline's U-Net, for ``delora generate``, ``merge`` and ``export``.

    >>> Task.of(ModuleType("mine"))
    Traceback (most recent call last):
        ...
    delora.outside.OutsideError: mine is no task: it has no Settings (a subclass of ...), no check, no base, no run
    """

    name: str
    Settings: type[Experiment]
    check: Callable[[Any], Any]
    base: Callable[[Any], nn.Module]
    run: Callable[[Any, RunContext, Any], Result]
    deliver: Callable[[Any, Path, Any, Path], Agreement]
    evaluate: Callable[[Any, Path], tuple[dict[str, float], int]]
    validation: Callable[[Any, Any], Validation]
    respond: Callable[[Any, Path], tuple[Kind, Any, Callable[[str], Any]]]
    columns: Callable[[Any], Sequence[str]]
    snapshots: Callable[[Path], dict[int, Path]]
    SELECTION: str = SELECTION
    NOT_SHARES: tuple[str, ...] = ()
    PARALLEL: bool = False
    DRAWS: bool = False

    @classmethod
    def of(cls, module: ModuleType) -> Task:
        """The task in a module.

        Raises:
            OutsideError: the module is not a task; the message says what it lacks.
        """
        missing = [name for name in ("check", "base", "run") if not callable(getattr(module, name, None))]
        settings: Any = getattr(module, "Settings", None)
        if not (isinstance(settings, type) and issubclass(settings, Experiment)):
            missing = ["Settings (a subclass of delora.training.config.Experiment)", *missing]
        if missing:
            raise OutsideError(f"{module.__name__} is no task: it has no {', no '.join(missing)}")
        base = module.base

        def deliver(experiment: Experiment, run: Path, data: Any, out: Path) -> Agreement:
            model = delora.load(base(experiment), run / "adapter", methods=experiment.adapter.classes())
            delora.save(model, out / "adapter")
            return {}, 0

        def evaluate(experiment: Experiment, folder: Path) -> tuple[dict[str, float], int]:
            raise ConfigError(f"the task {experiment.task} offers no evaluation: the scores are in its runs' folders")

        def validation(experiment: Experiment, data: Any) -> Validation:
            raise ConfigError(
                f"the task {experiment.task} offers no score on validation data: delora.choose_strength takes one of your own"
            )

        def respond(experiment: Experiment, adapter: Path) -> tuple[Kind, Any, Callable[[str], Any]]:
            raise ConfigError(
                f"the task {experiment.task} has nothing to answer: delora app is for classes, texts and pictures"
            )

        return cls(
            name=module.__name__,
            Settings=settings,
            check=module.check,
            base=base,
            run=module.run,
            deliver=getattr(module, "deliver", deliver),
            evaluate=getattr(module, "evaluate", evaluate),
            validation=getattr(module, "validation", validation),
            respond=getattr(module, "respond", respond),
            columns=getattr(module, "columns", lambda experiment: ()),
            snapshots=getattr(module, "snapshots", lambda run: {}),
            SELECTION=getattr(module, "SELECTION", SELECTION),
            NOT_SHARES=getattr(module, "NOT_SHARES", ()),
            PARALLEL=getattr(module, "PARALLEL", False),
            DRAWS=getattr(module, "DRAWS", False),
        )
