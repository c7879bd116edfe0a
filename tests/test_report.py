"""The report says what the results say, shows no text as markup, and needs no other file."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from delora.reports import experiment as report
from delora.reports import pages, samples
from delora.reports.curves import COLOURS, CURVES, draw
from delora.tasks import find
from delora.training.experiments import Outcome
from delora.training.runs import Result, RunError, write_json
from tests.browsing import CHROMIUM, browsing

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
        self.scripts: list[str] = []
        self.cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value for key, value in attrs if key in ("src", "href") and value]
        self.cell = tag in ("td", "th")
        if tag == "script":
            self.scripts.append("")
        if tag == "tr":
            self.rows.append([])
        elif self.cell:
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self.cell = self.cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self.cell:
            self.rows[-1][-1] += data
        if self.cdata_elem == "script":
            self.scripts[-1] += data


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
    runs = [result(EVIL), result("_hidden", bound_used=0.2, test=0.9), result("gone", diverged=2, test=None)]
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
    assert page.scripts == [pages.SCRIPT]
    assert page.rows[0] == list(report.header(Outcome.read(folder)))
    assert [row[0] for row in page.rows[1:]] == [EVIL, "_hidden", "gone"]


def test_the_page_needs_nothing_else(folder):
    text = report.write(folder, find("sentiment")).read_text()
    page = Page(text)
    assert page.tags.count("img") == len(CURVES) + 1 == len(page.addresses)  # the accuracy, too
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert not re.search(r"https?:|url\(|@import|//cdn", text)


def test_a_point_of_a_line_says_its_value_where_the_picture_has_the_line(tmp_path):
    """Under each spot the picture has the colour of the line whose value it says."""
    rows = [{"run": name, "step": s, "distance": 0.1 * s * k} for k, name in ((1, "a"), (2, "b")) for s in range(1, 300)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ((png, svg),) = draw(tmp_path / "metrics.jsonl", ["a", "b"], tmp_path).items()
    pixels = np.array(Image.open(png).convert("RGB")).astype(int)
    said = re.findall(r'cx="([\d.]+)" cy="([\d.]+)" r="6"><title>([ab]), optimizer step (\d+): ([\d.]+)<', svg)
    assert len(said) == 2 * pages.POINTS
    for x, y, name, step, value in said:
        assert float(value) == pytest.approx(0.1 * int(step) * (1 if name == "a" else 2), rel=1e-3)
        near = pixels[round(float(y)) - 2 : round(float(y)) + 3, round(float(x)) - 2 : round(float(x)) + 3].reshape(-1, 3)
        colour = [int(COLOURS[name == "b"][i : i + 2], 16) for i in (1, 3, 5)]
        if name == "a":  # the other one is dashed
            assert (np.abs(near - colour).max(1) < 60).any(), (x, y, name, step)
    assert {int(step) for *_, step, _ in said} >= {1, 299}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: make test installs it where apt-get may")
def test_a_click_on_a_head_sorts_and_nothing_is_fetched(folder):
    page = report.write(folder, find("sentiment"))
    seen: dict[str, Any] = {"asked": [], "said": []}

    async def act(tab: Any) -> None:
        tab.on("request", lambda request: seen["asked"].append(request.url))
        tab.on("console", lambda message: seen["said"].append(message.text))
        await tab.goto(page.as_uri())
        heads = tab.locator("th")

        async def names() -> list[str]:
            return await tab.locator("tbody td:first-child").all_inner_texts()

        seen["first"] = await names()
        for column in (0, 0, 1, 1, 3):
            await heads.nth(column).click()
            seen.setdefault("orders", []).append(await names())
        await heads.nth(0).press("Enter")
        seen["key"] = await names()
        seen["spots"] = await tab.locator("svg circle title").count()

    with browsing() as user:
        user(act)
    assert seen["first"] == [EVIL, "_hidden", "gone"]
    up, down, best, worst, _ = seen["orders"]
    assert up == down[::-1] == seen["key"]
    assert up[-1] == "gone"  # letters come after signs
    assert (best[:2], worst[:2]) == (["_hidden", EVIL], [EVIL, "_hidden"])
    assert best[2] == worst[2] == "gone"  # it diverged: last, however it is sorted
    assert seen["spots"] > 0
    assert not seen["said"]
    assert all(url.startswith(("file:", "data:")) for url in seen["asked"])


def test_a_curve_that_no_run_has_is_not_drawn(folder, tmp_path):
    out = tmp_path / "plots"
    out.mkdir()
    names = [p.name for p in draw(folder / "metrics.jsonl", [EVIL], out)]
    assert names == ["loss.png", "validation-accuracy.png", "distance.png"]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in out.iterdir())


def test_the_distance_of_a_layer_has_a_curve_of_its_own(tmp_path):
    rows = [{"run": "LoRA", "step": s, "|dW| up.$1.<b>": 0.1 * s} for s in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [p.name for p in draw(tmp_path / "metrics.jsonl", ["LoRA"], tmp_path)] == ["distance-up.-1.-b.png"]


@pytest.mark.parametrize(("first", "steps"), [(1e-3, ["2", "3"]), (1e-17, ["1", "2", "3"])])  # the last: all are
def test_a_distance_that_is_rounding_is_no_point_of_its_curve(first, steps, tmp_path):
    rows = [{"run": "a", "step": s, "distance": d} for s, d in ((1, 1e-17), (2, first), (3, 2 * first))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (svg,) = draw(tmp_path / "metrics.jsonl", ["a"], tmp_path).values()
    assert re.findall(r"step (\d): ", svg) == steps


def test_a_score_below_zero_is_inside_the_picture(tmp_path):
    rows = [{"run": "a", "step": s, "validation_matthews": m} for s, m in ((1, -0.4), (2, 0.5))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ((png, svg),) = draw(tmp_path / "metrics.jsonl", ["a"], tmp_path).items()
    assert png.name == "validation-matthews.png"
    heights = [float(y) for y in re.findall(r'cy="([\d.]+)"', svg)]
    with Image.open(png) as picture:
        assert [0 < y < picture.height for y in heights] == [True, True]


def answered(run: Path, steps: int, question: str = EVIL) -> None:
    run.mkdir(parents=True, exist_ok=True)
    rows = [
        {"step": s, "epoch": 1.0, "question": question, "base": "was", "adapted": f"{EVIL} {s}"} for s in range(1, steps + 1)
    ]
    (run / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("steps", [1, 4, 5, 9])
def test_what_was_answered_stands_beside_the_base_models_answer(folder, steps):
    answered(folder / "variants" / EVIL, steps)  # a run's folder has another name; this one's is in its result
    shown = Page(report.write(folder, find("chat")).read_text()).rows[len(summary(*[result("a")] * 3).results) + 1 :]
    assert shown[0] == ["Question", "Model", "Answer"]
    assert shown[1] == [EVIL, "the base model", "was"]
    assert 1 <= len(shown[2:]) <= 4
    assert shown[-1] == [EVIL, f"after step {steps}", f"{EVIL} {steps}"]  # the last one, always


def test_a_damaged_line_of_samples_is_named(folder):
    answered(folder / "variants" / EVIL, 1)
    with (folder / "variants" / EVIL / "samples.jsonl").open("a") as file:
        file.write('{"step": 2, "question": 3}\n')
    with pytest.raises(RunError, match="samples.jsonl, line 2.*question.*delete the file to do without it"):
        report.write(folder, find("chat"))


def test_pictures_that_a_run_made_are_in_its_page(folder):
    run = folder / "variants" / EVIL / "subjects" / "dog" / "snapshots"
    run.mkdir(parents=True)
    for step in (0, 200):
        Image.new("RGB", (96, 96), (step, 0, 0)).save(run / f"{step:05d}.png")
    before = Page(report.write(folder, find("sentiment")).read_text()).tags.count("img")
    assert Page(report.write(folder, find("subject")).read_text()).tags.count("img") == before + 1
    assert (folder / "samples.png").is_file()


@pytest.mark.parametrize("most", [1, 2, 4, 8])
def test_of_many_the_first_and_the_last_are_shown(most):
    for count in range(1, 30):
        some = samples.spread(range(count), most)
        assert len(some) == min(most, count)
        assert some == sorted(set(some))
        assert some[-1] == count - 1
        assert most == 1 or some[0] == 0


def test_the_reading_is_honest(folder):
    text = " ".join(report.reading(Outcome.read(folder), find("sentiment")))
    assert "one seed" in text
    assert "standard error" in text
    assert "merged 1,599" in text
