"""What the folder says of itself: commands name files and studies that exist, results are those of the pages."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from paper.studies import chat, digits, fashion, sentences
from paper.studies.claims import verdict_table

ROOT = Path(__file__).parents[2]
PAPER = ROOT / "paper"
README = (PAPER / "README.md").read_text("utf-8")
STUDIES = {"digits": digits, "sentences": sentences, "chat": chat, "fashion": fashion}
RECIPES = sorted(PAPER.rglob("*.toml"))


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_the_first_lines_of_a_recipe_have_its_command(file):
    head = file.read_text("utf-8").partition("\n\n")[0].splitlines()
    assert all(line.startswith("# ") for line in head)
    commands = [line.removeprefix("#").split() for line in head if line.startswith("#     delora ")]
    verb = "sweep" if "sweeps" in file.parts else "train"
    assert commands[0][:3] == ["delora", verb, str(file.relative_to(ROOT))]
    named = re.findall(r"paper/[\w./-]+", "\n".join(head))
    assert not [path for path in named if not (ROOT / path.rstrip(".")).exists()]


def test_every_command_of_the_readme_names_what_exists():
    paths = set(re.findall(r"`?(?:train|sweep) (paper/[\w./-]+\.toml)", README))
    assert len(paths) > 12
    assert not [path for path in paths if not (ROOT / path).is_file()]
    studies = re.findall(r"python -m paper\.studies\.(\w+) ([\w-]+)", README)
    assert len(studies) > 10
    assert not [pair for pair in studies if pair[1] not in STUDIES[pair[0]].STUDIES]


def test_every_folder_is_in_the_readmes_tree():
    files = subprocess.run(["git", "ls-files", "paper"], capture_output=True, text=True, check=True).stdout.splitlines()
    folders = {part for file in files for part in Path(file).parts[1:-1]}
    below = {
        "samples",
        "snapshots",
        "text_encoder",
        "vae",
        "scheduler",
        "classifier",
        "segmenter",
        "tokenizer",
        "unet",
        "weights",
    }
    tree = README.partition("```\npaper/")[2]
    assert not [folder for folder in folders - below if f"{folder}/" not in tree]


def test_the_readme_has_every_table_and_figure_once():
    rows = re.findall(r"^\| ((?:Table|Figure) \d+)", README, re.MULTILINE)
    assert rows == [*(f"Table {i}" for i in range(1, 11)), *(f"Figure {i}" for i in range(1, 9))]
    assert len(README.splitlines()) <= 120


def test_the_verdicts_of_the_readme_are_those_of_the_page():
    place = {
        "R1": "Figure 2",
        "R2": "Figure 2",
        "R3": "Figure 5",
        "R4": "Figure 3",
        "R5": "Figure 6",
        "R6": "Table",
        "R7": "Figure 2",
        "R8": "Table 3",
    }
    for standin, by_name in verdict_table().items():
        for name, verdict in by_name.items():
            outcome = rf"{name}\b.*\b{standin}(\]\([^)]*\))? {verdict.outcome}\b"
            rows = [line for line in README.splitlines() if line.startswith(f"| {place[name]}")]
            assert any(re.search(outcome, row) for row in rows), (name, standin)


def test_the_scores_of_the_readme_are_on_the_pages():
    pages = "".join((PAPER / "docs" / f"{name}.md").read_text("utf-8") for name in ("claims", "standins"))
    scores = re.findall(r"(?:\b([A-Z]\w+\+?)(?: with)? )?(\d+\.\d ± \d+\.\d)", README)
    assert len(scores) > 12
    for method, score in scores:
        names = {"DeLoRA": "DeLoRA|L2", "LoRA": "LoRA|L0", "": "DoRA, fixed magnitude"}.get(method, re.escape(method))
        assert re.search(rf"^\| ({names}) \|.*{score}", pages, re.MULTILINE), (method, score)
