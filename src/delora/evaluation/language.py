"""How well a language model predicts text."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

__all__ = ["perplexity"]


@torch.no_grad()
def perplexity(model: nn.Module, tokenizer: Any, text: str, block: int = 256) -> float:
    """exp of the mean negative log-likelihood of the text's tokens, each given those before it in its block of ``block``.

    The first token of a block is not predicted.

    >>> from types import SimpleNamespace
    >>> class Uniform(nn.Linear):
    ...     def forward(self, input_ids):
    ...         return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 7))
    >>> def letters(text, **options):
    ...     return {"input_ids": [ord(letter) % 7 for letter in text]}
    >>> round(perplexity(Uniform(1, 1), letters, "every token has probability 1/7"), 4)
    7.0
    """
    model.eval()
    device = next(model.parameters()).device
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    total, count = 0.0, 0
    for start in range(0, len(ids), block):
        some = torch.tensor([ids[start : start + block]], device=device)
        if some.shape[1] > 1:
            logs = model(input_ids=some).logits[0, :-1].float().log_softmax(-1)
            total -= logs.gather(-1, some[0, 1:, None]).sum().item()
            count += some.shape[1] - 1
    if not count:
        raise ValueError("perplexity needs a text of two tokens or more")
    return math.exp(total / count)
