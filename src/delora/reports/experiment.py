"""An experiment's outcome as a table and as one HTML file that needs nothing else."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping
from html import escape
from pathlib import Path

from delora.evaluation.text import standard_error
from delora.formats.files import read_json, write_atomically
from delora.reports import pages, samples
from delora.reports.curves import draw
from delora.training.experiments import Outcome
from delora.training.runs import CONFIG, METRICS, Result, Row, best_rows
from delora.training.task import Task

__all__ = ["header", "made_by", "page", "reading", "score", "table", "unlearned", "write"]

REPORT = "report.html"
NOTHING = "–"


def header(outcome: Outcome) -> tuple[str, ...]:
    """The names of the columns of `table`.

    >>> header(Outcome("mine", [], 0, "", {}, {}))[:2]
    ('Run', 'Test score [%]')
    """
    metrics = {result.reported for result in outcome.results}
    metric = metrics.pop() if len(metrics) == 1 else "score"
    return "Run", f"Test {metric} [%]", "Validation [%]", "Trainable", "Adapter [kB]", "Seconds", "|dW|/|W|"


def table(outcome: Outcome) -> list[tuple[str, ...]]:
    """The rows under `header`. Of the settings that share a row, the best by validation is shown.

    >>> names = dict(name="a", row="LoRA", setting="LoRA 3e-3", folder="a", task="mine", method="LoRA(r=8)")
    >>> result = Result(**names, seed=0, metric="f1", reported="f1", trainable=10, seconds=1.0, validation=0.7, test=0.6)
    >>> table(Outcome("mine", [result], 100, "a", {}, {}))
    [('LoRA (LoRA 3e-3)', '60.0', '70.0', '10', '–', '1', '–')]
    """
    return [_row(row, outcome.test) for row in best_rows(outcome.results)]


def _row(row: Row, examples: int) -> tuple[str, ...]:
    name = row.name if row.name == row.setting else f"{row.name} ({row.setting})"

    def mean(figure: Callable[[Result], float | None], form: str, unit: float = 1) -> str:
        values = row.values(figure)
        return format(unit * statistics.fmean(values), form) if values else NOTHING

    return (
        name,
        score(row, examples),
        mean(lambda r: r.validation, ".1f", 100),
        f"{row.runs[0].trainable:,}",
        mean(lambda r: r.adapter_bytes, ",.0f", 1e-3),
        mean(lambda r: r.seconds, ".0f"),
        mean(lambda r: r.distance, ".2f"),
    )


def score(row: Row, examples: int | None) -> str:
    """The test score in percent: mean ± standard deviation over the seeds.

    An accuracy of one seed has ± its standard error over ``examples`` instead.

    >>> names = dict(name="a", row="LoRA", setting="LoRA", folder="a", task="mine", method="LoRA(r=8)")
    >>> rest = dict(metric="accuracy", reported="accuracy", trainable=10, seconds=1.0)
    >>> score(Row([Result(**names, **rest, seed=0, test=0.5)]), examples=100)
    '50.0 ± 5.0'
    """
    values = row.values(lambda r: r.test)
    if not values:
        return f"diverged at step {row.diverged[0].diverged}"
    text = f"{100 * statistics.fmean(values):.1f}"
    if len(values) > 1:
        text += f" ± {100 * statistics.stdev(values):.1f}"
    elif examples is not None and row.runs[0].reported == "accuracy" and len(row.runs) == 1:
        text += f" ± {100 * standard_error(values[0], examples):.1f}"
    return text + (f" ({len(row.diverged)} of {len(row.runs)} seeds diverged)" if row.diverged else "")


def reading(outcome: Outcome, task: Task) -> list[str]:
    """Sentences that say how to read the table.

    >>> from delora import tasks
    >>> reading(Outcome("mine", [], 100, "a", {"adapter": 100}, {}), tasks.find("cola"))[-1][-12:]
    'adapter 100.'
    """
    seeds = len({result.seed for result in outcome.results})
    if any(len(row.runs) > 1 for row in best_rows(outcome.results)):
        spread = f"± is the standard deviation over {seeds} seeds, which also decide how the data are divided."
    else:
        spread = (
            f"± is one standard error of an accuracy over {outcome.test:,} test examples. Every figure is of one seed: "
            "differences of less than about two standard errors say nothing about which method is better."
            if any(result.reported == "accuracy" for result in outcome.results)
            else "Every figure is of one seed: small differences say nothing about which method is better."
        )
    lines = [
        spread,
        task.SELECTION,
        "|dW|/|W| is the mean over the adapted layers of the model that was kept, without modules trained whole. "
        "Seconds are those of training and validation.",
    ]
    same = ", ".join(f"{kind} {count:,}" for kind, count in outcome.agreement.items())
    return [
        *lines,
        f"“{outcome.delivered}” was saved, merged and exported, and each file read back into a fresh model. Of "
        f"{outcome.test:,} test predictions, this many equal those of the trained model: {same}.",
    ]


def unlearned(outcome: Outcome) -> list[str]:
    """A sentence if the run that was delivered is no better than its baseline.

    >>> names = dict(name="a", row="LoRA", setting="LoRA", folder="a", task="cola", method="LoRA(r=8)", seed=0)
    >>> run = Result(**names, metric="accuracy", reported="accuracy", trainable=10, seconds=1.0, test=0.5, baseline=0.5)
    >>> unlearned(Outcome("mine", [run], 100, "a", {}, {}))[0][:48]
    '“a” is no better than what has learned nothing: '
    """
    for run in outcome.results:
        if run.name != outcome.delivered or run.test is None or run.baseline is None:
            continue
        error = standard_error(run.test, outcome.test) if run.reported == "accuracy" and outcome.test else 0.0
        if run.test <= run.baseline + error:
            found = f"{100 * run.test:.1f} %" + (f" ± {100 * error:.1f}" if error else "")
            moved = "" if run.distance is None else f" Its layers changed by {100 * run.distance:,.1f} % of their norm."
            return [
                f"“{run.name}” is no better than what has learned nothing: its test {run.reported} is {found}, and "
                f"{100 * run.baseline:.1f} % without any learning.{moved} Lower train.lr, to a third, or raise it if next to "
                "nothing has changed; or take more rows."
            ]
    return []


def write(out: Path, task: Task) -> Path:
    """Write ``report.html`` and its plots into the folder of a finished experiment."""
    outcome = Outcome.read(out)
    plots = draw(out / METRICS, [row.runs[0].name for row in best_rows(outcome.results)], out)
    config = read_json(out / CONFIG)
    run = next((out / "variants" / run.folder for run in outcome.results if run.name == outcome.delivered), out)
    made = made_by(run, task, out / "samples.png")
    write_atomically(out / REPORT, page(outcome, task, config, plots, made).encode())
    return out / REPORT


def made_by(run: Path, task: Task, sheet: Path) -> str:
    """What a run answered or drew while it trained, the base model beside it, as a part of a page; "" if it did not.

    >>> from delora import tasks
    >>> made_by(Path("no such run"), tasks.find("cola"), Path("samples.png"))
    ''
    """
    parts = []
    if answered := samples.answers(run):
        parts.append(pages.table(("Question", "Model", "Answer"), answered, words=True))
    if drawn := samples.sheet({"After these steps (0: the base model)": task.snapshots(run)}, sheet):
        parts.append(pages.picture(drawn, "pictures from the same noise after more and more steps"))
    return "\n".join(["<h2>Samples</h2>", *parts]) if parts else ""


def page(outcome: Outcome, task: Task, config: dict[str, object], plots: Mapping[Path, str], made: str = "") -> str:
    """The text of ``report.html``, with the plots inside it, each with the SVG of its values. ``made``: of `made_by`.

    >>> from delora import tasks
    >>> "<title>mine</title>" in page(Outcome("mine", [], 100, "a", {}, {}), tasks.find("cola"), {}, {})
    True
    """
    best, rows = best_rows(outcome.results), table(outcome)
    delivered = [i for i, row in enumerate(best) if outcome.delivered in [run.name for run in row.runs]]
    figures = "\n".join(pages.picture(plot, f"{plot.stem} per optimizer step", spots) for plot, spots in plots.items())
    notes = "".join(f"<li>{escape(line)}</li>\n" for line in (*unlearned(outcome), *reading(outcome, task)))
    versions = ", ".join(f"{key} {value}" for key, value in outcome.environment.items())
    body = f"""<h1>{escape(outcome.name)}</h1>
<p class="what">{escape(str(config.get("model", "")))}; {escape(versions)}</p>
{pages.table(header(outcome), rows, delivered)}
<h2>Reading it</h2>
<ul>
{notes}</ul>
<h2>Curves</h2>
{figures}
{made}
<h2>Settings</h2>
<pre>{escape(json.dumps(config, indent=1, ensure_ascii=False))}</pre>"""
    return pages.document(outcome.name, body)
