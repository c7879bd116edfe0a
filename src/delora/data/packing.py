"""Rows of tokens in batches: padded, or several in one row whose tokens see only those of their own.

A packed row has no attention mask. Its positions begin at 0 with each of its documents, and by these transformers' attention
keeps the documents apart, with the same loss as of rows one by one.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from delora.data.alpaca import IGNORED

__all__ = ["Collator", "bins", "keeps_apart", "packed"]

Row = dict[str, Tensor]


def bins(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Which rows go together, so that none of the groups is longer than ``size``: best fit, the longest first.

    >>> bins([5, 3, 4, 2], 7)
    [[0, 3], [2, 1]]
    """
    made: list[list[int]] = []
    room: list[tuple[int, int]] = []  # of each group, sorted: what is left, and its number
    for row in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = next((k for k, (left, _) in enumerate(room) if left >= lengths[row]), None)
        left, group = room.pop(fitting) if fitting is not None else (size, len(made))
        if group == len(made):
            made.append([])
        made[group].append(row)
        if left > lengths[row]:
            insort(room, (left - lengths[row], group))
    return made


def packed(rows: Sequence[Row], size: int) -> list[Row]:
    """The rows, several in one of at most ``size`` tokens, with ``position_ids``.

    >>> rows = [{"input_ids": torch.tensor(ids), "labels": torch.tensor(ids)} for ids in ([1, 2, 3], [4, 5])]
    >>> {key: t.tolist() for key, t in packed(rows, 8)[0].items()}
    {'input_ids': [1, 2, 3, 4, 5], 'labels': [-100, 2, 3, -100, 5], 'position_ids': [0, 1, 2, 0, 1]}
    """
    made = []
    for group in bins([len(row["input_ids"]) for row in rows], size):
        some = [rows[i] for i in group]
        labels = [torch.cat([row["labels"].new_tensor([IGNORED]), row["labels"][1:]]) for row in some]
        places = [torch.arange(len(row["input_ids"])) for row in some]
        ids = [row["input_ids"] for row in some]
        made.append({"input_ids": torch.cat(ids), "labels": torch.cat(labels), "position_ids": torch.cat(places)})
    return made


class Collator:
    """Rows as one batch, filled up on the right with ``pad``, which no loss is on.

    >>> batch = Collator(pad=0)([{"input_ids": torch.tensor([5, 6]), "labels": torch.tensor([5, 6])}, {"input_ids":
    ...     torch.tensor([7]), "labels": torch.tensor([7])}])
    >>> batch["input_ids"].tolist(), batch["attention_mask"].tolist()
    ([[5, 6], [7, 0]], [[1, 1], [1, 0]])
    """

    def __init__(self, pad: int) -> None:
        self.fill = {"input_ids": pad, "labels": IGNORED, "position_ids": 0}  # each token of the filling is a document

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        def filled(key: str) -> Tensor:
            return nn.utils.rnn.pad_sequence([row[key] for row in rows], batch_first=True, padding_value=self.fill[key])

        batch = {key: filled(key) for key in rows[0]}
        if "position_ids" not in batch:
            lengths = torch.tensor([len(row["input_ids"]) for row in rows])
            batch["attention_mask"] = (torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]).long()
        return batch


@torch.no_grad()
def keeps_apart(model: Any) -> bool:
    """Whether a language model's documents are the same to it in one row as alone.

    Measured: the second of two documents must not change by a bit with what the first one says, nor, but for rounding, without
    it.
    """
    was = model.training
    model.eval()
    device, words = next(model.parameters()).device, model.get_input_embeddings().weight.shape[0]
    draw = torch.Generator().manual_seed(0)
    first, other, second = (torch.randint(words, (n,), generator=draw).tolist() for n in (6, 6, 7))

    def logits(*documents: list[int]) -> Tensor:
        ids = torch.tensor([[token for document in documents for token in document]], device=device)
        places = torch.tensor([[i for document in documents for i in range(len(document))]], device=device)
        found: Tensor = model(input_ids=ids, position_ids=places, use_cache=False).logits[0, -len(second) :].float()
        return found

    try:
        after, changed, alone = logits(first, second), logits(other, second), logits(second)
    except (TypeError, ValueError, RuntimeError):  # it takes no positions
        return False
    finally:
        model.train(was)
    close = torch.finfo(next(model.parameters()).dtype).eps ** 0.5 * alone.abs().max().item()
    return bool(torch.equal(after, changed)) and bool((after - alone).abs().max() <= close)
