"""Multiple choice by likelihood, through EleutherAI's lm-evaluation-harness: the benchmarks of the paper's Table 5."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from delora.data.examples import DataError
from delora.data.sentences import Question

__all__ = ["TASKS", "as_task", "load", "log_probability", "score", "with_macro"]

TASKS = ("mmlu", "arc_challenge", "truthfulqa_mc1", "truthfulqa_mc2")


def score(
    model: Any, tokenizer: Any, tasks: Sequence[str | Mapping[str, Any]] = TASKS, batch_size: int = 8, shots: int = 0
) -> dict[str, dict[str, float]]:
    """The scores of each task, such as ``{"arc_challenge": {"acc": ..., "acc_norm": ...}}``, of a model in memory.

    No start token is put before a question, as in the published runs. For a group of tasks, such as "mmlu", ``acc`` is the
    harness's mean over questions, and ``acc_macro`` the mean over the group's tasks.

    Args:
        model: a causal model of transformers, with or without an adapter.
        tokenizer: that of the model.
        tasks: the harness's names, or a task's own configuration (the keys of its YAML).
        shots: examples before each question; the paper's scores are at 0.

    Raises:
        ImportError: the harness is not installed; the message says what to do.
        DataError: a task is not known, or its data are missing.
    """
    _installed()
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    groups, manager = _loaded(tasks)
    host = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, add_bos_token=False)
    output = simple_evaluate(
        host,
        tasks=[task if isinstance(task, str) else dict(task) for task in tasks],
        num_fewshot=shots,
        task_manager=manager,
        bootstrap_iters=0,
    )
    results = {
        task: {key.removesuffix(",none"): value for key, value in scores.items() if isinstance(value, float)}
        for task, scores in output["results"].items()
    }
    return with_macro(results, groups)


def with_macro(results: dict[str, dict[str, float]], groups: Mapping[str, Sequence[str]]) -> dict[str, dict[str, float]]:
    """The results, with ``acc_macro`` added for each group: the mean of ``acc`` over its tasks, whatever their sizes.

    >>> results = {"sums": {"acc": 0.4}, "easy": {"acc": 0.5}, "hard": {"acc": 0.25}}
    >>> with_macro(results, {"sums": ["easy", "hard"]})["sums"]
    {'acc': 0.4, 'acc_macro': 0.375}
    """
    macro = {group: fmean(results[name]["acc"] for name in members) for group, members in groups.items()}
    return {task: scores | ({"acc_macro": macro[task]} if task in macro else {}) for task, scores in results.items()}


def load(tasks: Sequence[str | Mapping[str, Any]]) -> dict[str, list[str]]:
    """Load the tasks' data. Returns the names of the tasks in each group among them.

    Raises:
        DataError: a task is not known, or its data cannot be loaded.
    """
    return _loaded(tasks)[0]


def _loaded(tasks: Sequence[str | Mapping[str, Any]]) -> tuple[dict[str, list[str]], Any]:
    """The groups, and the harness's manager of tasks."""
    _installed()
    manager = _manager(any(isinstance(task, str) for task in tasks))
    groups: dict[str, list[str]] = {}
    for task in tasks:
        name = task if isinstance(task, str) else str(task["task"])
        if isinstance(task, str) and task not in manager.all_tasks:
            raise DataError(f"lm-evaluation-harness has no task {task!r}; those of the paper are {', '.join(TASKS)}")
        try:
            loaded = manager.load([task if isinstance(task, str) else dict(task)])
        except (OSError, ValueError, RuntimeError) as error:
            raise DataError(
                f"the data of {name} cannot be loaded: {error}.\nTo bring them here, run where there is a network:\n"
                f"    HF_HOME=FOLDER lm_eval --model dummy --tasks {name} --limit 1\n"
                "copy the folder, and set HF_HOME=FOLDER HF_HUB_OFFLINE=1 here"
            ) from error
        groups |= {name: [one.task_name for one in group.get_all_tasks()] for name, group in loaded["groups"].items()}
    return groups, manager


@cache
def _manager(own: bool) -> Any:
    """The harness's manager; ``own``: it knows the harness's own tasks, of which it reads 13,000 files."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=own)


def _installed() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{error}: the evaluation needs pip install lm-eval", name=error.name) from error


def as_task(name: str, questions: Sequence[Question], folder: Path) -> dict[str, Any]:
    """Questions as a task of the harness; its data are written into ``folder``, which must exist; `score` has their ``acc``
    and their ``likelihood`` (`log_probability`).

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     task = as_task("mine", [Question("Yes or no?", output=" no", choices=(" yes", " no"))], Path(folder))
    >>> task["task"], task["output_type"]
    ('mine', 'multiple_choice')
    """
    file = folder / f"{name}.jsonl"
    rows = [
        {"prompt": q.prompt, "choices": [c.strip() for c in q.choices], "gold": q.choices.index(q.output)} for q in questions
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}, "cache_dir": str(folder)},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "metric_list": [
            {"metric": "acc"},
            {"metric": "likelihood", "aggregation": log_probability, "higher_is_better": True},
        ],
    }


def log_probability(answers: Iterable[tuple[int, Sequence[float]]]) -> float:
    """The mean natural logarithm of the right answer's probability among the answers to choose from: ``likelihood`` in `score`.

    It tells models apart whose accuracies are near chance, where it is ``-log`` of the number of answers.

    Args:
        answers: for each question the right answer's number, and every answer's log-likelihood.

    >>> round(log_probability([(0, [-1.0, -1.0, -1.0, -1.0]), (1, [-5.0, -5.0])]), 4)
    -1.0397
    """
    return fmean(torch.tensor(given).double().log_softmax(0)[right].item() for right, given in answers)
