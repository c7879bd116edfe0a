"""Classification of texts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def predict(model: nn.Module, tokenizer: Any, texts: Sequence[str], max_tokens: int, batch_size: int = 64) -> Tensor:
    """The predicted class of each text [texts], on the CPU; the model is left in evaluation mode."""
    model.eval()
    device = next(model.parameters()).device
    classes = []
    for start in range(0, len(texts), batch_size):
        some = list(texts[start : start + batch_size])
        batch = tokenizer(some, padding=True, truncation=True, max_length=max_tokens, return_tensors="pt").to(device)
        classes.append(model(**batch).logits.argmax(dim=-1).cpu())
    return torch.cat(classes)


def accuracy(predicted: Tensor, labels: Sequence[int]) -> float:
    """The share of right predictions, in [0, 1]."""
    return (predicted == torch.tensor(labels)).double().mean().item()


def standard_error(share: float, n: int) -> float:
    """sqrt(p (1 - p) / n): that of a share p over n independent cases."""
    return math.sqrt(share * (1 - share) / n)
