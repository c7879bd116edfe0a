"""Write paper/docs/reach.md from the rows of the studies of reach (``reach.py``), by the rules in ``knobs.py``.

python -m paper.studies.strengths
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from delora.formats.files import write_atomically
from paper.studies import dial, knobs, reach
from paper.studies.knobs import Task, over
from paper.studies.verdicts import Gain

PAGE = Path("paper/docs/reach.md")

HEAD = """# One knob: which strength needs no search?

Written by `make claims`: every result on this page is computed from the rows in `paper/results/`. `reach` is the share of |W| that the change of
a layer comes to when its directions are random (`DeLoRA(reach=...)`); lam follows from it, the rank and the norms of W. The rules below, the
grids and the seeds were committed before the runs; every seed is new (100 and above). The tasks are those of [the claims](claims.md), in
smaller sizes: *film reviews* are 1,000 sentences, of which 24 tokens are read, twice, in bfloat16, 800 to test on; *turned digits*, *chat* and
*subjects* are as there; *product ratings* are as the reviews, scored by the mean of two correlations with what people said. The rate is that of A
and B. **Not run, for time**: product ratings in the studies that choose, which the committed grids have too; they are judged alone.
"""

UNTIL = "Not decided yet: these studies are not complete.\n"


def page() -> str:
    if not complete():
        return HEAD + "\n" + UNTIL
    lines = [
        HEAD,
        *modes(),
        *defaults(),
        *decisive(),
        *starts(),
        *chosen_start(),
        *few(),
        *own(),
        *chats(),
        *turned(),
        *forgetting(),
    ]
    return "\n".join(lines) + "\n"


def complete() -> bool:
    """Whether there are rows of every study that the sections need."""
    return all(knobs.read(study) for study in ("strength", "strength-own", "choose", "knob"))


def _gain(gain: Gain) -> str:
    return f"{100 * gain.gain:+.1f} ± {100 * gain.error:.1f}"


def _gains(gains: Mapping[str, Mapping[str, Gain]], first: str) -> list[str]:
    """A row for each case: its gain on each task and in the mean."""
    tasks = list(next(iter(gains.values())))
    table = [f"| {first} | " + " | ".join(tasks) + " | mean |", "|---" * (len(tasks) + 2) + "|"]
    for case, by_task in gains.items():
        cells = [_gain(g) for g in (*by_task.values(), over(by_task.values()))]
        table.append(f"| {case} | " + " | ".join(cells) + " |")
    return table


def modes() -> list[str]:
    one, two = knobs.read("strength"), knobs.second()
    first, gains = knobs.strength_mode(one)
    mode, own = knobs.strength_mode(two)
    rows = two["turned digits"].rows
    reaches = ", ".join(f"{m} {next(r['reach'] for r in rows if r['case'] == m):g}" for m in reach.MODES)
    return [
        "## How the strength is learned",
        "",
        '"Fixed": lam is not trained. "Learned": at half the rate, as the recipes have it. "Learned slowly": at a rate of its own, 3e-3. "In a ball": '
        "lam = 2 lam0 sigmoid(s), s at the rate of A and B. With the first and the last the bound holds at any rate. **Rule:** of these two the one with "
        'a higher score takes the place of "learned" if neither in the mean nor on any task it is more than two standard errors below; "fixed" is '
        'preferred unless "in a ball" gains more than two standard errors on it.',
        "",
        f'Gains over "learned" in points, at reach {reach.REACH:g} and the mean of the rates {", ".join(f"{lr:g}" for lr in reach.RATES)}:',
        "",
        *_gains(gains, "mode"),
        "",
        f'By the rule, "{first}". On digits this reach is too small for all: the modes differ by how far lam can grow. So, before the runs that follow, '
        f"the rule was also set for digits with each mode at its own reach of {', '.join(f'{r:g}' for r in reach.OWN_REACHES)}, by validation ({reaches}), "
        "at five new seeds:",
        "",
        *_gains(own, "mode"),
        "",
        f'**By this rule, which decides, the default is to be "{mode}".** `DeLoRA()` follows it; '
        "the paper's recipes, the rungs and what comes from PEFT have `learn_lam=True`. Validation and test examples are disjoint.",
        "",
    ]


def defaults() -> list[str]:
    tasks = knobs.read("choose")
    chosen, rate = knobs.chosen_default()
    table = ["| reach | " + " | ".join(f"{n}, rate {lr:g}" for n in tasks for lr in reach.CHOOSING_RATES) + " | mean |"]
    table.append("|---" * (2 + len(tasks) * len(reach.CHOOSING_RATES)) + "|")
    for r in reach.REACHES:
        cells = [fmean(t.scores("validation", reach=r, lr=lr).values()) for t in tasks.values() for lr in reach.CHOOSING_RATES]
        table.append(f"| {r:g} | " + " | ".join(f"{100 * c:.1f}" for c in (*cells, fmean(cells))) + " |")
    return [
        "## Which reach, which rate",
        "",
        "Rank 8, two seeds that judge nothing, validation scores [%]. **Rule:** the reach with the highest mean over tasks and rates; at it the rate "
        "with the highest mean.",
        "",
        *table,
        "",
        f"**Reach {chosen:g}, rate {rate:g}.**",
        "",
    ]


def decisive() -> list[str]:
    (chosen, rate), tasks = knobs.chosen_default(), knobs.read("knob")
    cells = knobs.knob(tasks, chosen)
    pretrained = {name: task for name, task in tasks.items() if name in ("film reviews", "chat")}
    second = knobs.knob(pretrained, reach.PRETRAINED)
    beside = knobs.knob({name: task for name, task in tasks.items() if name == "product ratings"}, reach.PRETRAINED)
    return [
        "## Against LoRA, tuned",
        "",
        "LoRA has alpha = 2 r and, for each task and rank, the best of its rates by validation on the judged seeds (subjects: by the score itself, in "
        "LoRA's favour). **Claim, fixed before:** at one reach, on every task, at every rank and every rate DeLoRA's mean test score is at most one "
        'standard error of the paired difference below LoRA\'s. A cell fails at more than two; between the two it is undecided ("?").',
        "",
        f"DeLoRA less LoRA in points, at the reach {chosen:g} that the rule chose:",
        "",
        *_cells(cells),
        "",
        f"{_outcome(cells)} At the one rate {rate:g} alone: {_counts([c for c in cells if c.lr == rate])}. {_spread(cells)}",
        "",
        "**A second claim, set after `choose` and before its own runs:** for models that others have pretrained "
        f"({', '.join(pretrained)}) the reach {reach.PRETRAINED:g} is enough, by the same rule.",
        "",
        *_cells(second),
        "",
        f"{_outcome(second)} {_spread(second)}",
        "",
        "Product ratings, which it did not name, at the same reach:",
        "",
        *_cells(beside),
        "",
        f"Here {_counts(beside)}. {_spread(beside)}",
        "",
    ]


def _cells(cells: list[knobs.Cell]) -> list[str]:
    rates = sorted({c.lr for c in cells})
    table = [
        "| task | rank | LoRA, its rate | " + " | ".join(f"rate {lr:g}" for lr in rates) + " |",
        "|---" * (3 + len(rates)) + "|",
    ]
    for task, r in dict.fromkeys((c.task, c.r) for c in cells):
        row = {c.lr: c for c in cells if (c.task, c.r) == (task, r)}
        first = next(iter(row.values()))
        shown = [f"{_gain(row[lr].gain)}{MARKS[row[lr].outcome]}" if lr in row else "–" for lr in rates]
        table.append(f"| {task} | {r:g} | {100 * first.lora:.1f} at {first.lora_lr:g} | " + " | ".join(shown) + " |")
    return table


MARKS = {"holds": "", "undecided": " ?", "fails": " **no**"}


def _counts(cells: list[knobs.Cell]) -> str:
    counts = {outcome: sum(c.outcome == outcome for c in cells) for outcome in MARKS}
    return f"of {len(cells)} cells: holds {counts['holds']}, undecided {counts['undecided']}, fails {counts['fails']}"


def _outcome(cells: list[knobs.Cell]) -> str:
    outcomes = {c.outcome for c in cells}
    word = "fails" if "fails" in outcomes else "is undecided" if "undecided" in outcomes else "holds"
    return f"**The claim {word}**: {_counts(cells)}."


def _spread(cells: Iterable[knobs.Cell]) -> str:
    """How much the rate moves each method, in words."""
    by_row: dict[tuple[str, float], list[float]] = {}
    for c in cells:
        by_row.setdefault((c.task, c.r), []).append(c.gain.score)
    ours = max(max(v) - min(v) for v in by_row.values())
    theirs: list[float] = []
    for name, task in knobs.read("knob").items():
        if name not in {c.task for c in cells}:
            continue
        for r in sorted({row["r"] for row in task.rows}):
            rates = sorted({row["lr"] for row in task.rows if (row["case"], row["r"]) == ("LoRA", r)})
            means = [fmean(task.scores(case="LoRA", r=r, lr=lr).values()) for lr in rates]
            theirs.append(max(means) - min(means))
    span = " to ".join(dict.fromkeys(f"{100 * moved:.1f}" for moved in (min(theirs), max(theirs))))
    return (
        f"Over its rates, a factor of 20, DeLoRA's score moves by at most {100 * ours:.1f} points in any row; LoRA's, over a factor of 10 to 33, by "
        f"{span}."
    )


def starts() -> list[str]:
    if not knobs.read("equal"):
        return [
            "## The starts at equal reach",
            "",
            "The rule and the runs are written (`knobs.equal_starts`); they were not run yet.",
            "",
        ]
    equal = knobs.starts()
    start, gains = knobs.equal_starts(equal)
    outcome = f"**By this rule `{start}` {'stays' if start == 'subtract' else 'takes the place of `subtract`'}.**"
    if start != "subtract":
        outcome += (
            " **It is not followed, `subtract` stays**: the next two sections have what this rule did not look at, a reach that is too high and few rows. "
            "There the chosen start falls to chance where `subtract` does not."
        )
    if own := [name for name, task in knobs.read("equal").items() if any(r["case"] == "subtract" for r in task.rows)]:
        outcome += (
            f" The runs of this section on {' and '.join(own)} are in float32, those of `subtract` as well, unlike all others there: the processor at "
            "hand took eight times as long in bfloat16. That was set before the first of them."
        )
    outcome += f" |dW|/|W| is, in the mean, {_reached(equal)}."
    if missing := [name for name in knobs.read("strength") if name not in equal]:
        outcome = (
            f"**Not decided: the rule is about the mean over the tasks, and {' and '.join(missing)} were not run.** On what was run "
            f"it would be `{start}`. There this reach is too small for every start (see above), so that those are better which come further with it: |dW|/|W| is {_reached(equal)}."
        )
    return [
        "## The starts at equal reach",
        "",
        "At equal lam `subtract` is stronger by a factor of sqrt(2) than the starts of rank r, whose change needs half the rank on export and half the "
        f"file. Here all have reach {reach.REACH:g}. A score is the mean over the rates {', '.join(f'{lr:g}' for lr in reach.RATES)}. **Rule:** a start of rank r takes "
        "the place of `subtract` if in the mean over the tasks it is at most one standard error below, and on no task more than two.",
        "",
        "Gains over `subtract` in points:",
        "",
        *_gains(gains, "start"),
        "",
        outcome,
        "",
    ]


def chosen_start() -> list[str]:
    tasks = knobs.read("knob-start")
    if not tasks:
        return []
    start = knobs.chosen_start()
    lines = [
        "## The chosen start against LoRA, tuned",
        "",
        f"The runs of DeLoRA above, with the start `{start}`, beside the same runs of LoRA, at the same seeds. **Claims, fixed before these runs**, by the "
        "rule above: those of the section on LoRA. LoRA's scores, and DeLoRA's of `subtract`, were known.",
        "",
    ]
    chosen, _ = knobs.chosen_default()
    for own, named in ((chosen, tasks), (reach.PRETRAINED, {n: t for n, t in tasks.items() if n != "turned digits"})):
        cells = knobs.knob(named, own)
        lines += [f"Reach {own:g}:", "", *_cells(cells), "", f"{_outcome(cells)} {_spread(cells)}", ""]
    return lines


def few() -> list[str]:
    tasks = knobs.read("few")
    if not tasks:
        return []
    ((_, task),) = tasks.items()
    columns = [(epochs, lr) for epochs in reach.FEW_EPOCHS for lr in reach.STEP_RATES]
    table = ["| start | " + " | ".join(f"{epochs} epochs, rate {lr:g}" for epochs, lr in columns) + " |"]
    table.append("|---" * (1 + len(columns)) + "|")
    for case in reach.FEW_STARTS:
        found = [list(task.scores(case=case, lr=lr, epochs=epochs).values()) for epochs, lr in columns]
        table.append(f"| {case} | " + " | ".join(f"{100 * fmean(f):.1f} ({len(f)})" if f else "–" for f in found) + " |")
    planned = len(reach.FEW_SEEDS) * len(columns) * len(reach.FEW_STARTS)
    return [
        "## Few rows, all linear layers",
        "",
        f"{reach.FEW_ROWS} film reviews in batches of 4, every linear layer as `delora finetune` has it, rank 8, reach {reach.REACH:g}, float32. Seen before it was written: on "
        "made-up tickets, at rate 0.03, `soft 0.03` ended at chance with three of three seeds and `subtract` was right with all. `soft 0.3` was added because a B that "
        "is drawn has entries of 0.2. Mean test scores [%], and the number of seeds:",
        "",
        *table,
        "",
        f"**Stopped after {len(task.rows)} of {planned} runs, so its rules are not applied**: at 0.03 and more hardly any run leaves chance, and the next section asks "
        "for a better setting. Of the starts of rank r only `soft 0.3` keeps up with `subtract` here; it was not compared elsewhere.",
        "",
    ]


def own() -> list[str]:
    tasks, judged = knobs.read("own-choose"), knobs.read("own-judged")
    if not tasks:
        return []
    ((_, task),) = tasks.items()
    (own, rate), lora_rate = knobs.own_default()
    sizes = {rows: epochs for rows, (epochs, _) in reach.OWN_ROWS.items()}
    table = ["| method | rate | " + " | ".join(f"{rows:,} rows" for rows in sizes) + " |", "|---" * (2 + len(sizes)) + "|"]
    cases = [
        (f"DeLoRA, reach {r:g}", lr, {"case": "DeLoRA", "reach": r}) for r in reach.OWN_GRID[0] for lr in reach.OWN_GRID[1]
    ]
    cases += [("LoRA", lr, {"case": "LoRA"}) for lr in reach.OWN_LORA_RATES]
    for name, lr, having in cases:
        scores = [100 * fmean(task.scores("validation", lr=lr, epochs=n, **having).values()) for n in sizes.values()]
        table.append(f"| {name} | {lr:g} | " + " | ".join(f"{score:.1f}" for score in scores) + " |")
    lines = [
        "## What `delora finetune` begins with",
        "",
        "Film reviews as `delora finetune` sets them up: every linear layer, rank 8, batches and epochs by the number of rows, float32. "
        f"**Rule, fixed before the runs:** the reach and the rate with the highest mean over both numbers of rows and {len(reach.OWN_CHOOSING)} seeds, by validation [%]; "
        "LoRA's rate likewise. With query and value alone reach 0.1 held at every rate (above).",
        "",
        *table,
        "",
        f"**Reach {own:g}, rate {rate:g}**; LoRA {lora_rate:g}. `delora finetune` begins so for a model with a new head.",
        "",
    ]
    for test in judged.values():
        lines += _judged_own(knobs.own_cells(test), len(reach.OWN_JUDGING), "Test scores [%]")
    return lines + unseen()


def unseen() -> list[str]:
    """The same claim on a table that chose nothing."""
    if not (judged := knobs.read("judged")):
        return []
    sizes = {rows: {"rows": rows} for rows in reach.OWN_ROWS}
    return [
        "Headlines, of which half are satire (the package `evals`; MIT), chose none of this. The recipe is the one that `delora finetune` makes of the "
        "table; LoRA has the rate that film reviews chose, and alpha 16.",
        "",
        *_judged_own(knobs.own_cells(judged["headlines"], sizes), len(reach.HEADLINES), "Test scores [%]"),
    ]


def _judged_own(found: Mapping[tuple[int, float], tuple[float, Gain]], seeds: int, scores: str) -> list[str]:
    """The claim of `knobs.own_cells`, and what came of it."""
    cells = ["| rows | rates | LoRA | DeLoRA less LoRA |", "|---|---|---|---|"]
    for (count, factor), (score, gain) in found.items():
        times = "the chosen" if factor == 1 else f"{factor:g} times"
        cells.append(f"| {count:,} | {times} | {100 * score:.1f} | {_gain(gain)} |")
    rows = "both numbers of rows" if len({count for count, _ in found}) == 2 else "the lower number of rows"
    least = {1.0: 1, 3.0: 2}
    holds = all(gain.gain >= -least[factor] * gain.error for (_, factor), (_, gain) in found.items())
    return [
        f"**Claim, fixed before:** at {seeds} new seeds, for {rows}, DeLoRA is at most one standard error below LoRA at the chosen rates, and not "
        f"more than two at three times these. {scores}:",
        "",
        *cells,
        "",
        f"**The claim {'holds' if holds else 'fails'}.**",
        "",
    ]


def chats() -> list[str]:
    tasks, judged = knobs.read("chats-choose"), knobs.read("chats-judged")
    if not tasks:
        return []
    ((_, task),) = tasks.items()
    (own, rate), lora_rate = knobs.chats_default(task)
    chosen: dict[str, tuple[str, dict[str, Any]]] = {
        "the base model": ("test_before", {}),
        f"DeLoRA at {own:g} and {rate:g}": ("test", {"case": "DeLoRA", "reach": own, "lr": rate}),
        f"LoRA at {lora_rate:g}": ("test", {"case": "LoRA", "lr": lora_rate}),
    }
    tests = {
        name: " and ".join(f"{100 * fmean(task.scores(key, rows=n, **having).values()):.2f}" for n in reach.CHATS_ROWS)
        for name, (key, having) in chosen.items()
    }
    table = ["| method | rate | " + " | ".join(f"{rows:,} chats" for rows in reach.CHATS_ROWS) + " | times the perplexity |"]
    table.append("|---" * (3 + len(reach.CHATS_ROWS)) + "|")
    cases: list[tuple[str, dict[str, float | str]]] = [
        (f"DeLoRA, reach {r:g}", {"case": "DeLoRA", "reach": r, "lr": lr})
        for r in reach.CHATS_GRID[0]
        for lr in reach.CHATS_GRID[1]
    ]
    cases += [("LoRA", {"case": "LoRA", "lr": lr}) for lr in reach.CHATS_LORA_RATES]
    for name, having in cases:
        scores = [100 * fmean(task.scores("validation", rows=n, **having).values()) for n in reach.CHATS_ROWS]
        shown = " | ".join(f"{score:.2f}" for score in scores)
        table.append(f"| {name} | {having['lr']:g} | {shown} | {knobs.forgotten(task, **having):.2f} |")
    lines = [
        "## What `delora finetune` begins with for chats",
        "",
        "SmolLM2-135M-Instruct on short conversations with a chat bot (the package `chatterbot-corpus`), every linear layer, rank 8, batches and epochs as "
        "`delora finetune` takes them, float32. Scores are the probability of a held-out token of an answer (geometric mean) [%]. "
        "What is forgotten is the perplexity on newspapers, in times of the base model's. **Rule, fixed before the runs:** the reach and the rate "
        f"with the highest mean by validation over both numbers of chats, among those with at most {reach.FORGOTTEN:g} times the perplexity; LoRA's rate likewise; "
        "where none has so little, the one with the least.",
        "",
        *table,
        "",
        f"**Reach {own:g}, rate {rate:g}**; LoRA {lora_rate:g}. `delora finetune` begins so for chats. On the test parts, for "
        f"{' and '.join(str(n) for n in reach.CHATS_ROWS)} chats: {'; '.join(f'{name} {found}' for name, found in tests.items())}. The rates 0.001, and "
        "0.003 of LoRA, were added after ten runs, in which the outermost rates were the best.",
        "",
    ]
    for test in judged.values():
        sizes = {rows: {"rows": rows} for rows in reach.CHATS_JUDGED}
        lines += _judged_own(knobs.own_cells(test, sizes), len(reach.CHATS_JUDGING), "Test scores [%]")
        lost = {case: knobs.forgotten(test, case=case, factor=1.0) for case in knobs.CASES}
        words = " and ".join(f"{times:.2f} with {case}" for case, times in lost.items())
        lines += [f"At the chosen rates the perplexity on newspapers is, in times of the base model's, {words}.", ""]
    return lines


def turned() -> list[str]:
    """What the strength chosen after training is worth."""
    tasks = knobs.read("dial")
    if not tasks:
        return []
    table = [
        "| task | run | strengths chosen | test at 1 [%] | gain | with the budget: strengths | test [%] | upright [%] (at 1) |"
    ]
    table.append("|---" * 8 + "|")
    claims = []
    for name, task in tasks.items():
        for case in dict.fromkeys(row["case"] for row in task.rows):
            rows = [row for row in task.rows if row["case"] == case and "curve" in row]
            worth = dial.worth(rows, case)
            claims.append(dial.outcome(worth, untuned="untuned" in case))
            one = [dial.at(row, 1.0) for row in rows]
            cells = [name, case, _each(row["strength"] for row in rows), f"{100 * fmean(p['test'] for p in one):.1f}"]
            cells.append(f"{_gain(worth)} {claims[-1]}")
            if all("within" in row for row in rows):
                inside = [dial.at(row, row["within"]) for row in rows]
                kept = f"{100 * fmean(p['kept'] for p in inside):.1f} ({100 * fmean(p['kept'] for p in one):.1f})"
                cells += [_each(row["within"] for row in rows), f"{100 * fmean(p['test'] for p in inside):.1f}", kept]
            else:
                cells += ["–"] * 3
            table.append(f"| {' | '.join(cells)} |")
    return [
        "## The strength chosen after training",
        "",
        "`delora.choose_strength` by validation, without further training, among 0, 0.25, ... 2; 1 is what was trained. Tuned runs are those of the section on LoRA "
        "(the reach of that task, rate 0.1; LoRA 0.003); untuned ones have twice the reach or more, on film reviews three times the rate, and LoRA's is 0.01. **Claims, "
        "fixed before the runs:** for tuned runs the gain in test score is not more than two standard errors below 0, for untuned ones more than two above. With a budget "
        f"a run keeps at least {dial.KEPT:.0%} of what the base model can (upright digits).",
        "",
        *table,
        "",
        f"Of {len(claims)} claims these hold: {claims.count('yes')}; undecided (?): {claims.count('?')}; these fail: {claims.count('no')}.",
        "",
        "![Accuracy on turned against upright digits over the strength](figures/forgetting-digits.png)",
        "",
        "*Turned digits against upright ones, which the base model knew, over the strength, chosen after training: means of five seeds. Strengths 0.5, 1 "
        "and 2 are written beside their points.*",
        "",
    ]


def _each(strengths: Iterable[float]) -> str:
    return ", ".join(f"{s:g}" for s in sorted(strengths))


def _reached(tasks: Mapping[str, Task]) -> str:
    """How far each start has come, in words."""
    rows = [row for task in tasks.values() for row in task.rows]
    far = {
        start: fmean(r.get("relative", r["distance"]) for r in rows if r["case"] == start)
        for start in ("subtract", *reach.STARTS)
    }
    return ", ".join(f"{100 * share:.1f} % with `{start}`" for start, share in far.items())


def forgetting() -> list[str]:
    tasks = knobs.read("knob")
    lines = [
        "## What is gained, what is forgotten",
        "",
        "The runs above at rank 8: the score, and of the base model's task what is left: on digits the accuracy on upright digits, with the chat "
        "model the perplexity on newspapers (its logarithm's mean). Means over the seeds.",
        "",
    ]
    for name, score, (key, kept, show) in (
        ("turned digits", {"test": "accuracy"}, ("upright", "upright digits [%]", lambda v: f"{100 * v:.1f}")),
        (
            "chat",
            {"likelihood": "likelihood of a response", "test": "both tasks"},
            ("perplexity", "perplexity on newspapers", lambda v: f"{v:,.0f}"),
        ),
    ):
        if name not in tasks:
            continue
        heads = " | ".join(f"{word} [%]" for word in score.values())
        lines += [
            f"{name.capitalize()}:",
            "",
            f"| method | rate | {heads} | {kept} | dW/W [%] |",
            "|---" * (4 + len(score)) + "|",
        ]
        for (case, lr), runs in by_setting(r for r in tasks[name].rows if r["r"] == 8 and key in r).items():
            left = math.exp(fmean(math.log(r[key]) for r in runs)) if key == "perplexity" else fmean(r[key] for r in runs)
            far = fmean(r.get("relative", r["distance"]) for r in runs)
            scores = " | ".join(f"{100 * fmean(r[of] for r in runs):.1f}" for of in score)
            lines.append(f"| {case} | {lr:g} | {scores} | {show(left)} | {100 * far:.1f} |")
        lines.append("")
        if name == "chat":
            lines += [
                "![Likelihood of responses against the perplexity on newspapers](figures/forgetting-chat.png)",
                "",
                "*The chat model: likelihood of responses against the perplexity on newspapers, whose scale runs to the left (better is up and to the right); the rates are beside their points.*",
                "",
            ]
    return lines


def by_setting(rows: Iterable[knobs.Row]) -> dict[tuple[str, float], list[knobs.Row]]:
    """The runs of each method, whose name has its reach, and rate.

    >>> row = {"case": "DeLoRA", "lr": 0.1}
    >>> list(by_setting([row | {"reach": 0.25}, row | {"reach": 0.1}, row | {"reach": 0.1}]))
    [('DeLoRA, reach 0.1', 0.1), ('DeLoRA, reach 0.25', 0.1)]
    """
    found: dict[tuple[str, float], list[knobs.Row]] = {}
    for row in sorted(rows, key=lambda r: (r["case"], r.get("reach", 0.0), r["lr"])):
        case = f"{row['case']}, reach {row['reach']:g}" if "reach" in row else row["case"]
        found.setdefault((case, row["lr"]), []).append(row)
    return found


if __name__ == "__main__":
    write_atomically(PAGE, page().encode())
