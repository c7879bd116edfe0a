"""Keep the results of a stand-in's recipe, and write paper/docs/standins.md from all that are kept.

delora train paper/standins/recipes/ratings.toml
python -m paper.studies.standins runs/ratings-standin
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

from delora.formats.files import write_atomically
from delora.reports.experiment import score
from delora.training.experiments import Outcome
from delora.training.runs import CONFIG, Result, Row, best_rows

RESULTS, PAGE = Path("paper/results/standins"), Path("paper/docs/standins.md")
NEAR = 0.02  # the rule: DeLoRA at most two points below LoRA

HEAD = """# Stand-ins for the language experiments

Written by `python -m paper.studies.standins`: every result on this page is computed from the rows in `paper/results/standins/`. **Not the paper's
models or data**: these are small packaged ones, run by the same code as the paper's recipes, and no number here is comparable with the paper's.
Every method is trained, selected, scored and delivered as in the recipes for GLUE. Its setting is the better one of two rates by validation.
Methods that lie within each other's deviations are not ranked by these tables.
"""
WHAT = {
    "sentences": "Film reviews, positive or negative (MiniLM, 800 training sentences, two epochs, 800 test sentences)",
    "ratings": "How people rated product reviews, from -4 to 4: the average of Pearson and Spearman (MiniLM, sizes as above)",
    "smollm2": "Instructions about film reviews (SmolLM2-135M-Instruct): multiple choice by likelihood; perplexity on editorials",
}


def keep(folder: Path) -> str:
    """Keeps the results of a finished experiment as rows, with a file that says how they were made."""
    summary, config = Outcome.read(folder), json.loads((folder / CONFIG).read_text("utf-8"))
    name = config["name"].removesuffix("-standin")
    RESULTS.mkdir(parents=True, exist_ok=True)
    rows = [dataclasses.asdict(result) for result in summary.results]
    write_atomically(RESULTS / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    about = {
        "command": f"delora train paper/standins/recipes/{name}.toml",
        "minutes": round(sum(row["seconds"] for row in rows) / 60, 1),
        "agreement": summary.agreement,
        "test": summary.test,
        **summary.environment,
    }
    write_atomically(RESULTS / f"{name}.json", (json.dumps(about, indent=1) + "\n").encode())
    return name


def read(name: str) -> list[Result]:
    file = RESULTS / f"{name}.jsonl"
    return [Result.of(json.loads(line), file) for line in file.read_text("utf-8").splitlines()] if file.is_file() else []


def page() -> str:
    lines = [HEAD]
    for name, what in WHAT.items():
        results = read(name)
        if results:
            about = json.loads((RESULTS / f"{name}.json").read_text("utf-8"))
            lines += [f"## {what}", "", *_table(results), "", _note(results, about), ""]
    return "\n".join(lines)


def _table(results: list[Result]) -> list[str]:
    rows = sorted(best_rows(results), key=Row.validation, reverse=True)
    others = [n for n in rows[0].runs[0].scores if n != rows[0].runs[0].reported]
    table = [["method", f"{rows[0].runs[0].reported} [%]", *others, "setting", "trainable"]]
    table.append(["---"] * len(table[0]))
    for row in rows:
        cells = [_mean(row, name) for name in others]
        table.append([row.name, score(row, None), *cells, row.setting, f"{row.runs[0].trainable:,}"])
    return [f"| {' | '.join(line)} |" for line in table]


def _mean(row: Row, name: str) -> str:
    values = row.values(lambda r: r.scores.get(name))
    unit = 1 if "perplexity" in name else 100
    return f"{unit * fmean(values):.1f}" if values else "–"


def _note(results: list[Result], about: dict[str, Any]) -> str:
    seeds = sorted({r.seed for r in results})
    means = {row.name: fmean(row.values(lambda r: r.test)) for row in best_rows(results) if row.values(lambda r: r.test)}
    settings: dict[str, list[str]] = {}
    for result in results:
        settings.setdefault(result.row, []).append(result.setting)
    tuned = {row: names for row, names in settings.items() if len(set(names)) > 1}
    edge = sum(
        row.setting == tuned[row.name][-1] for row in best_rows(results) if row.name in tuned
    )  # the last is the largest rate
    searched = (
        f"For {edge} of {len(tuned)} methods the larger of their rates was the better one. "
        if tuned
        else "No rate was searched for. "
    )
    difference = means["DeLoRA"] - means["LoRA"]
    judged = "holds" if difference >= -NEAR else "does not hold"
    same = ", ".join(f"{kind} {count:,}" for kind, count in about["agreement"].items())
    return (
        f"Mean ± standard deviation over {len(seeds)} seed{'s' if len(seeds) > 1 else ''} "
        f"({', '.join(map(str, seeds))}); sorted by validation. Rule, fixed before: DeLoRA is at most two points below LoRA. Its difference is "
        f"{100 * difference:+.1f} points: **{judged}**. {searched}The delivered run was read back in each format; of {about['test']:,} predictions "
        f"these are the same: {same}. {len(results)} runs, {about['minutes']:.0f} minutes of training on one core each, `{about['command']}`, "
        f"torch {about['torch']}."
    )


if __name__ == "__main__":
    for folder in sys.argv[1:]:
        print("kept:", keep(Path(folder)))
    write_atomically(PAGE, page().encode())
