"""A recipe run by two processes gives the numbers that one gives; and goes on where the other stopped."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from delora import tasks
from delora.training import parallel
from delora.training.config import ConfigError
from tests import tiny

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def train(start: list[str], file: Path, *changes: str) -> subprocess.CompletedProcess[str]:
    """``delora train``, started in this way."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [sys.executable, *start, "-m", "delora", "train", str(file), *changes], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture
def recipe(tmp_path):
    model = tiny.make_model(tmp_path / "model")
    config = tmp_path / "model" / "config.json"  # dropout is drawn by each process for itself
    text = json.loads(config.read_text()) | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config.write_text(json.dumps(text))
    source = tiny.make_sentences(tmp_path / "data")
    # 100 examples in batches of 16: the last one is smaller, and each process has a part of it.
    data = tiny.recipe(model, source, tmp_path / "one", data__train=100, train__clip=1.0, train__record_steps=1)
    return tiny.write(data, tmp_path / "recipe.json")


def same(one: Path, two: Path) -> None:
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
    assert x["test"] == y["test"]


@pytest.mark.slow
def test_two_processes_run_a_recipe_as_one_does(recipe, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    train([], recipe)
    done = train(TORCHRUN, recipe, "parallel=ddp", f"out={two}")
    assert done.stdout.count("Written to") == 1  # by the first process
    same(one, two)
    # What two processes had done when they were stopped, one goes on with.
    (run,) = (two / "variants").iterdir()
    shutil.rmtree(max((run / "checkpoints").iterdir(), key=lambda p: int(p.name.rpartition("-")[2])))
    for left in (two / "summary.json", run / "result.json"):
        left.unlink()
    train([], recipe, f"out={two}")
    same(one, two)


@pytest.mark.parametrize(
    ("changes", "able", "words"),
    [
        ([], True, '3 processes were started, but parallel = "none": set parallel=ddp'),
        (["parallel=ddp"], True, "train.batch_size = 16 cannot be divided among 3 processes"),
        (["parallel=ddp"], False, "the task sentiment runs in one process only"),
    ],
)
def test_what_several_processes_cannot_run_is_refused_before_they_meet(changes, able, words, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    file = tiny.write(tiny.recipe("no model", "no data", tmp_path / "out"), tmp_path / "recipe.json")
    with pytest.raises(ConfigError, match=words):
        parallel.join(tasks.read(str(file), changes), able)
