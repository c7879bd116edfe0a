"""The Trainer of a run, and the record of its steps."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from delora.diagnostics import Recorder
from delora.formats.files import write_atomically
from delora.integrations.trainer import AdapterTrainer
from delora.training import parallel

__all__ = ["Diverged", "Metrics", "RunTrainer", "metrics"]


class Diverged(RuntimeError):
    """The loss is no longer finite. ``step`` is the optimizer step after which that was detected.

    >>> str(Diverged(120))
    'the loss is not finite at step 120: lower the learning rate'
    """

    def __init__(self, step: int) -> None:
        super().__init__(f"the loss is not finite at step {step}: lower the learning rate")
        self.step = step


class RunTrainer(AdapterTrainer):
    """The Trainer of a run: it prints nothing, and knows where it diverged, and its best epoch."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.diverged: int | None = None
        self.remove_callback(PrinterCallback)  # the Trainer's own printing of every log

    def get_train_dataloader(self) -> Any:
        loader: Any = super().get_train_dataloader()
        if parallel.processes() > 1:  # no attribute of a DataLoader can be set anew
            loader.batch_sampler.__class__ = parallel.Slices
        return loader

    def best_epoch(self) -> int:
        """The epoch, counted from 1, with the best validation score."""
        scores = {row["step"]: row["epoch"] for row in self.state.log_history if "eval_loss" in row}
        return round(scores[cast(int, self.state.best_global_step)])


class Metrics(TrainerCallback):
    """Adds the measurements of `delora.diagnostics.Recorder` to each logged step, and writes all steps to ``metrics.jsonl``.

    The file is made from the Trainer's history, which is in each checkpoint: after a resumption no step is in it twice.
    ``seconds`` is the time of training and validation since the first start, without interruptions.

    >>> Metrics(Path("runs/mine/metrics.jsonl")).file.name
    'metrics.jsonl'
    """

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.recorder = Recorder(kwargs["model"])
        before = max((row.get("seconds", 0.0) for row in state.log_history), default=0.0)
        self.started = time.monotonic() - before

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        row = state.log_history[-1]
        row["seconds"] = round(time.monotonic() - self.started, 3)
        try:
            if not all(math.isfinite(row.get(key, 0.0)) for key in ("loss", "eval_loss")):
                raise Diverged(state.global_step)
            if "loss" in row:
                row |= self.recorder.record()
        except (Diverged, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
            # Weights that are not finite have no singular values.
            self.write(state)
            raise Diverged(state.global_step) from error

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.write(state)

    on_train_end = on_save  # after a resumption from the last checkpoint nothing else is saved

    def write(self, state: TrainerState) -> None:
        """Write the file anew from the Trainer's history."""
        if not state.is_world_process_zero:
            return
        rows = [metrics(row) for row in state.log_history]
        write_atomically(self.file, "".join(json.dumps(row) + "\n" for row in rows if row).encode())


KEPT = {key: key for key in ("step", "epoch", "seconds", "loss", "distance", "spectral", "bound_used", "reachable", "lam")}
KEPT |= {key: key for key in ("turn_A", "turn_B", "learning_rate")}
COST = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "eval_model_preparation_time")


def metrics(row: dict[str, Any]) -> dict[str, Any] | None:
    """A line of ``metrics.jsonl`` from a row of the Trainer's history, for a step or a validation; finite numbers only.

    >>> metrics({"step": 10, "loss": 0.5, "grad_norm": 1.0})
    {'step': 10, 'loss': 0.5}
    """
    if "loss" not in row and "eval_loss" not in row:
        return None  # the Trainer's last row, whose totals count from the last resumption
    scores = {key: key.replace("eval_", "validation_", 1) for key in row if key.startswith("eval_") and key not in COST}
    return {name: row[key] for key, name in (KEPT | scores).items() if key in row and math.isfinite(row[key])}
