"""Language understanding, GLUE or rated sentences: methods, rates and seeds on one task; the best run is delivered.

Delivered are the adapter, the merged model and the PEFT LoRA, each read back and compared with what was trained.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from torch import nn
from torch.utils.data import Dataset
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, set_seed

import delora
from delora.checkpoint import is_adapter
from delora.data import glue, sentences
from delora.data.tasks import Example, Splits, Task
from delora.evaluation import text
from delora.inject import adapters
from delora.layer import Adapter, Copy
from delora.training.config import ConfigError, Experiment
from delora.training.experiments import begin, cost, finish, fit, inject, reached, read_peft
from delora.training.models import classifier, drawn, loading, save_merged, skeleton
from delora.training.runs import Result, RunError, write_json

PREDICTIONS = "predictions.json"


def run(experiment: Experiment, folder: Path, row: str, setting: str, splits: Splits[Example], console: Console) -> Result:
    """Model, inject, data, train, evaluate. A run that was stopped goes on from its last checkpoint to the same numbers."""
    task, max_tokens = task_of(experiment), experiment.data.max_tokens
    begin(experiment, folder)
    model, tokenizer = classifier(experiment.model, task.labels)
    inject(model, experiment)
    trainer = fit(
        experiment,
        folder,
        model,
        console,
        metric=task.metrics[0],
        train_dataset=Encoded(splits.train, tokenizer, max_tokens, task),
        eval_dataset=Encoded(splits.validation, tokenizer, max_tokens, task),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda seen: text.scores(
            text.decided(torch.from_numpy(seen.predictions), task), splits.validation, task
        ),
    )
    scores: dict[str, Any] = {"diverged": trainer.diverged}
    if trainer.diverged is None:
        delora.save(model, folder / "adapter")
        predicted = text.predict(model, tokenizer, splits.test, task, max_tokens)
        write_json(folder / PREDICTIONS, predicted.tolist())
        found = text.scores(predicted, splits.test, task)
        scores |= {"validation": trainer.state.best_metric, "test": found[task.reported], "scores": found}
        scores |= {"best_epoch": trainer.best_epoch()} | reached(model, folder / "adapter")
    return finish(experiment, folder, row, setting, task.metrics[0], task.reported, **cost(model, trainer), **scores)


@dataclass(frozen=True)
class Encoded(Dataset[Any]):
    """Examples as the model takes them; tokenised when asked for, as MNLI's 393,000 would fill the memory."""

    part: Sequence[Example]
    tokenizer: Any
    max_tokens: int
    task: Task

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self.part[index]
        encoded = text.encode(self.tokenizer, [example], self.max_tokens)
        label = float(example.label) if self.task.regression else int(example.label)
        return {key: values[0] for key, values in encoded.items()} | {"labels": label}


def task_of(experiment: Experiment) -> Task:
    data = experiment.data
    return sentences.TASKS[data.task] if data.rated else glue.TASKS[data.task]


def read_splits(experiment: Experiment) -> Splits[Example]:
    data, seed = experiment.data, experiment.seed
    if not data.rated:
        return glue.splits(data.task, data.source, seed)
    return sentences.splits(data.task, cast(str, data.domain), data.source, seed, data.sizes())


# ---------------------------------------------------------------- before all runs, and after


def check(experiment: Experiment) -> Splits[Example]:
    """Everything that can be wrong with a run, found in seconds; its data."""
    labels = task_of(experiment).labels
    model = skeleton(experiment.model, labels)
    inject(model, experiment)
    whole = [name for name, adapter in adapters(model).items() if isinstance(adapter, Copy)]
    for key in drawn(experiment.model, labels):
        if not any(key.startswith(name + ".") for name in whole):
            head = key.rpartition(".")[0]
            raise ConfigError(
                f"{experiment.name}: the checkpoint of {experiment.model} has no {key}, which would stay at random values: "
                f'train it with adapter.also_train=["{head}"]'
            )
    return read_splits(experiment)


def base(experiment: Experiment) -> nn.Module:
    return classifier(experiment.model, task_of(experiment).labels)[0]


def deliver(experiment: Experiment, run: Path, splits: Splits[Example], out: Path) -> tuple[dict[str, int], int]:
    """Write ``adapter``, ``merged`` and ``peft``, read each back into a fresh model, count the equal predictions.

    Equal is the class; of a regression, half of float32's digits.
    """
    task, test = task_of(experiment), splits.test
    trained = torch.tensor(json.loads((run / PREDICTIONS).read_text()))
    close = torch.finfo(torch.float32).eps ** 0.5 if task.regression else 0.0

    def equal(model: torch.nn.Module) -> int:
        predicted = text.predict(model, tokenizer, test, task, experiment.data.max_tokens)
        return int(torch.isclose(predicted, trained, rtol=close, atol=close).sum())

    # Another seed than the run's: what the head starts from must not matter.
    set_seed(experiment.seed + 1)
    model, tokenizer = classifier(experiment.model, task.labels)
    delora.load(model, run / "adapter")
    delora.save(model, out / "adapter")
    model.config.architectures = [type(model).__name__]  # which model the adapter is for, beyond the base's name
    model.config.save_pretrained(out / "adapter")
    agreement = {"adapter": equal(model)}
    parts = [a for a in adapters(model).values() if isinstance(a, Adapter)]
    if parts and all(a.low_rank() is not None for a in parts):
        delora.export.peft(model, out / "peft")
        agreement["peft"] = equal(read_peft(classifier(experiment.model, task.labels)[0], out / "peft"))
    if all(a.mergeable() for a in parts):
        save_merged(model, out / "merged")
        agreement["merged"] = equal(loading(AutoModelForSequenceClassification, str(out / "merged")))
    for kind, same in agreement.items():
        if same != len(test):
            raise RunError(f"{out / kind} gives {len(test) - same} of {len(test)} other predictions than the trained model")
    return agreement, len(test)


def evaluate(experiment: Experiment, folder: Path) -> tuple[dict[str, float], int]:
    """The scores of an adapter, or of a whole model, on the experiment's test examples, and their number."""
    task = task_of(experiment)
    if is_adapter(folder):
        model, tokenizer = classifier(experiment.model, task.labels)
        delora.load(model, folder)
    elif folder.is_dir():
        model, tokenizer = classifier(str(folder), task.labels)
        if untrained := drawn(str(folder), task.labels):
            raise RunError(f"{folder} is no finetuned classifier: it has no {untrained[0]}")
    else:
        raise RunError(f"there is no folder {folder}")
    test = read_splits(experiment).test
    return text.scores(text.predict(model, tokenizer, test, task, experiment.data.max_tokens), test, task), len(test)
