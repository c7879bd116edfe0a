"""Headlines of a package become a table that `delora finetune` reads."""

from __future__ import annotations

import json

import pytest

from delora.data import tables
from delora.data.examples import DataError, Example
from paper.standins import headlines

ROW = {"input": [{"role": "system", "content": "Is it sarcasm?"}, {"role": "user", "content": "man sleeps"}], "ideal": "1"}


def write(folder, rows):
    folder.joinpath("samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_headline_is_read_once_and_not_under_both_labels(tmp_path):
    def row(text, label):
        return {"input": [*ROW["input"][:1], {"role": "user", "content": text}], "ideal": label}

    write(tmp_path, [ROW, row("rain falls", "0"), ROW, row("both", "0"), row("both", "1")])
    assert headlines.read(tmp_path) == [Example("man sleeps", 1), Example("rain falls", 0)]


@pytest.mark.parametrize("wrong", [{"ideal": "2"}, {"ideal": None}, {"input": []}])
def test_another_file_is_refused_with_its_line(tmp_path, wrong):
    write(tmp_path, [ROW, ROW | wrong])
    with pytest.raises(DataError, match="line 2: expected a message in input, and 0 or 1 as ideal"):
        headlines.read(tmp_path)


def test_no_headline_is_in_two_parts(tmp_path):
    made = headlines.prepared(100, 3, tmp_path / "made", [Example(f"headline {i}", i % 2) for i in range(1200)])
    table = tables.read(made)
    assert (table.kind, set(table.labels)) == ("classification", set(headlines.NAMES))
    assert table.sizes() == {"train": 100, **headlines.HELD_OUT}
    texts = [row["text"] for rows in table.parts.values() for row in rows]
    assert len(set(texts)) == len(texts)
