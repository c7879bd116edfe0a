"""The report says what the results say, shows no text as markup, and needs no other file."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from delora.reports import experiment as report
from delora.reports.curves import CURVES, draw
from delora.tasks import find
from delora.training.experiments import Outcome
from delora.training.runs import Result, write_json

EVIL = '<script>alert("x")</script> & $\\frac{1}{0}$'


def result(name: str, **changes: Any) -> Result:
    made = Result(
        name,
        name,
        name,
        name,
        0,
        "sentiment",
        "LoRA(r=8)",
        "accuracy",
        "accuracy",
        222_350,
        61.4,
        0.81,
        0.8,
        {},
        2,
        1_234_567,
        0.125,
    )
    return replace(made, **changes)


def summary(*results: Result) -> Outcome:
    return Outcome("quick", list(results), 1600, results[0].name, {"adapter": 1600, "merged": 1599}, {"torch": "2"})


class Page(HTMLParser):
    """The tags of a page, its table, and every address it would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.rows: list[list[str]] = []
        self.addresses: list[str] = []
        self.cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value for key, value in attrs if key in ("src", "href") and value]
        self.cell = tag in ("td", "th")
        if tag == "tr":
            self.rows.append([])
        elif self.cell:
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self.cell = self.cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self.cell:
            self.rows[-1][-1] += data


def test_the_table_holds_the_results():
    rows = report.table(summary(result("a"), result("b", row="c", distance=None, test=0.5)))
    assert rows[0] == ("a", "80.0 ± 1.0", "81.0", "222,350", "1,235", "61", "0.12")
    assert (rows[1][0], rows[1][1], rows[1][-1]) == ("c (b)", "50.0 ± 1.2", report.NOTHING)


def test_a_run_that_diverged_has_no_score():
    bad = result("bad", diverged=7, test=None, validation=None, adapter_bytes=None, distance=None)
    assert report.table(summary(result("a"), bad))[1][1:3] == ("diverged at step 7", report.NOTHING)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A finished experiment with names that are meant to do harm."""
    runs = [result(EVIL), result("_hidden", bound_used=0.2), result("gone", diverged=2, test=None)]
    write_json(tmp_path / "summary.json", {**vars(summary(*runs)), "name": EVIL, "results": [vars(r) for r in runs]})
    write_json(tmp_path / "config.json", {"model": EVIL, "adapter": {"targets": [EVIL]}})
    rows = [{"run": name, "step": s, "loss": 1 / s, "distance": 0.1 * s} for name in (EVIL, "_hidden") for s in range(1, 20)]
    rows += [{"run": "_hidden", "step": s, "bound_used": 0.01 * s} for s in range(1, 20)]
    rows += [{"run": EVIL, "step": 19, "validation_accuracy": 0.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_names_are_shown_as_they_are_and_never_as_markup(folder):
    text = report.write(folder, find("sentiment")).read_text()
    page = Page(text)
    assert "script" not in page.tags
    assert page.rows[0] == list(report.header(Outcome.read(folder)))
    assert [row[0] for row in page.rows[1:]] == [EVIL, "_hidden", "gone"]


def test_the_page_needs_nothing_else(folder):
    text = report.write(folder, find("sentiment")).read_text()
    page = Page(text)
    assert page.tags.count("img") == len(CURVES) == len(page.addresses)
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert not re.search(r"https?:|url\(|@import|//cdn", text)


def test_a_curve_that_no_run_has_is_not_drawn(folder, tmp_path):
    out = tmp_path / "plots"
    out.mkdir()
    assert [p.name for p in draw(folder / "metrics.jsonl", [EVIL], out)] == ["loss.png", "distance.png"]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in out.iterdir())


def test_the_distance_of_a_layer_has_a_curve_of_its_own(tmp_path):
    rows = [{"run": "LoRA", "step": s, "|dW| up.$1.<b>": 0.1 * s} for s in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [p.name for p in draw(tmp_path / "metrics.jsonl", ["LoRA"], tmp_path)] == ["distance-up.-1.-b.png"]


def test_the_reading_is_honest(folder):
    text = " ".join(report.reading(Outcome.read(folder), find("sentiment")))
    assert "one seed" in text
    assert "standard error" in text
    assert "merged 1,599" in text
