"""The claims and the rules that judge them. The rules' thresholds were fixed before the runs, whose seeds chose no setting.

Accuracies are shares of the test pictures, means over the seeds; a run that diverged counts as chance. A condition is decided
where its value is two standard errors from its threshold (`judge`); this was added after the runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import fmean, stdev
from typing import Any

Rows = Sequence[dict[str, Any]]
CHANCE = 0.1


YES, NO, OPEN = "yes", "no", "undecided"


@dataclass(frozen=True)
class Condition:
    """A condition in words, with its numbers, and whether it is met: `YES`, `NO`, or `OPEN` if the seeds do not decide."""

    text: str
    outcome: str


@dataclass(frozen=True)
class Verdict:
    """``parts``: the conditions. A claim fails if one is not met, and holds if all are; else it is undecided.

    ``notes``: what is reported beside the rule; it decides nothing.
    """

    claim: str
    rule: str
    parts: tuple[Condition, ...]
    notes: tuple[str, ...] = ()

    @property
    def outcome(self) -> str:
        """ "holds", "fails" or "undecided"."""
        outcomes = {part.outcome for part in self.parts}
        return "fails" if NO in outcomes else "undecided" if OPEN in outcomes else "holds"

    @property
    def holds(self) -> bool:
        return self.outcome == "holds"

    @property
    def summary(self) -> str:
        """The outcome and, unless it holds, how many conditions are met."""
        met = sum(part.outcome == YES for part in self.parts)
        return self.outcome if self.holds else f"{self.outcome}: {met} of {len(self.parts)} conditions are met"

    def listed(self) -> list[str]:
        """The conditions as lines of a page."""
        marks = {YES: "yes", NO: "**no**", OPEN: "*undecided*"}
        return [f"- {marks[part.outcome]}: {part.text}" for part in self.parts]


def judge(
    rows: Rows,
    value: Callable[[Rows], float],
    words: str,
    least: float | None = None,
    most: float | None = None,
    scale: float = 100,
    digits: int = 1,
) -> Condition:
    """Whether a value is at least ``least``, or at most ``most``, by two standard errors.

    The standard error is the jackknife's: the value is computed anew without each seed (and subject) in turn. Where it is not
    finite, because a run diverged, all of these must agree. One run alone decides nothing, and so does the limit itself.
    ``words``: "{}" stands for the value and its standard error, times ``scale``.
    """
    sign, limit = (1, least) if least is not None else (-1, most if most is not None else 0.0)
    reached = value(rows)
    units = sorted({(r.get("seed", 0), r.get("subject", "")) for r in rows})
    without = (
        [value([r for r in rows if (r.get("seed", 0), r.get("subject", "")) != unit]) for unit in units] if units[1:] else []
    )
    shown = f"{scale * reached:.{digits}f}"
    if not without:
        return Condition(words.format(shown) + "; one run", OPEN)
    if all(math.isfinite(v) for v in (reached, *without)):
        error = ((len(without) - 1) * fmean((v - fmean(without)) ** 2 for v in without)) ** 0.5
        margin = sign * (reached - limit)
        outcome = YES if margin > 2 * error else NO if -margin > 2 * error else OPEN
        shown += f" ± {scale * error:.{digits}f}"
    else:
        met = {sign * (v - limit) >= 0 for v in (reached, *without)}
        outcome = OPEN if len(met) == 2 else YES if met == {True} else NO
    return Condition(words.format(shown), outcome)


def either(*conditions: Condition) -> str:
    """The outcome of "one of these"."""
    outcomes = {c.outcome for c in conditions}
    return YES if YES in outcomes else OPEN if OPEN in outcomes else NO


def both(*conditions: Condition) -> str:
    """The outcome of "all of these"."""
    outcomes = {c.outcome for c in conditions}
    return NO if NO in outcomes else OPEN if OPEN in outcomes else YES


def mean(rows: Rows, case: str, factor: float, key: str, chance: float = CHANCE) -> float:
    """The mean over the seeds. A run that diverged has the score of chance; every other value of it is infinite."""
    runs = [r for r in rows if r["case"] == case and r.get("factor", 1.0) == factor]
    if not runs:
        raise ValueError(f"there is no run of {case!r} at factor {factor}")
    return fmean(r.get(key, chance if key == "test" else float("inf")) for r in runs)


def _factors(rows: Rows, case: str) -> list[float]:
    return sorted({r.get("factor", 1.0) for r in rows if r["case"] == case})


def r1(rows: Rows, chance: float = CHANCE) -> Verdict:
    def lost(case: str, factor: float) -> Callable[[Rows], float]:
        return lambda rows: mean(rows, case, 1.0, "test", chance) - mean(rows, case, factor, "test", chance)

    def kept(case: str) -> Callable[[Rows], float]:
        return lambda rows: mean(rows, case, 16.0, "test", chance) / mean(rows, case, 1.0, "test", chance)

    up = [f for f in _factors(rows, "LoRA") if 1 < f <= 8]
    failing = [f for f in up if lost("LoRA", f)(rows) >= 0.2 and lost("DoRA", f)(rows) >= 0.2]
    at = failing[0] if failing else up[-1]
    parts = [
        judge(rows, lost(case, at), f"at {at:g} times its base rate {case} loses {{}} points (at least 20)", least=0.2)
        for case in ("LoRA", "DoRA")
    ]
    for case in ("DeLoRA", "ETHER+"):
        parts.append(judge(rows, lost(case, at), f"there {case} loses {{}} points (less than 10)", most=0.1))
        parts.append(
            judge(rows, kept(case), f"at 16 times {case} keeps {{}} % of its score (at least 80)", least=0.8, digits=0)
        )
    return Verdict(
        "A bounded method keeps its score at rates at which LoRA and DoRA fail (Figure 2, left)",
        "LoRA and DoRA lose at least 20 points at one factor of at most 8; DeLoRA and ETHER+ lose less than 10 there and keep "
        "80 % of their score at 16.",
        tuple(parts),
    )


def r2(rows: Rows) -> Verdict:
    def ratio(case: str, far: float, near: float) -> Callable[[Rows], float]:
        return lambda rows: mean(rows, case, far, "distance") / mean(rows, case, near, "distance")

    def spread(case: str) -> Callable[[Rows], float]:
        def widest(rows: Rows) -> float:
            distances = [mean(rows, case, f, "distance") for f in _factors(rows, case)]
            return max(distances) / min(distances)

        return widest

    lora, dora = (
        "LoRA's distance at 16 is {} times that at 1 (at least 5)",
        "DoRA's at 16 is {} times that at 8 (less than 1.5)",
    )
    parts = [
        judge(rows, ratio("LoRA", 16, 1), lora, least=5, scale=1),
        judge(rows, ratio("DoRA", 16, 8), dora, most=1.5, scale=1, digits=2),
    ]
    for case in ("DeLoRA", "ETHER+"):
        words = f"{case}'s largest distance is {{}} times its smallest (less than 2)"
        parts.append(judge(rows, spread(case), words, most=2, scale=1, digits=2))
    bounded = [r | {"bound_used": r["distance"] / r["bound"]} if "bound" in r else r for r in rows]
    bounded = [r for r in bounded if "bound_used" in r]
    used = max(r["bound_used"] for r in bounded)
    text = f"no run of {len(bounded)} is beyond its bound at the end: at most {100 * used:.1f} % of it (this cannot fail)"
    parts.append(Condition(text, YES if used <= 1 + 1e-4 else NO))
    return Verdict(
        "The distance from the base explodes for LoRA, saturates for DoRA, stays within the bound for DeLoRA (Figure 2, right)",
        "LoRA's distance grows at least fivefold from factor 1 to 16, DoRA's less than 1.5 times from 8 to 16; the largest "
        "over all factors is less than twice the smallest for DeLoRA and ETHER+; no run exceeds its method's bound. The last "
        "condition cannot fail by construction: the bound is computed from the lam at the end of the run, and for that lam it "
        "holds whatever A and B are (ETHER+'s is a constant). It tests the code, not the claim.",
        tuple(parts),
    )


def largest_column_norm(prolonged: Rows) -> float:
    """max(c) of the drawn layer, from a run whose lam is fixed: its bound is 2 lam max(c)."""
    fixed = next(r for r in prolonged if r["case"] == "DeLoRA, lam fixed")
    return fixed["bound"] / (2 * strength(fixed))


def beside_r2(robustness: Rows, decoupling: Rows, prolonged: Rows) -> tuple[str, ...]:
    """What R2 does not ask, and what could fail: the distances against the bound of the first lam; how lam moves that bound.

    A run that diverged counts as infinitely far.
    """
    runs = [r for r in (*robustness, *decoupling, *prolonged) if r.get("method", "").startswith("DeLoRA")]
    start = 2 * strength(runs[0]) * largest_column_norm(prolonged)
    far, end = max(r.get("distance", float("inf")) for r in runs), max(r["bound"] for r in runs if "bound" in r)
    beyond = sum(r.get("distance", float("inf")) > start for r in runs)

    def bounds(case: str, rows: Rows) -> str:
        return _means_over_factors([r for r in rows if "bound" in r], case, lambda r: r["bound"], 1)

    return (
        f"The comparison that could fail is with the bound of the start, 2 lam0 max(c) = {start:.2f}. The largest distance "
        f"of {len(runs)} runs of DeLoRA (of R2, R4 and R5) is {far:.2f}, {100 * far / start:.1f} % of it; runs beyond it: "
        f"{beyond}.",
        f"lam is learned, so the radius is learned too: the bound at the end is at most {end:.2f}, {end / start:.2f} times "
        f"that of the start. Its mean over the seeds, if both rates are multiplied: {bounds('DeLoRA', robustness)}; if lam's "
        f"rate alone is: {bounds('lam alone', decoupling)}.",
    )


def beside_r2_on_subjects(robustness: Rows, prolonged: Rows) -> tuple[str, ...]:
    """As `beside_r2`, from rows that have only means over the layers: of the distance, and of the share of the bound."""
    fixed = [p["bound"] for r in prolonged if r["case"] == "DeLoRA, lam fixed" for p in r["trace"] if "bound" in p]
    runs = [r for r in robustness if r["case"] == "DeLoRA"]
    if not fixed or not runs:
        return ()
    far = max(r.get("distance", float("inf")) for r in runs)
    ratios = _means_over_factors([r for r in runs if "bound_used" in r], "DeLoRA", lambda r: r["distance"] / r["bound_used"], 2)
    return (
        "The comparison that could fail is with the bound of the start. These rows allow it only in the mean: they have "
        "neither lam nor a layer's bound, but means over the layers of the distance and of the used share of the bound. The "
        "ratio of the two is a mean of the layers' bounds, weighted by use. In the run of R4 whose lam stays at the start's it "
        f"is {min(fixed):.2f} to {max(fixed):.2f}; the largest distance of {len(runs)} runs of DeLoRA is {far:.2f}, "
        f"{100 * far / min(fixed):.1f} % of the lower of these.",
        f"lam is learned, so the radius is learned too: the same ratio at the end, if both rates are multiplied: {ratios}.",
    )


def _means_over_factors(rows: Rows, case: str, value: Callable[[dict[str, Any]], float], digits: int) -> str:
    """The mean of a value at each factor, in words."""
    means = [fmean(value(r) for r in rows if r["case"] == case and r.get("factor", 1.0) == f) for f in _factors(rows, case)]
    text = ", ".join(f"{m:.{digits}f} at {f:g}" for m, f in zip(means, _factors(rows, case), strict=True))
    if means in (sorted(means), sorted(means, reverse=True)):
        return f"{text} ({'rising' if means[-1] > means[0] else 'falling'} throughout)"
    return f"{text} (neither rising nor falling throughout)"


def r3(rows: Rows) -> Verdict:
    def less(key: str) -> Callable[[Rows], float]:
        return lambda rows: mean(rows, "DoRA, fixed magnitude", 16.0, key) - mean(rows, "DoRA", 16.0, key)

    fixed, free = (mean(rows, case, 16.0, "distance") for case in ("DoRA, fixed magnitude", "DoRA"))
    score, other = (mean(rows, case, 16.0, "test") for case in ("DoRA, fixed magnitude", "DoRA"))
    return Verdict(
        "A fixed magnitude does not make DoRA robust (Figure 5)",
        "At 16 times the base rate DoRA with fixed magnitude is at least as far from the base as DoRA, its score not better.",
        (
            judge(rows, less("distance"), f"distance {fixed:.2f} against {free:.2f}: {{}} more", least=0, scale=1, digits=2),
            judge(rows, less("test"), f"score {100 * score:.1f} % against {100 * other:.1f} %: {{}} points more", most=0),
        ),
    )


def r4(rows: Rows, scored: bool = True) -> Verdict:
    """``scored``: whether the traces have scores; if not, the distances alone are judged."""

    def curve(rows: Rows, case: str, key: str) -> list[float]:
        runs = [r["trace"] for r in rows if r["case"] == case]
        return [fmean(point.get(key, float("inf")) for point in points) for points in zip(*runs, strict=True)]

    def growth(case: str) -> Callable[[Rows], float]:
        def grown(rows: Rows) -> float:
            path = curve(rows, case, "distance")
            return path[-1] / path[round(len(path) / 6) - 1] - 1

        return grown

    def fall(rows: Rows, case: str) -> float:
        path = curve(rows, case, "validation")
        return max(path) - path[-1]

    parts = [
        judge(rows, growth(case), f"{case}'s distance grows by {{}} % (at least {100 * least:.0f})", least=least, digits=0)
        for case, least in (("LoRA", 0.5), ("DoRA", 0.3))
    ]
    parts += [
        judge(rows, growth(case), f"{case}: by {{}} % (less than 20)", most=0.2, digits=0)
        for case in ("DeLoRA, lam fixed", "DeLoRA")
    ]
    if scored:
        words = (
            f"at the end LoRA is {100 * fall(rows, 'LoRA'):.1f} points below its best, "
            f"DeLoRA {100 * fall(rows, 'DeLoRA'):.1f}: {{}} less"
        )
        parts.append(judge(rows, lambda rows: fall(rows, "LoRA") - fall(rows, "DeLoRA"), words, least=0))
    return Verdict(
        "In prolonged training LoRA and DoRA go on drifting, DeLoRA stops (Figure 3)",
        "Over the last five sixths of 2,600 steps LoRA's distance grows by at least 50 %, DoRA's by 30 %, DeLoRA's by less "
        "than 20 %, lam learned or not; where there are scores, LoRA ends further below its best than DeLoRA.",
        tuple(parts),
    )


def r5(decoupling: Rows, robustness: Rows) -> Verdict:
    rows = [*decoupling, *(r | {"case": "both"} for r in robustness if r["case"] == "DeLoRA")]

    def ratio(case: str, key: str) -> Callable[[Rows], float]:
        return lambda rows: mean(rows, case, 16.0, key) / mean(rows, case, 1.0, key)

    parts = []
    for case in ("lam alone", "A and B alone", "both"):
        far = ratio(case, "distance")(rows)
        words = f"{case}: {{}} % of the score at 16 times the rate (at least 80), {far:.2f} times the distance"
        parts.append(judge(rows, ratio(case, "test"), words, least=0.8, digits=0))
    words = "lam's rate alone moves the boundary: at 16 times the rate {} times the distance (more than 1)"
    parts.append(judge(rows, ratio("lam alone", "distance"), words, least=1, scale=1, digits=2))
    return Verdict(
        "Direction and strength are decoupled: either rate may be raised (Figure 6)",
        "At 16 times the rate of lam, of A and B, or of both the score keeps 80 %; a higher rate of lam, a larger distance.",
        tuple(parts),
    )


def ladder(rows: Rows) -> Verdict:
    ether = ["E0", "E1", "E2", "E3", "E4" if any(r["case"] == "E4" for r in rows) else "L2"]

    def score(rows: Rows, case: str) -> float:
        return fmean(r.get("test", CHANCE) for r in rows if r["case"] == case)

    def steps(rows: Rows) -> dict[str, float]:
        return {f"{a} to {b}": score(rows, b) - score(rows, a) for a, b in pairwise(ether)}

    def first_over_others(rows: Rows) -> float:
        first, *others = steps(rows).values()
        return first - max(others)

    def less(a: str, b: str) -> Callable[[Rows], float]:
        return lambda rows: score(rows, a) - score(rows, b)

    def two(a: str, b: str) -> str:
        return f"{a} {100 * score(rows, a):.1f} %, {b} {100 * score(rows, b):.1f} %"

    gains = ", ".join(f"{step} {100 * gain:+.1f}" for step, gain in steps(rows).items())
    return Verdict(
        "Each step from ETHER+ and from LoRA to DeLoRA counts (Tables 1 and 2)",
        "The step from E0 to E1 (the controllable boundary) is the largest on ETHER's side; weights-scaling (L1 to L2) gains; "
        "without it the additive form (L1) is below its multiplicative counterpart (E3).",
        (
            judge(rows, first_over_others, f"gains in points: {gains}; the first is {{}} above the largest other", least=0),
            judge(rows, less("L2", "L1"), f"{two('L1', 'L2')}: {{}} points gained", least=0),
            judge(rows, less("E3", "L1"), f"{two('L1', 'E3')}: {{}} points below", least=0),
        ),
    )


def on_equal_grids(equal: Rows, unequal: Rows) -> Verdict:
    """The ladder where every rung chose from the same rates; what it was on others is told beside it."""
    words = {YES: "met", NO: "not met", OPEN: "undecided"}
    beside = (
        f"with other rates to choose from for each rung, at five seeds: {part.text} ({words[part.outcome]})"
        for part in ladder(unequal).parts
    )
    return replace(ladder(equal), notes=tuple(beside))


def chat(rows: Rows, chance: float = 0.35) -> Verdict:
    """``chance``: the mean over a task of two answers (1/2) and one of five (1/5)."""
    before = fmean(r["perplexity_before"] for r in rows if "perplexity_before" in r)

    def lost(case: str, factor: float) -> Callable[[Rows], float]:
        return lambda rows: mean(rows, case, 1.0, "test", chance) - mean(rows, case, factor, "test", chance)

    def forgotten(case: str, factor: float) -> Callable[[Rows], float]:
        """How much the mean loss has grown: the logarithm of the perplexity over the base's."""

        def grown(rows: Rows) -> float:
            logs = [r | {"loss": math.log(r["perplexity"])} for r in rows if "perplexity" in r]
            gone = [r for r in rows if "perplexity" not in r]
            return mean([*logs, *gone], case, factor, "loss") - math.log(before)

        return grown

    def fails(case: str, factor: float) -> bool:
        return lost(case, factor)(rows) >= 0.1 or forgotten(case, factor)(rows) >= math.log(2)

    up = [f for f in _factors(rows, "LoRA") if 1 < f <= 16]
    failing = [f for f in up if fails("LoRA", f) and fails("DoRA", f)]
    at = failing[0] if failing else up[-1]

    def remembers(case: str, **limit: float) -> Condition:
        times = math.exp(forgotten(case, at)(rows))
        words = f"its perplexity is {times:,.1f} times the base's, in logarithms {{}}"
        return judge(rows, forgotten(case, at), words, **{k: math.log(v) for k, v in limit.items()}, scale=1, digits=2)

    parts = []
    for case in ("LoRA", "DoRA"):
        a = judge(rows, lost(case, at), f"at {at:g} times its base rate {case} loses {{}} points", least=0.1)
        b = remembers(case, least=2)
        parts.append(Condition(f"{a.text}, {b.text} (10 points, or 2 times)", either(a, b)))
    for case in ("DeLoRA", "ETHER+"):
        a = judge(rows, lost(case, at), f"there {case} loses {{}} points", most=0.05)
        b = remembers(case, most=1.5)
        parts.append(Condition(f"{a.text}, {b.text} (less than 5 points, and less than 1.5 times)", both(a, b)))
    return Verdict(
        "A bounded method keeps its score, and the language, at rates at which LoRA and DoRA fail",
        "At one factor of at most 16 LoRA and DoRA lose at least 10 points, or their perplexity on other text is at least "
        "twice the base model's; DeLoRA and ETHER+ lose less than 5 points there, and theirs is less than 1.5 times.",
        tuple(parts),
    )


def on_digits(read: Callable[[str], Rows]) -> dict[str, Verdict]:
    robustness = read("robustness")
    return {
        "R1": r1(robustness),
        "R2": replace(r2(robustness), notes=beside_r2(robustness, read("decoupling"), read("prolonged"))),
        "R3": r3(robustness),
        "R4": r4(read("prolonged")),
        "R5": r5(read("decoupling"), robustness),
        "R6": on_equal_grids(read("rungs-equal"), read("rungs")),
    }


def on_subjects(read: Callable[[str], Rows]) -> dict[str, Verdict]:
    """The same rules with the subjects' score in place of the accuracy; R4 judges the distances alone. A study that is not
    complete is not judged. A sweep has no runs at factor 1: those of its seeds in the study of all methods are taken.
    """
    judged: dict[str, Verdict] = {}
    methods, robustness, decoupling = read("methods"), read("robustness"), read("decoupling")
    if robustness and methods:
        seeds = {r["seed"] for r in robustness}
        robustness = [*robustness, *(r for r in methods if r["seed"] in seeds)]
        beside = beside_r2_on_subjects(robustness, read("prolonged"))
        judged |= {"R1": r1(robustness, 0.0), "R2": replace(r2(robustness), notes=beside), "R3": r3(robustness)}
    if read("prolonged"):
        judged["R4"] = r4(read("prolonged"), scored=False)
    if decoupling and robustness:
        first = [r for r in methods if r["case"] == "DeLoRA" and r["seed"] in {d["seed"] for d in decoupling}]
        base = [r | {"case": case} for r in first for case in ("lam alone", "A and B alone")]
        judged["R5"] = r5([*decoupling, *base], robustness)
    if read("ladder"):
        judged["R6"] = ladder(read("ladder"))
    if read("views-judged"):
        judged["R8"] = on_new_views(read("views-judged"))
    return judged


def on_new_views(rows: Rows) -> Verdict:
    """LoRA against DeLoRA where both had as many strengths and rates to choose from."""

    def less(case: str, other: str, key: str) -> Callable[[Rows], float]:
        def mean(rows: Rows, case: str) -> float:
            return fmean(r.get(key, 0.0) for r in rows if r["case"] == case)

        return lambda rows: mean(rows, case) - mean(rows, other)

    def beside(case: str, other: str) -> str:
        return judge(rows, less(case, other, "new_views"), f"on new views {case} less {other}: {{}} points", least=0).text

    words = "score, {} less LoRA: {{}} points (at least 0)"
    return Verdict(
        "DeLoRA learns a subject at least as well as LoRA (Table 3)",
        "Each at its best of equal grids, its score on other subjects is not below LoRA's, with the start that is the default "
        "and with the one of rank r.",
        tuple(judge(rows, less(case, "LoRA", "test"), words.format(case), least=0) for case in ("DeLoRA", "DeLoRA, soft")),
        (beside("DeLoRA", "LoRA"), beside("DeLoRA, soft", "LoRA")),
    )


# ---------------------------------------------------------------- which start, and lam


def near_best(rows: Rows, pictures: int = 398, chance: float = CHANCE) -> list[dict[str, Any]]:
    """The rows of all cells (start, clipping, lam, rate) that lie within one standard deviation of the best cell.

    A cell's score is the mean validation accuracy over the seeds; a run that diverged counts as chance. The standard deviation
    is the best cell's over its seeds, or the binomial standard error of its accuracy on so many ``pictures`` if that is
    larger, because three seeds can agree by chance.
    """
    cells: dict[tuple[str, float, str, float], list[dict[str, Any]]] = {}
    for r in rows:
        cells.setdefault((r["case"], r.get("clip", 0.0), r["method"], r["lr"]), []).append(r)
    scores = {cell: [r.get("validation", chance) for r in runs] for cell, runs in cells.items()}
    top = max(scores.values(), key=fmean)
    best = fmean(top)
    sd = max(stdev(top) if len(top) > 1 else 0.0, (best * (1 - best) / pictures) ** 0.5)
    return [r for cell, runs in cells.items() if fmean(scores[cell]) >= best - sd for r in runs]


def area(rows: Rows, pictures: int = 398, chance: float = CHANCE) -> dict[tuple[str, float], int]:
    """How many (lam, rate) cells of each start and clipping are `near_best`.

    The first rule for the library's default, fixed before the runs: the start with the largest area without clipping, summed
    over the tasks as shares of their cells; `subtract` stays if it is within one cell of the largest on every task.
    """
    near = {(r["case"], r.get("clip", 0.0), r["method"], r["lr"]) for r in near_best(rows, pictures, chance)}
    groups = {(r["case"], r.get("clip", 0.0)) for r in rows}
    return {group: sum(cell[:2] == group for cell in near) for group in groups}


@dataclass(frozen=True)
class Gain:
    """A start's best decade of rates on one task: ``score``, and its ``gain`` over `subtract` with the standard error."""

    score: float
    gain: float
    error: float


def decade(rows: Rows, case: str, chance: float) -> list[float]:
    """For each seed the mean score over three neighbouring rates: those that are best for all other seeds."""
    scores: dict[float, dict[int, float]] = {}
    for r in rows:
        if r["case"] == case:
            scores.setdefault(r["lr"], {})[r["seed"]] = r.get("validation", chance)
    rates = sorted(scores)
    windows = [rates[i : i + 3] for i in range(len(rates) - 2)]
    seeds = sorted(scores[rates[0]])

    def over(window: list[float], chosen: Sequence[int]) -> float:
        return fmean(scores[lr][seed] for lr in window for seed in chosen)

    held_out = []
    for seed in seeds:
        others = [s for s in seeds if s != seed]
        held_out.append(over(max(windows, key=lambda w: over(w, others)), [seed]))
    return held_out


def gains(rows: Rows, chance: float) -> dict[str, Gain]:
    """Every start's gain over `subtract`, seed by seed."""
    base = decade(rows, "subtract", chance)
    by_start = {}
    for case in dict.fromkeys(r["case"] for r in rows):
        scores = decade(rows, case, chance)
        differences = [a - b for a, b in zip(scores, base, strict=True)]
        by_start[case] = Gain(fmean(scores), fmean(differences), stdev(differences) / len(differences) ** 0.5)
    return by_start


def start(tasks: Sequence[dict[str, Gain]]) -> tuple[str, dict[str, Gain]]:
    """The library's default start, and each start's mean over the tasks.

    The second rule, fixed before its runs: at lam 8 and ten new seeds, a start's score is that of its best decade. A start
    takes the place of `subtract` if its mean gain over the tasks is more than twice its standard error and if on no task it
    loses more than twice the standard error there; of several, the one that gains most. The first rule (`area`) counted cells
    on three seeds, and gave `copy` and `subtract` different counts, though these differ only by how far lam has moved.
    """
    mean = {}
    for case in tasks[0]:
        gains = [task[case] for task in tasks]
        error = sum(g.error**2 for g in gains) ** 0.5 / len(gains)
        mean[case] = Gain(fmean(g.score for g in gains), fmean(g.gain for g in gains), error)
    passed = [
        case
        for case, g in mean.items()
        if g.gain > 2 * g.error and all(task[case].gain >= -2 * task[case].error for task in tasks)
    ]
    return max(passed, key=lambda case: mean[case].gain, default="subtract"), mean


def widest(rows: Rows, start: str, pictures: int = 398, chance: float = CHANCE) -> dict[float, int]:
    """At how many rates each lam of one start without clipping is near the best of that start's cells.

    The rule for the library's default lam, fixed before the runs: the lam with the most of these rates, as shares of all rates
    summed over the tasks; 8 stays unless another lam has more than its share by a tenth.
    """
    runs = [r for r in rows if r["case"] == start and not r.get("clip")]
    near = {(r["method"], r["lr"]) for r in near_best(runs, pictures, chance)}
    methods = {r["method"]: strength(r) for r in runs}
    return {lam: sum(method == name for name, _ in near) for method, lam in methods.items()}


def strength(row: dict[str, Any]) -> float:
    """lam of a kept row, whose method is text: ``DeLoRA(r=8, lam=4.0, ...)``."""
    return float(row["method"].partition("lam=")[2].partition(",")[0])


def by_rank(rows: Rows, chance: float = 0.5) -> Verdict:
    """Whether a lam set by the rank does better than a constant one, each at its best rate; means over ranks and seeds."""
    scores: dict[str, list[float]] = {"constant": [], "by rank": []}
    for case, values in scores.items():
        for r in sorted({row["r"] for row in rows}):
            by_rate: dict[float, list[float]] = {}
            for row in rows:
                if (row["case"], row["r"]) == (case, r):
                    by_rate.setdefault(row["lr"], []).append(row.get("validation", chance))
            values += max(by_rate.values(), key=fmean)
    pairs = [b - a for a, b in zip(*scores.values(), strict=True)]
    gain, error = fmean(pairs), stdev(pairs) / len(pairs) ** 0.5
    return Verdict(
        "A lam that grows with the square root of the rank does better than a constant",
        "Over ranks 2 and 32, each at its best rate, the mean gain is more than twice its standard error.",
        (
            Condition(
                f"the gain is {100 * gain:+.1f} points, its standard error {100 * error:.1f}", YES if gain > 2 * error else NO
            ),
        ),
    )


def cut(rows: Rows, task: str, rank: str = "8") -> Verdict:
    """Whether an export of the method's own rank, half of the change's, keeps what the change is worth.

    A rate's change is worth its score above that of rank 0, and an export loses the exact score less its own, seed by seed.
    """
    parts = []
    for factor in _factors(rows, "DeLoRA"):
        runs = [r for r in rows if r.get("factor", 1.0) == factor]
        lost = [r["test"] - r["exported"][rank] for r in runs]
        loss, error = fmean(lost), stdev(lost) / len(lost) ** 0.5
        worth = fmean(r["test"] - r["exported"]["0"] for r in runs)
        words = (
            f"{task}, {factor:g} times the base rate: it loses {100 * loss:.1f} ± {100 * error:.1f} of {100 * worth:.1f} points"
        )
        parts.append(Condition(words, YES if loss + 2 * error < 0.1 * worth else NO))
    return Verdict(
        "An export of the default start at the method's own rank keeps its score",
        "The mean loss over the seeds and twice its standard error are less than a tenth of what the change is worth.",
        tuple(parts),
    )
