"""Write paper/docs/starts.md from the kept rows: which start, and which lam.

    python -m paper.studies.starts

Sentences that state a result are computed; sentences that are typed here say how something was made.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from delora.formats.files import write_atomically
from paper.studies import cut as cuts
from paper.studies import digits, engine, sentences, verdicts
from paper.studies.verdicts import CHANCE, Gain, strength

PAGE = Path("paper/docs/starts.md")
SENTENCES = {"movie": "film reviews", "product": "product ratings"}  # the tasks of `sentences` on which starts are compared

HEAD = """# Which start, and which lam?

Written by `make claims`: every result on this page is computed from the rows in `paper/results/`. DeLoRA can begin at the base model in five
ways (`DeLoRA(start=...)`). Each was run on turned digits (see [the claims](claims.md)), and with a pretrained sentence encoder on film reviews
(two classes) and on ratings of products (a correlation): over lam, over three decades of the rate (lam's rate is half of it), with three seeds,
rank 8, without gradient clipping and with the norm clipped at 1. A score is the mean validation score over the seeds.

**The first rule, fixed before the runs.** For each start the cells (lam, rate) are counted that lie within one standard deviation of the best
cell of all (the deviation over the best cell's seeds, or the binomial standard error if that is larger). The counts without clipping are divided by
the number of a task's cells and summed over the tasks; the default is the start with the largest sum. It stays `subtract` if that is within one
cell of the largest count on every task.
"""


@dataclass(frozen=True)
class Task:
    """A task on which the starts are compared: each start has ``cells`` (lam, rate), scored on ``examples``."""

    name: str
    setting: str
    rows: list[dict[str, Any]]
    cells: int
    examples: int
    chance: float


def start_tasks() -> dict[str, Task]:
    """The tasks of which every run is kept."""
    rows = [*digits.read("starts"), *engine.whole("starts-clipped", digits)]
    tasks = {"digits": Task("turned digits", "lam 1 to 16, rates 1e-3 to 1; accuracy", rows, 35, 398, CHANCE)}
    scores = {"movie": "accuracy", "product": "mean of both correlations"}
    for key, (_, _, chance) in sentences.TASKS.items():
        study = f"starts-{key}"
        if rows := engine.whole(study, sentences):
            rows = [r | {"method": f"DeLoRA(lam={r['lam']:g},)"} for r in [*rows, *engine.whole(f"{study}-clipped", sentences)]]
            size = sentences.SHORT
            setting = f"lam 2 to 32, rates 3e-4 to 3e-1, {size.train} sentences once; {scores[key]}"
            tasks[key] = Task(SENTENCES[key], setting, rows, 12, size.validation, chance)
    return tasks


def page() -> str:
    tasks = start_tasks()
    lines = [HEAD, *_near(tasks), *_judged(), *_widest(tasks), *_rank(), *_cut(), *_turning(tasks["digits"].rows)]
    return "\n".join(lines) + "\n"


def _near(tasks: dict[str, Task]) -> list[str]:
    lines = []
    for key, task in tasks.items():
        lines += [
            f"![Mean validation score over rate and lam, one map per start; framed: near the best](figures/starts-{key}.png)",
            "",
            f"*{task.name.capitalize()}, without clipping; framed: near the best.*",
            "",
        ]
    areas = {key: verdicts.area(task.rows, task.examples, task.chance) for key, task in tasks.items()}
    head = "".join(f" {task.name}, of {task.cells} | clipped | best [%] |" for task in tasks.values())
    lines += [f"| start |{head} sum of shares |", "|---|" + "---|" * (3 * len(tasks) + 1)]
    total = {}
    for case in digits.STARTS:
        cells, total[case] = [], 0.0
        for key, task in tasks.items():
            total[case] += areas[key][case, 0.0] / task.cells
            best = max(means([r for r in task.rows if not r.get("clip")], case, task.chance).values())
            cells.append(f" {areas[key][case, 0.0]} | {areas[key].get((case, 1.0), '–')} | {100 * best:.1f} |")
        lines.append(f"| {case} |{''.join(cells)} {total[case]:.2f} |")
    within = all(max(a[c, 0.0] for c in digits.STARTS) - a["subtract", 0.0] <= 1 for a in areas.values())
    first = max(total, key=lambda case: total[case])
    verdict = "`subtract` stays" if within or first == "subtract" else f"`{first}` takes the place of `subtract`"
    near = sum(count for a in areas.values() for (_, clip), count in a.items() if not clip)
    every = sum(task.cells for task in tasks.values()) * len(digits.STARTS)
    lead = (
        f" The sum of `{first}` is {total[first] - total['subtract']:.2f} above that of `subtract`; for comparison, the sums of `copy` and "
        f"`subtract`, which differ only by how far lam has moved, are {abs(total['copy'] - total['subtract']):.2f} apart."
    )
    settings = "; ".join(f"{task.name}: {task.setting}" for task in tasks.values())
    return [
        *lines,
        "",
        f"**By this rule {verdict}.** {near} of {every} cells without clipping are near the best.{lead if first != 'subtract' else ''} "
        f"{settings.capitalize()}.",
        "",
    ]


def judged_tasks() -> dict[str, dict[str, Gain]]:
    """What every start gains on each task whose runs at new seeds are all kept, by the task's name in words."""
    by_task = {}
    if rows := engine.whole("starts-judged", digits):
        by_task["turned digits"] = verdicts.gains(rows, CHANCE)
    for key, name in SENTENCES.items():
        if rows := engine.whole(f"starts-{key}-judged", sentences):
            by_task[name] = verdicts.gains(rows, sentences.TASKS[key][2])
    return by_task


def _judged() -> list[str]:
    tasks = judged_tasks()
    if len(tasks) < 3:
        return []
    first, mean = verdicts.start(list(tasks.values()))
    lines = [
        "## The default start",
        "",
        f"The rule above counts cells of three seeds. A second rule was written, again before its runs, and it decides. It compares "
        f"{len(mean)} starts at lam {digits.JUDGED_LAM:g}, six rates from 1e-3 to 3e-1 and {len(digits.JUDGED_SEEDS)} new seeds. A start's score is its "
        "mean over its best decade, three neighbouring rates; for each seed the decade is chosen by the other seeds. **Rule:** a start takes the "
        "place of `subtract` if its mean gain over the tasks is more than twice its standard error and if on no task it loses more than twice the "
        "standard error there; of several, the one that gains most.",
        "",
        "| start |" + "".join(f" {name} [%] | gain |" for name in tasks) + " mean gain |",
        "|---|" + "---|" * (2 * len(tasks) + 1),
    ]
    for case, over in mean.items():
        cells = [f" {100 * t[case].score:.1f} | {_gain(t[case])} |" for t in tasks.values()]
        lines.append(f"| {case} |{''.join(cells)} {_gain(over)} |")
    verdict = "stays" if first == "subtract" else "takes the place of `subtract`"
    return [*lines, "", f"Gains in points over `subtract` of the same seeds, ± standard error. **`{first}` {verdict}.**", ""]


def _gain(gain: Gain) -> str:
    return f"{100 * gain.gain:+.1f} ± {100 * gain.error:.1f}" if gain.error else "–"


def _widest(tasks: dict[str, Task]) -> list[str]:
    counts = {key: verdicts.widest(t.rows, "subtract", t.examples, t.chance) for key, t in tasks.items()}
    rates = {key: task.cells // len(counts[key]) for key, task in tasks.items()}
    lines = ["## The default lam", "", "At how many rates each lam is near the best of `subtract`'s own cells:", ""]
    shares: dict[float, float] = {}
    for key, task in tasks.items():
        by_lam = ", ".join(f"lam {lam:g}: {n}" for lam, n in sorted(counts[key].items()))
        lines.append(f"- {task.name} ({rates[key]} rates): {by_lam}")
        for lam, n in counts[key].items():
            shares[lam] = shares.get(lam, 0.0) + n / rates[key]
    common = {lam: share for lam, share in shares.items() if all(lam in c for c in counts.values())}
    first = max(common, key=lambda lam: common[lam])
    stays = shares[first] - shares[sentences.FIXED_LAM] <= 0.1
    return [
        *lines,
        "",
        "Rule, fixed before: the lam with the most of these rates, as shares of all rates summed over the tasks; 8 stays unless another lam has more "
        f"than its share by a tenth. Every lam that all tasks have is compared. **{'8 stays' if stays else f'{first:g} takes its place'}**: "
        f"{', '.join(f'{lam:g} has {share:.2f}' for lam, share in sorted(common.items()))}.",
        "",
    ]


def _rank() -> list[str]:
    rows = engine.read("ranks", sentences.RESULTS)
    if len(rows) < len(list(sentences.ranks())):
        return []
    verdict = verdicts.by_rank(rows)
    table = [
        "| | rank | lam | " + " | ".join(f"rate {lr:g}" for lr in sentences.RANK_RATES) + " |",
        "|---|---|---|---|---|---|",
    ]
    for case in ("constant", "by rank"):
        for r in sentences.RANKS:
            runs = [row for row in rows if (row["case"], row["r"]) == (case, r)]
            cells = [[100 * run.get("validation", 0.5) for run in runs if run["lr"] == lr] for lr in sentences.RANK_RATES]
            spreads = " | ".join(f"{fmean(c):.1f} ± {stdev(c):.1f}" for c in cells)
            table.append(f"| {case} | {r} | {runs[0]['lam']:g} | {spreads} |")
    return [
        "## A rule for lam from the model",
        "",
        "Directions that have nothing in common change W by about lam / sqrt(r in) of |W|: at the same lam a larger rank changes less. Does "
        "lam = 8 sqrt(r / 8) do better than 8 at ranks far from 8? Film reviews, three seeds, validation accuracy [%]:",
        "",
        *table,
        "",
        f"Rule, fixed before: {verdict.rule[0].lower()}{verdict.rule[1:]} **{verdict.summary.capitalize()}**: {verdict.parts[0].text}.",
        "",
    ]


def cut_tasks() -> dict[str, list[dict[str, Any]]]:
    """The runs of every task whose adapters were all exported at lower ranks, by the task's name in words."""
    by_task = {"turned digits": engine.whole("cut", digits)}
    by_task |= {name: engine.whole(f"cut-{key}", sentences) for key, name in SENTENCES.items()}
    return {name: rows for name, rows in by_task.items() if rows}


def _cut() -> list[str]:
    table = [
        "| task | rate | " + " | ".join(["exact, rank 16", *(f"rank {r}" for r in cuts.RANKS[:-1]), "no change"]) + " |",
        "|---|---|" + "---|" * (len(cuts.RANKS) + 1),
    ]
    words: list[str] = []
    for task, rows in cut_tasks().items():
        for factor in cuts.FACTORS:
            runs = [row for row in rows if row.get("factor", 1.0) == factor]
            cells = [f"{100 * fmean(row['test'] for row in runs):.1f}"]
            for rank in map(str, cuts.RANKS):
                lost = [100 * (row["exported"][rank] - row["test"]) for row in runs]
                error = fmean(row["errors"][rank] for row in runs)
                cells.append(
                    f"{fmean(lost):+.1f} ± {stdev(lost) / len(lost) ** 0.5:.1f}" + (f" ({error:.2f})" if error else "")
                )
            table.append(f"| {task} | {factor:g} | " + " | ".join(cells) + " |")
        verdict = verdicts.cut(rows, task)
        rule = f"{verdict.rule[0].lower()}{verdict.rule[1:]}"
        words += verdict.listed()
    return [
        "## What an export of rank r costs the default start",
        "",
        "`subtract` subtracts its frozen start, so that its change has rank 2r, 16 here. `export.peft(rank=r)` writes the nearest change of rank r. "
        f"Test scores [%] of the exact adapter, what an export of a lower rank loses (± standard error, {len(cuts.SEEDS)} new seeds), and in brackets "
        "the mean of |error| / |change| over the layers, at the base rate and four times that:",
        "",
        *table,
        "",
        f"Rule for rank 8, fixed before the runs: {rule}",
        "",
        *words,
        "",
    ]


WATCHED = ("subtract", "paired", "soft 0.01", "soft 0.03", "soft 0.1", "zero")


def _turning(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "## How fast the columns of B turn, and where the change gathers",
        "",
        "By how many degrees the columns of B turn in one step, and which share of the change lies in its largest direction (the spectral norm "
        "over the Frobenius norm, means over the layers; 0.35 if all eight terms were orthogonal and equal, 1 if all were the same); turned "
        "digits without clipping, one seed.",
        "",
        "| start | lam | rate | turn at step 2 | at 6 | at 21 | largest direction at step 2 | at 21 | at 300 | score [%] |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    first_turns: dict[tuple[str, float], list[float]] = {}  # at step 2, over lam
    last_shares: dict[str, list[float]] = {}  # at step 300, over lam and the rate
    for lam, lr, case in product((4.0, 16.0), rates := (1e-2, 1e-1), WATCHED):
        key = (case, lam, lr)
        row = next(r for r in rows if (r["case"], strength(r), r["lr"]) == key and "trace" in r and not r.get("clip"))
        at = {point["step"]: point for point in row["trace"]}
        turns = [at[step]["turn_B"] for step in (2, 6, 21)]
        shares = [at[step]["spectral"] / at[step]["mean_distance"] for step in (2, 21, 300)]
        cells = [*(f"{turn:.1f}°" for turn in turns), *(f"{share:.2f}" for share in shares)]
        lines.append(f"| {case} | {lam:g} | {lr:g} | {' | '.join(cells)} | {100 * row.get('validation', CHANCE):.1f} |")
        first_turns.setdefault((case, lr), []).append(turns[0])
        last_shares.setdefault(case, []).append(shares[-1])
    ratios = {(case, lr): fmean(first_turns[case, lr]) / fmean(first_turns["subtract", lr]) for case, lr in first_turns}
    others = [case for case in WATCHED if case != "subtract"]
    at_rate = [f"at rate {lr:g} " + ", ".join(f"`{case}` {ratios[case, lr]:.1f}" for case in others) for lr in rates]
    return [
        *lines,
        "",
        f"Angle at step 2 over that of `subtract`, means over lam: {'; '.join(at_rate)}. Share of the largest direction at step 300, means over lam and "
        f"the rate: {', '.join(f'`{case}` {fmean(values):.2f}' for case, values in last_shares.items())}. One seed on one task: no cause follows from it.",
    ]


def means(rows: Iterable[dict[str, Any]], case: str, chance: float = CHANCE) -> dict[tuple[float, float], float]:
    """The mean validation accuracy of each (lam, rate)."""
    cells: dict[tuple[float, float], list[float]] = {}
    for r in rows:
        if r["case"] == case:
            cells.setdefault((strength(r), r["lr"]), []).append(r.get("validation", chance))
    return {cell: fmean(scores) for cell, scores in cells.items()}


if __name__ == "__main__":
    write_atomically(PAGE, page().encode())
