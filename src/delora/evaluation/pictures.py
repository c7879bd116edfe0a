"""Pictures as files and in grids."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

MARGIN, LABEL = 4, 14  # pixels between the pictures of a grid, and above a row for its label
LEAST = 96  # pixels that a picture should be wide to be seen


def grid(rows: Sequence[Sequence[Any]], labels: Sequence[str]) -> Any:
    """Pictures of one size in rows, each under its label. Small ones are drawn two or more times as large, pixel by pixel."""
    times = max(1, LEAST // rows[0][0].width)
    width, height = (times * side for side in rows[0][0].size)
    columns = max(map(len, rows))
    size = (columns * (width + MARGIN) + MARGIN, len(rows) * (height + LABEL + MARGIN) + MARGIN)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for number, (row, label) in enumerate(zip(rows, labels, strict=True)):
        top = MARGIN + number * (height + LABEL + MARGIN)
        draw.text((MARGIN, top), label, fill="black")
        for place, picture in enumerate(row):
            large = picture.resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(large, (MARGIN + place * (width + MARGIN), top + LABEL))
    return sheet


def write(picture: Any, file: Path) -> None:
    """As PNG; the file is there only when it is whole."""
    partial = file.with_name(f".{file.name}.part")
    file.parent.mkdir(parents=True, exist_ok=True)
    picture.save(partial, "PNG")
    partial.rename(file)
