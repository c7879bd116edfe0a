"""The rules that judge the studies of reach (``reach.py``), committed with them before the first run.

A score is the share of right answers or the mean of two correlations on the test examples; a run that diverged has that of
chance. Differences are paired by the seed, in shares of one.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from paper.studies import engine, reach
from paper.studies.verdicts import Gain

Row, Pair = dict[str, Any], tuple[int, str]
CASES = ("DeLoRA", "LoRA")
RESULTS = Path("paper/results")
# The folder of a task's rows, what its studies' names end with, and the score of a model that has learned nothing.
TASKS = {
    "turned digits": ("digits", "", 0.1),
    "film reviews": ("sentences", "-movie", 0.5),
    "product ratings": ("sentences", "-product", 0.0),
    "chat": ("chat", "", 0.35),
    "chats": ("dialogs", "", 0.0),
    "headlines": ("headlines", "", 0.5),
    "subjects": ("fashion", "", 0.0),
}


@dataclass(frozen=True)
class Task:
    """What was run on a task, and the score of a model that has learned nothing.

    ``chosen_by``: the score that chooses LoRA's rate.
    """

    rows: Sequence[Row]
    chance: float
    chosen_by: str = "validation"

    def scores(self, key: str = "test", **having: Any) -> dict[Pair, float]:
        """The mean score, by seed and subject, of the runs whose rows have these values."""
        by_pair: dict[Pair, list[float]] = {}
        for row in self.rows:
            if all(row.get(name) == value for name, value in having.items()):
                by_pair.setdefault((row["seed"], row.get("subject", "")), []).append(row.get(key, self.chance))
        return {pair: fmean(scores) for pair, scores in by_pair.items()}


def read(study: str, results: Path = RESULTS) -> dict[str, Task]:
    """The rows so far of a study of reach, by the task's name; of ``knob`` where every setting has been run at every seed."""
    tasks = {}
    for name, (folder, end, chance) in TASKS.items():
        # The runs of the chosen start are beside the runs of LoRA that `knob` has.
        other = [r for r in engine.read("knob" + end, results / folder) if r["case"] == "LoRA"] if study == "knob-start" else []
        own = engine.read(study + end, results / folder)
        rows = [_with_fields(row) for row in [*own, *(other if own else [])]]
        if rows and (study != "knob" or paired(rows)):
            # A subject has no pictures to choose by: LoRA's rate is the best by the score itself, which favours LoRA.
            tasks[name] = Task(rows, chance, "test" if folder == "fashion" else "validation")
    return tasks


def paired(rows: Iterable[Row]) -> bool:
    """Whether every setting was run at the same seeds, of which there are several: what differences need.

    >>> rows = [{"case": case, "lr": 0.1, "seed": seed} for case in CASES for seed in (1, 2)]
    >>> paired(rows), paired(rows[:3]), paired(rows[::2])
    (True, False, False)
    """
    seeds: dict[tuple[Any, ...], set[int]] = {}
    for row in rows:
        seeds.setdefault(tuple(row.get(name) for name in ("case", "lr", "r", "reach")), set()).add(row["seed"])
    every = set().union(*seeds.values())
    return len(every) > 1 and all(some == every for some in seeds.values())


def _with_fields(row: Row) -> Row:
    """The row with rank and reach as numbers, which rows of digits and subjects have in their method alone."""
    found = re.findall(r"\b(r|reach)\W+([\d.]+)", str(row.get("method", row.get("adapter", ""))))
    return {name: float(value) for name, value in found} | row


def at_their_own(rows: Sequence[Row]) -> list[Row]:
    """Of each mode the rows at its own reach, the one with the highest mean validation score."""
    kept = []
    for mode in reach.MODES:
        runs = Task([r for r in rows if r["case"] == mode], 0.1)
        best = max({r["reach"] for r in runs.rows}, key=lambda own: fmean(runs.scores("validation", reach=own).values()))
        kept += [r for r in runs.rows if r["reach"] == best]
    return kept


def second() -> dict[str, Task]:
    """The rows that choose the mode: on digits each mode's at its own reach."""
    tasks = read("strength")
    own = read("strength-own")["turned digits"]
    return tasks | {"turned digits": Task(at_their_own(own.rows), own.chance)}


def chosen_mode() -> str:
    """The mode that `strength_mode` chooses from the rows of `second`."""
    return strength_mode(second())[0]


def starts() -> dict[str, Task]:
    """The rows that choose the start, with those of `subtract` from the study of modes where the study has none of its own."""
    tasks = {}
    for name, task in read("equal").items():
        rows = list(task.rows)
        if not any(row["case"] == "subtract" for row in rows):
            mode = chosen_mode()
            rows += [r | {"case": "subtract"} for r in read("strength")[name].rows if r["case"] == mode]
        tasks[name] = Task(rows, task.chance)
    return tasks


def chosen_start() -> str:
    """The start that `equal_starts` chooses from the rows of `starts`."""
    return equal_starts(starts())[0]


def of_start() -> reach.Fields:
    """The fields of the start that is chosen."""
    return ({"subtract": {"start": "subtract"}} | reach.STARTS)[chosen_start()]


def chosen_default() -> tuple[float, float]:
    """The reach and the rate that `default` chooses from the kept rows."""
    return default(read("choose"))


def gain(scores: Mapping[Pair, float], base: Mapping[Pair, float]) -> Gain:
    """The mean gain over the base's runs of the same seeds and subjects, and its standard error."""
    differences = [score - base[pair] for pair, score in sorted(scores.items())]
    return Gain(fmean(scores.values()), fmean(differences), stdev(differences) / len(differences) ** 0.5)


def over(tasks: Iterable[Gain]) -> Gain:
    """The mean over tasks."""
    gains = list(tasks)
    error = sum(g.error**2 for g in gains) ** 0.5 / len(gains)
    return Gain(fmean(g.score for g in gains), fmean(g.gain for g in gains), error)


def strength_mode(tasks: Mapping[str, Task]) -> tuple[str, dict[str, dict[str, Gain]]]:
    """How DeLoRA's strength is learned by default; what each mode gains over "learned", by task.

    It was written for one reach on every task, and is applied to `second`, which was set before the runs that it adds.

    A mode's score for a seed is its mean over the three rates. With the strength fixed, or in a ball, the bound is a law at any
    learning rate. Rule: of these two the one with a higher mean score takes the place of "learned" if it has no measurable
    loss: neither in the mean over the tasks nor on any task is it more than two standard errors below. "fixed" has one rate
    less to choose; it is preferred to "in a ball" unless that gains more than two standard errors on it. If neither passes,
    "learned" stays.
    """
    scores = {mode: {name: task.scores(case=mode) for name, task in tasks.items()} for mode in reach.MODES}

    def gains(mode: str, base: str) -> dict[str, Gain]:
        return {name: gain(scores[mode][name], scores[base][name]) for name in tasks}

    def loses_nothing(mode: str) -> bool:
        by_task = gains(mode, "learned")
        return all(g.gain >= -2 * g.error for g in (over(by_task.values()), *by_task.values()))

    passed = [mode for mode in ("fixed", "in a ball") if loses_nothing(mode)]
    if len(passed) == 2:
        more = over(gains("in a ball", "fixed").values())
        passed = ["in a ball"] if more.gain > 2 * more.error else ["fixed"]
    return (passed or ["learned"])[0], {mode: gains(mode, "learned") for mode in reach.MODES if mode != "learned"}


def default(tasks: Mapping[str, Task]) -> tuple[float, float]:
    """The library's reach and the recipes' rate, from validation scores at rank 8 and the choosing seeds.

    Rule: the reach with the highest mean over the tasks, rates and seeds; at it the rate with the highest mean.
    """

    def score(reach_: float, rates: Iterable[float]) -> float:
        runs = [task.scores("validation", reach=reach_, lr=lr) for task in tasks.values() for lr in rates]
        return fmean(fmean(scores.values()) for scores in runs)

    best = max(reach.REACHES, key=lambda reach_: score(reach_, reach.CHOOSING_RATES))
    return best, max(reach.CHOOSING_RATES, key=lambda lr: score(best, [lr]))


def equal_starts(tasks: Mapping[str, Task]) -> tuple[str, dict[str, dict[str, Gain]]]:
    """The library's default start, and what each start gains over `subtract` at the same reach, by task.

    A start's score for a seed is its mean over the three rates, which are a decade. Rule: a start of rank r takes the place of
    `subtract` if in the mean over the tasks it is at most one standard error below, and on no task more than two; of several,
    the one with the highest mean.
    """
    gains = {}
    for start in reach.STARTS:
        gains[start] = {name: gain(t.scores(case=start), t.scores(case="subtract")) for name, t in tasks.items()}
    mean = {start: over(by_task.values()) for start, by_task in gains.items()}
    passed = [
        start
        for start, by_task in gains.items()
        if mean[start].gain >= -mean[start].error and all(g.gain >= -2 * g.error for g in by_task.values())
    ]
    return max(passed, key=lambda start: mean[start].score, default="subtract"), gains


def own_default() -> tuple[tuple[float, float], float]:
    """Reach and rate of `delora finetune` with a new head, and LoRA's rate, from the validation scores of ``own-choose``.

    Rule: of DeLoRA's pairs of reach and rate, and of LoRA's rates, those with the highest mean over both numbers of rows and
    the choosing seeds.
    """
    ((_, task),) = read("own-choose").items()

    def score(**having: Any) -> float:
        return fmean(fmean(task.scores("validation", epochs=n, **having).values()) for n, _ in reach.OWN_ROWS.values())

    pairs = [(own, lr) for own in reach.OWN_GRID[0] for lr in reach.OWN_GRID[1]]
    best = max(pairs, key=lambda pair: score(case="DeLoRA", reach=pair[0], lr=pair[1]))
    return best, max(reach.OWN_LORA_RATES, key=lambda lr: score(case="LoRA", lr=lr))


def chats_default(task: Task) -> tuple[tuple[float, float], float]:
    """Reach and rate of `delora finetune` for chats, and LoRA's rate, from the validation scores of ``chats-choose``.

    Rule: of DeLoRA's pairs of reach and rate, and of LoRA's rates, those with the highest mean over both numbers of rows and
    the choosing seeds, among those whose perplexity on newspapers is, in the mean of its logarithm, at most `reach.FORGOTTEN`
    times the base model's; if there is none, the one with the lowest perplexity.
    """

    def best(settings: Sequence[dict[str, Any]]) -> dict[str, Any]:
        lost = {i: forgotten(task, **having) for i, having in enumerate(settings)}
        fitting = [i for i, times in lost.items() if times <= reach.FORGOTTEN] or [min(lost, key=lambda i: lost[i])]

        def score(i: int) -> float:
            return fmean(fmean(task.scores("validation", rows=n, **settings[i]).values()) for n in reach.CHATS_ROWS)

        return settings[max(fitting, key=score)]

    grid = itertools.product(*reach.CHATS_GRID)
    ours = best([{"case": "DeLoRA", "reach": own, "lr": lr} for own, lr in grid])
    theirs = best([{"case": "LoRA", "lr": lr} for lr in reach.CHATS_LORA_RATES])
    return (ours["reach"], ours["lr"]), theirs["lr"]


def forgotten(task: Task, **having: Any) -> float:
    """How many times the base model's the perplexity on newspapers is, for the runs with these values; a geometric mean."""
    rows = [row for row in task.rows if all(row.get(name) == value for name, value in having.items())]
    return math.exp(fmean(math.log(row.get("perplexity", math.inf) / row["perplexity_before"]) for row in rows))


def own_cells(task: Task, sizes: Mapping[int, Mapping[str, Any]] | None = None) -> dict[tuple[int, float], tuple[float, Gain]]:
    """By the number of rows and the factor: LoRA's mean test score, and DeLoRA's gain over LoRA at the same factor.

    Claim: for each number of rows DeLoRA is at most one standard error below LoRA at its chosen rate, and at three times the
    rate it is not more than two standard errors below. ``sizes``: the values that rows of each number have.
    """
    cells = {}
    sizes = sizes or {rows: {"epochs": epochs} for rows, (epochs, _) in reach.OWN_ROWS.items()}
    for (rows, having), factor in itertools.product(sizes.items(), reach.OWN_FACTORS):
        base = task.scores(case="LoRA", factor=factor, **having)
        ours = task.scores(case="DeLoRA", factor=factor, **having)
        cells[rows, factor] = fmean(base.values()), gain(ours, base)
    return cells


@dataclass(frozen=True)
class Cell:
    """DeLoRA at one rank and rate, against LoRA of that rank at the best of its rates."""

    task: str
    r: int
    lr: float
    lora_lr: float
    lora: float
    gain: Gain

    @property
    def outcome(self) -> str:
        """'holds': at most one standard error below; "fails": more than two; else 'undecided'."""
        if self.gain.gain >= -self.gain.error:
            return "holds"
        return "fails" if self.gain.gain < -2 * self.gain.error else "undecided"


def knob(tasks: Mapping[str, Task], own: float) -> list[Cell]:
    """DeLoRA of reach ``own`` at every rate and rank against LoRA, tuned for each task and rank.

    LoRA's rate is the one with the best mean validation score over the judged seeds (subjects: the best score). Claim: on every
    task, at every rank and every rate, DeLoRA's mean test score is at most one standard error of the paired difference
    below LoRA's.
    """
    cells = []
    for name, task in tasks.items():
        for r in sorted({row["r"] for row in task.rows}):
            mine = [row for row in task.rows if row["r"] == r and row.get("reach", own) == own]
            rates = {case: sorted({row["lr"] for row in mine if row["case"] == case}) for case in CASES}
            tuned = max(rates["LoRA"], key=lambda lr: fmean(task.scores(task.chosen_by, case="LoRA", r=r, lr=lr).values()))
            base = task.scores(case="LoRA", r=r, lr=tuned)
            cells += [
                Cell(name, r, lr, tuned, fmean(base.values()), gain(task.scores(case="DeLoRA", r=r, lr=lr, reach=own), base))
                for lr in rates["DeLoRA"]
            ]
    return cells
