"""Pictures as files and in grids."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

MARGIN, LABEL = 4, 14  # pixels between the pictures of a grid, and above a row for its label


def grid(rows: Sequence[Sequence[Any]], labels: Sequence[str]) -> Any:
    """Pictures of one size in rows, each under its label."""
    width, height = rows[0][0].size
    columns = max(map(len, rows))
    size = (columns * (width + MARGIN) + MARGIN, len(rows) * (height + LABEL + MARGIN) + MARGIN)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for number, (row, label) in enumerate(zip(rows, labels, strict=True)):
        top = MARGIN + number * (height + LABEL + MARGIN)
        draw.text((MARGIN, top), label, fill="black")
        for place, picture in enumerate(row):
            sheet.paste(picture, (MARGIN + place * (width + MARGIN), top + LABEL))
    return sheet


def write(picture: Any, file: Path) -> None:
    """As PNG; the file is there only when it is whole."""
    partial = file.with_name(f".{file.name}.part")
    file.parent.mkdir(parents=True, exist_ok=True)
    picture.save(partial, "PNG")
    partial.rename(file)
