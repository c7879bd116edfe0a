"""Convolutions in one, two and three dimensions."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from delora import torch_private
from delora.hosts.base import MatrixHost

__all__ = ["Conv1d", "Conv2d", "Conv3d", "Convolution"]


class Convolution(MatrixHost):
    """A convolution: weight [out, in, *kernel], matrix [out, in * kernel].

    ``project`` is a convolution to k channels with the layer's stride and padding, ``add`` one with kernel size 1.
    """

    dims: ClassVar[int]

    def check(self) -> None:
        super().check()
        layer = self.layer
        if layer.groups != 1:
            raise ValueError(
                f"cannot adapt a {type(layer).__name__} with groups = {layer.groups}: "
                "its weight is not one matrix but one for each group"
            )

    def matrix(self) -> Tensor:
        return self.layer.weight.flatten(1)

    def as_weight(self, W: Tensor) -> Tensor:
        return W.reshape(-1, self.layer.in_channels, *self.layer.kernel_size)

    def channels_last(self, y: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
        channels = -1 - self.dims
        return fn(y.movedim(channels, -1)).movedim(-1, channels)

    def project(self, x: Tensor, down: Tensor, dropout: float) -> Tensor:
        kernel = down.reshape(-1, self.layer.in_channels, *self.layer.kernel_size)  # [k, in, *kernel]
        return torch_private.conv(self.layer, F.dropout(x, dropout) if dropout else x, kernel)

    def add(self, y: Tensor, h: Tensor, up: Tensor) -> Tensor:
        conv = (F.conv1d, F.conv2d, F.conv3d)[self.dims - 1]
        return y + conv(h, up.reshape(*up.shape, *(1,) * self.dims))


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
