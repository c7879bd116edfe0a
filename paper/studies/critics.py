"""Every method of Table 4 on critics' sentences, by the recipe with GLUE's code; and on whole reviews by viewers, which none
was trained on.

    python -m paper.studies.critics [STUDY ...]

``pair`` is LoRA and DeLoRA, which `judged` compares; ``others`` are the other methods, hours of one core.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.console import Console

import delora
from delora.data.examples import Example
from delora.tasks import classification, read
from delora.training.config import Experiment
from paper.standins import reviews
from paper.studies import engine
from paper.studies.verdicts import Rows, Verdict, judge

RESULTS, RECIPE = Path("paper/results/critics"), Path("paper/standins/recipes/critics.toml")
PAIR = ("LoRA", "DeLoRA")
DOCUMENTS, LONGEST = 400, 256  # reviews, half of each class, and their tokens: the sentences have 32
NEAR = 0.02  # DeLoRA is at most two points below LoRA: as on the other sentences


@dataclass(frozen=True)
class Job:
    """A variant of the recipe."""

    study: str
    case: str
    seed: int

    def key(self) -> dict[str, Any]:
        return {"case": self.case, "seed": self.seed}


def runs(study: str, chosen: Callable[[str], bool]) -> Iterator[Job]:
    base = read(RECIPE)
    for seed in base.seeds:
        for variant in base.variants:
            if chosen(variant.name):
                yield Job(study, variant.name, seed)


STUDIES: dict[str, Callable[[], Iterable[Job]]] = {
    "pair": partial(runs, "pair", PAIR.__contains__),
    "others": partial(runs, "others", lambda name: name not in PAIR),
}


def experiment(job: Job, out: Path) -> Experiment:
    """The recipe's variant with the job's seed."""
    every = read(RECIPE, [f"seeds=[{job.seed}]", f"out={out}"]).runs()
    return next(run for variant, run in every if variant.name == job.case)


@cache
def documents() -> tuple[Example, ...]:
    """Reviews by viewers, half of each class, of which none is among the critics' sentences."""
    known = reviews.read("rotten_tomatoes")
    every = reviews.read("imdb")
    same = set(reviews.shared([e.text for e in every], [e.text for e in known]))
    rows = [e for e in every if e.text not in same]
    random.Random(0).shuffle(rows)
    return tuple(e for label in (0, 1) for e in [r for r in rows if r.label == label][: DOCUMENTS // 2])


def work(job: Job) -> dict[str, Any]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        settings: Any = experiment(job, Path(folder))
        context = engine.context(Path(folder))
        splits = classification.read_splits(settings)
        result = classification.run(settings, context, splits)
        scores = {"validation": result.validation, "test": result.test, "distance": result.distance}
        if result.diverged is None:
            model = delora.load(classification.base(settings), Path(folder) / "run" / "adapter")
            long = settings.model_copy(update={"data": settings.data.model_copy(update={"max_tokens": LONGEST})})
            unseen = replace(splits, validation=list(documents()))
            scores["documents"] = classification.validation(long, unseen).score(model)
    return job.key() | {k: v for k, v in scores.items() if v is not None} | {"lr": settings.train.lr, "seconds": result.seconds}


def judged(rows: Rows) -> Verdict:
    """Whether DeLoRA is at most two points below LoRA: on sentences, and on documents."""

    def difference(rows: Rows, key: str) -> float:
        ours, theirs = (fmean(r.get(key, 0.5) for r in rows if r["case"] == case) for case in reversed(PAIR))
        return ours - theirs

    parts = [
        judge(rows, partial(difference, key=key), f"on {what} DeLoRA less LoRA: {{}} points (at least -2)", least=-NEAR)
        for key, what in (("test", "sentences"), ("documents", "documents"))
    ]
    return Verdict("DeLoRA is as good as LoRA", "DeLoRA is at most two points below LoRA.", tuple(parts))


def run(study: str, jobs: Iterable[Job], results: Path, console: Console, workers: int | None = None) -> None:
    reviews.prepared()
    engine.run(study, jobs, work, results, console, workers)


if __name__ == "__main__":
    engine.command(STUDIES, RESULTS, run)
