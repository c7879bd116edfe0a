"""Rows of a data set, drawn by a seed, as a folder of JSONL: what a user of `delora finetune` has."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from delora.formats.files import whole_folder

__all__ = ["drawn"]


def drawn(folder: Path, rows: Callable[[], Sequence[Mapping[str, Any]]], sizes: Mapping[str, int], seed: int) -> Path:
    """The folder with a file for each part of ``sizes``, no row in two of them; it is made if it is not there,
    and only then are the ``rows`` asked for.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as place:
    ...     made = drawn(Path(place, "mine"), lambda: [{"text": t} for t in "abcd"], {"train": 2, "test": 1}, seed=0)
    ...     sorted(file.name for file in made.iterdir())
    ['test.jsonl', 'train.jsonl']
    """
    if folder.is_dir():
        return folder
    order = random.Random(seed).sample(rows(), sum(sizes.values()))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with whole_folder(folder) as new:
        for part, count in sizes.items():
            lines = [json.dumps(order.pop()) + "\n" for _ in range(count)]
            (new / f"{part}.jsonl").write_text("".join(lines), "utf-8")
    return folder
