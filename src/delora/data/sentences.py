"""Sentences whose sentiment was rated by people, in four domains: as two classes (as SST-2) or as the rating (as STS-B).

C. J. Hutto and E. Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text", ICWSM
2014. Each sentence has the mean of 20 people's ratings from -4 to 4.
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
    """``rating`` is the mean human rating in [-4, 4], ``label`` the index in `LABELS`."""

    text: str
    rating: float

    @property
    def label(self) -> int:
        return int(self.rating > 0)


def splits(task: str, domain: str, source: str, seed: int, sizes: Sequence[int]) -> Splits[Example]:
    """Disjoint parts for "sentiment" (two classes) or "rating" (a regression). ``sizes``: train, validation, test."""
    found = read(domain, source, neutral=task == "rating")
    examples = [Example(s.text, s.rating if task == "rating" else s.label) for s in found]
    return split(examples, seed, *sizes)


@dataclass(frozen=True)
class Question(Instruction):
    """An instruction whose answer is one of ``choices``."""

    choices: tuple[str, ...] = ()


QUESTIONS = {
    "sentiment": ("Is the sentiment of this text negative or positive?", (" negative", " positive")),
    "rating": (
        "How does this text rate its subject: very negative, negative, neutral, positive or very positive?",
        (" very negative", " negative", " neutral", " positive", " very positive"),
    ),
}
EDGES = (-2.0, -NEUTRAL, NEUTRAL, 2.0)  # between the ratings' five words


def questions(kind: str, sentences: Sequence[Sentence]) -> list[Question]:
    """The sentences as instructions of a kind of `QUESTIONS`: the sentiment of those that have one, the rating in words."""
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
    """
    folder = fetch(PACKAGES[source]) if source in PACKAGES else Path(source)
    file = folder / f"{DOMAINS[domain]}_GroundTruth.txt"
    if not file.is_file():
        known = [name for name, package in PACKAGES.items() if package.kind == "data"]
        raise DataError(f"there is no {file}: the data's source is a folder that holds it, or one of {known}")
    found: dict[str, Sentence] = {}
    # Not splitlines(), which would cut a sentence at every exotic line separator.
    for number, line in enumerate(file.read_text("utf-8", errors="replace").split("\n"), 1):
        if line.strip():
            sentence = _parse(line.rstrip("\r"), f"{file}, line {number}")
            if neutral or abs(sentence.rating) > NEUTRAL:
                found.setdefault(sentence.text, sentence)
    return list(found.values())


def _parse(line: str, where: str) -> Sentence:
    try:
        _, rating, text = line.split("\t")
        sentence = Sentence(text.strip(), float(rating))
    except ValueError as error:
        raise DataError(f"{where}: expected id, rating and text with tabs between, got {line[:80]!r}") from error
    if not -4 <= sentence.rating <= 4:
        raise DataError(f"{where}: the rating is {rating}, expected a number from -4 to 4")
    return sentence


def split(sentences: Sequence[T], seed: int, train: int, validation: int, test: int) -> Splits[T]:
    """Three disjoint parts of a seeded shuffle. The test part depends on the seed and its own size alone."""
    asked = train + validation + test
    if asked > len(sentences):
        raise DataError(
            f"there are {len(sentences):,} sentences, but train {train:,} + validation {validation:,} + test {test:,} "
            f"= {asked:,} were asked for"
        )
    order = list(sentences)
    random.Random(seed).shuffle(order)
    return Splits(test=order[:test], validation=order[test : test + validation], train=order[test + validation : asked])
