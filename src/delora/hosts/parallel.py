"""Tensor parallel linear layers: each process multiplies by a part of W.

Such a layer divides W by rows, and gives a part of the output's features; or by columns, gets a part of the input's, and adds
up what the processes have. The change up down is computed in the same way: of the factor on the divided side each process uses
its part; the few features in the middle are whole on all of them. So the layer itself runs as it is, with its hooks.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from delora.hosts.base import PARALLEL, MatrixHost
from delora.hosts.embedding import Embedding
from delora.hosts.linear import Linear
from delora.sharded import divided_dims, is_dtensor

__all__ = ["ParallelEmbedding", "ParallelLinear"]


class ParallelLinear(Linear):
    """A linear layer whose weight is divided by rows (``ColwiseParallel``) or by columns (``RowwiseParallel``)."""

    def check(self) -> None:
        super().check()
        if divided_dims(self.layer.weight) is None:
            raise TypeError(
                f"cannot adapt a {type(self.layer).__name__}: its weight is divided among processes in a way that is not known "
                f"here, {tuple(self.layer.weight.placements)}"
            )

    def branch(self, y: Tensor, x: Tensor, down: Tensor, up: Tensor, dropout: float, constant: int = 0) -> Tensor:
        """``y + up down drop(x)``, for what this process has of the output y and of the input x."""
        W = self.layer.weight
        (out, inp), group = W.shape, W.device_mesh.get_group()
        if is_dtensor(x) or is_dtensor(y):
            raise ValueError(
                f"a tensor parallel {type(self.layer).__name__} was given or gave a DTensor: an adapter needs this process's "
                "part of it, use_local_output=True"
            )
        if x.shape[:-1] != y.shape[:-1]:
            raise ValueError(
                f"a tensor parallel {type(self.layer).__name__} was given tokens {list(x.shape[:-1])} and gave "
                f"{list(y.shape[:-1])}: layers that divide the sequence cannot have adapters"
            )
        if y.shape[-1] < out and x.shape[-1] == inp:  # each process has features of its own, from the whole input
            h = self.project(_Summed.apply(x, group), _Summed.apply(down, group), dropout)
            return self.add(y, h, _Summed.apply(up, group)[_own(out, y.shape[-1], group)])
        if x.shape[-1] < inp and y.shape[-1] == out:  # each process has its part of a sum
            h = self.project(x, _Summed.apply(down, group)[:, _own(inp, x.shape[-1], group)], dropout)
            return self.add(y, _Sum.apply(h, group), up)
        if x.shape[-1] != inp or y.shape[-1] != out:
            raise ValueError(
                f"a tensor parallel {type(self.layer).__name__} was given {x.shape[-1]} of {inp} features and gave "
                f"{y.shape[-1]} of {out}: an adapter needs all of them on one of the two sides"
            )
        return self.add(y, self.project(x, down, dropout), up)

    def with_branch(self, x: Tensor, down: Tensor, up: Tensor, dropout: float, constant: int = 0) -> Tensor:
        return self.branch(self.layer(x), x, down, up, dropout, constant)

    def with_rows(self, x: Tensor, rows: Any) -> Tensor:
        raise ValueError("a tensor parallel layer cannot run a batch with an adapter for each row")


class ParallelEmbedding(Embedding):
    """An embedding that is divided among processes, and gives whole vectors."""

    def add(self, y: Tensor, h: Tensor, up: Tensor) -> Tensor:
        if y.shape[-1] != len(up):
            raise ValueError(f"a tensor parallel Embedding gave {y.shape[-1]} of {len(up)} features: it must give all")
        return super().add(y, h, up)


PARALLEL |= cast("dict[type[MatrixHost], type[MatrixHost]]", {Linear: ParallelLinear, Embedding: ParallelEmbedding})


def _own(size: int, width: int, group: Any) -> slice:
    """Which of ``size`` features this process has, if it has ``width`` of them: as torch divides them.

    Raises:
        ValueError: it divides them otherwise.
    """
    step = -(-size // torch.distributed.get_world_size(group))
    start = step * torch.distributed.get_rank(group)
    if width != max(0, min(step, size - start)):
        raise ValueError(f"a tensor parallel layer has {width} of {size} features here, and torch would give it {step}")
    return slice(start, start + width)


class _Summed(torch.autograd.Function):
    """A tensor that all processes have alike; its gradient is the sum of what they compute."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return t.view_as(t)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=ctx.group)
        return total, None


class _Sum(torch.autograd.Function):
    """The sum of what all processes have, which they go on with alike."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, group: Any) -> Tensor:
        total = t.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
