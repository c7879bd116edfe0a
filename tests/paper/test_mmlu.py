"""MMLU's questions become those of the harness."""

from __future__ import annotations

import json

import pytest

from delora.data.examples import DataError
from paper.standins import mmlu

ROW = {"question": "What is it?\nA. one\nB. two\nC. three\nD. four\nAnswer:", "answer": "C"}


def write(folder, rows):
    folder.joinpath("samples-all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_question_is_asked_once(tmp_path):
    write(tmp_path, [ROW, ROW | {"topic": "virology"}, ROW | {"question": "Why?\nAnswer:"}])
    first, second = mmlu.read(tmp_path)
    assert (first.prompt, first.output, first.choices) == (ROW["question"], " C", (" A", " B", " C", " D"))
    assert second.prompt.startswith("Why?")


@pytest.mark.parametrize("wrong", [{"answer": "E"}, {"question": "What is it?"}, {"answer": ""}])
def test_another_file_is_refused_with_its_line(tmp_path, wrong):
    write(tmp_path, [ROW, ROW | wrong])
    with pytest.raises(DataError, match="line 2: expected a question that ends with 'Answer:' and an answer of A to D"):
        mmlu.read(tmp_path)


def test_a_folder_without_questions_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"is samples-\*"):
        mmlu.read(tmp_path)


def test_the_package_has_1331_questions():
    questions = mmlu.read()
    assert len(questions) == 1331
    assert {q.output for q in questions} == set(mmlu.LETTERS)
    assert all(f"\n{letter.strip()}." in q.prompt for q in questions for letter in mmlu.LETTERS)
