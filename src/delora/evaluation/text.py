"""Predictions for texts, and GLUE's metrics of them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.functional import pearson_corrcoef, spearman_corrcoef
from torchmetrics.functional.classification import binary_f1_score, binary_matthews_corrcoef

from delora.data.examples import Example, TextTask


@torch.no_grad()
def predict(
    model: nn.Module, tokenizer: Any, part: Sequence[Example], task: TextTask, max_tokens: int, batch: int = 64
) -> Tensor:
    """`decided` of the model for each example [examples], on the CPU; the model is left in evaluation mode."""
    model.eval()
    device = next(model.parameters()).device
    found = []
    for start in range(0, len(part), batch):
        encoded = encode(tokenizer, part[start : start + batch], max_tokens)
        found.append(decided(model(**tokenizer.pad(encoded, return_tensors="pt").to(device)).logits.float().cpu(), task))
    return torch.cat(found)


def encode(tokenizer: Any, part: Sequence[Example], max_tokens: int) -> Any:
    """The token ids of the examples' one or two texts; where these are too long together, the longer one is cut."""
    pairs = [example.pair for example in part]
    second = None if None in pairs else pairs
    return tokenizer([example.text for example in part], second, truncation=True, max_length=max_tokens)


def decided(logits: Tensor, task: TextTask) -> Tensor:
    """The class of each row, or the value of a regression, from logits [examples, labels]."""
    return logits.squeeze(-1) if task.regression else logits.argmax(dim=-1)


def scores(predicted: Tensor, part: Sequence[Example], task: TextTask) -> dict[str, float]:
    """Every metric of the task. A correlation with something constant is undefined, and given as 0."""
    kind = torch.float64 if task.regression else torch.int64
    labels = torch.tensor([example.label for example in part], dtype=kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a variance near zero
        found = {name: float(METRICS[name](predicted.to(kind), labels)) for name in task.metrics}
    return {name: value if math.isfinite(value) else 0.0 for name, value in found.items()}


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """The share of right predictions, in [0, 1]."""
    return (predicted == labels).double().mean().item()


# Of predictions and labels. f1 and matthews are of two classes.
METRICS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "accuracy": accuracy,
    "f1": binary_f1_score,
    "matthews": binary_matthews_corrcoef,
    "pearson": pearson_corrcoef,
    "spearman": spearman_corrcoef,
    "average": lambda predicted, labels: (pearson_corrcoef(predicted, labels) + spearman_corrcoef(predicted, labels)) / 2,
}


def standard_error(share: float, n: int) -> float:
    """sqrt(p (1 - p) / n): that of a share p over n independent cases."""
    return math.sqrt(share * (1 - share) / n)
