"""Predictions for texts, and the metrics of classes and of a regression."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.functional import pearson_corrcoef, spearman_corrcoef
from torchmetrics.functional.classification import binary_f1_score, binary_matthews_corrcoef, multiclass_f1_score

from delora.data.examples import Example, TextTask

__all__ = ["METRICS", "accuracy", "decided", "encode", "macro_f1", "predict", "scores", "standard_error"]


@torch.no_grad()
def predict(
    model: nn.Module, tokenizer: Any, part: Sequence[Example], task: TextTask, max_tokens: int, batch: int = 64
) -> Tensor:
    """The model's class or value for each example [examples], on the CPU. The model is left in evaluation mode."""
    model.eval()
    device = next(model.parameters()).device
    predictions = []
    for start in range(0, len(part), batch):
        encoded = encode(tokenizer, part[start : start + batch], max_tokens)
        logits = model(**tokenizer.pad(encoded, return_tensors="pt").to(device)).logits
        predictions.append(decided(logits.float().cpu(), task))
    return torch.cat(predictions)


def encode(tokenizer: Any, part: Sequence[Example], max_tokens: int | None) -> Any:
    """The token ids of the examples' one or two texts; if two are too long together, the longer one is cut. None: uncut."""
    pairs = [example.pair for example in part]
    second = None if None in pairs else pairs
    return tokenizer([example.text for example in part], second, truncation=max_tokens is not None, max_length=max_tokens)


def decided(logits: Tensor, task: TextTask) -> Tensor:
    """The class of each row, or the value of a regression, from logits [examples, labels].

    >>> decided(torch.tensor([[0.2, 0.8], [3.0, -1.0]]), TextTask(("negative", "positive"), ("accuracy",))).tolist()
    [1, 0]
    """
    return logits.squeeze(-1) if task.regression else logits.argmax(dim=-1)


def scores(predicted: Tensor, part: Sequence[Example], task: TextTask) -> dict[str, float]:
    """Every metric of the task. A correlation with a constant is undefined; it is returned as 0.

    >>> part = [Example("Good.", 1), Example("Bad.", 0)]
    >>> scores(torch.tensor([1, 1]), part, TextTask(("negative", "positive"), ("accuracy", "matthews")))
    {'accuracy': 0.5, 'matthews': 0.0}
    """
    kind = torch.float64 if task.regression else torch.int64
    labels = torch.tensor([example.label for example in part], dtype=kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about a variance near zero
        values = {name: float(METRICS[name](predicted.to(kind), labels)) for name in task.metrics}
    return {name: value if math.isfinite(value) else 0.0 for name, value in values.items()}


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """The share of correct predictions, in [0, 1].

    >>> accuracy(torch.tensor([1, 0]), torch.tensor([1, 1]))
    0.5
    """
    return (predicted == labels).double().mean().item()


def macro_f1(predicted: Tensor, labels: Tensor) -> Tensor:
    """The mean of the classes' F1, over those that are predicted or true somewhere.

    >>> round(float(macro_f1(torch.tensor([0, 1, 2]), torch.tensor([0, 1, 1]))), 3)
    0.556
    """
    classes = int(max(predicted.max(), labels.max())) + 1
    return multiclass_f1_score(predicted, labels, num_classes=max(2, classes), average="macro")


# Each is a function of predictions and labels. f1 and matthews are for two classes.
METRICS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "accuracy": accuracy,
    "f1": binary_f1_score,
    "macro_f1": macro_f1,
    "matthews": binary_matthews_corrcoef,
    "pearson": pearson_corrcoef,
    "spearman": spearman_corrcoef,
    "average": lambda predicted, labels: (pearson_corrcoef(predicted, labels) + spearman_corrcoef(predicted, labels)) / 2,
}


def standard_error(share: float, n: int) -> float:
    """The standard error sqrt(p (1 - p) / n) of a share p over n independent cases.

    >>> standard_error(0.5, 100)
    0.05
    """
    return math.sqrt(share * (1 - share) / n)
