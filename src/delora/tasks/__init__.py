"""Tasks: one module for each kind of experiment. It reads top to bottom: settings, model, inject, data, train, evaluate.

====================  ===============================================================================
``classification``    a table of one's own, GLUE's tasks, sentences with human ratings: classes or a regression
``instructions``      instruction tuning of a causal language model
``chat``              a causal language model on chats, completions or texts of one's own
``preference``        a causal language model on pairs of a chosen and a rejected answer (DPO)
``subject``           a text-to-image model learns a subject from photographs (DreamBooth)
``semantic_map``      a text-to-image model learns to follow label maps
====================  ===============================================================================

A task of your own is a module too: ``task = "mytasks.tickets"``. `delora.training.task.Task` says what it must have.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from delora import outside
from delora.errors import nearest, nearest_path
from delora.recipes import find as find_recipe
from delora.training.config import ConfigError, Experiment, load_file
from delora.training.config import parse as parse_as
from delora.training.runs import CONFIG
from delora.training.task import Task

__all__ = ["NAMES", "find", "of_run", "own_names", "parse", "read"]

# The module of each task that a recipe can name.
NAMES = {
    **dict.fromkeys(("classification", "regression"), "classification"),
    **dict.fromkeys(("sentiment", "rating", "mnli", "sst2", "mrpc", "cola", "qnli", "qqp", "rte", "stsb"), "classification"),
    "instructions": "instructions",
    "chat": "chat",
    "preference": "preference",
    "subject": "subject",
    "semantic_map": "semantic_map",
}


@cache
def find(name: str) -> Task:
    """The task of a recipe's ``task``: a name in `NAMES`, or the dotted name of a module of your own.

    Raises:
        ConfigError: there is no task of this name.
        OutsideError: the module cannot be imported, or is not a task.

    >>> find("cola").name
    'delora.tasks.classification'
    """
    if name in NAMES:
        return Task.of(importlib.import_module(f"delora.tasks.{NAMES[name]}"))
    try:
        return Task.of(outside.module(name))
    except outside.OutsideError as error:
        if "." in name or not str(error).startswith("there is no module"):
            raise
        raise ConfigError(f"task = {name!r}: {nearest(name, list(NAMES))}; one of your own is a module, and {error}") from error


def read(recipe: Path | str, overrides: Sequence[str] = ()) -> Experiment:
    """The experiment of a TOML or JSON file, or of a shipped recipe's name, with ``key=value`` changes.

    Keys are dotted. A value is read as TOML, or as a string if it is not TOML.

    Raises:
        ConfigError: a key or value is wrong; the message has its dotted path.

    >>> read("quickstart", ["train.lr=0.01", "variants=[]"]).train.lr
    0.01
    """
    file = find_recipe(recipe)
    return parse(load_file(file), overrides, str(file))


def of_run(folder: Path, overrides: Sequence[str] = ()) -> Experiment:
    """The experiment behind the adapter in a run's folder: of several variants or seeds the one that was delivered there.

    Raises:
        UserError: it is no run's folder, or nothing was delivered into it yet.

    >>> of_run(Path("none"))
    Traceback (most recent call last):
    delora.training.config.ConfigError: none is no run's folder, which has a config.json: delora train or finetune makes one
    """
    if not (folder / CONFIG).is_file():
        near = nearest_path(folder)
        raise ConfigError(f"{folder}{near} is no run's folder, which has a {CONFIG}: delora train or finetune makes one")
    experiment = read(folder / CONFIG, overrides)
    runs = experiment.runs()
    if len(runs) == 1:  # a variant's own folder, too, in which nothing is delivered
        return runs[0][1]
    from delora.training.experiments import delivered  # which imports transformers

    return delivered(experiment, folder)


def parse(data: dict[str, Any], overrides: Sequence[str] = (), where: str = "recipe") -> Experiment:
    """The experiment of a recipe's tables, with ``key=value`` changes. ``where`` is for the messages of errors.

    >>> adapter = {"method": "lora", "r": 4, "targets": ["query"]}
    >>> parse({"task": "cola", "name": "mine", "out": "runs/mine", "model": "bert", "adapter": adapter}).data.source
    'nyu-mll/glue'
    """

    def settings(task: Any) -> type[Experiment]:
        if not isinstance(task, str) or not task:
            problem = "is missing" if task is None else f"= {task!r}: must be a name"
            raise ConfigError(f"{where}: task {problem}; known are {', '.join(NAMES)}, or a module of your own")
        return find(task).Settings

    return parse_as(data, settings, overrides, where)


def own_names(data: Any) -> list[str]:
    """The methods and tasks of a user's own that a recipe's tables name: reading the recipe imports their modules.

    >>> own_names({"task": "mytasks.tickets", "adapter": {"method": "mymethods:Outer"}})
    ['mytasks.tickets', 'mymethods:Outer']
    """
    if not isinstance(data, dict):
        return []
    tables = [data, *(variant for variant in data.get("variants") or [] if isinstance(variant, dict))]
    tasks = [str(table["task"]) for table in tables if "task" in table and table["task"] not in NAMES]
    adapters = [table["adapter"] for table in tables if isinstance(table.get("adapter"), dict)]
    methods = [str(adapter["method"]) for adapter in adapters if ":" in str(adapter.get("method"))]
    return [*tasks, *methods]
