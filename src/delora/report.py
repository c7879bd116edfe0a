"""An experiment's outcome as a table and as one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path

from delora.evaluation.text import standard_error
from delora.files import write_atomically
from delora.plots import draw
from delora.recipes.classification import Summary
from delora.training.runs import CONFIG, METRICS, Result, shown

REPORT = "report.html"
HEADER = ("Run", "Test accuracy [%]", "Validation [%]", "Trainable", "Adapter [kB]", "Seconds", "|dW|/|W|")
NOTHING = "–"

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: #1a1a1a; background: #fff;
       max-width: 54rem; margin: 3rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.1rem; margin: 2.4rem 0 .6rem; }
p.what { color: #555; margin: 0 0 1.6rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .93rem; }
th, td { padding: .45rem .5rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th { font-weight: 600; border-bottom: 2px solid #1a1a1a; vertical-align: bottom; white-space: normal; }
th:first-child, td:first-child { text-align: left; }
tr.delivered td { background: #eef4fa; }
figure { margin: 1.2rem 0; break-inside: avoid; }
figure img { max-width: 100%; height: auto; }
pre { background: #f6f6f6; padding: 1rem; font-size: .8rem; line-height: 1.4; white-space: pre-wrap; overflow-wrap: anywhere; }
ul { padding-left: 1.2rem; }
@media print { body { margin: 0 auto; max-width: none; font-size: 11pt; } h2 { break-after: avoid; } }
"""


def table(summary: Summary) -> list[tuple[str, ...]]:
    """The rows under `HEADER`; of the runs that share a row, the best by validation."""
    results = shown(summary.results)
    return [_row(r, summary) for r in results]


def _row(r: Result, summary: Summary) -> tuple[str, ...]:
    name = r.row if r.row == r.name else f"{r.row} ({r.name})"
    if r.diverged is not None or r.test_accuracy is None or r.validation_accuracy is None:
        scores = (f"diverged at step {r.diverged}", NOTHING)
    else:
        error = standard_error(r.test_accuracy, summary.test)
        scores = (f"{100 * r.test_accuracy:.1f} ± {100 * error:.1f}", f"{100 * r.validation_accuracy:.1f}")
    size = NOTHING if r.adapter_bytes is None else f"{r.adapter_bytes / 1000:,.0f}"
    distance = NOTHING if r.distance is None else f"{r.distance:.2f}"
    return name, *scores, f"{r.trainable:,}", size, f"{r.seconds:.0f}", distance


def reading(summary: Summary) -> list[str]:
    """What the table says, and what it does not."""
    lines = [
        f"± is one standard error of an accuracy over {summary.test:,} test sentences. Every figure is of one seed: "
        "differences of less than about two standard errors say nothing about which method is better.",
        "The best epoch, and the best run of a row, were chosen on the validation sentences alone.",
        "|dW|/|W| is the mean over the adapted layers at the best epoch; modules that are trained whole are not in it. "
        "Seconds are of training and validation.",
    ]
    same = ", ".join(f"{kind} {count:,}" for kind, count in summary.agreement.items())
    return [
        *lines,
        f"“{summary.delivered}” was saved, merged and exported. Read back into a fresh model, of {summary.test:,} test "
        f"predictions these are those of the trained model: {same}.",
    ]


def write(out: Path) -> Path:
    """``report.html`` and its plots, from what is in a finished experiment's folder."""
    summary = Summary.read(out)
    plots = draw(out / METRICS, [r.name for r in shown(summary.results)], out)
    config = json.loads((out / CONFIG).read_text())
    write_atomically(out / REPORT, page(summary, config, plots).encode())
    return out / REPORT


def page(summary: Summary, config: dict[str, object], plots: Sequence[Path]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in HEADER)
    body = "".join(
        f"<tr{' class=delivered' if result.name == summary.delivered else ''}>"
        + "".join(f"<td>{escape(cell)}</td>" for cell in row)
        + "</tr>\n"
        for result, row in zip(shown(summary.results), table(summary), strict=True)
    )
    figures = "".join(
        f'<figure><img alt="{escape(plot.stem)} per optimizer step" '
        f'src="data:image/png;base64,{base64.b64encode(plot.read_bytes()).decode()}"></figure>\n'
        for plot in plots
    )
    notes = "".join(f"<li>{escape(line)}</li>\n" for line in reading(summary))
    versions = ", ".join(f"{key} {value}" for key, value in summary.environment.items())
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(summary.name)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{escape(summary.name)}</h1>
<p class="what">{escape(str(config.get("model", "")))}; {escape(versions)}</p>
<table>
<thead><tr>{head}</tr></thead>
<tbody>
{body}</tbody>
</table>
<h2>Reading it</h2>
<ul>
{notes}</ul>
<h2>Curves</h2>
{figures}
<h2>Settings</h2>
<pre>{escape(json.dumps(config, indent=1, ensure_ascii=False))}</pre>
</body>
</html>
"""
