"""What one sees while it trains."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class Bar(TrainerCallback):
    """A line with the loss and the mean |dW|/|W|; train inside ``with bar.progress:``."""

    def __init__(self, title: str, console: Console) -> None:
        self.progress = Progress(
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[said]}", markup=False),
            TimeRemainingColumn(),
            console=console,
        )
        self.title = escape(title)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.task = self.progress.add_task(self.title, total=state.max_steps, completed=state.global_step, said="")

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        row = state.log_history[-1]
        if "loss" in row:
            moved = f"  |dW|/|W| {row['distance']:.3f}" if "distance" in row else ""
            self.progress.update(self.task, completed=state.global_step, said=f"loss {row['loss']:.3f}{moved}")
