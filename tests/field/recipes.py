"""Small recipes, of classes and of language, whose runs are stopped, continued and compared."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from delora import tasks
from delora.training import experiments
from tests import test_chat, test_preference, tiny, tiny_chat

__all__ = ["KINDS", "make", "same", "stopped", "trained"]

KINDS = ("sentiment", "instructions", "chat", "preference")


def make(folder: Path) -> None:
    """A recipe of each kind, such as ``sentiment.json``, with what it needs.

    Neither training nor validation is a multiple of the batch: of the last ones each process has a part.
    """
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
    talks, pairs = folder / "talks", folder / "pairs"
    talks.mkdir()
    pairs.mkdir()
    chats = test_chat.written(talks, test_chat.rows_of(60))
    (folder / "other.txt").write_text("The time is noon. " * 40)
    llm, some = (
        tiny_chat.make_model(folder / "chat-llm"),
        {
            "train": {"lr": 1e-3, "batch_size": 4, "epochs": 3, "record_steps": 1},
            "evaluate": {"sample": ["who are you"], "tokens": 4, "text": str(folder / "other.txt")},
        },
    )
    tiny.write(test_chat.recipe(llm, chats, folder / "one-chat", **some), folder / "chat.json")
    source = test_preference.written(pairs, test_preference.pairs_of(60))
    tiny.write(test_preference.recipe(llm, source, folder / "one-preference", **some), folder / "preference.json")


def trained(folder: Path, kind: str, out: str, *changes: str) -> None:
    """Run the recipe of this kind into a folder beside it, or go on with it."""
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
