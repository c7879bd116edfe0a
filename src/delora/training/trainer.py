"""transformers' Trainer for adapters: parameter groups, checkpoints without the base model, exact resumption."""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from delora.diagnostics import Recorder
from delora.formats.files import AdapterError, get, read_json, shown, write_atomically
from delora.formats.native import JSON, load, save
from delora.models import adapters
from delora.optimizing import param_groups

__all__ = ["AdapterTrainer", "Diverged", "Metrics", "damage", "last_checkpoint", "metrics"]

MANIFEST = "manifest.json"
NUMBERED = re.compile(r"checkpoint-[0-9]{1,18}")
# Not among them: how many steps are trained in all, which a resume may change.
SETTINGS = (
    "learning_rate",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "lr_scheduler_type",
    "warmup_steps",
    "max_grad_norm",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "seed",
    "data_seed",
    "bf16",
    "fp16",
)


class Diverged(RuntimeError):
    """The loss is no longer finite. ``step`` is the optimizer step after which that was detected.

    >>> str(Diverged(120))
    'the loss is not finite at step 120: lower the learning rate'
    """

    def __init__(self, step: int) -> None:
        super().__init__(f"the loss is not finite at step {step}: lower the learning rate")
        self.step = step


class AdapterTrainer(Trainer):
    """A Trainer for a model with an adapter.

    The optimizer is AdamW over `delora.param_groups`: ``args.learning_rate`` for the adapter, ``lam_lr`` for the strengths,
    ``head_lr`` for the modules trained whole. A checkpoint holds the adapter and the optimizer, never the base model.
    """

    def __init__(
        self,
        *args: Any,
        lam_lr: float | None = None,
        head_lr: float | None = None,
        lam_weight_decay: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.lam_lr, self.head_lr, self.lam_weight_decay = lam_lr, head_lr, lam_weight_decay
        self.diverged: int | None = None
        self.remove_callback(PrinterCallback)  # the Trainer's own printing of every log

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            args = self.args
            groups = param_groups(
                model or self._injected,
                args.learning_rate,
                lam_lr=self.lam_lr,
                head_lr=self.head_lr,
                weight_decay=args.weight_decay,
                lam_weight_decay=self.lam_weight_decay,
            )
            self.optimizer = torch.optim.AdamW(groups, betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_epsilon)
        return self.optimizer

    @property
    def _injected(self) -> nn.Module:
        return cast(nn.Module, self.model)

    @property
    def _folder(self) -> Path:
        return Path(cast(str, self.args.output_dir))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, from a checkpoint if one is given; ``True``: from the newest one that is whole.

        Raises:
            AdapterError: the checkpoint is not whole, or was written with other settings.
        """
        if resume_from_checkpoint is True:

            def tell(line: str) -> None:
                warnings.warn(line, stacklevel=4)

            resume_from_checkpoint = last_checkpoint(self._folder, tell, bool(self.args.load_best_model_at_end))
            if resume_from_checkpoint is None:
                raise AdapterError(f"{self._folder} holds no whole checkpoint: train without resume_from_checkpoint")
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        checkpoint = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            (checkpoint / MANIFEST).unlink(missing_ok=True)
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()  # each process has written its own random state
        if self.args.should_save:
            files = {path.relative_to(checkpoint).as_posix(): _measured(path) for path in _files(checkpoint)}
            text = json.dumps({"settings": self.settings(), "files": files}, indent=1)
            write_atomically(checkpoint / MANIFEST, text.encode())

    def settings(self) -> dict[str, Any]:
        """What the numbers of a step depend on, beside the model and the data: a resume with other values is refused."""
        placed = [a for a in adapters(self._injected).values() if not a.whole]
        rates = {key: getattr(self, key) for key in ("lam_lr", "head_lr", "lam_weight_decay")}
        methods = {"method": sorted({str(a.method) for a in placed}), "dropout": sorted({a.dropout for a in placed})}
        values = methods | {key: getattr(self.args, key) for key in SETTINGS} | rates
        return cast(dict[str, Any], json.loads(json.dumps(values, default=str)))  # as the manifest will have them

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.args.should_save:
            save(self._injected, output_dir or self._folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        checkpoint = Path(resume_from_checkpoint)
        if (broken := damage(checkpoint)) is not None:
            raise AdapterError(f"{checkpoint} is not whole: {broken}")
        if not (self.is_deepspeed_enabled or self.is_fsdp_enabled):  # these name their files otherwise
            for name in ("optimizer.pt", "scheduler.pt", "rng_state*.pth"):
                if not any(checkpoint.glob(name)):
                    raise AdapterError(
                        f"{checkpoint} holds no {name} (save_only_model?): training cannot go on from it; delora.load its "
                        "adapter and train anew"
                    )
        before, now = read_json(checkpoint / MANIFEST)["settings"], self.settings()
        others = [key for key in now if before.get(key) != now[key]]
        if others:
            changes = ", ".join(f"{key} = {shown(before.get(key))} there, {shown(now[key])} now" for key in others)
            raise AdapterError(f"{checkpoint} was written with other settings: {changes}; train with those, or anew without it")
        load(model or self._injected, checkpoint)

    def _load_best_model(self) -> None:
        # Not the path that the state remembers: the run's folder may have been moved since.
        load(self._injected, self._folder / f"checkpoint-{self.state.best_global_step}")

    def finished(self, checkpoint: str) -> None:
        """Load a checkpoint of a finished training. The Trainer itself would do one more step."""
        self._load_from_checkpoint(checkpoint)
        self.state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))

    def best_epoch(self) -> int:
        """The epoch, counted from 1, with the best validation score."""
        scores = {row["step"]: row["epoch"] for row in self.state.log_history if "eval_loss" in row}
        return round(scores[cast(int, self.state.best_global_step)])


def last_checkpoint(folder: Path, tell: Callable[[str], None] = lambda line: None, best: bool = False) -> str | None:
    """The newest checkpoint of which every file is as it was written; what is passed over is told, with the reason.

    With ``best``, that checkpoint must be whole, too, which was the best one when it was written: at the end it is loaded.
    """
    steps = {int(c.name.removeprefix("checkpoint-")): c for c in folder.glob("checkpoint-*") if NUMBERED.fullmatch(c.name)}
    passed_over: list[str] = []
    for step in sorted(steps, reverse=True):
        broken = damage(steps[step])
        if broken is None and best and (winner := _best(steps[step])) not in (None, step):
            missing = "it is missing" if winner not in steps else damage(steps[winner])
            broken = None if missing is None else f"its best checkpoint was checkpoint-{winner}, which is not whole: {missing}"
        if broken is None:
            for line in passed_over:
                tell(f"{line}; going on from {steps[step].name}")
            return str(steps[step])
        passed_over.append(f"{steps[step]} is not whole: {broken}")
    for line in passed_over:
        tell(f"{line}; no older one is whole, starting anew")
    return None


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, against its manifest; None if every file is as it was written."""
    if not (checkpoint / MANIFEST).is_file():
        return f"it has no {MANIFEST}, which is written last: its process was stopped, or an older delora wrote it"
    try:
        manifest = read_json(checkpoint / MANIFEST)
        files = get(manifest, "files", dict, MANIFEST)
        get(manifest, "settings", dict, MANIFEST)
        for needed in (JSON, "trainer_state.json"):
            get(files, needed, dict, MANIFEST)
        for name, entry in files.items():
            path = checkpoint / name
            if not path.resolve().is_relative_to(checkpoint.resolve()) or not path.is_file():
                return f"{shown(name)} is missing"
            if _measured(path) != entry:
                return f"{shown(name)} is not what {MANIFEST} describes"
    except (AdapterError, OSError, ValueError) as error:
        return str(error)
    return None


def _best(checkpoint: Path) -> int | None:
    best = read_json(checkpoint / "trainer_state.json").get("best_global_step")
    return best if isinstance(best, int) else None


def _files(checkpoint: Path) -> list[Path]:
    temporary = (MANIFEST, ".lock")
    return sorted(p for p in checkpoint.rglob("*") if p.is_file() and p.name not in temporary and not p.name.endswith(".tmp"))


def _measured(file: Path) -> dict[str, Any]:
    with file.open("rb") as data:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(data, "sha256").hexdigest()}


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
