"""Language understanding: GLUE, sentences with human ratings, or a table of one's own with a text and a label in each row.

The best run is delivered as an adapter, a merged model and a PEFT LoRA. Each is read back and compared with the trained model.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Self, cast

import torch
from pydantic import Field, model_validator
from torch import nn
from torch.utils.data import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

import delora
from delora.data import glue, sentences, tables
from delora.data.examples import Example, Splits, TextTask
from delora.errors import nearest_path
from delora.evaluation import text
from delora.formats.files import read_json, write_atomically
from delora.formats.native import is_adapter
from delora.models import adapters
from delora.training import delivery, parallel
from delora.training.config import ConfigError, Count, Experiment, Strict
from delora.training.defaults import Sketch
from delora.training.experiments import adapt, begin, conclude, fit
from delora.training.models import classifier, drawn, loading, skeleton
from delora.training.runs import Result, RunContext, RunError, write_json
from delora.training.task import Kind, Validation

__all__ = [
    "Data",
    "Settings",
    "Units",
    "base",
    "baseline",
    "check",
    "deliver",
    "evaluate",
    "examples",
    "own_table",
    "read_splits",
    "run",
    "sketch",
    "task_of",
    "text_task",
    "units_of",
    "validation",
]

PARALLEL = True
PREDICTIONS = "predictions.json"
MODEL_CONFIG = "config.json"  # transformers'
# The first one chooses the best epoch, and is the one that is reported.
OWN_METRICS = {"classification": ("accuracy", "macro_f1"), "regression": ("pearson", "spearman")}
RATED = ("sentiment", "rating")  # tasks on the rated sentences
OWN = ("classification", "regression")  # tasks on a table of the user's; all others are GLUE's


class Data(Strict):
    """The examples. ``source``: a packaged data set, a file, a folder, or a name on the Hugging Face Hub.

    ``domain``, ``train``, ``validation`` and ``test`` choose the rated sentences of "sentiment" and "rating"; GLUE's tasks are
    divided by `delora.data.glue.divide`. ``text`` (two texts: with a comma between them), ``label`` and ``group`` are columns
    of a table of one's own, see `delora.data.tables.read`. Texts of more than ``max_tokens`` tokens are cut.

    >>> Data(source="vaderSentiment", domain="movie", train=200, validation=100, test=50, max_tokens=32).sizes()
    (200, 100, 50)
    """

    source: str
    domain: Literal["movie", "product", "newspaper", "tweet"] | None = None
    train: Count | None = None
    validation: Count | None = None
    test: Count | None = None
    text: str | None = None
    label: str | None = None
    group: str | None = None
    max_tokens: int = Field(ge=3)

    def sizes(self) -> tuple[int, int, int]:
        """How many of the rated sentences are for training, validation and test."""
        return cast(tuple[int, int, int], (self.train, self.validation, self.test))


RATED_DATA = {"source": "vaderSentiment", "domain": "movie", "train": 2000, "validation": 1000, "test": 1500, "max_tokens": 32}
GLUE_DATA = {"source": glue.HUB, "max_tokens": 256}
OWN_DATA = {"max_tokens": 256}


class Settings(Experiment):
    """An experiment of this kind; ``task`` is "classification" or "regression" on a table of one's own, "sentiment" or
    "rating", or one of GLUE's.

    >>> adapter = {"method": "lora", "r": 4, "targets": ["query"]}
    >>> recipe = {"task": "rte", "name": "mine", "out": "runs/mine", "model": "bert", "adapter": adapter}
    >>> Settings.model_validate(recipe).data.max_tokens
    256
    """

    task: Literal[
        "classification", "regression", "sentiment", "rating", "mnli", "sst2", "mrpc", "cola", "qnli", "qqp", "rte", "stsb"
    ]
    data: Data

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, values: Any) -> Any:
        """The task's defaults for what the recipe does not set."""
        if not isinstance(values, dict) or not isinstance(values.get("data", {}), dict):
            return values
        task = values.get("task")
        defaults = RATED_DATA if task in RATED else OWN_DATA if task in OWN else GLUE_DATA
        return values | {"data": defaults | values.get("data", {})}

    @model_validator(mode="after")
    def _parts(self) -> Self:
        for key in () if self.task in RATED else ("domain", "train", "validation", "test"):
            if getattr(self.data, key) is not None:
                own = "those of the files, or made of its rows" if self.task in OWN else "GLUE's own"
                raise ValueError(f"data.{key} is for the rated sentences; the parts of {self.task} are {own}")
        for key in () if self.task in OWN else ("text", "label", "group"):
            if getattr(self.data, key) is not None:
                raise ValueError(f"data.{key} is a column of a table of one's own: task = {' or '.join(map(repr, OWN))}")
        return self

    def other_data(self) -> bool:
        return self.task in (*RATED, *OWN)


def run(experiment: Settings, context: RunContext, splits: Splits[Example]) -> Result:
    """Model, inject, data, train, evaluate. An interrupted run resumes from its last checkpoint, with the same results."""
    task, max_tokens = text_task(experiment), experiment.data.max_tokens
    begin(experiment, context)
    for line in own_table(experiment).told if experiment.task in OWN else ():
        context.console.print(line, markup=False, style="dim")
    model, tokenizer = classifier(experiment.model, task.labels)
    adapt(model, experiment)
    units = units_of(model, [float(e.label) for e in splits.train]) if experiment.task == "regression" else None
    for line in () if units is None else units.told():
        context.console.print(line, markup=False, style="dim")
    trainer = fit(
        experiment,
        context,
        model,
        metric=task.metrics[0],
        train_dataset=Encoded(splits.train, tokenizer, max_tokens, task, units),
        eval_dataset=Encoded(splits.validation, tokenizer, max_tokens, task, units),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda output: text.scores(
            text.decided(torch.from_numpy(output.predictions), task), splits.validation, task
        ),
    )
    if units is not None:
        units.put_back()

    def score() -> dict[str, Any]:
        predicted = text.predict(model, tokenizer, splits.test, task, max_tokens)
        if parallel.first():
            write_json(context.folder / PREDICTIONS, predicted.tolist())
        scores = text.scores(predicted, splits.test, task)
        best = {"validation": trainer.state.best_metric, "best_epoch": trainer.best_epoch()}
        return best | {"test": scores[task.reported], "scores": scores, "baseline": baseline(splits, task)}

    return conclude(experiment, context, model, trainer, task.metrics[0], task.reported, score)


def baseline(splits: Splits[Example], task: TextTask) -> float:
    """The reported score on the test part of one answer to all: the most frequent class of those to train on, or the mean.

    >>> part = [Example("Good.", 1), Example("Fine.", 1), Example("Bad.", 0)]
    >>> round(baseline(Splits(part, part, part), TextTask(("negative", "positive"), ("accuracy",))), 3)
    0.667
    """
    labels = [e.label for e in splits.train]
    always = statistics.fmean(labels) if task.regression else statistics.mode(labels)
    return text.scores(torch.tensor([always] * len(splits.test)), splits.test, task)[task.reported]


@dataclass(frozen=True)
class Units:
    """The units that a head learns the values of a regression in: (value - middle) / spread.

    A head starts near 0 and its rate moves it by about one in a short run, whatever the values are in. ``output``: the layer of
    the head that puts out the value, which `put_back` gives the values' own units: W and b become spread W and
    spread b + middle, so that all that is saved, merged and served answers in them.

    >>> head = nn.Linear(2, 1)
    >>> x, units = torch.ones(2), Units(head, middle=100.0, spread=10.0)
    >>> before = head(x)
    >>> units.put_back()
    >>> bool(torch.isclose(head(x), 10 * before + 100))
    True
    """

    output: nn.Linear
    middle: float
    spread: float

    def told(self) -> tuple[str, ...]:
        if (self.middle, self.spread) == (0.0, 1.0):
            return ()
        return (
            f"the values are learned as (value - {self.middle:.4g}) / {self.spread:.4g}, and given in their own units after",
        )

    @torch.no_grad()
    def put_back(self) -> None:
        self.output.weight.mul_(self.spread)
        if self.output.bias is not None:
            self.output.bias.mul_(self.spread).add_(self.middle)


def units_of(model: nn.Module, values: Sequence[float]) -> Units | None:
    """The units for these values: their mean and their spread; without a bias the mean stays, and the spread is that around 0.

    None if no layer of those trained whole, or several of them, put out a single value: the values are then learned as they
    are.
    """
    copies = [each.adapter.module for each in adapters(model).values() if each.whole]
    outputs = [m for copy in copies for m in copy.modules() if isinstance(m, nn.Linear) and m.out_features == 1]
    if len(outputs) != 1:
        return None
    middle = sum(values) / len(values) if outputs[0].bias is not None else 0.0
    spread = (sum((value - middle) ** 2 for value in values) / len(values)) ** 0.5
    return Units(outputs[0], middle, spread or 1.0)


@dataclass(frozen=True)
class Encoded(Dataset[Any]):
    """Examples as the model takes them, tokenised one by one: MNLI's 393,000 would fill the memory."""

    part: Sequence[Example]
    tokenizer: Any
    max_tokens: int
    task: TextTask
    units: Units | None = None

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self.part[index]
        encoded = text.encode(self.tokenizer, [example], self.max_tokens)
        label = float(example.label) if self.task.regression else int(example.label)
        if self.units is not None:
            label = (label - self.units.middle) / self.units.spread
        return {key: values[0] for key, values in encoded.items()} | {"labels": label}


def text_task(experiment: Settings) -> TextTask:
    """The labels and metrics of the experiment's task.

    >>> adapter = {"method": "lora", "r": 4, "targets": ["query"]}
    >>> recipe = {"task": "cola", "name": "mine", "out": "runs/mine", "model": "bert", "adapter": adapter}
    >>> text_task(Settings.model_validate(recipe)).reported
    'matthews'
    """
    if experiment.task in OWN:
        return task_of(own_table(experiment))
    return sentences.TASKS[experiment.task] if experiment.task in RATED else glue.TASKS[experiment.task]


def task_of(table: tables.Table) -> TextTask:
    """The labels and metrics of a table.

    >>> task_of(tables.Table("regression", {"text": "text", "label": "stars"}, {}, (), ())).metrics
    ('pearson', 'spearman')
    """
    return TextTask(table.labels or (str(table.columns["label"]),), OWN_METRICS[table.kind])


def own_table(experiment: Settings) -> tables.Table:
    """The user's own rows, divided by the experiment's seed. A file is read once, and again when it has changed."""
    data = experiment.data
    return _table(data.source, experiment.task, data.text, data.label, data.group, experiment.seed, _stamp(Path(data.source)))


@lru_cache(maxsize=8)
def _table(source: str, kind: str, text: str | None, label: str | None, group: str | None, seed: int, _: Any) -> tables.Table:
    return tables.read(source, kind=kind, text=text, label=label, group=group, seed=seed)


def _stamp(source: Path) -> tuple[tuple[str, int, int], ...]:
    """What tells whether a file, or one in a folder, has changed."""
    files = sorted(path for path in (source.rglob("*") if source.is_dir() else [source]) if path.is_file())
    return tuple((str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in files)


def examples(table: tables.Table, labels: Sequence[str]) -> Splits[Example]:
    """A table's rows as examples; a class is its place among ``labels``.

    >>> import datasets
    >>> rows = datasets.Dataset.from_dict({"text": ["Down again."], "queue": ["network"]})
    >>> table = tables.Table("classification", {"text": "text", "label": "queue"}, {"train": rows}, ("network",), ())
    >>> examples(table, ["billing", "network"]).train
    [Example(text='Down again.', label=1, pair=None)]
    """
    columns, place = table.columns["text"], {label: i for i, label in enumerate(labels)}
    first, second = (columns, None) if isinstance(columns, str) else columns

    def part(name: str) -> list[Example]:
        rows = table.parts.get(name, [])
        read = ((row[first], row[table.columns["label"]], row[second] if second else None) for row in rows)
        return [Example(text, place[label] if table.labels else label, pair) for text, label, pair in read]

    return Splits(part("train"), part("validation"), part("test"))


def read_splits(experiment: Settings) -> Splits[Example]:
    """The experiment's examples, divided by its seed."""
    data, seed = experiment.data, experiment.seed
    if experiment.task in OWN:
        return examples(own_table(experiment), text_task(experiment).labels)
    if experiment.task not in RATED:
        return glue.splits(experiment.task, data.source, seed)
    return sentences.splits(experiment.task, cast(str, data.domain), data.source, seed, data.sizes())


def sketch(name: str, table: tables.Table, data: Mapping[str, Any]) -> Sketch:
    """What there is to know of a model and a table before a recipe is made: what to train whole, lengths, one example.

    ``data``: the keys of the recipe's table of that name that the user gave.
    """
    labels = task_of(table).labels
    model, tokenizer, train = skeleton(name, labels), loading(AutoTokenizer, name), examples(table, labels).train
    lengths = [len(ids) for ids in text.encode(tokenizer, train, None)["input_ids"]]
    first = train[0]
    shown = tokenizer.decode(text.encode(tokenizer, [first], None)["input_ids"][0])
    known = [getattr(model.config, "max_position_embeddings", 0), tokenizer.model_max_length]
    limit = min([most for most in known if 0 < most < 1 << 30], default=max(lengths))
    inside = f"{model.base_model_prefix}."
    fresh = [key.rpartition(".")[0] for key in drawn(name, labels)]
    heads = [layer for layer, module in model.named_modules() if f"{layer}.".startswith(inside) is False and _holds(module)]
    target = f"{first.label:g}" if task_of(table).regression else repr(labels[int(first.label)])

    def batch(rows: int, length: int) -> dict[str, torch.Tensor]:
        keys = text.encode(tokenizer, [first], None)
        label = torch.empty(rows, dtype=torch.float if task_of(table).regression else torch.long, device="meta")
        return {key: torch.empty(rows, length, dtype=torch.long, device="meta") for key in keys} | {"labels": label}

    return Sketch(model, list(dict.fromkeys([*heads, *fresh])), lengths, limit, f"{shown}  ->  {target}", batch)


def _holds(module: nn.Module) -> bool:
    return any(True for _ in module.parameters(recurse=False))


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


def respond(experiment: Settings, adapter: Path) -> tuple[Kind, nn.Module, Callable[[str], Any]]:
    """The classifier, and the probability of each class for a text; or the value that a regression gives it."""
    task = text_task(experiment)
    model, tokenizer = classifier(experiment.model, task.labels)

    @torch.no_grad()
    def answer(prompt: str) -> Any:
        encoded = text.encode(tokenizer, [Example(prompt, 0)], experiment.data.max_tokens)
        logits = model(**tokenizer.pad(encoded, return_tensors="pt").to(next(model.parameters()).device)).logits[0].float()
        if task.regression:
            return f"{task.labels[0]}: {logits.item():.2f}"
        return dict(zip(task.labels, logits.softmax(-1).tolist(), strict=True))

    return "text" if task.regression else "classes", model, answer


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
    made = delivery.deliver(experiment, run, out, lambda: base(experiment), auto, same)
    if "peft" in made:  # PEFT's own files do not say how many classes there are, and what they are called
        write_atomically(out / "peft" / MODEL_CONFIG, (out / "adapter" / MODEL_CONFIG).read_bytes())
    return made, len(test)


def evaluate(experiment: Settings, folder: Path) -> tuple[dict[str, float], int]:
    """The scores of an adapter, or of a whole model, on the experiment's test examples; and how many these are."""
    task, test = text_task(experiment), None
    if experiment.task in OWN and not task.regression:
        task = replace(task, labels=_known(folder, task.labels))
        test = examples(own_table(experiment), task.labels).test
    if is_adapter(folder):
        model, tokenizer = classifier(experiment.model, task.labels)
        delora.load(model, folder, methods=experiment.adapter.classes())
    elif folder.is_dir():
        model, tokenizer = classifier(str(folder), task.labels)
        if untrained := drawn(str(folder), task.labels):
            raise RunError(f"{folder} is no finetuned classifier: it has no {untrained[0]}")
    else:
        raise RunError(f"there is no folder {folder}{nearest_path(folder)}")
    test = read_splits(experiment).test if test is None else test
    return text.scores(text.predict(model, tokenizer, test, task, experiment.data.max_tokens), test, task), len(test)


def _known(folder: Path, labels: tuple[str, ...]) -> tuple[str, ...]:
    """The classes of the model in a folder, in its own order: the data may have fewer of them, and no other.

    A folder that does not name them is taken to have those of the data.
    """
    names = read_json(folder / MODEL_CONFIG).get("id2label") if (folder / MODEL_CONFIG).is_file() else None
    if not isinstance(names, dict) or not all(key.isdigit() for key in names):
        return labels
    known = tuple(str(names[key]) for key in sorted(names, key=int))
    if unknown := [label for label in labels if label not in known]:
        raise RunError(
            f"the data have the label {unknown[0]!r}, which the model in {folder} does not know: it knows {', '.join(known)}"
        )
    return known


def validation(experiment: Settings, splits: Splits[Example]) -> Validation:
    """The metric by which the best epoch is chosen."""
    task, part, tokenizer = text_task(experiment), splits.validation, loading(AutoTokenizer, experiment.model)

    def score(model: nn.Module) -> float:
        return text.scores(text.predict(model, tokenizer, part, task, experiment.data.max_tokens), part, task)[task.metrics[0]]

    return Validation(task.metrics[0], score)
