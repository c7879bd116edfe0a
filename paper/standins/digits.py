"""A small vision transformer, pretrained on handwritten digits and finetuned on turned and inverted ones.

A stand-in for the paper's experiments on robustness and for its ladder (Figures 2, 3, 5, 6, Table 1). It can show their
phenomena on two cores; its scores are not comparable with theirs. The data are scikit-learn's ``load_digits`` (Alpaydin &
Kaynak 1998, 1,797 pictures of 8 x 8 pixels).
"""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

import delora
from delora.diagnostics import Recorder, report
from delora.models import adapters
from delora.training.trainer import Diverged, RunTrainer

TARGETS = ["to_q", "to_k", "to_v", "to_out"]
MEASURED = "layers.2.to_out"  # the layer whose distance is drawn
NOISE, RESAMPLED = 0.3, 0.3  # of the noisy objective: standard deviation added to pixels, share of random labels

# ---------------------------------------------------------------- model and data


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.to_out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (to(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for to in (self.to_q, self.to_k, self.to_v))
        x = x + self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class DigitsViT(nn.Module):
    """16 patches of 2 x 2 pixels, width 64, 3 layers, 4 heads; layers named as in Stable Diffusion's attention.

    ``noisy``: at every training step 30 % of the labels are redrawn and noise N(0, 0.3^2) is added to the pixels. As with a
    diffusion model's loss, the gradients do not vanish however long the training.
    """

    def __init__(self, width: int = 64, depth: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.noisy = False
        self.patch = nn.Linear(4, width)
        self.position = nn.Parameter(0.02 * torch.randn(16, width))
        self.layers = nn.ModuleList([Block(width, heads) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, pixels: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """``pixels [n, 8, 8]`` in [0, 1]; a cross-entropy ``loss`` where there are ``labels [n]``."""
        if self.noisy and labels is not None:
            pixels = pixels + NOISE * torch.randn_like(pixels)
            labels = torch.where(torch.rand(len(labels)) < RESAMPLED, torch.randint_like(labels, 10), labels)
        patches = F.unfold(pixels[:, None], kernel_size=2, stride=2).transpose(1, 2)  # [n, 16, 4]
        x = self.patch(patches) + self.position
        for layer in self.layers:
            x = layer(x)
        logits = self.head(self.norm(x).mean(1))
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


@dataclass(frozen=True)
class Digits:
    """Pictures [n, 8, 8] and labels [n], upright. Finetuning sees them `turned`."""

    pretrain: tuple[Tensor, Tensor]
    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


@cache
def digits() -> Digits:
    """1,000 pictures to pretrain on, 100 of them to finetune on; of the other 797, 398 to validate and 399 to test."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(data.images, dtype=torch.float32)[order] / 16, torch.tensor(data.target)[order]
    return Digits((x[:1000], y[:1000]), (x[:100], y[:100]), (x[1000:1398], y[1000:1398]), (x[1398:], y[1398:]))


def turned(x: Tensor) -> Tensor:
    """The pictures, rotated by 90 degrees and inverted."""
    return 1 - x.rot90(1, (1, 2))


def as_rows(x: Tensor, y: Tensor) -> list[dict[str, Tensor]]:
    return [{"pixels": image, "labels": label} for image, label in zip(x, y, strict=True)]


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return (model(x)["logits"].argmax(-1) == y).double().mean().item()


# ---------------------------------------------------------------- one run


def arguments(folder: Path, steps: int, lr: float, batch: int, seed: int, decay: float = 0.01, clip: float = 0.0) -> Any:
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch,
        optim="adamw_torch",
        learning_rate=lr,
        weight_decay=decay,
        lr_scheduler_type="constant",
        max_grad_norm=clip,
        seed=seed,
        save_strategy="no",
        logging_strategy="no",
        dataloader_pin_memory=False,
        disable_tqdm=True,
        report_to="none",
        use_cpu=True,  # the kept numbers are those of a CPU
    )


def pretrained(folder: Path, steps: int = 700) -> DigitsViT:
    """The model after pretraining on upright digits. It is trained once and kept in the folder."""
    file = folder / f"base-{steps}.pt"
    set_seed(0)
    model = DigitsViT()
    if not file.is_file():
        trainer = Trainer(model, arguments(folder, steps, 2e-3, 96, seed=0), train_dataset=as_rows(*digits().pretrain))
        trainer.remove_callback(PrinterCallback)  # the Trainer's own printing of its summary
        trainer.train()
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}")
        torch.save(model.state_dict(), partial)
        partial.rename(file)
    model.load_state_dict(torch.load(file, weights_only=True))
    return model


@dataclass(frozen=True)
class Job:
    """One finetuning. ``study``, ``case`` and ``factor`` (of the case's base rate) only say what it is for.

    ``watched``: the steps after which the change and the validation accuracy are measured.
    """

    study: str
    case: str
    method: Any
    lr: float
    lam_lr: float
    seed: int
    factor: float = 1.0
    steps: int = 300
    decay: float = 0.01
    clip: float = 0.0
    noisy: bool = False
    watched: tuple[int, ...] = ()

    def key(self) -> dict[str, Any]:
        """The job as JSON values, without the fields at their defaults."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return values | {"method": str(self.method)} | ({"watched": list(self.watched)} if self.watched else {})


class Watch(TrainerCallback):
    """Measures the change and the validation accuracy after some of the steps."""

    def __init__(self, model: nn.Module, steps: tuple[int, ...], score: Callable[[], float]) -> None:
        self.model, self.steps, self.score = model, steps, score
        self.recorder = Recorder(model)
        self.rows: list[dict[str, Any]] = []

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        step = state.global_step
        if step in self.steps:
            reached = self.recorder.record()
            # An angle is measured since the last record: it is of one step if the step before was recorded too.
            kept = {k: v for k, v in reached.items() if not k.startswith("turn") or step == 1 or step - 1 in self.steps}
            self.rows.append({"step": step} | measured(self.model) | {"validation": self.score()} | _finite(kept))


def measured(model: nn.Module) -> dict[str, float]:
    """|dW|_F of the layer that is drawn, and its bound where the method has one."""
    layer = report(adapters(model)[MEASURED])
    norms = {"distance": layer.distance, "bound": layer.bound}
    return {key: value for key, value in norms.items() if value is not None}


def _finite(values: dict[str, float]) -> dict[str, float]:
    return {f"mean_{k}" if k == "distance" else k: v for k, v in values.items() if math.isfinite(v)}


def finetune(
    base: DigitsViT, job: Job, folder: Path, also: Callable[[nn.Module], dict[str, Any]] | None = None
) -> dict[str, Any]:
    """The job's settings with its results: accuracies in [0, 1], |dW|_F, the watched steps; and what ``also`` says.

    ``relative`` is a mean over all layers, ``distance`` that of one. ``diverged``: a loss or a weight is not finite; then there
    are no scores.
    """
    started = time.monotonic()
    set_seed(job.seed)
    data = digits()
    base = copy.deepcopy(base)
    base.noisy = job.noisy
    model = delora.inject(base, job.method, TARGETS)
    validation = turned(data.validation[0]), data.validation[1]
    watch = Watch(model, job.watched, lambda: accuracy(model, *validation))
    x, y = data.train
    trainer = RunTrainer(
        model,
        arguments(folder, job.steps, job.lr, 16, job.seed, job.decay, job.clip),
        train_dataset=as_rows(turned(x), y),
        callbacks=[watch],
        lam_lr=job.lam_lr if getattr(job.method, "learn_lam", True) else None,  # none is taken for a fixed lam
    )
    try:
        trainer.train()
        if not all(p.isfinite().all() for p in model.parameters()):
            raise Diverged(job.steps)
        reached = measured(model) | {"relative": Recorder(model).record()["distance"]}
    except (Diverged, torch.linalg.LinAlgError):  # type: ignore[attr-defined]
        scores: dict[str, Any] = {"diverged": True}
    else:
        scores = {
            "validation": accuracy(model, *validation),
            "test": accuracy(model, turned(data.test[0]), data.test[1]),
            "upright": accuracy(model, *data.test),
            **reached,
            **(also(model) if also else {}),
        }
    return (
        job.key() | scores | {"seconds": round(time.monotonic() - started, 2)} | ({"trace": watch.rows} if watch.rows else {})
    )
