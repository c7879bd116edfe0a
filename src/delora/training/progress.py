"""What a run says while it trains: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from delora.training.trainer import metrics

__all__ = ["Bar", "Lines", "progress", "spoken"]

OFTEN = 60.0  # seconds without a line, after which there is one
SHARES = 10  # of a run, each with a line
MEASURED = 3  # steps after which the time left is known; the first one, which is slower, is not counted


def progress(title: str, console: Console) -> Bar | Lines:
    """What suits the console; train inside ``with shown.live():``.

    >>> progress("mine", Console(quiet=True, force_terminal=False)).title
    'mine'
    """
    return Bar(title, console) if console.is_terminal or console.is_jupyter else Lines(title, console)


def spoken(seconds: float) -> str:
    """A duration in words.

    >>> spoken(42), spoken(260), spoken(9000)
    ('42 s', '4 min', '2.5 h')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _figures(row: dict[str, Any]) -> str:
    """The loss and the mean |dW|/|W| of a logged step."""
    distance = f"  |dW|/|W| {row['distance']:.3f}" if "distance" in row else ""
    return f"loss {row['loss']:.3f}{distance}"


def _validation(row: dict[str, Any]) -> str:
    scores = {key.removeprefix("validation_"): value for key, value in (metrics(row) or {}).items()}
    shown = ", ".join(f"{key} {scores[key]:.3f}" for key in scores if f"eval_{key}" in row)
    return f"validation after step {row['step']}: {shown}"


class Bar(TrainerCallback):
    """A progress bar with the loss, the mean |dW|/|W| and the time left, and above it a line for each validation.

    >>> Bar("mine", Console(quiet=True)).title
    'mine'
    """

    def __init__(self, title: str, console: Console) -> None:
        self.title, self.console = title, console
        self.progress = Progress(
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}", markup=False),
            TimeRemainingColumn(),
            console=console,
        )

    def live(self) -> AbstractContextManager[Any]:
        """The context in which the bar is shown."""
        return self.progress

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        done, total = state.global_step, state.max_steps
        self.task = self.progress.add_task(escape(self.title), total=total, completed=done, figures="")

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        row = state.log_history[-1]
        if "loss" in row:
            self.progress.update(self.task, completed=state.global_step, figures=_figures(row))
        elif "eval_loss" in row:
            self.console.print(f"{self.title}: {_validation(row)}", markup=False, highlight=False)


class Lines(TrainerCallback):
    """Lines for a log file: after three steps the time left, then the loss at each tenth of the run and at least once a minute,
    and every validation.

    >>> Lines("mine", Console(quiet=True)).title
    'mine'
    """

    def __init__(self, title: str, console: Console) -> None:
        self.title, self.console = title, console

    def live(self) -> AbstractContextManager[Any]:
        """A context, as `Bar` has one; nothing is to be kept alive."""
        return nullcontext()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.first = self.said = state.global_step  # steps
        self.told = time.monotonic()  # the last line's time
        self._say(f"step {state.global_step} of {state.max_steps}: {'going on' if state.global_step else 'begins'}")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        done = state.global_step - self.first
        if done == 1:
            self.second = time.monotonic()  # when it began
        elif done == MEASURED:
            self._say(f"step {state.global_step} of {state.max_steps}: {self._left(state)}")

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        row, step = state.log_history[-1], state.global_step
        if "eval_loss" in row:
            self._say(_validation(row))
        elif "loss" in row:
            share = step * SHARES // state.max_steps > self.said * SHARES // state.max_steps
            if share or time.monotonic() - self.told >= OFTEN:
                self.said = step
                left = f"  {self._left(state)}" if step - self.first >= MEASURED else ""
                self._say(f"step {step} of {state.max_steps}  {_figures(row)}{left}")

    def _left(self, state: TrainerState) -> str:
        """The time left, by the mean of this process's steps, with the validations so far."""
        steps = state.global_step - self.first - 1
        return f"{spoken((time.monotonic() - self.second) / steps * (state.max_steps - state.global_step))} left"

    def _say(self, text: str) -> None:
        self.told = time.monotonic()
        self.console.print(f"{self.title}: {text}", markup=False, highlight=False, soft_wrap=True)
