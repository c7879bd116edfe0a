"""1,331 of MMLU's questions, which the package ``evals`` has, for the harness: a benchmark with no data hub.

They are read at run time, and no row is kept here. They are to be answered alone: never trained on.
"""

from __future__ import annotations

import json
from pathlib import Path

from delora.data.examples import DataError
from delora.data.packages import fetch
from delora.data.sentences import Question
from paper.standins.packages import EVALS

__all__ = ["LETTERS", "Asked", "read"]

LETTERS = (" A", " B", " C", " D")
END = "\nAnswer:"  # of every question, after its four answers


class Asked(Question):
    """A question that is asked as it stands, in no template."""

    @property
    def prompt(self) -> str:
        return self.instruction


def read(folder: Path | None = None) -> list[Asked]:
    """Each question once, with its four answers in its text, as the harness asks those of MMLU; what is answered is a letter.

    Raises:
        PackageError: the package cannot be fetched; the error says what to do by hand.
        DataError: a file is another one.
    """
    found: dict[str, Asked] = {}
    for file in sorted((folder or fetch(EVALS)).glob("samples-*.jsonl")):
        for number, line in enumerate(file.read_text("utf-8").splitlines(), 1):
            row = json.loads(line)
            text, answer = row.get("question", ""), f" {row.get('answer', '')}"
            if answer not in LETTERS or not text.endswith(END):
                raise DataError(f"{file}, line {number}: expected a question that ends with 'Answer:' and an answer of A to D")
            found.setdefault(text, Asked(text, output=answer, choices=LETTERS))
    if not found:
        raise DataError(f"no file in {folder or 'the package evals'} is samples-*.jsonl")
    return list(found.values())
