"""Pictures in grids and as files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

__all__ = ["grid", "write"]

MARGIN, LABEL = 4, 14  # pixels between the pictures of a grid, and above a row for its label
LEAST = 96  # pixels: a narrower picture is enlarged


def grid(rows: Sequence[Sequence[Any]], labels: Sequence[str]) -> Any:
    """Pictures of one size in rows, each row under its label. Small ones are enlarged by a whole factor.

    >>> picture = Image.new("RGB", (96, 96))
    >>> grid([[picture, picture]], ["two"]).size
    (204, 118)
    """
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
    """Write a PNG file; it exists only when it is complete.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write(Image.new("RGB", (4, 4)), Path(folder, "new", "black.png"))
    ...     Path(folder, "new", "black.png").is_file()
    True
    """
    partial = file.with_name(f".{file.name}.part")
    file.parent.mkdir(parents=True, exist_ok=True)
    picture.save(partial, "PNG")
    partial.rename(file)
