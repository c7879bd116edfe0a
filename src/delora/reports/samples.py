"""What runs answered or drew while they trained, always to the same question or from the same noise."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from delora.training.runs import SAMPLES, read_samples

__all__ = ["answers", "sheet"]

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
        some = own[:: -(-len(own) // SHOWN)]
        some[-1] = own[-1]
        shown += [(question, f"after step {row['step']:,}", row["adapted"]) for row in some]
    return shown


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

    steps = steps[:: -(-len(steps) // COLUMNS)]
    rows = [[open_image(pictures[step]) for step in steps] for pictures in drawn.values()]
    write(grid(rows, [f"{name}: {', '.join(map(str, steps))}" for name in drawn]), file)
    return file
