"""What the adapter does to the model, in the loggers that a Trainer has; and a stop at a distance from the base."""

from __future__ import annotations

import sys
import warnings
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from delora.diagnostics import Recorder
from delora.methods.base import is_number

__all__ = ["Monitor", "first"]


class Monitor(TrainerCallback):
    """Adds the measurements of `delora.diagnostics.Recorder` to each logged training step, for every logger of the Trainer.

    ``delora/distance`` is the mean of |W' - W| / |W| over the layers; beside it stand ``bound_used``, ``lam``, ``spectral``,
    ``reach``, and the angles ``turn_A``, ``turn_B`` (degrees since the last logged step), as far as the method has them.

    Args:
        budget: stop training at the first measured step at which the distance is at least this: how far from the base, and so
            how much forgetting, is allowed.
        every: measure each so many steps for the budget (at logged steps, if None).

    Raises:
        ValueError: ``budget`` or ``every`` is no positive number.

    >>> Monitor(budget=0.1).budget
    0.1
    """

    def __init__(self, budget: float | None = None, every: int | None = None) -> None:
        if budget is not None and (not is_number(budget) or budget <= 0):
            raise ValueError(f"budget = {budget!r}: must be a positive number")
        if every is not None and (type(every) is not int or every < 1):
            raise ValueError(f"every = {every!r}: must be a whole number, at least 1")
        self.budget, self.every = budget, every

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._to_the_front()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._to_the_front()
        self.recorder = Recorder(kwargs["model"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.budget is not None and self.every is not None and state.global_step % self.every == 0:
            self._spend(self.recorder.distance(), args, state, control)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs.get("logs")
        if logs is None or "loss" not in logs:  # a validation, or the totals at the end
            return
        measured = self.recorder.record()
        row = {f"delora/{key}": value for key, value in measured.items()}
        logs |= row
        state.log_history[-1] |= row
        if self.budget is not None:
            self._spend(measured.get("distance"), args, state, control)

    def _spend(self, distance: float | None, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        if self.budget is not None and distance is not None and distance >= self.budget and not control.should_training_stop:
            warnings.warn(
                f"stopped at step {state.global_step}: the distance from the base, {distance:.4g}, reached the budget "
                f"{self.budget}",
                stacklevel=2,
            )
            control.should_training_stop = True
            control.should_save = args.save_strategy != "no"

    def _to_the_front(self) -> None:
        """Loggers are callbacks, too, and get what those before them in the Trainer's list put into the logs."""
        frame: Any = sys._getframe(2)
        while frame is not None:  # a callback is not given the list; who calls it has it
            if isinstance(frame.f_locals.get("self"), CallbackHandler):
                return first(frame.f_locals["self"])
            frame = frame.f_back
        warnings.warn(
            "this Trainer calls its callbacks in a way of its own: loggers that stand before Monitor do not get its numbers",
            stacklevel=3,
        )


def first(handler: CallbackHandler) -> None:
    """Put the Monitors of a Trainer before its other callbacks.

    >>> from transformers import DefaultFlowCallback
    >>> handler = CallbackHandler([DefaultFlowCallback, Monitor()], None, None, None, None)
    >>> first(handler)
    >>> [type(callback).__name__ for callback in handler.callbacks]
    ['Monitor', 'DefaultFlowCallback']
    """
    handler.callbacks.sort(key=lambda callback: not isinstance(callback, Monitor))  # stable; in place
