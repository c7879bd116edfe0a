"""What is gained by the strength chosen after training (`delora.choose_strength`): on turned digits and film reviews.

The runs are DeLoRA and LoRA at settings that other studies chose (tuned), and at others that are too strong (untuned). `worth`
judges; it was committed with this file, before the first run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from torch import nn

import delora
from paper.studies.knobs import gain
from paper.studies.verdicts import Gain

SEEDS = {"turned digits": (180, 181, 182, 183, 184), "film reviews": (180, 181, 182)}
KEPT = 0.5  # the share of the base model's accuracy on its own task that the budget keeps
LORA_RATES = {"tuned": 3e-3, "untuned": 1e-2}  # tuned: by `knob`, on both tasks
# DeLoRA's reach and rate. Untuned: twice and more the reach that is enough, and on film reviews three times the rate.
DELORA = {
    "turned digits": {"tuned": (0.25, 0.1), "untuned": (0.5, 0.1)},
    "film reviews": {"tuned": (0.1, 0.1), "untuned": (0.25, 0.3)},
}

Score = Callable[[nn.Module], float]


def dialled(model: nn.Module, validation: Score, test: Score, kept: Score | None = None, base: float = 0.0) -> dict[str, Any]:
    """The curve over the strengths, the chosen one, and the one that is chosen with a budget; with the test score at each.

    Args:
        model: a trained model.
        validation: the score by which the strength is chosen.
        test: the score that is reported.
        kept: the model's score on the base model's own task.
        base: the base model's score on it; the budget is that at least `KEPT` of it is left.
    """
    tests: dict[float, float] = {}

    def score(turned: nn.Module) -> float:
        placed = next(p for p in delora.models.adapters(turned).values() if not p.whole)
        tests[placed.adapter.strength] = test(turned)
        return validation(turned)

    choice = delora.choose_strength(model, score, forgotten=None if kept is None else lambda turned: -kept(turned))
    curve = [
        {"strength": t.strength, "validation": t.score, "test": tests[t.strength]}
        | ({} if t.forgotten is None else {"kept": -t.forgotten})
        for t in choice.tried
    ]
    row: dict[str, Any] = {"strength": choice.strength, "chosen": tests[choice.strength], "curve": curve}
    if kept is not None:
        within = delora.choose_strength(model, validation, forgotten=lambda turned: -kept(turned), budget=-KEPT * base)
        row |= {"within": within.strength, "base": base}
    return row


def worth(rows: Sequence[dict[str, Any]], case: str) -> Gain:
    """What the chosen strength gains in test score over strength 1, paired by seed.

    Claims, for each task: with tuned settings the gain is not more than two standard errors below 0 (choosing does no harm);
    with untuned ones it is more than two above 0 (it helps).
    """
    mine = {(row["seed"], ""): row for row in rows if row["case"] == case}
    return gain({pair: row["chosen"] for pair, row in mine.items()}, {pair: at(row, 1.0)["test"] for pair, row in mine.items()})


def outcome(worth: Gain, untuned: bool) -> str:
    """Whether a claim of `worth` holds: "yes", "no", or "?" where that is undecided.

    >>> outcome(Gain(0.6, -0.01, 0.01), untuned=False), outcome(Gain(0.6, 0.01, 0.01), untuned=True)
    ('yes', '?')
    """
    if untuned:
        return "yes" if worth.gain > 2 * worth.error else "no" if worth.gain <= -2 * worth.error else "?"
    return "yes" if worth.gain >= -2 * worth.error else "no"


def at(row: dict[str, Any], strength: float) -> dict[str, float]:
    """What a row's curve has at a strength."""
    return next(point for point in row["curve"] if point["strength"] == strength)


def curve(rows: Sequence[dict[str, Any]], case: str, key: str) -> list[float]:
    """The mean over the seeds of a value at each strength."""
    mine = [row["curve"] for row in rows if row["case"] == case]
    return [fmean(point[key] for point in points) for points in zip(*mine, strict=True)]
