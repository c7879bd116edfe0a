"""Curves of an experiment's metrics as PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from delora.formats.files import printable
from delora.reports.pages import spots
from delora.training.config import slug
from delora.training.runs import read_metrics
from delora.training.trainer import LAYER

__all__ = ["COLOURS", "CURVES", "DASHES", "STYLE", "Curve", "draw"]

# Okabe & Ito 2008: eight colours that people with any kind of colour blindness can tell apart. Here black comes first;
# yellow, which is weak on white, is left out.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
DASHES = ("-", "--", "-.", ":")
STYLE: Any = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#e4e4e4", "font.size": 10}


@dataclass(frozen=True)
class Curve:
    """One quantity of a run's metrics, over its steps.

    >>> Curve("loss.png", key="loss", label="loss [nats]", title="Training loss").log
    False
    """

    file: str
    key: str
    label: str
    title: str
    log: bool = False
    smooth: float = 0.0  # weight of the past in a running mean
    marked: bool = False  # at each of its values, which are few


VALIDATION = "validation_"  # begins the names of scores on validation data
EPS = torch.finfo(torch.float32).eps

CURVES = (
    Curve("loss.png", "loss", "training loss", "Training loss (running mean over about 10 steps)", smooth=0.9),
    Curve("distance.png", "distance", "|dW| / |W|", "Distance from the base, mean over the adapted layers", log=True),
    Curve(
        "bound.png", "bound_used", "|dW| / bound", "Share of the guaranteed bound that is used, mean over the adapted layers"
    ),
)


def draw(metrics: Path, runs: Sequence[str], folder: Path) -> dict[Path, str]:
    """One PNG for each quantity of `CURVES` that any of the runs in a ``metrics.jsonl`` has, and for each layer's distance.

    Returns the values of each as `delora.reports.pages.spots` gives them.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     metrics = Path(folder, "metrics.jsonl")
    ...     _ = metrics.write_text('{"run": "LoRA", "step": 1, "loss": 0.7}\\n{"run": "LoRA", "step": 2, "loss": 0.5}')
    ...     [file.name for file in draw(metrics, ["LoRA"], Path(folder))]
    ['loss.png']
    """
    rows = read_metrics(metrics, needs=["run"])
    drawn = {}
    with mpl.rc_context(STYLE):
        for curve in (CURVES[0], *_of_validation(rows), *CURVES[1:], *_of_layers(rows)):
            by_run = {
                run: [(row["step"], row[curve.key]) for row in rows if row["run"] == run and curve.key in row] for run in runs
            }
            if any(by_run.values()):
                figure = Figure(figsize=(7.2, 3.6), layout="constrained")
                _plot(figure.subplots(), curve, by_run)
                FigureCanvasAgg(figure).print_png(folder / curve.file, metadata={"Software": None})
                drawn[folder / curve.file] = spots(figure)
    return drawn


def _of_validation(rows: Sequence[dict[str, Any]]) -> list[Curve]:
    """The scores on validation data."""
    names = dict.fromkeys(key.removeprefix(VALIDATION) for row in rows for key in row if key.startswith(VALIDATION))
    return [
        Curve(f"validation-{slug(name)}.png", VALIDATION + name, said, f"Validation {said}", marked=True)
        for name in names
        for said in [printable(name, newlines=False).replace("$", r"\$")]
    ]


def _of_layers(rows: Sequence[dict[str, Any]]) -> list[Curve]:
    """The distance of each layer that has one of its own."""
    keys = dict.fromkeys(key for row in rows for key in row if key.startswith(LAYER))
    names = {key: key.removeprefix(LAYER) for key in keys}
    return [
        Curve(
            f"distance-{slug(name)}.png",
            key,
            "|dW|",
            f"Distance from the base: {printable(name, newlines=False)}".replace("$", r"\$"),
        )
        for key, name in names.items()
    ]


def _plot(axes: Axes, curve: Curve, by_run: dict[str, list[tuple[int, float]]]) -> None:
    # Below float32's eps a distance is rounding: the start, which has no place on a scale of logarithms.
    above = {run: [(step, value) for step, value in points if value > EPS] for run, points in by_run.items()}
    if log := curve.log and any(above.values()):
        by_run = above
    for number, (run, points) in enumerate(by_run.items()):
        if points:  # its number alone decides a run's style, which is then the same in all plots
            steps, values = zip(*points, strict=True)
            # A leading underscore would hide a line from the legend; a dollar sign would start a formula.
            name = printable(run, newlines=False).replace("$", r"\$").lstrip("_") or "run"
            style: Any = {"color": COLOURS[number % len(COLOURS)], "linestyle": DASHES[number % len(DASHES)]}
            style |= {"marker": "o", "markersize": 4} if curve.marked else {}
            axes.plot(steps, _smooth(values, curve.smooth), linewidth=1.6, label=name, **style)
    if log:
        axes.set_yscale("log")
    elif all(value >= 0 for points in by_run.values() for _, value in points):
        axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(curve.label)
    axes.set_title(curve.title, fontsize=10, loc="left")
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.01, 0.5))


def _smooth(values: Sequence[float], weight: float) -> list[float]:
    """The exponential running mean, each value corrected for its bias towards zero (as in Adam)."""
    means, total = [], 0.0
    for count, value in enumerate(values, 1):
        total = weight * total + (1 - weight) * value
        means.append(total / (1 - weight**count))
    return means
