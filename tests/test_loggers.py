"""A run's metrics in other programs: what their own readers read is what metrics.jsonl says."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event

from delora import finetuning
from delora.tasks import find, parse
from delora.training import experiments, loggers
from delora.training.config import ConfigError
from delora.training.runs import METRICS, read_metrics
from tests import tiny


@pytest.fixture(scope="module")
def values(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("logged")
    made = tiny.recipe(tiny.make_model(folder / "model"), tiny.make_sentences(folder / "data"), folder / "run")
    made["train"] |= {"epochs": 1, "record_steps": 1}
    return made


def events(file: Path) -> list[Event]:
    """The records of TensorBoard's file: each is its length (8 bytes), a checksum (4), the event, a checksum (4)."""
    data, found = file.read_bytes(), []
    while data:
        length = int.from_bytes(data[:8], "little")
        found.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    return found


@pytest.mark.slow
def test_tensorboard_reads_what_metrics_has(values):
    experiment = parse(values | {"log": ["tensorboard"]})
    task = find(experiment.task)
    experiments.train(task, experiment, Console(quiet=True))
    run = next(file.parent for file in Path(experiment.out).glob("variants/*/metrics.jsonl"))
    told = events(next((run / loggers.FOLDER).glob("events*")))
    for name in ("loss", "distance", "bound_used"):
        rows = {row["step"]: row[name] for row in read_metrics(run / METRICS) if name in row}
        assert rows
        read = {event.step: v.simple_value for event in told for v in event.summary.value if v.tag == f"train/{name}"}
        assert read == pytest.approx(rows, rel=1e-6)  # TensorBoard keeps float32
    # No result depends on where they went: the same run without it is there already.
    assert experiments.train(task, parse(values), Console(quiet=True)).delivered


def test_what_is_no_logger_or_not_installed_is_told_before_anything_is_written(values, tmp_path):
    for name, words in (("tensorbord", "did you mean tensorboard"), ("neptune", "not installed: pip install neptune")):
        experiment = parse(values | {"log": [name], "out": str(tmp_path / "run")})
        with pytest.raises(ConfigError, match=words):
            experiments.train(find(experiment.task), experiment, Console(quiet=True))
    assert not (tmp_path / "run").exists()


def test_wandb_sends_nothing_that_was_not_asked_for(values, monkeypatch, tmp_path):
    monkeypatch.setattr(loggers, "_callback", lambda name, folder: None)
    for key in ("WANDB_DIR", "WANDB_MODE"):  # so that both are as before, after this test
        monkeypatch.setenv(key, str(tmp_path))
    monkeypatch.delenv("WANDB_MODE")
    loggers.callbacks(parse(values | {"log": ["wandb"]}), tmp_path)
    assert os.environ["WANDB_MODE"] == "offline"
    monkeypatch.setenv("WANDB_MODE", "online")
    loggers.callbacks(parse(values | {"log": ["wandb"]}), tmp_path)
    assert os.environ["WANDB_MODE"] == "online"


def test_finetune_takes_loggers_and_questions(tmp_path):
    from tests.test_chat import make_model, rows_of, written

    planned = finetuning.plan(
        make_model(tmp_path / "llm"), written(tmp_path, rows_of(30)), sample=['"who" are\nyou?'], log=["tensorboard"]
    )
    assert (planned.experiment.log, planned.experiment.evaluate.sample) == (["tensorboard"], ['"who" are\nyou?'])
