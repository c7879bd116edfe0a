"""Linear layers: ``nn.Linear`` and transformers' ``Conv1D``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from delora.hosts.base import MatrixHost, is_bare
from delora.lowrank import add_low_rank, can_add_in_place, can_fuse, linear
from delora.torch_private import is_view
from delora.updates import PerRow

__all__ = ["Conv1D", "Linear"]


class Linear(MatrixHost):
    """``nn.Linear``: weight [out, in].

    >>> Linear(torch.nn.Linear(4, 3)).matrix().shape
    torch.Size([3, 4])
    """

    linear = True

    def matrix(self) -> Tensor:
        return self.layer.weight

    def as_weight(self, W: Tensor) -> Tensor:
        return W

    @torch.no_grad()
    def is_product(self) -> bool:
        """Whether ``layer(x) = W x + b``, tried on two rows of fixed numbers; on the meta device, where nothing runs, yes."""
        W, b = self.matrix(), self.layer.bias
        if W.is_meta:
            return True
        rows = torch.arange(2 * W.shape[1], device=W.device).reshape(2, -1)
        x = torch.cos(rows.float()).to(W.dtype)
        expected = F.linear(x, W, b)
        try:
            y = type(self.layer).forward(self.layer, x)
        except Exception:  # whatever another forward raises, given one plain input
            return False
        close = torch.finfo(W.dtype).eps ** 0.5
        return isinstance(y, Tensor) and y.shape == expected.shape and torch.allclose(y, expected, rtol=close, atol=close)

    def branch(self, y: Tensor, x: Tensor, down: Tensor, up: Tensor, dropout: float, constant: int = 0) -> Tensor:
        if not can_add_in_place(y, x):
            return super().branch(y, x, down, up, dropout)
        # A hook may have kept the layer's output.
        return add_low_rank(y if is_bare(self.layer) and not is_view(y) else y.clone(), x, down, up, dropout, constant)

    def with_branch(self, x: Tensor, down: Tensor, up: Tensor, dropout: float, constant: int = 0) -> Tensor:
        layer = self.layer
        if type(self) is Linear and is_bare(layer):
            weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
            if weight is not None and can_fuse(x, weight, bias):
                return linear(x, weight, bias, down, up, dropout, constant)
        return super().with_branch(x, down, up, dropout, constant)

    def with_rows(self, x: Tensor, rows: PerRow) -> Tensor:
        y = self.layer(x)
        into, back = rows.gathered(x.dtype)
        batch = len(x)
        h = torch.bmm(x.reshape(batch, -1, x.shape[-1]), into)  # [rows, tokens, k]
        flat = y.reshape(batch, -1, y.shape[-1])
        if y.dtype != h.dtype:  # under autocast
            return (flat + torch.bmm(h, back).to(y.dtype)).view_as(y)
        own = type(self.layer).forward is torch.nn.Linear.forward or not is_view(y)  # its memory is nobody else's
        fresh = own and not torch.is_grad_enabled() and can_add_in_place(y, x) and is_bare(self.layer)
        return (flat.baddbmm_(h, back) if fresh else torch.baddbmm(flat, h, back)).view_as(y)

    def project(self, x: Tensor, down: Tensor, dropout: float) -> Tensor:
        return F.linear(F.dropout(x, dropout) if dropout else x, down)

    def add(self, y: Tensor, h: Tensor, up: Tensor) -> Tensor:
        if y.dim() == 1 or y.dtype != h.dtype:  # under autocast, y and h can differ in dtype
            return y + F.linear(h, up).to(y.dtype)
        # One fused kernel and no [tokens, out] temporary for up h.
        return torch.addmm(y.flatten(0, -2), h.flatten(0, -2), up.T).view_as(y)


class Conv1D(Linear):
    """transformers' ``Conv1D`` (GPT-2): a linear layer whose weight is stored as [in, out].

    >>> from transformers.pytorch_utils import Conv1D as Layer
    >>> from delora.hosts import host
    >>> host(Layer(3, 4)).matrix().shape  # 4 inputs, 3 outputs
    torch.Size([3, 4])
    """

    def matrix(self) -> Tensor:
        return self.layer.weight.T

    def as_weight(self, W: Tensor) -> Tensor:
        return W.T
