"""The paper's kinds of figures, from plain rows: score and distance over rates, distance over steps, column norms, grids.

Each function returns a matplotlib figure; `save` writes it as PNG and PDF.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn

from delora.diagnostics import column_norms
from delora.formats.files import printable
from delora.reports.curves import COLOURS, DASHES, STYLE

__all__ = ["column_norm_profile", "grids", "kind", "over_rates", "over_steps", "save", "styles", "tradeoff"]

METHODS = ("LoRA", "DoRA", "ETHER+", "DeLoRA")
Rows = Iterable[Mapping[str, Any]]


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write ``stem.png`` and ``stem.pdf``. The same figure always gives the same bytes.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     [file.name for file in save(Figure(), Path(folder, "empty"))]
    ['empty.png', 'empty.pdf']
    """
    stem.parent.mkdir(parents=True, exist_ok=True)
    files = [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "pdf")]
    figure.savefig(files[0], dpi=150, metadata={"Software": None})
    figure.savefig(files[1], metadata={"Creator": None, "Producer": None, "CreationDate": None})
    return files


def over_rates(rows: Rows, cases: Sequence[str], score: str = "score", distance: str = "|W' - W|") -> Figure:
    """Figures 2, 5 and 6: score (left) and distance (right) over factors of each case's base rate.

    Rows have ``case``, ``factor``, ``score`` (a share) and ``distance``, one row for each seed. Lines are means, bands one
    standard deviation to both sides. A row without a score diverged: the line ends with a cross before its factor.

    >>> rows = [{"case": "LoRA", "factor": f, "score": 0.6, "distance": 0.1 * f} for f in (1, 2, 4)]
    >>> [axes.get_xlabel() for axes in over_rates(rows, ["LoRA"]).axes]
    ['factor of the base rate', 'factor of the base rate']
    """
    rows = list(rows)
    figure, (left, right) = _canvas(1, 2, (9.6, 3.4))
    for case, number in styles(cases).items():
        of_case = [r for r in rows if r["case"] == case]
        _line(left, of_case, "score", number, case, scale=100)
        _line(right, of_case, "distance", number, case)
    for axes in (left, right):
        factors = sorted({r["factor"] for r in rows})
        axes.set_xscale("log", base=2)
        axes.set_xticks(factors, [f"{f:g}" if f >= 1 else f"1/{1 / f:g}" for f in factors])
        axes.minorticks_off()
        axes.set_xlabel("factor of the base rate")
    left.set_ylabel(f"{score} [%]")
    if all((np.asarray(line.get_ydata(), dtype=float) >= 0).all() for line in left.lines):
        left.set_ylim(bottom=0)
    right.set_ylabel(distance)
    right.set_yscale("log")
    low, high = right.get_ylim()
    first_digits = "123456" if high < 30 * low else "1"  # more labels on a short axis
    for axis in (right.yaxis.set_major_formatter, right.yaxis.set_minor_formatter):
        axis(lambda y, _: f"{y:g}" if f"{y:e}"[0] in first_digits else "")
    _legend(right)
    return figure


def over_steps(
    rows: Rows, cases: Sequence[str], bound: str | None = None, score: str = "score", distance: str = "|W' - W|"
) -> Figure:
    """Figure 3: distance and score over training.

    Rows have ``case``, ``step``, ``distance`` and ``score``, one row for each seed. If none has a score, only the distance is
    drawn. ``bound`` names a case for which two more lines are drawn: ``bound``, which its distance cannot exceed, and, if rows
    have it, ``reachable``, the distance at which its directions have nothing left in common with those at the start.

    >>> rows = [{"case": "DeLoRA", "step": step, "distance": 0.01 * step, "bound": 0.5} for step in (10, 20)]
    >>> over_steps(rows, ["DeLoRA"], bound="DeLoRA").axes[0].get_xlabel()
    'optimizer step'
    """
    rows = list(rows)
    scored = any("score" in r for r in rows)
    figure, panels = _canvas(1, 1 + scored, (9.6 if scored else 5.8, 3.4))
    left = panels[0]
    for case, number in styles(cases).items():
        of_case = [r for r in rows if r["case"] == case]
        _line(left, of_case, "distance", number, case, x="step")
        if scored:
            _line(panels[1], of_case, "score", number, case, x="step", scale=100)
        if case == bound:
            points = _means(of_case, "bound", "step")
            colour = COLOURS[number % len(COLOURS)]
            left.plot(*zip(*points, strict=True), color=colour, linewidth=3, alpha=0.4, label=_plain(f"bound of {case}"))
            if points := _means(of_case, "reachable", "step"):
                label = _plain(f"reachable size of {case}")
                left.plot(*zip(*points, strict=True), color=colour, linewidth=1, linestyle=(0, (1, 3)), label=label)
    for axes, label in zip(panels, (distance, f"{score} [%]"), strict=False):
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
    handles, labels = left.get_legend_handles_labels()
    panels[-1].legend(handles, labels, frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def column_norm_profile(model: nn.Module, names: Sequence[str]) -> Figure:
    """Figure 4: the mean norm of the input columns of frozen weights, by kind of layer and depth.

    Args:
        names: the layers, in order of depth within each kind.

    >>> figure = column_norm_profile(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), ["0", "1"])
    >>> figure.axes[0].get_ylabel()
    'mean column norm of W'
    """
    kinds: dict[str, list[float]] = {}
    for name, norms in column_norms(model, names).items():
        kinds.setdefault(kind(name), []).append(norms.double().mean().item())
    figure, (axes,) = _canvas(1, 1, (6.4, 3.4))
    for number, (label, values) in enumerate(kinds.items()):
        axes.plot(range(len(values)), values, marker="o", markersize=3, label=_plain(label), **_style(number))
    axes.set_xlabel("depth")
    axes.set_ylabel("mean column norm of W")
    axes.set_ylim(bottom=0)
    _legend(axes)
    return figure


def kind(name: str) -> str:
    """The kind of a layer at any depth: its name after the last number that is not at the end, or else its last part.

    >>> kind("encoder.layer.3.attention.query"), kind("blocks.2.attn1.to_out.0"), kind("model.head")
    ('attention.query', 'attn1.to_out.0', 'head')
    """
    parts = name.split(".")
    numbered = [i for i, part in enumerate(parts[:-1]) if part.isdigit()]
    return ".".join(parts[numbered[-1] + 1 :] if numbered else parts[-1:])


def grids(
    cells: Mapping[str, Mapping[tuple[float, float], float]], x: str, y: str, value: str, framed: Mapping[str, set[Any]]
) -> Figure:
    """For each case a heat map of values in [0, 1] over (x, y), in percent, all on one colour scale.

    The cells in ``framed`` have a frame.

    >>> cells = {"LoRA": {(1.0, 1.0): 0.5, (2.0, 1.0): 0.6}}
    >>> grids(cells, "rate", "rank", "score [%]", framed={"LoRA": {(2.0, 1.0)}}).axes[0].get_xlabel()
    'rate'
    """
    count = len(cells)
    columns = min(count, 4)
    figure, axes = _canvas(math.ceil(count / columns), columns, (2.6 * columns + 0.8, 2.6 * math.ceil(count / columns)))
    xs, ys = (sorted({key[i] for case in cells.values() for key in case}) for i in (0, 1))
    percents = [100 * value for case in cells.values() for value in case.values()]
    low, high = 10 * math.floor(min(percents, default=0) / 10), 10 * math.ceil(max(percents, default=100) / 10)
    image = None
    for place, (case, values) in zip(axes, cells.items(), strict=False):
        table = [[100 * values.get((a, b), math.nan) for a in xs] for b in ys]
        image = place.imshow(table, origin="lower", aspect="auto", vmin=low, vmax=high, cmap="viridis")
        for i, a in enumerate(xs):
            for j, b in enumerate(ys):
                if (a, b) in framed.get(case, ()):
                    place.add_patch(
                        mpl.patches.Rectangle((i - 0.5, j - 0.5), 1, 1, fill=False, edgecolor="#ffffff", linewidth=1.6)
                    )
        place.set_xticks(range(len(xs)), [f"{a:g}" for a in xs], fontsize=7, rotation=45)
        place.set_yticks(range(len(ys)), [f"{b:g}" for b in ys], fontsize=7)
        place.set_title(_plain(case), fontsize=9, loc="left")
        place.grid(visible=False)
        place.set_xlabel(x, fontsize=8)
        place.set_ylabel(y, fontsize=8)
    for place in axes[count:]:
        place.set_visible(False)
    if image is not None:
        figure.colorbar(image, ax=axes, label=value, shrink=0.8)
    return figure


def tradeoff(
    curves: Mapping[str, Sequence[tuple[float, float, str]]], kept: str, score: str, logarithmic: bool = False
) -> Figure:
    """What is gained against what is forgotten: a line for each case, through its points (kept, score, label) in their order.

    Args:
        curves: a case's points: the value of what the base model could do, the score, and what is written beside the point.
        kept: what the horizontal axis is.
        score: what the vertical axis is.
        logarithmic: whether the horizontal axis is so, and reversed: for a perplexity, of which less is better.

    >>> figure = tradeoff({"DeLoRA": [(0.9, 0.5, "0"), (0.6, 0.8, "1")]}, "upright [%]", "turned [%]")
    >>> figure.axes[0].get_ylabel()
    'turned [%]'
    """
    figure, (axes,) = _canvas(1, 1, (7.2, 4.0))
    for case, number in styles(list(curves)).items():
        points = curves[case]
        xs, ys = [p[0] for p in points], [p[1] for p in points]
        axes.plot(xs, ys, marker="o", markersize=4, label=_plain(case), **_style(number))
        for x, y, label in points:
            colour = COLOURS[number % len(COLOURS)]
            axes.annotate(_plain(label) if label else "", (x, y), (4, 4), textcoords="offset points", fontsize=7, color=colour)
    if logarithmic:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        axes.invert_xaxis()
    axes.set_xlabel(kept)
    axes.set_ylabel(score)
    _legend(axes)
    return figure


# ---------------------------------------------------------------- shared


def _canvas(rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def styles(cases: Sequence[str]) -> dict[str, int]:
    """The number of each case's colour and dash. A method of the paper's figures has the same number in all figures.

    >>> styles(["mine", "DeLoRA", "LoRA"])
    {'mine': 1, 'DeLoRA': 3, 'LoRA': 0}
    """
    taken = [METHODS.index(case) for case in cases if case in METHODS]
    free = iter(n for n in range(len(METHODS) + len(cases)) if n not in taken)
    return {case: METHODS.index(case) if case in METHODS else next(free) for case in cases}


def _style(number: int) -> dict[str, Any]:
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": DASHES[number % len(DASHES)], "linewidth": 1.6}


def _plain(name: str) -> str:
    """A leading underscore would hide a line from the legend; a dollar sign would start a formula."""
    return printable(name, newlines=False).replace("$", r"\$").lstrip("_") or "case"


def _values(rows: Rows, key: str, x: str) -> list[tuple[float, list[float]]]:
    """For each x the values of all seeds; an x is left out if any seed has no value there."""
    by_x: dict[float, list[float | None]] = {}
    for r in rows:
        by_x.setdefault(r[x], []).append(r.get(key))
    return [(at, [v for v in values if v is not None]) for at, values in sorted(by_x.items()) if None not in values]


def _means(rows: Rows, key: str, x: str) -> list[tuple[float, float]]:
    return [(at, fmean(values)) for at, values in _values(rows, key, x)]


def _line(
    axes: Axes, rows: Sequence[Mapping[str, Any]], key: str, number: int, case: str, x: str = "factor", scale: float = 1
) -> None:
    points = _values(rows, key, x)
    if not points:
        return
    at = [a for a, _ in points]
    mean = [scale * fmean(values) for _, values in points]
    spread = [scale * stdev(values) if len(values) > 1 else 0.0 for _, values in points]
    axes.plot(at, mean, label=_plain(case), **_style(number))
    # A band that reaches below zero cannot be drawn on a logarithmic axis.
    low = [m - s if key == "score" else max(m - s, m / 10) for m, s in zip(mean, spread, strict=True)]
    high = [m + s for m, s in zip(mean, spread, strict=True)]
    axes.fill_between(at, low, high, color=COLOURS[number % len(COLOURS)], alpha=0.12, linewidth=0)
    if x == "factor" and len(points) < len({r[x] for r in rows}):
        axes.plot(at[-1:], mean[-1:], marker="x", color=COLOURS[number % len(COLOURS)])


def _legend(axes: Axes) -> None:
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.01, 0.5))
