"""Updates: how one layer changes, most of them how its weight matrix ``W [out, in]`` does.

An update is a small value that holds two equal computations of the same map: ``merge(W)`` and ``bias(b)`` give the new
weights, ``forward(host, dropout, x)`` the new output of the layer, without building the matrix where that is cheaper.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that updates are built and merged in: float32, or wider if the weight is."""
    return torch.promote_types(dtype, torch.float32)


class Update:
    """What a method says about one layer, whose matrix is W [out, in] and whose bias is b [out] or None."""

    mergeable: ClassVar[bool] = True

    def merge(self, W: Tensor) -> Tensor:
        """The new matrix W' [out, in], for a W in the dtype the update was built in.

        Raises:
            ValueError: no weight of the layer could do the same.
        """
        raise NotImplementedError

    def bias(self, b: Tensor | None) -> Tensor | None:
        """The new bias."""
        return b

    def forward(self, host: Any, dropout: float, *args: Any, **kwargs: Any) -> Any:
        """The output of the layer as if its weights were the new ones, for the layer's own arguments.

        ``dropout`` drops entries of the input on the way of the change.
        """
        raise NotImplementedError

    def scaled(self, strength: float) -> Update:
        """The same update with its change, from W and b and from the layer's output, multiplied by ``strength``."""
        return Scaled(self, strength)

    def low_rank(self, W: Tensor) -> LowRank | None:
        """W' - W as exact factors where it has few; None where it has not."""
        return None


@dataclass(frozen=True)
class LowRank(Update):
    """W' = W + up @ down, with ``up [out, k]`` and ``down [k, in]``."""

    up: Tensor
    down: Tensor

    def merge(self, W: Tensor) -> Tensor:
        return torch.addmm(W, self.up, self.down)

    def forward(self, host: Any, dropout: float, x: Tensor) -> Tensor:
        if x.is_floating_point():
            return host.with_branch(x, self.down.to(x.dtype), self.up.to(x.dtype), dropout)
        return self.onto(host.layer(x), host, dropout, x)

    def onto(self, y: Tensor, host: Any, dropout: float, x: Tensor) -> Tensor:
        """y + up down x, for an output y of the layer."""
        # Token ids have no dtype to follow: there the layer's output tells.
        dtype = x.dtype if x.is_floating_point() else y.dtype
        return host.branch(y, x, self.down.to(dtype), self.up.to(dtype), dropout)

    def scaled(self, strength: float) -> LowRank:
        return LowRank(self.up, self.down * strength)

    def low_rank(self, W: Tensor) -> LowRank:
        return self


# ---------------------------------------------------------------- both sides of W


class Side(Protocol):
    """A square matrix S [d, d] that multiplies W from one side."""

    def apply(self, x: Tensor) -> Tensor:
        """S x for every vector x in the last dimension."""
        ...

    def transposed(self) -> Side: ...

    def excess(self) -> LowRank | None:
        """S - I as factors where it has few."""
        ...


@dataclass(frozen=True)
class NearIdentity(Side):
    """S = I + blockdiag(up_1 down_1, ..., up_n down_n), with ``up [n, m, k]``, ``down [n, k, m]`` and d = n m."""

    up: Tensor
    down: Tensor

    def apply(self, x: Tensor) -> Tensor:
        up, down = self.up.to(x.dtype), self.down.to(x.dtype)
        if len(up) == 1:
            return x + x @ down[0].T @ up[0].T
        parts = x.unflatten(-1, up.shape[:2])  # [..., n, m]
        h = torch.einsum("...nm,nkm->...nk", parts, down)
        return (parts + torch.einsum("...nk,nmk->...nm", h, up)).flatten(-2)

    def transposed(self) -> NearIdentity:
        return NearIdentity(self.down.mT, self.up.mT)

    def excess(self) -> LowRank:
        return LowRank(torch.block_diag(*self.up), torch.block_diag(*self.down))


@dataclass(frozen=True)
class BlockDiagonal(Side):
    """S = blockdiag(S_1, ..., S_n), with ``blocks [n, m, m]`` and d = n m."""

    blocks: Tensor

    def apply(self, x: Tensor) -> Tensor:
        blocks = self.blocks.to(x.dtype)
        return torch.einsum("...nj,nij->...ni", x.unflatten(-1, blocks.shape[:2]), blocks).flatten(-2)

    def transposed(self) -> BlockDiagonal:
        return BlockDiagonal(self.blocks.mT)

    def excess(self) -> None:
        return None


@dataclass(frozen=True)
class Diagonal(Side):
    """S = diag(scale), with ``scale [d]``."""

    scale: Tensor

    def apply(self, x: Tensor) -> Tensor:
        return x * self.scale.to(x.dtype)

    def transposed(self) -> Diagonal:
        return self

    def excess(self) -> None:
        return None


@dataclass(frozen=True)
class TwoSided(Update):
    """W' = left W right; a side that is None is the identity. The bias stays.

    The layer's input and output are transformed and W is not read, so a quantised base stays as it is. A layer whose input
    is not a plain vector (a convolution, an embedding) cannot have it transformed: there ``right`` costs the merged
    matrix in every forward.
    """

    left: Side | None = None
    right: Side | None = None

    def merge(self, W: Tensor) -> Tensor:
        if self.right is not None:
            W = self.right.transposed().apply(W)
        return W if self.left is None else self.left.apply(W.mT).mT

    def forward(self, host: Any, dropout: float, x: Tensor) -> Tensor:
        if self.right is None:
            y = host.layer(x)
        elif host.linear:
            y = host.layer(self.right.apply(x))
        else:
            return host.run(x, self.merge(host.weight()))
        return y if self.left is None else host.mixed(y, self.left.apply)

    def low_rank(self, W: Tensor) -> LowRank | None:
        ups, downs = [], []
        for side, is_left in ((self.right, False), (self.left, True)):
            excess = None if side is None else side.excess()
            if excess is not None:
                ups.append(excess.up if is_left else W @ excess.up)
                downs.append(excess.down @ W if is_left else excess.down)
                W = torch.addmm(W, ups[-1], downs[-1])
            elif side is not None:
                return None
        return LowRank(torch.cat(ups, dim=1), torch.cat(downs)) if ups else None


# ---------------------------------------------------------------- scales


@dataclass(frozen=True)
class Rescaled(Update):
    """W' = diag(scale) (W + up down), with ``scale [out]``; the bias stays."""

    scale: Tensor
    inner: LowRank

    def merge(self, W: Tensor) -> Tensor:
        return self.scale[:, None] * self.inner.merge(W)

    def forward(self, host: Any, dropout: float, x: Tensor) -> Tensor:
        y = host.layer(x)
        if not dropout:
            return host.mixed(self.inner.onto(y, host, 0.0, x), self._rescale)
        # The base's own term is not dropped, all that is added to it is: W x + (diag(scale) (W + up down) - W) drop(x).
        # Token ids cannot be dropped: there only up down is.
        on_values = x.is_floating_point()
        dropped = torch.nn.functional.dropout(x, dropout) if on_values else x
        z = host.layer(dropped) if on_values else y
        branch = self.inner.onto(z, host, 0.0 if on_values else dropout, dropped)
        return y + (host.mixed(branch, self._rescale) - z)

    def _rescale(self, y: Tensor) -> Tensor:
        return y * self.scale.to(y.dtype)


@dataclass(frozen=True)
class Affine(Update):
    """y' = scale y + shift for every channel of the output: W' = diag(scale) W, b' = scale b + shift. Either can be None."""

    scale: Tensor | None = None
    shift: Tensor | None = None

    def merge(self, W: Tensor) -> Tensor:
        return W if self.scale is None else self.scale[:, None] * W

    def bias(self, b: Tensor | None) -> Tensor | None:
        if b is not None and self.scale is not None:
            b = self.scale * b
        return b if self.shift is None else self.shift if b is None else b + self.shift

    def forward(self, host: Any, dropout: float, *args: Any, **kwargs: Any) -> Any:
        def edit(y: Tensor) -> Tensor:
            if self.scale is not None:
                y = y * self.scale.to(y.dtype)
            return y if self.shift is None else y + self.shift.to(y.dtype)

        return host.edited(edit, *args, **kwargs)

    def scaled(self, strength: float) -> Affine:
        return Affine(
            None if self.scale is None else 1 + strength * (self.scale - 1),
            None if self.shift is None else strength * self.shift,
        )


@dataclass(frozen=True)
class Edited(Update):
    """y' = fn(y, dropout) for the output y [..., channels] of a module of any kind; no weight of it could do the same."""

    fn: Callable[[Tensor, float], Tensor]
    mergeable: ClassVar[bool] = False

    def merge(self, W: Tensor) -> Tensor:
        raise ValueError("it edits what the layer puts out, as no weight of the layer could: it cannot be merged")

    def forward(self, host: Any, dropout: float, *args: Any, **kwargs: Any) -> Any:
        return host.edited(lambda y: self.fn(y, dropout), *args, **kwargs)

    def scaled(self, strength: float) -> Edited:
        return Edited(lambda y, dropout: torch.lerp(y, self.fn(y, dropout), strength))


@dataclass(frozen=True)
class Scaled(Update):
    """W' = W + strength (W'' - W) and b' = b + strength (b'' - b), with W'' and b'' the weights of another update."""

    inner: Update
    strength: float

    def merge(self, W: Tensor) -> Tensor:
        return torch.lerp(W, self.inner.merge(W), self.strength)

    def bias(self, b: Tensor | None) -> Tensor | None:
        new = self.inner.bias(b)
        return b if new is None or new is b else torch.lerp(torch.zeros_like(new) if b is None else b, new, self.strength)

    def forward(self, host: Any, dropout: float, *args: Any, **kwargs: Any) -> Any:
        return torch.lerp(host.layer(*args, **kwargs), self.inner.forward(host, dropout, *args, **kwargs), self.strength)

    def low_rank(self, W: Tensor) -> LowRank | None:
        factors = self.inner.low_rank(W)
        return None if factors is None else factors.scaled(self.strength)
