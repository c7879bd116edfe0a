"""Multiple choice by likelihood, through EleutherAI's lm-evaluation-harness: the benchmarks of the paper's Table 5."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

TASKS = ("mmlu", "arc_challenge", "truthfulqa_mc1", "truthfulqa_mc2")


def score(
    model: Any, tokenizer: Any, tasks: Sequence[str | Mapping[str, Any]] = TASKS, batch_size: int = 8, shots: int = 0
) -> dict[str, dict[str, float]]:
    """The scores of each task, such as ``{"arc_challenge": {"acc": ..., "acc_norm": ...}}``, of a model in memory.

    No start token is put before a question, as in the published runs.

    Args:
        model, tokenizer: of transformers, causal; with or without an adapter.
        tasks: the harness's names, or a task's own configuration (the keys of its YAML).
        shots: examples before each question; the paper's scores are at 0.

    Raises:
        ImportError: the harness is not installed; says what to do.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise ImportError(f"{error}: the evaluation needs pip install lm-eval", name=error.name) from error
    host = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, add_bos_token=False)
    asked = [task if isinstance(task, str) else dict(task) for task in tasks]
    found = simple_evaluate(host, tasks=asked, num_fewshot=shots, bootstrap_iters=0)["results"]
    return {
        task: {key.removesuffix(",none"): value for key, value in scores.items() if isinstance(value, float)}
        for task, scores in found.items()
    }
