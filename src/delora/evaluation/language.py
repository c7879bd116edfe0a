"""How well a language model predicts text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["log_likelihood", "perplexity", "predicted", "token_sums"]


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


@torch.no_grad()
def log_likelihood(model: Any, rows: Sequence[Mapping[str, Tensor]], collate: Any, size: int) -> float:
    """The mean log-probability of the rows' trained tokens, each counted alike; ``size`` rows at a time.

    ``rows`` have ``input_ids`` and ``labels``, of which -100 is left out; ``collate`` makes a batch of some.

    >>> from types import SimpleNamespace
    >>> class Uniform(nn.Linear):
    ...     def forward(self, input_ids):
    ...         return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 7))
    >>> row = {"input_ids": torch.tensor([1, 2, 3]), "labels": torch.tensor([-100, 2, 3])}
    >>> round(math.exp(-log_likelihood(Uniform(1, 1), [row], lambda rows: {k: t[None] for k, t in rows[0].items()}, 1)), 4)
    7.0
    """
    model.eval()
    device, total, count = next(model.parameters()).device, 0.0, 0
    for start in range(0, len(rows), size):
        batch = {key: t.to(device) for key, t in collate(rows[start : start + size]).items()}
        labels = batch.pop("labels")
        sums = token_sums(model(**batch).logits, labels).double().sum(0).tolist()
        total, count = total + sums[0], count + round(sums[1])
    return total / count


def token_sums(logits: Tensor, labels: Tensor) -> Tensor:
    """For each row the sum of its trained tokens' log-probabilities, and their number: [rows, 2].

    >>> token_sums(torch.zeros(1, 3, 2), torch.tensor([[-100, 1, 0]]))
    tensor([[-1.3863,  2.0000]])
    """
    trained = labels[:, 1:] != -100
    sums = logits.new_zeros(len(labels), dtype=torch.float32)
    for row, (where, wanted) in enumerate(zip(trained, labels[:, 1:], strict=True)):  # the softmax of few tokens at a time
        logs = logits[row, :-1][where].float().log_softmax(-1)
        sums[row] = logs.gather(-1, wanted[where][:, None]).sum()
    return torch.stack([sums, trained.sum(1).float()], 1)


@torch.no_grad()
def predicted(model: Any, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The most probable next token at every position of the rows, one after the other, and the mean of the rows' losses."""
    model.eval()
    device = next(model.parameters()).device
    tokens: list[int] = []
    losses = []
    for row in rows:
        ids, labels = (torch.as_tensor(row[key], device=device)[None] for key in ("input_ids", "labels"))
        output = model(input_ids=ids, labels=labels)
        tokens += output.logits[0].argmax(-1).tolist()
        losses.append(output.loss.item())
    return {"tokens": tokens, "loss": fmean(losses)}
