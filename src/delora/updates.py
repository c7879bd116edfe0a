"""Updates: how one weight matrix ``W [out, in]`` changes.

An update is a small value that holds two equal computations of the same linear map: ``merge(W)`` gives the new
matrix, ``forward(x, host)`` the new output of the layer, without building the matrix where that is cheaper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from delora.hosts import MatrixHost


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that updates are built and merged in: float32, or wider if the weight is."""
    return torch.promote_types(dtype, torch.float32)


class Update(Protocol):
    """What a method says about one weight matrix."""

    def merge(self, W: Tensor) -> Tensor:
        """The new matrix W' [out, in], for a W in the dtype the update was built in."""
        ...

    def forward(self, x: Tensor, host: MatrixHost, dropout: float = 0.0) -> Tensor:
        """The output of the layer as if its matrix were W'. ``dropout`` drops entries of x on the way of the change."""
        ...

    def scaled(self, strength: float) -> Update:
        """The same update with its change W' - W multiplied by ``strength``."""
        ...


@dataclass(frozen=True)
class LowRank:
    """W' = W + up @ down, with ``up [out, k]`` and ``down [k, in]``."""

    up: Tensor
    down: Tensor

    def merge(self, W: Tensor) -> Tensor:
        return torch.addmm(W, self.up, self.down)

    def forward(self, x: Tensor, host: MatrixHost, dropout: float = 0.0) -> Tensor:
        y = host.layer(x)
        # Token ids have no dtype to follow: there the layer's output tells.
        dtype = x.dtype if x.is_floating_point() else y.dtype
        h = host.project(x, self.down.to(dtype), dropout)
        return host.add(y, h, self.up.to(dtype))

    def scaled(self, strength: float) -> LowRank:
        return LowRank(self.up, self.down * strength)
