"""Pages in one file, without a network: tables that a click on a head sorts, pictures that say their values when pointed at."""

from __future__ import annotations

import base64
from collections.abc import Collection, Sequence
from hashlib import sha256
from html import escape
from math import isfinite
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

__all__ = ["document", "picture", "spots", "table"]

POINTS = 80  # of a line, at the most

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: #1a1a1a; background: #fff;
       max-width: 54rem; margin: 3rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.1rem; margin: 2.4rem 0 .6rem; }
p.what { color: #555; margin: 0 0 1.6rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .93rem; }
th, td { padding: .45rem .5rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th { font-weight: 600; border-bottom: 2px solid #1a1a1a; vertical-align: bottom; white-space: normal; }
th:first-child, td:first-child, .words th, .words td { text-align: left; }
.words td { white-space: normal; overflow-wrap: anywhere; vertical-align: top; }
th[tabindex] { cursor: pointer; }
th[tabindex]:hover { background: #f2f2f2; }
th[aria-sort=ascending]::after { content: " ▲"; font-size: .7em; }
th[aria-sort=descending]::after { content: " ▼"; font-size: .7em; }
tr.delivered td { background: #eef4fa; }
figure { margin: 1.2rem 0; break-inside: avoid; }
figcaption { color: #555; font-size: .85rem; }
figure img { max-width: 100%; height: auto; display: block; }
.values { position: relative; display: inline-block; }
.values svg { position: absolute; inset: 0; width: 100%; height: 100%; }
.values circle { fill: transparent; }
.values circle:hover { fill: #0006; }
pre { background: #f6f6f6; padding: 1rem; font-size: .8rem; line-height: 1.4; white-space: pre-wrap; overflow-wrap: anywhere; }
ul { padding-left: 1.2rem; }
@media print { body { margin: 0 auto; max-width: none; font-size: 11pt; } h2 { break-after: avoid; } }
"""

# A click, or the key Enter: names from A to Z first, numbers from the highest; a cell without a number is last either way.
SCRIPT = """
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, column) => {
    const text = row => row.cells[column].innerText;
    const number = row => parseFloat(text(row).replaceAll(",", ""));
    const compare = (a, b, sign) => {
      if (column === 0) return sign * text(a).localeCompare(text(b), undefined, {numeric: true});
      const [x, y] = [number(a), number(b)];
      return isNaN(x) || isNaN(y) ? isNaN(x) - isNaN(y) : sign * (x - y);
    };
    const sort = () => {
      const sign = {ascending: -1, descending: 1}[head.getAttribute("aria-sort")] ?? (column === 0 ? 1 : -1);
      heads.forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      body.append(...[...body.rows].sort((a, b) => compare(a, b, sign)));
    };
    head.tabIndex = 0;
    head.title = "Sort by this column";
    head.addEventListener("click", sort);
    head.addEventListener("keydown", event => { if (event.key === "Enter") sort(); });
  });
}
"""
HASH = base64.b64encode(sha256(SCRIPT.encode()).digest()).decode()
# The one script may run; nothing is fetched, whatever a name in the page says.
POLICY = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{HASH}'"


def document(title: str, body: str) -> str:
    """The text of a page. ``body`` is HTML, ``title`` is text.

    >>> "<title>a &lt; b</title>" in document("a < b", "<p>Hello.</p>")
    True
    """
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
{body}
<script>{SCRIPT}</script>
</body>
</html>
"""


def table(header: Sequence[str], rows: Sequence[Sequence[str]], delivered: Collection[int] = (), words: bool = False) -> str:
    """A table of text cells. ``delivered``: the numbers of the rows that stand out. ``words``: it holds sentences, not figures.

    >>> table(["Run"], [["a < b"]]).splitlines()[3]
    '<tr><td>a &lt; b</td></tr>'
    """

    def cell(text: str, tag: str = "td") -> str:
        return f"<{tag}>{escape(text).replace(chr(10), '<br>')}</{tag}>"

    body = "".join(
        f"<tr{' class=delivered' if number in delivered else ''}>{''.join(map(cell, row))}</tr>\n"
        for number, row in enumerate(rows)
    )
    head = "".join(cell(name, "th") for name in header)
    return f"<table{' class=words' if words else ''}>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>"


def picture(png: Path, name: str, values: str = "", note: str = "") -> str:
    """A picture inside the page, with the `spots` of its figure over it."""
    data = base64.b64encode(png.read_bytes()).decode()
    caption = f"<figcaption>{escape(note)}</figcaption>" if note else ""
    image = f'<img alt="{escape(name)}" src="data:image/png;base64,{data}">'
    return f'<figure><div class="values">{image}{values}</div>{caption}</figure>'


def spots(figure: Figure) -> str:
    """The points of a figure's lines as an SVG to lay over its picture, each with its value as a title; "" without lines.

    The figure must have been drawn: before, its axes are not where they will be.

    >>> figure = Figure()
    >>> _ = figure.subplots().plot([10, 20], [0.5, 0.25], label="LoRA")
    >>> "<title>LoRA, 20: 0.25</title>" in spots(figure)
    True
    """
    width, height = figure.bbox.width, figure.bbox.height
    marks = []
    for axes in figure.axes:
        for line in axes.lines:
            if str(line.get_label()).startswith("_"):  # matplotlib's names of lines that have none
                continue
            points = np.asarray(line.get_xydata(), dtype=float).tolist()
            last = len(points) - 1
            kept = {round(i * last / (POINTS - 1)) for i in range(POINTS)} if last >= POINTS else range(last + 1)
            for x, y in (points[i] for i in sorted(kept)):
                right, up = axes.transData.transform((x, y))
                if isfinite(right) and isfinite(up):
                    said = f"{line.get_label()}, {axes.get_xlabel()} {x:g}: {y:.4g}".replace(r"\$", "$").replace(",  ", ", ")
                    place = f'cx="{right:.1f}" cy="{height - up:.1f}"'
                    marks.append(f'<circle {place} r="6"><title>{escape(said)}</title></circle>')
    return f'<svg viewBox="0 0 {width:g} {height:g}">{"".join(marks)}</svg>' if marks else ""
