"""The Trainer of a run, and the record of its steps."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor, nn
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from delora.diagnostics import Recorder
from delora.formats.files import write_atomically
from delora.integrations.trainer import AdapterTrainer
from delora.training import parallel
from delora.training.runs import Interrupted

__all__ = ["Diverged", "Metrics", "RunTrainer", "SavedAfterValidation", "Stopping", "metrics"]


class Diverged(RuntimeError):
    """The loss is no longer finite. ``step`` is the optimizer step after which that was detected.

    >>> str(Diverged(120))
    'the loss is not finite at step 120: lower the learning rate'
    """

    def __init__(self, step: int) -> None:
        super().__init__(f"the loss is not finite at step {step}: lower the learning rate")
        self.step = step


class RunTrainer(AdapterTrainer):
    """The Trainer of a run: it prints nothing, and knows where it diverged, and its best epoch.

    Of several processes each has a part of every batch, and the losses are those of the whole batch. ``tokens``: the loss is
    the mean over tokens, of which the parts have different numbers; else over examples.
    """

    def __init__(self, *args: Any, tokens: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.diverged: int | None = None
        self.tokens = tokens
        self.evaluated: list[tuple[float, int]] = []  # the losses of batches, and their numbers of examples
        self.remove_callback(PrinterCallback)  # the Trainer's own printing of every log
        if self.is_fsdp_enabled and self.accelerator.mixed_precision != "no":
            # By autocast, as in one process: Accelerate's policy would round what trains, and the loss.
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = None
            self._injected.forward = convert_outputs_to_fp32(self.accelerator.autocast()(self._injected.forward))

    def get_train_dataloader(self) -> Any:
        loader: Any = super().get_train_dataloader()
        if parallel.processes() > 1:  # no attribute of a DataLoader can be set anew
            loader.batch_sampler.__class__ = parallel.Slices
        return loader

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """The mean over the examples of this process's part of a batch; or of tokens, its share of the mean over the batch,
        times the number of processes, over which the mean is taken."""
        if not self.tokens or parallel.processes() == 1:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        count = inputs["labels"][..., 1:].ne(-100).sum()
        total = self.accelerator.reduce(count, "sum") if num_items_in_batch is None else num_items_in_batch
        if not count:  # a mean over no tokens is not a number, whatever it is multiplied by
            inputs = {**inputs, "labels": torch.zeros_like(inputs["labels"])}
        loss, outputs = super().compute_loss(model, inputs, True)  # the model's own mean; not all do as num_items_in_batch says
        loss = loss * (count * parallel.processes() / total)
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss, logits, labels = super().prediction_step(model, inputs, *args, **kwargs)
        n = parallel.processes()
        if n > 1 and loss is not None:
            rows = len(next(iter(inputs.values())))
            filled = self.accelerator.gradient_state
            last = filled.end_of_dataloader and filled.remainder > 0
            count = filled.remainder if last else n * rows
            if count < n * rows:  # Accelerate fills up the last batch with other examples
                loss = self._loss_of_first(model, inputs, min(max(count - rows * self.args.process_index, 0), rows), count)
            loss = self.accelerator.reduce(loss, "mean")
            self.evaluated.append((loss.item(), count))
        return loss, logits, labels

    @torch.no_grad()
    def _loss_of_first(self, model: nn.Module, inputs: Any, mine: int, count: int) -> Tensor:
        """The loss of the first ``mine`` examples of this process's part: their mean over processes is that of ``count``."""
        part = self._prepare_inputs({key: t[: max(mine, 1)] for key, t in inputs.items()})
        if self.tokens and not mine:
            part["labels"] = torch.full_like(part["labels"], -100)
        with self.compute_loss_context_manager():
            loss = self.compute_loss(model, part).detach()
        return loss if self.tokens else loss * (mine * parallel.processes() / count)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self.evaluated = []
        output: Any = super().evaluation_loop(*args, **kwargs)
        if self.evaluated:  # the Trainer weighs the last batch by the number of its examples, and all others by more
            examples = sum(count for _, count in self.evaluated)
            loss = sum(loss * count for loss, count in self.evaluated) / examples
            output = output._replace(metrics=output.metrics | {"eval_loss": loss})
        return output

    def best_epoch(self) -> int:
        """The epoch, counted from 1, with the best validation score."""
        scores = {row["step"]: row["epoch"] for row in self.state.log_history if "eval_loss" in row}
        return round(scores[cast(int, self.state.best_global_step)])


class SavedAfterValidation(TrainerCallback):
    """A checkpoint at the end of an epoch is written after the epoch's validation, not before: who goes on from it would lack
    that score.

    >>> from types import SimpleNamespace
    >>> arguments, state = SimpleNamespace(gradient_accumulation_steps=2), TrainerState(global_step=3, max_steps=6)
    >>> control, callback = TrainerControl(should_save=True), SavedAfterValidation()
    >>> callback.on_step_end(arguments, state, control, train_dataloader=range(5))
    >>> control.should_save
    False
    >>> callback.on_epoch_end(arguments, state, control)
    >>> control.should_save
    True
    """

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        steps = -(-len(kwargs["train_dataloader"]) // args.gradient_accumulation_steps)
        last = state.global_step % steps == 0 or state.global_step >= state.max_steps
        self.late = control.should_save and last
        control.should_save = control.should_save and not last

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_save = control.should_save or self.late


class Metrics(TrainerCallback):
    """Adds the measurements of `delora.diagnostics.Recorder` to each logged step, and writes it to ``metrics.jsonl`` at once.

    The Trainer's history, which is in each checkpoint, has all lines: a resumption begins the file with it, so that no step is
    in it twice. ``seconds`` is the time of training and validation since the first start, without interruptions.

    ``layers``: those whose distance is recorded beside the mean.

    >>> Metrics(Path("runs/mine/metrics.jsonl")).file.name
    'metrics.jsonl'
    """

    def __init__(self, file: Path, layers: Sequence[str] = ()) -> None:
        self.file, self.layers = file, layers

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.recorder = Recorder(kwargs["model"], self.layers)
        before = max((row.get("seconds", 0.0) for row in state.log_history), default=0.0)
        self.started = time.monotonic() - before
        if state.is_world_process_zero:
            write_atomically(self.file, "".join(map(_line, state.log_history)).encode())

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        row = state.log_history[-1]
        row["seconds"] = round(time.monotonic() - self.started, 3)
        try:
            if not all(math.isfinite(row.get(key, 0.0)) for key in ("loss", "eval_loss")):
                raise Diverged(state.global_step)
            if "loss" in row:
                measured = self.recorder.record()
                row |= measured
                (kwargs.get("logs") or {}).update(measured)  # what the loggers after this callback get
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            # Weights that are not finite have no singular values.
            raise Diverged(state.global_step) from error
        finally:
            if state.is_world_process_zero:
                with self.file.open("a") as file:
                    file.write(_line(row))


def _line(row: dict[str, Any]) -> str:
    kept = metrics(row)
    return json.dumps(kept) + "\n" if kept else ""


class Stopping(TrainerCallback):
    """Ctrl-C while a run trains: the step is finished, a checkpoint is written, and then an `Interrupted` ends the run.

    A second Ctrl-C ends it at once. Of several processes, which torchrun asks when it is asked, all stop after the same step.

    >>> Stopping(print).asked
    False
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say, self.asked = say, False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """The context in which Ctrl-C is heard. Where somebody else hears it, that is left alone."""
        there = threading.current_thread() is threading.main_thread()
        if not there or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            yield
            return
        signal.signal(signal.SIGINT, self._ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _ask(self, *_: Any) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self.say("Stopping with a checkpoint after this step; Ctrl-C again ends it at once")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.asked = parallel.anyone(self.asked)
        control.should_save = control.should_save or self.asked

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.asked:
            raise Interrupted(f"stopped after step {state.global_step} of {state.max_steps}, with a checkpoint")


KEPT = {key: key for key in ("step", "epoch", "seconds", "loss", "distance", "spectral", "bound_used", "reach", "lam")}
KEPT |= {key: key for key in ("turn_A", "turn_B", "learning_rate")}
LAYER = "|dW| "  # begins the name of one layer's distance
COST = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "eval_model_preparation_time")


def metrics(row: dict[str, Any]) -> dict[str, Any] | None:
    """A line of ``metrics.jsonl`` from a row of the Trainer's history, for a step or a validation; finite numbers only.

    >>> metrics({"step": 10, "loss": 0.5, "grad_norm": 1.0})
    {'step': 10, 'loss': 0.5}
    """
    if "loss" not in row and "eval_loss" not in row:
        return None  # the Trainer's last row, whose totals count from the last resumption
    scores = {key: key.replace("eval_", "validation_", 1) for key in row if key.startswith("eval_") and key not in COST}
    layers = {key: key for key in row if key.startswith(LAYER)}
    return {name: row[key] for key, name in (KEPT | layers | scores).items() if key in row and math.isfinite(row[key])}
