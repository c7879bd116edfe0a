"""GLUE's eight tasks, with the split of the published runs.

A. Wang et al., "GLUE: A Multi-Task Benchmark and Analysis Platform for Natural Language Understanding", ICLR 2019. The
labels of its test sets are not public: its validation set is divided, by the run's seed, into a new validation and a new
test part, as the authors' code does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from delora.data.examples import DataError, Example, Splits, TextTask
from delora.errors import nearest, nearest_path

__all__ = ["HUB", "TASKS", "GlueTask", "divide", "read", "splits"]

HUB = "nyu-mll/glue"
FORMATS = {"parquet": "parquet", "jsonl": "json"}


@dataclass(frozen=True)
class GlueTask(TextTask):
    """A task of GLUE. ``columns`` hold the one or two texts; ``validation`` is the name of the part that is divided.

    >>> TASKS["mnli"].columns, TASKS["mnli"].validation
    (('premise', 'hypothesis'), 'validation_matched')
    """

    columns: tuple[str, ...]
    validation: str = "validation"


_SENTENCES = ("sentence1", "sentence2")
TASKS = {
    "mnli": GlueTask(
        ("entailment", "neutral", "contradiction"), ("accuracy",), ("premise", "hypothesis"), "validation_matched"
    ),
    "sst2": GlueTask(("negative", "positive"), ("accuracy",), ("sentence",)),
    "mrpc": GlueTask(("not_equivalent", "equivalent"), ("accuracy", "f1"), _SENTENCES),
    "cola": GlueTask(("unacceptable", "acceptable"), ("matthews",), ("sentence",)),
    "qnli": GlueTask(("entailment", "not_entailment"), ("accuracy",), ("question", "sentence")),
    "qqp": GlueTask(("not_duplicate", "duplicate"), ("accuracy", "f1"), ("question1", "question2")),
    "rte": GlueTask(("entailment", "not_entailment"), ("accuracy",), _SENTENCES),
    "stsb": GlueTask(("similarity",), ("pearson", "spearman", "average"), _SENTENCES),
}
LARGE = ("mnli", "qnli", "qqp")  # of these 1,000 examples validate; of the others half


def splits(task: str, source: str, seed: int) -> Splits[Example]:
    """The whole training set, and GLUE's validation set divided by `divide`.

    Args:
        source: a folder, or the data set's name on the Hugging Face Hub (`HUB`). A folder holds one folder for each task, of
            the task's name: as ``datasets`` saves it, or with files ``train*.parquet`` and ``validation*.parquet`` (or
            ``.jsonl``).

    >>> import datasets, tempfile
    >>> rows = datasets.Dataset.from_dict({"sentence": ["Good.", "Bad."], "label": [1, 0]})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     datasets.DatasetDict(train=rows, validation=rows).save_to_disk(f"{folder}/sst2")
    ...     parts = splits("sst2", folder, seed=0)
    >>> len(parts.train), len(parts.validation), len(parts.test)
    (2, 1, 1)
    """
    train, rated = read(task, source)
    validation, test = divide(task, len(rated), seed)
    return Splits(train, [rated[i] for i in validation], [rated[i] for i in test])


def divide(task: str, n: int, seed: int) -> tuple[list[int], list[int]]:
    """The indices of the new validation and the new test part of ``n`` examples.

    The first part of a permutation validates: 1,000 examples for the large tasks, half of them for the others. CoLA's two
    parts are exchanged, as in the authors' code.

    >>> validation, test = divide("rte", 277, seed=42)
    >>> len(validation), len(test)
    (138, 139)
    """
    first = 1000 if task in LARGE else n // 2
    if not 0 < first < n:
        raise DataError(f"{task}: {n:,} validation examples cannot be divided: {first:,} of them must validate, the rest test")
    order = np.random.RandomState(seed).permutation(n).tolist()  # the generator of the published split
    return (order[first:], order[:first]) if task == "cola" else (order[:first], order[first:])


@cache
def read(task: str, source: str) -> tuple[list[Example], list[Example]]:
    """The training set and the validation set of a task, in their own order. ``source``: as for `splits`.

    >>> import datasets, tempfile
    >>> rows = datasets.Dataset.from_dict({"sentence": ["Good."], "label": [1]})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     datasets.DatasetDict(train=rows, validation=rows).save_to_disk(f"{folder}/sst2")
    ...     read("sst2", folder)[0]
    [Example(text='Good.', label=1, pair=None)]
    """
    parts = _folder(task, Path(source)) if Path(source).is_dir() else _hub(task, source)
    names = ("train", TASKS[task].validation)
    for name in names:
        if name not in parts:
            raise DataError(f"{source}: {task} has no part {name!r}; there are {', '.join(map(repr, parts)) or 'none'}")
    train, validation = (_examples(task, parts[name], f"{source}: {task}, {name}") for name in names)
    return train, validation


def _folder(task: str, source: Path) -> Any:
    import datasets

    folder = source / task if (source / task).is_dir() else source
    try:
        if (folder / "dataset_dict.json").is_file():
            return datasets.load_from_disk(str(folder))
        for ending, reader in FORMATS.items():
            names = ("train", TASKS[task].validation)
            files = {name: sorted(map(str, folder.glob(f"{name}*.{ending}"))) for name in names}
            if all(files.values()):
                return datasets.load_dataset(reader, data_files=files)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{folder} cannot be read: {error.__cause__ or error}") from error
    raise DataError(f"{folder} does not hold {task}.\n{_by_hand(task, str(source))}")


def _hub(task: str, source: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset(source, task)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"there is no folder {source!r}{nearest_path(source)}, and the Hugging Face Hub did not provide its {task}: "
            f"{type(error).__name__}.\n"
            f"{_by_hand(task, 'FOLDER')}"
        ) from error


def _by_hand(task: str, folder: str) -> str:
    return (
        "To do it by hand, run where there is a network:\n"
        f"    python -c \"import datasets; datasets.load_dataset('{HUB}', '{task}').save_to_disk('{folder}/{task}')\"\n"
        f"bring the folder here, and give data.source={folder}"
    )


def _examples(task: str, part: Any, where: str) -> list[Example]:
    known = TASKS[task]
    missing = [column for column in (*known.columns, "label") if column not in part.column_names]
    if missing:
        raise DataError(f"{where}: there is no column {missing[0]!r}; {nearest(missing[0], part.column_names, repr)}")
    labels = [_label(known, label, f"{where}, item {number}") for number, label in enumerate(part["label"], 1)]
    texts: list[Sequence[str]] = [part[column] for column in known.columns]
    for column, values in zip(known.columns, texts, strict=True):
        for number, text in enumerate(values, 1):
            if not isinstance(text, str):
                raise DataError(f"{where}, item {number}: {column} = {text!r} is no text")
    if not labels:
        raise DataError(f"{where}: there are no examples")
    seconds: Sequence[str | None] = texts[1] if len(texts) == 2 else [None] * len(labels)
    return [Example(text, label, pair) for text, label, pair in zip(texts[0], labels, seconds, strict=True)]


def _label(task: TextTask, label: Any, where: str) -> float:
    if task.regression:
        if not isinstance(label, (int, float)) or not math.isfinite(label):
            raise DataError(f"{where}: label = {label!r}, expected a number")
    elif not isinstance(label, int) or not 0 <= label < len(task.labels):
        what = " or ".join(f"{i} ({name})" for i, name in enumerate(task.labels))
        raise DataError(f"{where}: label = {label!r}, expected {what}; GLUE's own test part has no labels")
    return label
