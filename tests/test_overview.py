"""The report of many runs: what its tables say follows from the runs, nothing else is written, no name is markup."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from delora import tasks
from delora.reports import figures, overview, pages
from delora.reports.overview import Run, collect, robustness, safe, table, write
from delora.tasks import parse
from delora.training.config import ConfigError
from delora.training.runs import Result, RunError, write_json
from tests import test_cli, tiny
from tests.test_report import EVIL, Page

ADAPTER = {"method": "lora", "targets": ["query"]}


def make(out: Path, test: float | None, **changes: Any) -> Path:
    """A finished run's folder. ``changes``: of the result, or ``experiment``'s."""
    config = {"task": "sentiment", "name": "x", "out": "o", "model": "m", "adapter": ADAPTER} | changes.pop("experiment", {})
    experiment = parse(config)
    values = {
        "name": "x",
        "row": "LoRA",
        "setting": "s",
        "folder": out.name,
        "seed": experiment.seed,
        "task": experiment.task,
        "method": "LoRA(r=8)",
        "metric": "accuracy",
        "reported": "accuracy",
        "trainable": 1000,
        "seconds": 1.0,
        "validation": test,
        "test": test,
        "distance": 0.1,
        "diverged": 3 if test is None else None,
    } | changes
    write_json(out / "config.json", experiment.model_dump(mode="json"))
    write_json(out / "result.json", values)
    rows = [{"step": 1, "loss": 1.0, "distance": 0.1, "bound_used": 0.5}, {"step": 1, "validation_accuracy": 0.5}]
    (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return out


@pytest.fixture
def folders(tmp_path):
    """Folders, made when they are asked for."""
    numbers = iter(range(100))

    def another() -> Path:
        folder = tmp_path / "runs" / str(next(numbers))
        folder.mkdir(parents=True)
        return folder

    return another


def runs(tmp_path: Path) -> list[Run]:
    return collect([tmp_path / "runs"])[0]


def test_the_table_has_mean_and_deviation_of_the_setting_that_validates_best(tmp_path, folders):
    for seed, first, second in ((0, 0.7, 0.9), (1, 0.8, 0.3)):
        make(folders(), first, setting="a", experiment={"seed": seed})
        make(folders(), second, setting="b", experiment={"seed": seed})
    made = table("m", runs(tmp_path))
    assert made.header == ["Method", "Trainable", "accuracy"]
    assert made.rows == [["LoRA", "1,000", "75.0 ± 7.1"]]


def test_a_column_for_each_task_and_their_mean(tmp_path, folders):
    for task, test, metric in (("cola", 0.5, "matthews"), ("rte", 0.7, "accuracy")):
        make(folders(), test, reported=metric, experiment={"task": task})
    make(folders(), 0.6, row="other", experiment={"task": "rte"})
    made = table("m", runs(tmp_path))
    assert made.header == ["Method", "Trainable", "cola matthews", "rte accuracy", "mean"]
    assert made.rows == [["LoRA", "1,000", "50.0", "70.0", "60.0"], ["other", "1,000", "–", "60.0", "–"]]


def test_the_papers_figure_only_beside_its_own_model_and_task(tmp_path, folders):
    known = {"published": {"model": "hub/m", "task": "cola", "test": 63.6, "deviation": 1.52}, "task": "cola"}
    make(folders(), 0.5, reported="matthews", experiment=known)
    make(folders(), 0.5, row="b", reported="matthews", experiment=known | {"model": "other"})
    seen = runs(tmp_path)
    assert [row[2] for row in table("m", seen[:1]).rows] == ["50.0\npaper 63.6 ± 1.5"]
    assert [row[2] for row in table("other", seen[1:]).rows] == ["50.0"]


def test_the_scores_of_a_language_model_are_columns(tmp_path, folders):
    scores = {"mmlu": 0.4, "arc_challenge": 0.5, "average": 0.45, "perplexity": 12.25, "likelihood": 0.3}
    known = {"model": "m", "task": "instructions", "test": 41.42, "scores": {"mmlu": 44.21}}
    experiment = {"task": "instructions", "evaluate": {"tasks": ["mmlu", "arc_challenge"]}, "published": known}
    make(folders(), 0.45, scores=scores, reported="average", metric="likelihood", experiment=experiment)
    made = table("m", runs(tmp_path))
    assert made.header == ["Method", "Trainable", "mmlu", "arc_challenge", "average", "perplexity"]
    assert made.rows == [["LoRA", "1,000", "40.0\npaper 44.2", "50.0", "45.0\npaper 41.4", "12.2"]]


def results(scores: dict[float, list[float]]) -> dict[float, list[Result]]:
    made = {"name": "", "row": "", "setting": "", "folder": "", "task": "", "method": "", "metric": "", "reported": ""}
    return {f: [Result(**made, seed=0, trainable=0, seconds=0, test=s) for s in values] for f, values in scores.items()}


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ({1: [0.80], 2: [0.795], 4: [0.78]}, (1, 2)),  # within one point
        ({1: [0.80, 0.90], 2: [0.81], 4: [0.70]}, (1, 2)),  # within the deviation of the best
        ({0.5: [0.8], 1: [0.8], 2: [0.5], 4: [0.8]}, (0.5, 1)),  # no gap is jumped over
        ({1: [0.5], 2: [0.8], 4: [0.5]}, (2, 2)),
    ],
)
def test_safe_factors_are_those_around_the_best_without_a_gap(scores, expected):
    means = {f: sum(values) / len(values) for f, values in scores.items()}
    assert safe(means, results(scores)) == expected


def test_a_factor_at_which_a_run_diverges_is_not_safe(tmp_path, folders):
    for factor, test, distance in ((0.5, 0.7, 0.1), (1.0, 0.8, 0.2), (4.0, None, 0.4)):
        make(folders(), test, distance=None if test is None else distance, experiment={"factor": factor})
    made = robustness(runs(tmp_path))
    assert made.rows == [["LoRA", "80.0", "1", "1 to 1", "70.0; diverges at 4", "0.20 to –"]]


def test_the_page_its_figures_and_its_numbers(tmp_path, folders):
    for factor in (1.0, 4.0):
        make(folders(), 0.5, row=EVIL, experiment={"factor": factor, "model": EVIL})
    failed = folders()
    write_json(failed / "failed.json", {"error": EVIL})
    out = tmp_path / "report"
    text = write([tmp_path / "runs"], out).read_text()
    page = Page(text)
    assert page.scripts == [pages.SCRIPT]
    assert text.count("<title>") > len(page.addresses)  # each point of a line says its value
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert len(page.addresses) == 2
    assert [row[0] for row in page.rows] == ["Method", EVIL, "Case", EVIL]
    assert EVIL.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;") in text
    with (out / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["model"], row["factor"], row["test"]) for row in rows] == [(EVIL, "1.0", "0.5"), (EVIL, "4.0", "0.5")]
    assert {p.suffix for p in out.iterdir()} == {".html", ".csv", ".png", ".pdf"}
    assert write([tmp_path / "runs"], out).read_text() == text  # again, in the same place, the same


def test_curves_are_thinned_and_keep_every_validation(tmp_path, folders):
    folder = make(folders(), 0.5)
    rows = [{"step": s, "loss": 1.0, "distance": s / 1e4, "bound_used": 0.5, "reach": 0.3} for s in range(1, 5001)]
    rows += [{"step": s, "validation_accuracy": 0.5} for s in (777, 4999)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run,) = runs(tmp_path)
    points = overview._points(run)
    assert len(points) <= 2 * overview.POINTS
    assert [p["step"] for p in points if "score" in p] == [777, 4999]
    assert all(p["bound"] == pytest.approx(2 * p["distance"]) for p in points if "bound" in p)
    assert {p["reachable"] for p in points if "bound" in p} == {0.3}


def test_what_cannot_be_reported_is_told_and_nothing_is_written(tmp_path, folders):
    out = tmp_path / "report"
    for given, words in (([tmp_path / "none"], "there is no folder"), ([tmp_path], "there is no finished run")):
        with pytest.raises(RunError, match=words):
            write(given, out)
    folder = make(folders(), 0.5)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(RunError, match="is not empty and holds no report"):
        write([tmp_path / "runs"], tmp_path / "mine")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    result = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps(result | {"mystery": 1}))
    with pytest.raises(RunError, match=r"another version of delora .*mystery"):
        write([tmp_path / "runs"], out)
    (folder / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="is missing"):
        write([tmp_path / "runs"], out)
    assert not out.exists()


def test_the_command(tmp_path, folders):
    make(folders(), 0.5)
    code, told, _ = test_cli.run("report", tmp_path / "runs", "--out", tmp_path / "page")
    assert (code, "report.html" in "".join(told.split())) == (0, True)
    code, _, told = test_cli.run("report", tmp_path / "page", "--out", tmp_path / "other")
    assert (code, "there is no finished run" in told) == (1, True)


def test_samples_over_training_are_a_row_for_each_method(tmp_path, folders):
    """At the steps that all methods have; a run without snapshots has no row."""
    for row, steps, colour in (("A", (0, 200, 400), 10), ("B", (0, 400), 200), ("C", (), 0)):
        folder = make(folders(), 0.5, row=row, experiment={"task": "subject"})
        for step in steps:
            file = folder / "subjects" / "dog" / "snapshots" / f"{step:05d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (96, 96), (colour, step // 2, 0)).save(file)
    write([tmp_path / "runs"], tmp_path / "report")
    (file,) = (tmp_path / "report").glob("*-samples.png")
    sheet = np.array(Image.open(file))
    seen = [[tuple(sheet[top, left]) for left in (8, 108)] for top in (22, 136)]
    assert seen == [[(10, 0, 0), (10, 200, 0)], [(200, 0, 0), (200, 200, 0)]]


def test_the_column_norms_are_those_of_the_layers_that_are_adapted(tmp_path, folders):
    """By hand from the checkpoint's own weights: two kinds in two layers of depth."""
    model = tiny.make_model(tmp_path / "model")
    changes = {"model": model, "adapter": {"method": "lora", "r": 2, "targets": ["query", "value"]}}
    make(folders(), 0.5, experiment=changes)
    page = overview.write([tmp_path / "runs"], tmp_path / "page", with_norms=True)
    assert "column norms" in page.read_text()
    (experiment,) = (run.experiment for run in runs(tmp_path))
    base = tasks.find(experiment.task).base(experiment)
    expected: dict[str, list[float]] = {}
    for name, p in base.named_parameters():
        if name.endswith(("query.weight", "value.weight")):
            kind = f"attention.self.{name.split('.')[-2]}"
            expected.setdefault(kind, []).append(p.norm(dim=0).mean().item())
    assert sorted(map(len, expected.values())) == [2, 2]
    names = [
        name.removesuffix(".weight") for name, _ in base.named_parameters() if name.endswith(("query.weight", "value.weight"))
    ]
    (axes,) = figures.column_norm_profile(base, names).axes
    drawn = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    assert drawn == {kind: pytest.approx(values) for kind, values in expected.items()}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("encoder.layer.3.attention.query", "attention.query"),
        ("down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_out.0", "attn1.to_out.0"),
        ("model.layers.11.mlp.up_proj", "mlp.up_proj"),
        ("layer0.q", "q"),
        ("head", "head"),
        ("0", "0"),
    ],
)
def test_a_layers_kind_is_its_name_after_the_last_number(name, kind):
    assert figures.kind(name) == kind
