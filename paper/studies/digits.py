"""All studies on turned digits: base rates, robustness, prolonged training, decoupling, ladder, starts, rank of an export.

    python -m paper.studies.digits [STUDY ...]

Rows go to ``paper/results/digits/<study>.jsonl``, one for each run; a study that is started again runs only what is missing.
The base rate of a case, and its lam, are those with the best mean accuracy on the validation pictures over two seeds that
nothing else uses.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import delora
from delora import HRA, RUNGS, DeLoRA, DoRA, EtherPlus, LoRA, NBLoRA
from paper.standins.digits import Job, accuracy, digits, finetune, pretrained, turned
from paper.studies import cut as cuts
from paper.studies import dial, engine, knobs, reach
from paper.studies.ball import InBall

RESULTS = Path("paper/results/digits")
TUNING_SEEDS, SEEDS = (8, 9), (10, 11, 12)
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
LAMS = (1.0, 2.0, 4.0, 8.0)
LOW, HIGH = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3), (2.5e-3, 5e-3, 1e-2, 2e-2, 4e-2)
LAM_SHARE = 0.5  # lam's rate over A's and B's

DELORA = DeLoRA(r=8, start="subtract", learn_lam=True)  # as the paper trains it
Choices = dict[str, tuple[list[Any], tuple[float, ...]]]  # each case's methods and rates to choose from
METHODS: Choices = {
    "LoRA": ([LoRA(r=8, alpha=16.0)], LOW),
    "DoRA": ([DoRA(r=8, alpha=16.0)], LOW),
    "DoRA, fixed magnitude": ([DoRA(r=8, alpha=16.0, fixed_magnitude=True)], LOW),
    "ETHER+": ([EtherPlus()], HIGH),
    "DeLoRA": ([replace(DELORA, lam=lam) for lam in LAMS], HIGH),
}


def rung(name: str) -> tuple[list[Any], tuple[float, ...]]:
    """A rung at rank 8 (E1: 2), with the strengths and rates to choose from. L1's strength is not relative to W."""
    method = RUNGS[name]
    if name == "L0":
        return [replace(method, r=8, alpha=16.0)], (1e-3, 2e-3, 4e-3)
    if name == "E0":
        return [method], (1e-2, 2e-2, 4e-2)
    method = method if name == "E1" else replace(method, r=8)
    return [replace(method, lam=lam) for lam in LAMS], (1e-2, 2e-2, 4e-2)


# Methods that the paper does not compare with: as many rates as DeLoRA, and as many strengths where there is one. HRA of r 16
# has as many parameters as the others of r 8.
RIVAL_REACHES = (0.125, 0.25, 0.5, 1.0)
RIVALS: Choices = {
    "HRA": ([HRA(r=8), HRA(r=16)], HIGH),
    "NB-LoRA": ([NBLoRA(r=8, reach=reach_) for reach_ in RIVAL_REACHES], HIGH),
}

LADDER = {name: rung(name) for name in RUNGS}

# R6 anew: in `rungs` the rates to choose from were not the same for every rung, and the chosen ones lie at their edges. Here
# all rungs have the same rates, a factor of three apart, and four strengths where they have one: lam, or LoRA's alpha.
EQUAL_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
EQUAL_SEEDS = tuple(range(190, 200))
ALPHAS = (4.0, 8.0, 16.0, 32.0)


def equal_rung(name: str) -> tuple[list[Any], tuple[float, ...]]:
    """A rung with the strengths and rates to choose from that every rung has."""
    methods = [replace(RUNGS[name], r=8, alpha=alpha) for alpha in ALPHAS] if name == "L0" else rung(name)[0]
    return methods, EQUAL_RATES


EQUAL_LADDER = {name: equal_rung(name) for name in RUNGS}

# ---------------------------------------------------------------- which runs


def tuning(study: str, cases: Choices) -> Iterator[Job]:
    """Every method of every case at every rate, from which `best` chooses."""
    for case, (methods, rates) in cases.items():
        for method, lr, seed in product(methods, rates, TUNING_SEEDS):
            yield Job(study, case, method, lr, lr * LAM_SHARE, seed)


def best(study: str, cases: Choices) -> dict[str, tuple[Any, float]]:
    """Each case's method and base rate with the best mean validation accuracy in a study."""
    rows = read(study)
    chosen = {}
    for case, (methods, rates) in cases.items():

        def score(choice: tuple[Any, float], case: str = case) -> float:
            runs = [r for r in rows if (r["case"], r["method"], r["lr"]) == (case, str(choice[0]), choice[1])]
            assert len(runs) == len(TUNING_SEEDS), f"run the study {study!r} first"
            return sum(r.get("validation", 0.0) for r in runs)

        chosen[case] = max(product(methods, rates), key=score)
    return chosen


def robustness() -> Iterator[Job]:
    """Figures 2 and 5: every method over factors of its base rate, 300 steps; lam's rate is multiplied as well."""
    for case, (method, lr) in best("tuning", METHODS).items():
        for factor, seed in product(FACTORS, SEEDS):
            yield Job("robustness", case, method, lr * factor, lr * factor * LAM_SHARE, seed, factor)


def rivals() -> Iterator[Job]:
    """`robustness` of methods that the paper does not compare with, to stand beside its rows."""
    for case, (method, lr) in best("rivals-tuning", RIVALS).items():
        for factor, seed in product(FACTORS, SEEDS):
            yield Job("rivals", case, method, lr * factor, lr * factor * LAM_SHARE, seed, factor)


def decoupling() -> Iterator[Job]:
    """Figure 6: the rate of lam alone, of A and B alone; both together is in `robustness`."""
    method, lr = best("tuning", METHODS)["DeLoRA"]
    for factor, seed in product(FACTORS, SEEDS):
        yield Job("decoupling", "lam alone", method, lr, lr * factor * LAM_SHARE, seed, factor)
        yield Job("decoupling", "A and B alone", method, lr * factor, lr * LAM_SHARE, seed, factor)


def prolonged() -> Iterator[Job]:
    """Figure 3: 2,600 steps of the noisy objective without weight decay, each method at its base rate."""
    chosen = best("tuning", METHODS)
    long = partial(Job, "prolonged", steps=2600, decay=0.0, noisy=True, watched=tuple(range(100, 2601, 100)))
    for seed in SEEDS:
        for case in ("LoRA", "DoRA", "ETHER+", "DeLoRA"):
            method, lr = chosen[case]
            yield long(case, method, lr, lr * LAM_SHARE, seed)
        method, lr = chosen["DeLoRA"]
        yield long("DeLoRA, lam fixed", replace(method, learn_lam=False), lr, 0.0, seed)


def rungs(study: str, tuned: str, ladder: Choices, seeds: tuple[int, ...]) -> Iterator[Job]:
    """The ladder of Table 1, each rung at its chosen strength and rate."""
    for case, (method, lr) in best(tuned, ladder).items():
        for seed in seeds:
            yield Job(study, case, method, lr, lr * LAM_SHARE, seed)


STARTS: dict[str, dict[str, Any]] = {
    "subtract": {"start": "subtract"},
    "copy": {"start": "copy"},
    "paired": {"start": "paired"},
    "soft 0.01": {"start": "soft", "softness": 0.01},
    "soft 0.03": {"start": "soft", "softness": 0.03},
    "soft 0.1": {"start": "soft", "softness": 0.1},
    "zero": {"start": "zero"},
}
START_LAMS = (1.0, 2.0, 4.0, 8.0, 16.0)
START_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)


def starts(study: str = "starts", clip: float = 0.0) -> Iterator[Job]:
    """Every start over lam and the rate (lam's rate is half of it); the runs of the first seed have a trace."""
    for seed, lam, lr, (case, fields) in product(SEEDS, START_LAMS, START_RATES, STARTS.items()):
        watched = (1, 2, 5, 6, 20, 21, 100, 101, 300) if seed == SEEDS[0] else ()
        yield Job(study, case, replace(DELORA, lam=lam, **fields), lr, lr * LAM_SHARE, seed, clip=clip, watched=watched)


JUDGED = ("subtract", "copy", "paired", "soft 0.01", "soft 0.03")
JUDGED_SEEDS, JUDGED_LAM, JUDGED_RATES = tuple(range(50, 60)), 8.0, (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)


def starts_judged() -> Iterator[Job]:
    """Five of the starts at the default lam and ten new seeds, for `verdicts.start`."""
    for seed, lr, case in product(JUDGED_SEEDS, JUDGED_RATES, JUDGED):
        yield Job("starts-judged", case, replace(DELORA, lam=JUDGED_LAM, **STARTS[case]), lr, lr * LAM_SHARE, seed)


def cut() -> Iterator[Job]:
    """The default start, whose change has twice the rank of its method, at new seeds, to be exported for `verdicts.cut`."""
    method, lr = best("tuning", METHODS)["DeLoRA"]
    for factor, seed in product(cuts.FACTORS, cuts.SEEDS):
        yield Job("cut", "DeLoRA", method, lr * factor, lr * factor * LAM_SHARE, seed, factor)


def reaching(study: str, mode: str, lr: float, seed: int, case: str, reach_: float, **fields: Any) -> Job:
    """A run of DeLoRA at a reach, its strength learned as ``mode`` says."""
    method, learned, _ = reach.MODES[mode]
    kind = InBall if method == reach.BALL else DeLoRA
    return Job(study, case, kind(**{"r": 8, "reach": reach_} | learned | fields), lr, reach.lam_lr(mode, lr), seed)


def modes() -> Iterator[Job]:
    """How the strength is learned, for `knobs.strength_mode`."""
    for seed, lr, mode in product(reach.MODE_SEEDS, reach.RATES, reach.MODES):
        yield reaching("strength", mode, lr, seed, mode, reach.REACH)


def modes_at_their_own() -> Iterator[Job]:
    """The same at higher reaches, of which each mode has its own."""
    for seed, lr, reach_, mode in product(reach.OWN_SEEDS, reach.RATES, reach.OWN_REACHES, reach.MODES):
        yield reaching("strength-own", mode, lr, seed, mode, reach_)


def choose() -> Iterator[Job]:
    """Reach and rate, for `knobs.default`."""
    for seed, lr, reach_ in product(reach.CHOOSING_SEEDS, reach.CHOOSING_RATES, reach.REACHES):
        yield reaching("choose", knobs.chosen_mode(), lr, seed, "DeLoRA", reach_)


def equal() -> Iterator[Job]:
    """Starts of rank r at the reach, the rates and the seeds of `modes`, for `knobs.equal_starts`."""
    for seed, lr, (case, fields) in product(reach.MODE_SEEDS, reach.RATES, reach.STARTS.items()):
        yield reaching("equal", knobs.chosen_mode(), lr, seed, case, reach.REACH, **fields)


def knob() -> Iterator[Job]:
    """The chosen reach against LoRA, for `knobs.knob`."""
    chosen, _ = knobs.chosen_default()
    for r, seed in product(reach.RANKS, reach.JUDGED_SEEDS):
        for lr in reach.JUDGED_RATES:
            yield reaching("knob", knobs.chosen_mode(), lr, seed, "DeLoRA", chosen, r=r)
        for lr in reach.LORA_RATES:
            yield Job("knob", "LoRA", LoRA(r=r, alpha=2.0 * r), lr, 0.0, seed)


def knob_start() -> Iterator[Job]:
    """DeLoRA's runs of `knob` with the chosen start."""
    chosen, start = knobs.chosen_default()[0], knobs.of_start()
    for r, seed, lr in product(reach.RANKS, reach.JUDGED_SEEDS, reach.JUDGED_RATES):
        yield reaching("knob-start", knobs.chosen_mode(), lr, seed, "DeLoRA", chosen, r=r, **start)


def dial_runs() -> Iterator[Job]:
    """Tuned and untuned runs, whose strength is chosen afterwards, for `dial.worth`."""
    for seed, how in product(dial.SEEDS["turned digits"], ("tuned", "untuned")):
        own, lr = dial.DELORA["turned digits"][how]
        yield reaching("dial", "fixed", lr, seed, f"DeLoRA, {how}", own)
        yield Job("dial", f"LoRA, {how}", LoRA(r=8, alpha=16.0), dial.LORA_RATES[how], 0.0, seed)


STUDIES: dict[str, Callable[[], Iterable[Job]]] = {
    "tuning": partial(tuning, "tuning", METHODS),
    "robustness": robustness,
    "rivals-tuning": partial(tuning, "rivals-tuning", RIVALS),
    "rivals": rivals,
    "decoupling": decoupling,
    "prolonged": prolonged,
    "rungs-tuning": partial(tuning, "rungs-tuning", LADDER),
    "rungs": partial(rungs, "rungs", "rungs-tuning", LADDER, (*SEEDS, 13, 14)),
    "rungs-equal-tuning": partial(tuning, "rungs-equal-tuning", EQUAL_LADDER),
    "rungs-equal": partial(rungs, "rungs-equal", "rungs-equal-tuning", EQUAL_LADDER, EQUAL_SEEDS),
    "starts": starts,
    "starts-clipped": partial(starts, "starts-clipped", 1.0),
    "starts-judged": starts_judged,
    "cut": cut,
    "strength": modes,
    "strength-own": modes_at_their_own,
    "choose": choose,
    "equal": equal,
    "knob": knob,
    "knob-start": knob_start,
    "dial": dial_runs,
}

# ---------------------------------------------------------------- running them


def work(job: Job, base: Path, base_steps: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    x, y = digits().test
    if job.study == "dial":
        untuned = pretrained(base, base_steps)
        seen, labels = digits().validation
        dialled = partial(
            dial.dialled,
            validation=lambda model: accuracy(model, turned(seen), labels),
            test=lambda model: accuracy(model, turned(x), y),
            kept=lambda model: accuracy(model, x, y),
            base=accuracy(untuned, x, y),
        )
        return finetune(untuned, job, base, dialled)
    if job.study != "cut":
        return finetune(pretrained(base, base_steps), job, base)

    def score(folder: Path) -> float:
        return accuracy(delora.load(pretrained(base, base_steps), folder), turned(x), y)

    with tempfile.TemporaryDirectory() as folder:
        return finetune(
            pretrained(base, base_steps), job, base, lambda model: cuts.exported(model, Path(folder), cuts.RANKS, score)
        )


def run(
    study: str, jobs: Iterable[Job], results: Path, console: Console, workers: int | None = None, base_steps: int = 700
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        pretrained(Path(folder), base_steps)
        engine.run(study, jobs, partial(work, base=Path(folder), base_steps=base_steps), results, console, workers)


def read(study: str, results: Path = RESULTS) -> list[dict[str, Any]]:
    return engine.read(study, results)


if __name__ == "__main__":
    engine.command(STUDIES, RESULTS, run)
