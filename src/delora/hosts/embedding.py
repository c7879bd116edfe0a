"""Embeddings."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from delora.hosts.base import MatrixHost

__all__ = ["Embedding"]


class Embedding(MatrixHost):
    """``nn.Embedding``: the linear map from one-hot ids to vectors; weight [ids, out], matrix [out, ids].

    Dropout of a one-hot input drops the whole change of a token.

    >>> from torch import nn
    >>> Embedding(nn.Embedding(10, 4)).matrix().shape
    torch.Size([4, 10])
    """

    lookup = True

    def check(self) -> None:
        super().check()
        if self.layer.max_norm is not None:
            raise ValueError("cannot adapt an Embedding with max_norm: it rewrites its own weight at every look-up")

    def matrix(self) -> Tensor:
        return self.layer.weight.T

    def as_weight(self, W: Tensor) -> Tensor:
        return W.T

    def fold(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, None]:
        return (W if b is None else W + b[:, None]), None

    def project(self, x: Tensor, down: Tensor, dropout: float) -> Tensor:
        h = F.embedding(x, down.T)
        return h * F.dropout(h.new_ones(*x.shape, 1), dropout) if dropout else h

    def add(self, y: Tensor, h: Tensor, up: Tensor) -> Tensor:
        return y + F.linear(h, up).to(y.dtype)
