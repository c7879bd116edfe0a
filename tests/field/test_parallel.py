"""A recipe run by two processes gives the numbers that one gives; and goes on where others stopped, whatever their number."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule

from delora import tasks
from delora.training import experiments, parallel
from delora.training.config import ConfigError
from delora.training.trainer import RunTrainer
from tests import tiny
from tests.processes import all_hold

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
KINDS, WAYS = ("sentiment", "instructions"), ("ddp", "fsdp2")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder with a recipe of each kind, and the runs of both by one process.

    Neither training nor validation is a multiple of the batch: of the last ones each process has a part.
    """
    folder = tmp_path_factory.mktemp("runs")
    model = tiny.make_model(folder / "model")
    config = folder / "model" / "config.json"  # dropout is drawn by each process for itself
    text = json.loads(config.read_text()) | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config.write_text(json.dumps(text))
    source = tiny.make_sentences(folder / "data")
    common = {"train__clip": 1.0, "train__record_steps": 1}
    classes = tiny.recipe(model, source, folder / "one-sentiment", data__train=100, data__validation=77, **common)
    tiny.write(classes, folder / "sentiment.json")
    words = tiny.recipe(tiny.make_language_model(folder / "llm"), source, folder / "one-instructions", **common)
    words["data"] = {"source": source, "domain": "movie", "train": 24, "validation": 21, "test": 10, "max_tokens": 48}
    words |= {"task": "instructions", "evaluate": {"text": "movie"}}
    words["train"] |= {"batch_size": 4, "accumulation": 2, "save_steps": 5}
    words["adapter"] |= {"targets": "all-linear", "also_train": [], "exclude": ["lm_head"]}
    tiny.write(words, folder / "instructions.json")
    for kind in KINDS:
        trained(folder, kind, f"one-{kind}")
    return folder


def trained(folder: Path, kind: str, out: str, *changes: str) -> None:
    experiment = tasks.read(folder / f"{kind}.json", [f"out={folder / out}", *changes])
    experiments.train(tasks.find(experiment.task), experiment, Console(quiet=True))


def stopped(folder: Path, old: str, new: str) -> None:
    """A run as it was before its last checkpoint."""
    shutil.copytree(folder / old, folder / new)
    (run,) = (folder / new / "variants").iterdir()
    shutil.rmtree(max((run / "checkpoints").iterdir(), key=lambda p: int(p.name.rpartition("-")[2])))
    for left in (folder / new / "summary.json", run / "result.json"):
        left.unlink()


def same(folder: Path, kind: str, out: str) -> None:
    """A run's losses, scores, adapter and optimizer are those of one process, to rounding."""
    one, two = folder / f"one-{kind}", folder / out
    a, b = ([json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()] for out in (one, two))
    assert len(a) == len(b) > 10
    for row, other in zip(a, b, strict=True):
        assert row.keys() == other.keys()
        for key in row.keys() - {"seconds", "run"}:
            assert other[key] == pytest.approx(row[key], rel=1e-3, abs=1e-4), (row, other)
    (x,), (y,) = (list((out / "adapter").glob("*.safetensors")) for out in (one, two))
    for key, t in load_file(x).items():
        torch.testing.assert_close(load_file(y)[key], t, rtol=1e-3, atol=1e-4)
    x, y = (json.loads((out / "summary.json").read_text())["results"][0] for out in (one, two))
    for key in x.keys() - {"seconds", "adapter_bytes"}:
        number = isinstance(x[key], (float, dict))
        assert y[key] == (pytest.approx(x[key], rel=1e-3, abs=1e-4) if number else x[key]), key
    x, y = (max(out.glob("variants/*/checkpoints/*"), key=lambda p: int(p.name.rpartition("-")[2])) for out in (one, two))
    x, y = (torch.load(checkpoint / "optimizer.pt") for checkpoint in (x, y))
    assert x["state"].keys() == y["state"].keys()
    for key, values in x["state"].items():
        for name, t in values.items():
            torch.testing.assert_close(y["state"][key][name], t, rtol=1e-2, atol=1e-5)


def runs_as_one(rank: int, folder: str, kind: str, how: str, out: str, *changes: str) -> None:
    sharded = []
    save = RunTrainer._save

    def spied(self: RunTrainer, *args: object, **kwargs: object) -> None:
        sharded.append(any(isinstance(module, FSDPModule) for module in self.model.modules()))
        save(self, *args, **kwargs)

    RunTrainer._save = spied
    try:
        trained(Path(folder), kind, out, f"parallel={how}", *changes)
    finally:
        RunTrainer._save = save
    if rank == 0:
        assert sharded
        assert set(sharded) == {how == "fsdp2"}
        if not changes:
            same(Path(folder), kind, out)


def runs_alike(rank: int, folder: str, *changes: str) -> None:
    """Where products are rounded to 8 bits, ddp and fsdp2 are compared: each example is computed alike in both."""
    for how in WAYS:
        runs_as_one(rank, folder, "instructions", how, f"{how}-{changes[0]}", *changes)
    if rank == 0:
        one, two = (Path(folder) / f"{how}-{changes[0]}" / "metrics.jsonl" for how in WAYS)
        for x, y in zip(one.read_text().splitlines(), two.read_text().splitlines(), strict=True):
            x, y = json.loads(x), json.loads(y)
            for key in x.keys() - {"seconds", "run"}:
                assert y[key] == pytest.approx(x[key], rel=1e-3, abs=1e-4), (x, y)


@pytest.mark.slow
def test_two_processes_run_a_recipe_as_one_does(runs, tmp_path):
    """Unbroken; going on from what one process did; and from what two did in the other way."""
    laws = {f"{kind} {how}": (runs_as_one, (str(runs), kind, how, f"{how}-{kind}")) for kind in KINDS for how in WAYS}
    for kind, first, how in (("sentiment", "one", "fsdp2"), ("instructions", "ddp", "fsdp2"), ("instructions", "fsdp2", "ddp")):
        old, new = f"{first}-{kind}", f"{first}-{how}-{kind}"
        laws[f"{new} stopped"] = stops, (str(runs), old, new)
        laws[new] = runs_as_one, (str(runs), kind, how, new)
    laws["bf16"] = runs_alike, (str(runs), "train.precision=bf16", "train.weights=bf16", "train.steps=6")
    all_hold(laws, tmp_path)
    for kind, first in (("sentiment", "ddp"), ("instructions", "fsdp2")):
        stopped(runs, f"{first}-{kind}", f"{first}-one-{kind}")
        trained(runs, kind, f"{first}-one-{kind}")
        same(runs, kind, f"{first}-one-{kind}")


def stops(rank: int, folder: str, old: str, new: str) -> None:
    if rank == 0:
        stopped(Path(folder), old, new)


@pytest.mark.slow
def test_torchrun_runs_a_recipe(runs):
    env = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    changes = ["parallel=fsdp2", f"out={runs / 'torchrun'}"]
    command = [sys.executable, *TORCHRUN, "-m", "delora", "train", str(runs / "sentiment.json"), *changes]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("Written to") == 1  # by the first process
    same(runs, "sentiment", "torchrun")


@pytest.mark.parametrize(
    ("changes", "able", "words"),
    [
        ([], True, '3 processes were started, but parallel = "none": set parallel=ddp or fsdp2'),
        (["parallel=ddp"], True, "train.batch_size = 16 cannot be divided among 3 processes"),
        (["parallel=fsdp2"], False, "the task sentiment runs in one process only"),
    ],
)
def test_what_several_processes_cannot_run_is_refused_before_they_meet(changes, able, words, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    file = tiny.write(tiny.recipe("no model", "no data", tmp_path / "out"), tmp_path / "recipe.json")
    with pytest.raises(ConfigError, match=words):
        parallel.join(tasks.read(str(file), changes), able)
