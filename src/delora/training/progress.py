"""The progress bar of a run."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

__all__ = ["Bar"]


class Bar(TrainerCallback):
    """A progress bar with the loss and the mean |dW|/|W|; train inside ``with bar.progress:``.

    >>> Bar("mine", Console(quiet=True)).title
    'mine'
    """

    def __init__(self, title: str, console: Console) -> None:
        self.progress = Progress(
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}", markup=False),
            TimeRemainingColumn(),
            console=console,
        )
        self.title = escape(title)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.task = self.progress.add_task(self.title, total=state.max_steps, completed=state.global_step, figures="")

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        row = state.log_history[-1]
        if "loss" in row:
            distance = f"  |dW|/|W| {row['distance']:.3f}" if "distance" in row else ""
            self.progress.update(self.task, completed=state.global_step, figures=f"loss {row['loss']:.3f}{distance}")
