"""Sweeps: every trial once and as `delora train` would run it; what is done stays; a failure stops nobody."""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from delora import sweep as sweeps
from delora import tasks
from delora.sweep import RESULTS, Sweep, perform, read, run, trials
from delora.tasks import classification, parse
from delora.training.config import ConfigError
from delora.training.runs import FAILED, RESULT, Result, RunContext, RunError
from tests.tiny import make_model, make_sentences, recipe

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True, scope="module")
def _not_behind_all_others() -> Iterator[None]:
    """Ray's processes are nice to all others, and would wait for the tests that run beside these."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_worker_niceness", "0")
        yield


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> dict[str, Any]:
    """A recipe's file, and the recipe."""
    folder = tmp_path_factory.mktemp("recipe")
    values = recipe(make_model(folder / "model"), make_sentences(folder / "data"), folder / "unused", train__epochs=1)
    (folder / "recipe.json").write_text(json.dumps(values))
    return {"file": str(folder / "recipe.json"), "values": values}


def asked(written, out: Path, **changes: Any) -> Sweep:
    return Sweep(**{"name": "made", "out": str(out), "recipe": written["file"], "grid": {"seed": [0, 1]}} | changes)


def screen() -> Console:
    return Console(file=io.StringIO(), width=120)


def test_the_product_of_all_lists(written, tmp_path):
    cases = [{"name": "L", "set": {"adapter.method": "lora", "train.lr": 1e-3}}, {"name": "D", "set": {"train.lr": 1e-2}}]
    found = trials(asked(written, tmp_path, cases=cases, factors=[0.5, 4.0], grid={"seed": [0, 1], "adapter.r": [2, 4]}))
    told = {
        (
            t.case,
            t.factor,
            t.experiment.seed,
            t.experiment.adapter.build().r,
            t.experiment.train.lr,
            t.experiment.adapter.method,
        )
        for t in found
    }
    assert told == {
        (case, factor, seed, r, lr * factor, method)
        for case, lr, method in (("L", 1e-3, "lora"), ("D", 1e-2, "delora"))
        for factor in (0.5, 4.0)
        for seed in (0, 1)
        for r in (2, 4)
    }
    assert len({t.folder(tmp_path) for t in found}) == len(found) == 16
    assert all(t.experiment.factor == t.factor for t in found)


def test_a_factor_leaves_the_rate_of_lam_beside_it(written, tmp_path):
    rates = {"adapter.learn_lam": [True], "train.lr": [1e-3], "train.lam_lr": [2e-3]}
    (one,) = trials(asked(written, tmp_path, factors=[4.0], grid=rates))
    assert (one.experiment.train.lr, one.experiment.train.lam_lr) == (4e-3, 8e-3)


@pytest.mark.parametrize(
    ("scaled", "given", "expected"),
    [
        (["train.lam_lr"], 2e-3, (1e-3, 8e-3)),
        (["train.lr"], 2e-3, (4e-3, 2e-3)),
        (["train.lam_lr"], None, (1e-3, 4e-3)),  # without a rate of its own lam has that of A and B
        (["train.lr"], None, (4e-3, 1e-3)),
    ],
)
def test_a_case_may_scale_one_rate_alone(written, tmp_path, scaled, given, expected):
    rates = {"train.lr": [1e-3]} | ({} if given is None else {"train.lam_lr": [given]})
    case = {"name": "one", "set": {"adapter.learn_lam": True}, "scaled": scaled}
    (one,) = trials(asked(written, tmp_path, cases=[case], factors=[4.0], grid=rates))
    assert (one.experiment.train.lr, one.experiment.train.lam_lr) == expected


def test_the_rate_of_a_lam_that_is_not_learned_is_not_scaled(written, tmp_path):
    def swept(scaled):
        return trials(
            asked(written, tmp_path, cases=[{"name": "one", "scaled": scaled}], factors=[4.0], grid={"train.lr": [1e-3]})
        )

    for scaled in (["train.lr"], ["train.lr", "train.lam_lr"]):
        (one,) = swept(scaled)
        assert (one.experiment.train.lr, one.experiment.train.lam_lr) == (4e-3, None)
    with pytest.raises(ConfigError, match="lam is not learned"):
        swept(["train.lam_lr"])


def test_the_papers_figure_is_not_that_of_a_sweep(written, tmp_path):
    values = written["values"] | {"published": {"model": written["values"]["model"], "task": "sentiment", "test": 99.0}}
    (tmp_path / "recipe.json").write_text(json.dumps(values))
    found = trials(asked(written, tmp_path, recipe=str(tmp_path / "recipe.json")))
    assert [trial.experiment.published for trial in found] == [None, None]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"grid": {"train.lrr": [1.0]}}, "did you mean"),
        ({"grid": {"train.lr": [1.0, -1.0]}}, "train.lr=-1.0"),
        ({"grid": {"adapter.method": ["lora", "lorra"]}}, "adapter.method=lorra"),
        ({"cases": [{"name": "same", "set": {"seed": s}} for s in (0, 1)], "grid": {}}, "same"),
    ],
)
def test_what_cannot_be_is_found_before_anything_is_written(written, tmp_path, changes, words):
    with pytest.raises(ConfigError, match=words):
        run(asked(written, tmp_path / "out", **changes), screen())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('name = "a"\nout = "o"\nrecipe = "r.toml"\n', "nothing to sweep over"),
        ('name = "a"\nout = "o"\nrecipe = "r.toml"\ngrid = { seed = [] }\n', "grid.seed is an empty list"),
        ('name = "a"\nout = "o"\nrecipe = "r.toml"\nfactors = [0.0]\n', "greater than 0"),
        (
            'name = "a"\nout = "o"\nrecipe = "r.toml"\n[[cases]]\nname = "b"\nscaled = ["seed"]\n',
            "input should be 'train.lr' or",
        ),
        ('name = "a"\nout = "o"\nrecipe = "r.toml"\nfaktors = [1.0]\n', "did you mean factors"),
    ],
)
def test_a_file_that_is_no_sweep(tmp_path, text, words):
    (tmp_path / "sweep.toml").write_text(text)
    with pytest.raises(ConfigError, match=words):
        read(tmp_path / "sweep.toml")


def test_the_recipe_is_beside_the_sweep(tmp_path):
    (tmp_path / "sweep.toml").write_text('name = "a"\nout = "o"\nrecipe = "r.toml"\ngrid = { seed = [0] }\n')
    assert read(tmp_path / "sweep.toml").recipe == str(tmp_path / "r.toml")


def test_a_trial_that_raises_says_why(written, tmp_path, monkeypatch):
    (one, _) = trials(asked(written, tmp_path))
    shutil.copytree(Path(written["file"]).parent / "data", tmp_path / "data")
    broken = one.experiment.model_copy(
        update={"data": one.experiment.data.model_copy(update={"source": str(tmp_path / "none")})}
    )
    perform(sweeps.dataclasses.replace(one, experiment=broken), tmp_path)
    assert "there is no" in json.loads((one.folder(tmp_path) / FAILED).read_text())["error"]


def numbers(result: Result | None) -> dict[str, Any]:
    assert result is not None
    return {key: value for key, value in vars(result).items() if key not in ("name", "row", "setting", "folder", "seconds")}


@contextmanager
def cluster(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A Ray cluster that somebody else has started, somewhere else, and that asks for Ray's token; its address."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray = str(Path(sys.executable).with_name("ray"))
    subprocess.run([ray, "get-auth-token", "--generate"], check=True, capture_output=True)
    place.mkdir()
    options = ["--head", f"--port={port}", "--num-cpus=2", "--include-dashboard=false", "--disable-usage-stats", "--block"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen([ray, "start", *options], cwd=place, **pipes) as head:
        for line in head.stdout or ():
            if "Ray runtime started" in line:
                break
        try:
            yield f"127.0.0.1:{port}"
        finally:
            head.terminate()
            head.wait(60)


@pytest.mark.slow
def test_on_ray_every_trial_is_what_train_gives(written, tmp_path, monkeypatch):
    """One that cannot end well fails alone; started again, on a cluster, only what is missing runs. What the recipe names
    relative to where the command is given is found by Ray's processes as well.
    """
    monkeypatch.chdir(Path(written["file"]).parent)
    out = tmp_path / "out"
    one = asked(written, out, grid={"seed": [0, 1], "model": ["model"], "data.source": ["data"]})
    first, second = trials(one)
    (first.folder(out)).mkdir(parents=True)
    (first.folder(out) / "notes.txt").write_text("not a run's")  # a folder that no run may take
    assert run(one, screen()) == [first.name]
    assert "holds no run" in sweeps.reason(first, out)
    before = (second.folder(out) / RESULT).stat().st_mtime_ns

    shutil.rmtree(first.folder(out))
    with cluster(tmp_path / "elsewhere", monkeypatch) as address:
        assert run(one, screen(), address=address) == []
    assert Result.read(first.folder(out))
    assert not list(out.glob(".ray*"))
    assert (second.folder(out) / RESULT).stat().st_mtime_ns == before

    values = written["values"] | {"seed": 1, "out": str(tmp_path / "alone"), "variants": [], "model": "model"}
    experiment = parse(values | {"data": values["data"] | {"source": "data"}})
    context = RunContext(tmp_path / "alone", tmp_path, "row", "setting", screen())
    alone = classification.run(experiment, context, classification.read_splits(experiment))
    assert numbers(Result.read(second.folder(out))) == numbers(alone)

    lines = list(csv.DictReader((out / RESULTS).read_text().splitlines()))
    assert [(line["trial"], line["seed"]) for line in lines] == [(first.name, "0"), (second.name, "1")]
    assert float(lines[1]["test"]) == float(lines[1]["test accuracy"]) == alone.test


@pytest.mark.slow
def test_trials_of_two_processes_are_what_one_gives(written, tmp_path):
    """One that cannot end well fails alone, and does not hang."""
    values = written["values"] | {"parallel": "fsdp2"}
    config = Path(values["model"]) / "config.json"
    kept = config.read_text()
    config.write_text(json.dumps(json.loads(kept) | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}))
    try:
        (tmp_path / "recipe.json").write_text(json.dumps(values))
        one = asked(written, tmp_path / "out", recipe=str(tmp_path / "recipe.json"))
        first, second = trials(one)
        first.folder(tmp_path / "out").mkdir(parents=True)
        (first.folder(tmp_path / "out") / "notes.txt").write_text("not a run's")
        assert run(one, screen(), processes=2) == [first.name]
        assert "holds no run" in sweeps.reason(first, tmp_path / "out")
        perform(second, tmp_path / "alone")
    finally:
        config.write_text(kept)
    together, alone = (numbers(Result.read(second.folder(tmp_path / out))) for out in ("out", "alone"))
    states = list(second.folder(tmp_path / "out").glob("checkpoints/*/rng_state_*.pth"))
    assert {file.name for file in states} == {"rng_state_0.pth", "rng_state_1.pth"}  # it was two
    for key, value in alone.items():
        same = pytest.approx(value, rel=1e-3, abs=1e-4) if isinstance(value, (float, dict)) else value
        assert key == "adapter_bytes" or together[key] == same, key


def test_trials_of_several_processes_need_a_recipe_for_them(written, tmp_path):
    with pytest.raises(ConfigError, match='2 processes were started, but parallel = "none"'):
        run(asked(written, tmp_path / "out"), screen(), processes=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("address", ["127.0.0.1:9", "ray://127.0.0.1:9", "127.0.0.1:99999"])
def test_a_cluster_that_is_not_there(written, tmp_path, address):
    with pytest.raises(RunError, match=f"nothing answers at {address}, the Ray cluster's address"):
        run(asked(written, tmp_path / "out"), screen(), address=address)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- the paper's


@pytest.mark.parametrize("file", sorted((ROOT / "paper" / "sweeps").glob("*.toml")), ids=lambda file: file.stem)
def test_every_sweep_of_the_folder_makes_its_trials(file):
    sweep = read(file)
    every = trials(sweep)
    sizes = [len(sweep.cases) or 1, len(sweep.factors) or 1, *map(len, sweep.grid.values())]
    assert len(every) == math.prod(sizes)
    for trial in every:
        trial.experiment.adapter.build()


def test_lam_is_decayed_as_in_the_authors_code():
    """In every recipe of the paper's models, and so in the sweeps over them; Table 5's script has no decay."""
    runs = [run for file in (ROOT / "paper" / "recipes").rglob("*.toml") for _, run in tasks.read(file).runs()]
    runs += [trial.experiment for file in (ROOT / "paper" / "sweeps").glob("*.toml") for trial in trials(read(file))]
    learned = [run for run in runs if getattr(run.adapter.build(), "lam", None) is not None and run.task != "instructions"]
    assert len(learned) > 100
    assert {run.train.lam_weight_decay for run in learned} == {0.01}


def test_the_sweeps_of_figures_are_the_recipes():
    """At factor 1, Figure 2's methods are those of Table 3's recipes, at the rates of the figure; so is their training."""
    at_one = {t.case: t.experiment for t in trials(read(ROOT / "paper/sweeps/subject-rates.toml")) if t.factor == 1}
    rows = {"LoRA": "lora", "DoRA": "dora", "ETHER+": "etherplus", "DeLoRA": "sd15-dreambooth"}
    for case, name in rows.items():
        _, run = tasks.read(ROOT / "paper/recipes/subject" / f"{name}.toml").runs()[0]
        swept = at_one[case]
        assert swept.adapter.build() == run.adapter.build()
        same = {"lr", "lam_lr", "lam_weight_decay", "record_layers"}
        assert swept.train.model_dump(exclude=same) == run.train.model_dump(exclude=same)
        assert (swept.subject.crops, swept.subject.token) == (run.subject.crops, run.subject.token)
        assert swept.train.lr == run.train.lr or case == "DeLoRA"  # of which the paper gives two
