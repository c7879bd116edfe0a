"""What runs answered or drew while they trained, always to the same question or from the same noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from delora.training.runs import SAMPLES, read_samples

__all__ = ["answers", "sheet", "spread"]

T = TypeVar("T")

COLUMNS = 8  # of a sheet of pictures, at the most
SHOWN = 4  # answers to one question, at the most, beside the base model's


def answers(run: Path) -> list[tuple[str, str, str]]:
    """Rows of question, model and answer: of the base model, and of the adapted one after some of the steps and the last.

    >>> answers(Path("no such run"))
    []
    """
    rows = read_samples(run / SAMPLES)
    shown = []
    for question in dict.fromkeys(row["question"] for row in rows):
        own = [row for row in rows if row["question"] == question]
        shown.append((question, "the base model", own[0]["base"]))
        shown += [(question, f"after step {row['step']:,}", row["adapted"]) for row in spread(own, SHOWN)]
    return shown


def spread(items: Sequence[T], most: int) -> list[T]:
    """At most so many of the items, evenly apart, the first and the last among them; of one that may be shown, the last.

    >>> spread([0, 1, 2, 3, 4, 5, 6], 4), spread("abc", 8), spread("abc", 1)
    ([0, 2, 4, 6], ['a', 'b', 'c'], ['c'])
    """
    count = min(most, len(items))
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)] if count > 1 else list(items[-1:])


def sheet(drawn: Mapping[str, Mapping[int, Path]], file: Path) -> Path | None:
    """As in Figures 3 and 8: a row of pictures under each name, at the steps that all have, as one picture in ``file``.

    ``drawn``: for each name the pictures by their step. None, and no file: there is no step that all have.

    >>> sheet({"LoRA": {}}, Path("samples.png"))
    """
    drawn = {name: pictures for name, pictures in drawn.items() if pictures}
    steps = sorted(set.intersection(*(set(pictures) for pictures in drawn.values()))) if drawn else []
    if not steps:
        return None
    from delora.data.dreambooth import open_image
    from delora.evaluation.pictures import grid, write

    steps = spread(steps, COLUMNS)
    rows = [[open_image(pictures[step]) for step in steps] for pictures in drawn.values()]
    write(grid(rows, [f"{name}: {', '.join(map(str, steps))}" for name in drawn]), file)
    return file
