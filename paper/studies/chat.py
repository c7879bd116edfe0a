"""Robustness of a chat model (SmolLM2-135M-Instruct) to the learning rate, through the recipe for instructions.

    python -m paper.studies.chat [STUDY ...]

It learns from instructions about 120 sentences of film reviews, in bfloat16 with adapters in float32. The base rate is the one
of three with the highest likelihood of held-out responses, at a seed that nothing else uses.
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

import delora
from delora.evaluation import harness
from delora.tasks import instructions, parse, read
from delora.training.config import Experiment
from delora.training.models import language_model
from paper.standins import mmlu
from paper.studies import engine, knobs, reach

RESULTS, RECIPE = Path("paper/results/chat"), Path("paper/standins/recipes/smollm2.toml")
TUNING_SEED, SEEDS = 8, (10, 11, 12)
FACTORS = (1.0, 8.0)
METHODS: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    "LoRA": ({"method": "lora", "r": 8, "alpha": 16.0}, (3e-4, 1e-3, 3e-3)),
    "DoRA": ({"method": "dora", "r": 8, "alpha": 16.0}, (3e-4, 1e-3, 3e-3)),
    "ETHER+": ({"method": "etherplus", "blocks": 4}, (1e-3, 3e-3, 1e-2)),
    "DeLoRA": ({"method": "delora", "r": 8, "learn_lam": True, "start": "subtract", "lam": 8.0}, (3e-3, 1e-2, 3e-2)),
}


@dataclass(frozen=True)
class Job:
    """One run of the recipe for instructions.

    ``scored``: whether the tasks and the perplexity are scored as well, and not the held-out responses alone.
    """

    study: str
    case: str
    adapter: dict[str, Any]
    lr: float
    seed: int
    factor: float = 1.0
    scored: bool = True
    lam_lr: float | None = None

    def key(self) -> dict[str, Any]:
        kept = {name: self.adapter[name] for name in ("r", "reach") if self.study == "knob" and name in self.adapter}
        return {"case": self.case, "lr": self.lr, "seed": self.seed, "factor": self.factor} | kept


def tuning() -> Iterator[Job]:
    for case, (adapter, rates) in METHODS.items():
        for lr in rates:
            yield Job("tuning", case, adapter, lr, TUNING_SEED, scored=False)


def base_rates() -> dict[str, float]:
    """Each method's rate with the best likelihood in `tuning`; that of a run that diverged is 0."""
    rows = engine.read("tuning", RESULTS)
    chosen = {}
    for case, (_, rates) in METHODS.items():
        by_rate = {r["lr"]: r.get("validation", 0.0) for r in rows if r["case"] == case}
        assert set(by_rate) == set(rates), "run the study 'tuning' first"
        chosen[case] = max(by_rate, key=lambda lr: by_rate[lr])
    return chosen


def robustness() -> Iterator[Job]:
    rates = base_rates()
    for seed, factor, (case, (adapter, _)) in product(SEEDS, FACTORS, METHODS.items()):
        yield Job("robustness", case, adapter, rates[case] * factor, seed, factor)


def knob() -> Iterator[Job]:
    """The chosen reach against LoRA, for `knobs.knob`."""
    chosen, mode = knobs.chosen_default()[0], knobs.chosen_mode()
    method, learned, _ = reach.MODES[mode]
    for seed in reach.CHAT_SEEDS:
        for own, lr in (*((reach.PRETRAINED, lr) for lr in reach.FEW_RATES), (chosen, reach.FEW_RATES[1])):
            adapter = {"method": method, "r": 8, "reach": own} | learned
            yield Job("knob", "DeLoRA", adapter, lr, seed, lam_lr=reach.lam_lr(mode, lr))
        for lr in reach.CHAT_LORA_RATES:
            yield Job("knob", "LoRA", METHODS["LoRA"][0], lr, seed)


# What learning from 120 sentences does to MMLU: the base model, and each method at the rate that is the best of its grid in
# `knob` by the likelihood of held-out responses. Seeds are new.
UNTUNED, MMLU_SEEDS = "as it was", (117, 118)


def mmlu_before_and_after() -> Iterator[Job]:
    yield Job("mmlu", UNTUNED, {}, 0.0, 0, scored=False)
    ours = reach.fixed(reach.PRETRAINED)
    for seed in MMLU_SEEDS:
        yield Job("mmlu", "LoRA", METHODS["LoRA"][0], 3e-3, seed, scored=False)
        yield Job("mmlu", "DeLoRA", ours, 3e-2, seed, scored=False)


STUDIES: dict[str, Callable[[], Iterable[Job]]] = {
    "tuning": tuning,
    "robustness": robustness,
    "knob": knob,
    "mmlu": mmlu_before_and_after,
}


def experiment(job: Job, out: Path) -> Experiment:
    """The recipe of the stand-in with the job's adapter, rate and seed. Only one run also scores the model before training."""
    data = read(RECIPE, ["variants=[]", "seeds=[]"]).model_dump(mode="json")
    adapter = {"targets": data["adapter"]["targets"]} | job.adapter
    rates = reach.rates(job.adapter, job.lr, job.lr / 2 if job.lam_lr is None else job.lam_lr)
    train = data["train"] | rates
    first = (job.case, job.factor, job.seed) == ("LoRA", 1, SEEDS[0])
    evaluate = data["evaluate"] | {"before": first} if job.scored else {}
    return parse(data | {"seed": job.seed, "out": str(out), "adapter": adapter, "train": train, "evaluate": evaluate})


def answered(model: Any, tokenizer: Any) -> dict[str, float]:
    """MMLU's questions: the share of right answers, and the mean logarithm of the right letter's probability among the four."""
    model.eval()
    with tempfile.TemporaryDirectory() as folder:
        task = harness.as_task("mmlu-of-evals", mmlu.read(), Path(folder))
        scores = harness.score(model, tokenizer, [task], batch_size=4)["mmlu-of-evals"]
    return {"mmlu": scores["acc"], "log_probability": scores["likelihood"]}


def work(job: Job) -> dict[str, Any]:
    torch.set_num_threads(1)
    if job.case == UNTUNED:
        base = read(RECIPE, ["variants=[]", "seeds=[]"])
        return job.key() | answered(*language_model(base.model, base.train.weights)) | {"seconds": 0.0}
    with tempfile.TemporaryDirectory() as folder:
        settings = experiment(job, Path(folder))
        context = engine.context(Path(folder))
        result = instructions.run(settings, context, instructions.check(settings))
        asked = {}
        if job.study == "mmlu" and result.diverged is None:
            model, tokenizer = language_model(settings.model, settings.train.weights)
            asked = answered(delora.load(model, context.folder / "adapter"), tokenizer)
    scores = {"validation": result.validation, "distance": result.distance, "bound_used": result.bound_used}
    if job.scored and result.test is not None:
        scores |= {"test": result.test} | {k.replace(" ", "_"): v for k, v in result.scores.items()}
    return job.key() | {k: v for k, v in scores.items() if v is not None} | asked | {"seconds": result.seconds}


def run(study: str, jobs: Iterable[Job], results: Path, console: Console, workers: int | None = None) -> None:
    engine.run(study, jobs, work, results, console, workers)


if __name__ == "__main__":
    engine.command(STUDIES, RESULTS, run)
