"""Convolutions in one, two and three dimensions."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from delora import torch_private
from delora.hosts.base import MatrixHost
from delora.updates import PerRow

__all__ = ["Conv1d", "Conv2d", "Conv3d", "Convolution"]


class Convolution(MatrixHost):
    """A convolution: weight [out, in, *kernel], matrix [out, in * kernel].

    ``project`` is a convolution to k channels with the layer's stride and padding, ``add`` one with kernel size 1.

    With groups (depthwise convolutions have one for each channel) the weight is [out, in / groups, *kernel], and so the matrix:
    each row is a filter, applied to the inputs of its group. ``W' = W + up down`` is then a change of the weight as ever: all
    groups share ``down``, which makes k features of each group's inputs, and each row of ``up`` multiplies those of its group.
    """

    dims: ClassVar[int]

    @property
    def mixes(self) -> bool:
        return bool(self.layer.groups == 1)

    def matrix(self) -> Tensor:
        return self.layer.weight.flatten(1)

    def as_weight(self, W: Tensor) -> Tensor:
        return W.reshape(-1, *self._filter())

    def _filter(self) -> tuple[int, ...]:
        """The shape of a row of the matrix as a filter, which is known where the weight is not here: [in / groups, *kernel]."""
        return self.layer.in_channels // self.layer.groups, *self.layer.kernel_size

    def channels_last(self, y: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
        channels = -1 - self.dims
        return fn(y.movedim(channels, -1)).movedim(-1, channels)

    def project(self, x: Tensor, down: Tensor, dropout: float) -> Tensor:
        kernel = down.reshape(-1, *self._filter())  # [k, in / groups, *kernel]
        if self.layer.groups > 1:  # the k features of each group, one group after another
            kernel = kernel.repeat(self.layer.groups, *(1,) * (1 + self.dims))
        return torch_private.conv(self.layer, F.dropout(x, dropout) if dropout else x, kernel)

    def add(self, y: Tensor, h: Tensor, up: Tensor) -> Tensor:
        conv = (F.conv1d, F.conv2d, F.conv3d)[self.dims - 1]
        return y + conv(h, up.reshape(*up.shape, *(1,) * self.dims), groups=self.layer.groups)

    def with_rows(self, x: Tensor, rows: PerRow) -> Tensor:
        y, dtype, groups = self.layer(x), x.dtype, self.layer.groups
        h = self.project(x, rows.all_down(dtype), 0.0)
        h = self.channels_last(h, lambda t: rows.own(t.unflatten(-1, (groups, -1))).flatten(-2))
        return self.add(y, h, rows.all_up(dtype))


class Conv1d(Convolution):
    """``nn.Conv1d``.

    >>> import torch
    >>> Conv1d(torch.nn.Conv1d(2, 4, kernel_size=3)).matrix().shape
    torch.Size([4, 6])
    """

    dims = 1


class Conv2d(Convolution):
    """``nn.Conv2d``.

    >>> import torch
    >>> Conv2d(torch.nn.Conv2d(2, 4, kernel_size=3)).matrix().shape
    torch.Size([4, 18])
    """

    dims = 2


class Conv3d(Convolution):
    """``nn.Conv3d``.

    >>> import torch
    >>> Conv3d(torch.nn.Conv3d(2, 4, kernel_size=3)).matrix().shape
    torch.Size([4, 54])
    """

    dims = 3
