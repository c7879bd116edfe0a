"""Language understanding: GLUE, or sentences with human ratings.

The best run is delivered as an adapter, a merged model and a PEFT LoRA. Each is read back and compared with the trained model.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, cast

import torch
from pydantic import Field, model_validator
from torch import nn
from torch.utils.data import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

import delora
from delora.data import glue, sentences
from delora.data.examples import Example, Splits, TextTask
from delora.evaluation import text
from delora.formats.native import is_adapter
from delora.models import adapters
from delora.training import delivery, parallel
from delora.training.config import ConfigError, Count, Experiment, Strict
from delora.training.experiments import adapt, begin, conclude, fit
from delora.training.models import classifier, drawn, loading, skeleton
from delora.training.runs import Result, RunContext, RunError, write_json
from delora.training.task import Validation

__all__ = ["Data", "Settings", "base", "check", "deliver", "evaluate", "read_splits", "run", "text_task", "validation"]

PARALLEL = True
PREDICTIONS = "predictions.json"
RATED = ("sentiment", "rating")  # tasks on the rated sentences; the others are GLUE's


class Data(Strict):
    """The examples. ``source``: a packaged data set, a folder, or a name on the Hugging Face Hub.

    ``domain``, ``train``, ``validation`` and ``test`` choose the rated sentences of "sentiment" and "rating"; GLUE's tasks are
    divided by `delora.data.glue.divide`. Texts of more than ``max_tokens`` tokens are cut.

    >>> Data(source="vaderSentiment", domain="movie", train=200, validation=100, test=50, max_tokens=32).sizes()
    (200, 100, 50)
    """

    source: str
    domain: Literal["movie", "product", "newspaper", "tweet"] | None = None
    train: Count | None = None
    validation: Count | None = None
    test: Count | None = None
    max_tokens: int = Field(ge=3)

    def sizes(self) -> tuple[int, int, int]:
        """How many of the rated sentences are for training, validation and test."""
        return cast(tuple[int, int, int], (self.train, self.validation, self.test))


RATED_DATA = {"source": "vaderSentiment", "domain": "movie", "train": 2000, "validation": 1000, "test": 1500, "max_tokens": 32}
GLUE_DATA = {"source": glue.HUB, "max_tokens": 256}


class Settings(Experiment):
    """An experiment of this kind; ``task`` is "sentiment" or "rating", or one of GLUE's.

    >>> adapter = {"method": "lora", "r": 4, "targets": ["query"]}
    >>> recipe = {"task": "rte", "name": "mine", "out": "runs/mine", "model": "bert", "adapter": adapter}
    >>> Settings.model_validate(recipe).data.max_tokens
    256
    """

    task: Literal["sentiment", "rating", "mnli", "sst2", "mrpc", "cola", "qnli", "qqp", "rte", "stsb"]
    data: Data

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, values: Any) -> Any:
        """The task's defaults for what the recipe does not set."""
        if not isinstance(values, dict) or not isinstance(values.get("data", {}), dict):
            return values
        defaults = RATED_DATA if values.get("task") in RATED else GLUE_DATA
        return values | {"data": defaults | values.get("data", {})}

    @model_validator(mode="after")
    def _parts(self) -> Self:
        for key in () if self.task in RATED else ("domain", "train", "validation", "test"):
            if getattr(self.data, key) is not None:
                raise ValueError(f"data.{key} is for the rated sentences; the parts of {self.task} are GLUE's own")
        return self

    def other_data(self) -> bool:
        return self.task in RATED


def run(experiment: Settings, context: RunContext, splits: Splits[Example]) -> Result:
    """Model, inject, data, train, evaluate. An interrupted run resumes from its last checkpoint, with the same results."""
    task, max_tokens = text_task(experiment), experiment.data.max_tokens
    begin(experiment, context)
    model, tokenizer = classifier(experiment.model, task.labels)
    adapt(model, experiment)
    trainer = fit(
        experiment,
        context,
        model,
        metric=task.metrics[0],
        train_dataset=Encoded(splits.train, tokenizer, max_tokens, task),
        eval_dataset=Encoded(splits.validation, tokenizer, max_tokens, task),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda output: text.scores(
            text.decided(torch.from_numpy(output.predictions), task), splits.validation, task
        ),
    )

    def score() -> dict[str, Any]:
        predicted = text.predict(model, tokenizer, splits.test, task, max_tokens)
        if parallel.first():
            write_json(context.folder / PREDICTIONS, predicted.tolist())
        scores = text.scores(predicted, splits.test, task)
        best = {"validation": trainer.state.best_metric, "best_epoch": trainer.best_epoch()}
        return best | {"test": scores[task.reported], "scores": scores}

    return conclude(experiment, context, model, trainer, task.metrics[0], task.reported, score)


@dataclass(frozen=True)
class Encoded(Dataset[Any]):
    """Examples as the model takes them, tokenised one by one: MNLI's 393,000 would fill the memory."""

    part: Sequence[Example]
    tokenizer: Any
    max_tokens: int
    task: TextTask

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self.part[index]
        encoded = text.encode(self.tokenizer, [example], self.max_tokens)
        label = float(example.label) if self.task.regression else int(example.label)
        return {key: values[0] for key, values in encoded.items()} | {"labels": label}


def text_task(experiment: Settings) -> TextTask:
    """The labels and metrics of the experiment's task.

    >>> adapter = {"method": "lora", "r": 4, "targets": ["query"]}
    >>> recipe = {"task": "cola", "name": "mine", "out": "runs/mine", "model": "bert", "adapter": adapter}
    >>> text_task(Settings.model_validate(recipe)).reported
    'matthews'
    """
    return sentences.TASKS[experiment.task] if experiment.task in RATED else glue.TASKS[experiment.task]


def read_splits(experiment: Settings) -> Splits[Example]:
    """The experiment's examples, divided by its seed."""
    data, seed = experiment.data, experiment.seed
    if experiment.task not in RATED:
        return glue.splits(experiment.task, data.source, seed)
    return sentences.splits(experiment.task, cast(str, data.domain), data.source, seed, data.sizes())


# ---------------------------------------------------------------- before all runs, and after


def check(experiment: Settings) -> Splits[Example]:
    """Raises an error for anything that would make a run fail, before one starts; returns its data."""
    labels = text_task(experiment).labels
    model = skeleton(experiment.model, labels)
    adapt(model, experiment)
    trained_whole = [name for name, adapter in adapters(model).items() if adapter.whole]
    for key in drawn(experiment.model, labels):
        if not any(key.startswith(name + ".") for name in trained_whole):
            head = key.rpartition(".")[0]
            raise ConfigError(
                f"{experiment.name}: the checkpoint of {experiment.model} has no {key}, which would stay at random values: "
                f'train it with adapter.also_train=["{head}"]'
            )
    return read_splits(experiment)


def base(experiment: Settings) -> nn.Module:
    """The frozen classifier."""
    return classifier(experiment.model, text_task(experiment).labels)[0]


def deliver(experiment: Settings, run: Path, splits: Splits[Example], out: Path) -> tuple[dict[str, int], int]:
    """Write ``adapter``, ``merged`` and ``peft``, read each back into a fresh model, count the equal predictions.

    Classes must be equal; the values of a regression must agree in half of float32's digits, that is to 3.5e-4.
    """
    task, test = text_task(experiment), splits.test
    trained = torch.tensor(json.loads((run / PREDICTIONS).read_text()))
    close = torch.finfo(torch.float32).eps ** 0.5 if task.regression else 0.0
    tokenizer = loading(AutoTokenizer, experiment.model)

    def same(kind: str, model: nn.Module) -> int:
        predicted = text.predict(model, tokenizer, test, task, experiment.data.max_tokens)
        equal = int(torch.isclose(predicted, trained, rtol=close, atol=close).sum())
        if equal != len(test):
            raise RunError(f"{out / kind} and the trained model disagree in {len(test) - equal} of {len(test)} predictions")
        return equal

    auto = AutoModelForSequenceClassification
    return delivery.deliver(experiment, run, out, lambda: base(experiment), auto, same), len(test)


def evaluate(experiment: Settings, folder: Path) -> tuple[dict[str, float], int]:
    """The scores of an adapter, or of a whole model, on the experiment's test examples; and how many these are."""
    task = text_task(experiment)
    if is_adapter(folder):
        model, tokenizer = classifier(experiment.model, task.labels)
        delora.load(model, folder, methods=experiment.adapter.classes())
    elif folder.is_dir():
        model, tokenizer = classifier(str(folder), task.labels)
        if untrained := drawn(str(folder), task.labels):
            raise RunError(f"{folder} is no finetuned classifier: it has no {untrained[0]}")
    else:
        raise RunError(f"there is no folder {folder}")
    test = read_splits(experiment).test
    return text.scores(text.predict(model, tokenizer, test, task, experiment.data.max_tokens), test, task), len(test)


def validation(experiment: Settings, splits: Splits[Example]) -> Validation:
    """The metric by which the best epoch is chosen."""
    task, part, tokenizer = text_task(experiment), splits.validation, loading(AutoTokenizer, experiment.model)

    def score(model: nn.Module) -> float:
        return text.scores(text.predict(model, tokenizer, part, task, experiment.data.max_tokens), part, task)[task.metrics[0]]

    return Validation(task.metrics[0], score)
