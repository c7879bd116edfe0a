"""Updates: how one layer changes; for most, how its weight matrix ``W [out, in]`` changes.

An update computes the same map in two ways: ``merge(W)`` and ``bias(b)`` give the new weights, ``forward(host, dropout, x)``
gives the new output of the layer, without the matrix W' where that is cheaper.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from delora.frozen import Frozen, given, takes_frozen, wide

__all__ = [
    "Affine",
    "BlockDiagonal",
    "Diagonal",
    "Edited",
    "LowRank",
    "NearIdentity",
    "PerRow",
    "Rescaled",
    "Scaled",
    "Side",
    "Sliced",
    "TwoSided",
    "Update",
    "joined",
    "wide",
]


class Update:
    """The change of one layer with matrix W [out, in] and bias b, which is [out] or None.

    The base class of all updates. ``mergeable`` is False if no weight can express the change.

    >>> class Negated(Update):
    ...     def merge(self, W):
    ...         return -W
    >>> Negated().scaled(0.5).merge(torch.ones(2, 2)).abs().max().item()
    0.0
    """

    mergeable: ClassVar[bool] = True

    def merge(self, W: Tensor) -> Tensor:
        """The new matrix W' [out, in], for a W in the dtype of the update.

        Raises:
            ValueError: no weight of the layer can express the change.
        """
        raise NotImplementedError

    def bias(self, b: Tensor | None) -> Tensor | None:
        """The new bias."""
        return b

    def forward(self, host: Any, dropout: float, *args: Any, **kwargs: Any) -> Any:
        """The output of the layer with the new weights, for the layer's own arguments.

        ``dropout`` is the probability with which entries of the input are dropped where the change is computed.
        """
        raise NotImplementedError

    def scaled(self, strength: float) -> Update:
        """The update whose change of W, b and the layer's output is ``strength`` times this one's."""
        return Scaled(self, strength)

    def rows(self, start: int, stop: int) -> Update | None:
        """The same change for the rows from ``start`` to before ``stop`` of W alone; None if a row of W' depends on others.

        >>> part = LowRank(up=torch.ones(4, 1), down=torch.ones(1, 2)).rows(1, 3)
        >>> part.merge(torch.zeros(2, 2)).tolist()
        [[1.0, 1.0], [1.0, 1.0]]
        """
        return None

    def largest(self, size: float) -> float:
        """An upper bound of |W'|_F, for |W|_F = ``size``, and of all numbers on the way to W'; infinity if none is known.

        >>> LowRank(up=torch.ones(4, 1), down=torch.ones(1, 4)).largest(10.0)
        14.0
        """
        return math.inf

    @takes_frozen
    def low_rank(self, W: Frozen) -> LowRank | None:
        """W' - W as exact low-rank factors, or None if it is not low-rank."""
        return None


def _size(t: Tensor) -> float:
    return torch.linalg.vector_norm(t.detach()).item()


@dataclass(frozen=True)
class LowRank(Update):
    """W' = W + up @ down, with ``up [out, k]`` and ``down [k, in]``.

    The last ``constant`` of the k terms do not depend on anything that trains: a layer does not compute their gradient.

    >>> LowRank(up=torch.ones(2, 1), down=torch.ones(1, 3)).merge(torch.zeros(2, 3))
    tensor([[1., 1., 1.],
            [1., 1., 1.]])
    """

    up: Tensor
    down: Tensor
    constant: int = 0

    def merge(self, W: Tensor) -> Tensor:
        return torch.addmm(W, self.up, self.down)

    def forward(self, host: Any, dropout: float, x: Tensor) -> Tensor:
        if x.is_floating_point():
            up, down = self.within(x.dtype)
            return host.with_branch(x, down, up, dropout, self.constant)
        return self.onto(host.layer(x), host, dropout, x)

    def within(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """``up`` and ``down`` in the dtype that is computed in.

        >>> LowRank(up=torch.ones(2, 1), down=torch.ones(1, 3)).within(torch.bfloat16)[0].dtype
        torch.bfloat16
        """
        even = self.evened() if dtype == torch.float16 else self
        up, down = even.up, even.down
        return up if up.dtype == dtype else up.to(dtype), down if down.dtype == dtype else down.to(dtype)

    def evened(self) -> LowRank:
        """The same product of factors that are of one size, column by row.

        A factor alone may leave the range of float16 (65,504) although the change is small.

        >>> even = LowRank(up=torch.tensor([[1e6]]), down=torch.tensor([[1e-8]])).evened()
        >>> round(even.up.item(), 3), round(even.down.item(), 3)
        (0.1, 0.1)
        """
        with torch.no_grad():
            u, d = self.up.abs().amax(-2).double(), self.down.abs().amax(-1).double()
            # Where one factor is zero, as at the start of training, its gradient is the other's, which must stay.
            one = torch.where(u > 0, 1 / u.clamp_min(1), d.clamp_min(1))
            to_up = torch.where((u > 0) & (d > 0), (d / u).sqrt(), one)
        to_down = (1 / to_up).to(self.up.dtype)[..., None]
        return LowRank(self.up * to_up.to(self.up.dtype)[..., None, :], self.down * to_down, self.constant)

    @torch.no_grad()
    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """U [out, n], s [n] and V [n, in] with ``up @ down = U diag(s) V``, s falling and n <= k: in float64, on the CPU.

        From the triangular factors of both, [k, k]: no [out, in] matrix is built, and terms that cancel do so before.

        >>> U, s, V = LowRank(up=2 * torch.eye(3, 2), down=torch.eye(2, 5)).svd()
        >>> s
        tensor([2., 2.], dtype=torch.float64)
        """
        left, up = torch.linalg.qr(self.up.cpu().double())
        right, down = torch.linalg.qr(self.down.cpu().double().mT)
        U, s, V = torch.linalg.svd(up @ down.mT, full_matrices=False)
        return left @ U, s, V @ right.mT

    def onto(self, y: Tensor, host: Any, dropout: float, x: Tensor) -> Tensor:
        """y + up down drop(x), for an output y of the layer."""
        # Token ids do not tell the dtype to compute in; the layer's output does.
        up, down = self.within(x.dtype if x.is_floating_point() else y.dtype)
        return host.branch(y, x, down, up, dropout, self.constant)

    def scaled(self, strength: float) -> LowRank:
        return LowRank(self.up, self.down * strength, self.constant)

    def rows(self, start: int, stop: int) -> LowRank:
        return LowRank(self.up[start:stop], self.down, self.constant)

    def largest(self, size: float) -> float:
        return size + _size(self.up) * _size(self.down)

    @takes_frozen
    def low_rank(self, W: Frozen) -> LowRank:
        return self


@dataclass(frozen=True)
class PerRow(Update):
    """Row i of a batch runs with ``W + scale[i] up[index[i]] down[index[i]]``, out of the n changes of one layer.

    ``up [n, out, k]``, ``down [n, k, in]``, ``index [rows]`` and ``scale [rows]``. ``into [rows, in, k]`` and
    ``back [rows, k, out]`` are the same factors gathered for every row; a linear layer multiplies by them.

    >>> from delora.hosts import host
    >>> layer = host(torch.nn.Linear(1, 1, bias=False))
    >>> up, down = torch.tensor([[[0.0]], [[1.0]]]), torch.ones(2, 1, 1)
    >>> change = PerRow(up, down, torch.tensor([0, 1]), torch.ones(2))
    >>> y = change.forward(layer, 0.0, torch.ones(2, 3, 1)) - layer.layer(torch.ones(2, 3, 1))
    >>> y.flatten(1).tolist()
    [[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]
    """

    up: Tensor
    down: Tensor
    index: Tensor
    scale: Tensor
    into: Tensor | None = None
    back: Tensor | None = None
    mergeable: ClassVar[bool] = False

    def merge(self, W: Tensor) -> Tensor:
        raise ValueError("every row of the batch has a change of its own, which no one weight can express")

    def forward(self, host: Any, dropout: float, x: Tensor) -> Tensor:
        return host.with_rows(x, self)

    def gathered(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The factors of every row, [rows, in, k] and [rows, k, out]."""
        into, back = self.into, self.back
        if into is None or back is None:
            into = (self.down[self.index] * self.scale.view(-1, 1, 1)).mT
            back = self.up[self.index].mT
        return into.to(dtype), back.to(dtype)

    def all_down(self, dtype: torch.dtype) -> Tensor:
        """The n factors ``down`` as one, [n k, in]."""
        return self.down.flatten(0, 1).to(dtype)

    def all_up(self, dtype: torch.dtype) -> Tensor:
        """The n factors ``up`` as one, [out, n k]."""
        return self.up.movedim(0, 1).flatten(1).to(dtype)

    def own(self, h: Tensor) -> Tensor:
        """Of the features h [rows, ..., n k] of every row under all n changes those under its own, scaled; the others are 0."""
        n, k = self.down.shape[:2]
        shape = (len(self.index), *(1,) * (h.dim() - 2), n * k)
        number = torch.arange(n, device=h.device).repeat_interleave(k)
        mine = (self.index[:, None] == number).view(shape)
        # Not a product with zeros and ones: another change's features may have overflowed.
        return torch.where(mine, h, 0) * self.scale.to(h.dtype).view(-1, *(1,) * (h.dim() - 1))


# ---------------------------------------------------------------- multiplication from both sides


class Side(Protocol):
    """A square matrix S [d, d] that multiplies W from the left or the right.

    >>> S: Side = Diagonal(torch.tensor([1.0, 2.0]))
    >>> S.apply(torch.ones(3, 2)).tolist()
    [[1.0, 2.0], [1.0, 2.0], [1.0, 2.0]]
    """

    def apply(self, x: Tensor) -> Tensor:
        """S x for every vector x in the last dimension."""
        ...

    def transposed(self) -> Side:
        """S^T."""
        ...

    def excess(self) -> LowRank | None:
        """S - I as exact low-rank factors, or None if it is not low-rank."""
        ...

    def largest(self) -> float:
        """An upper bound, at least 1, of |S x| / |x| and of all numbers on the way to S x; infinity if none is known."""
        return math.inf


@dataclass(frozen=True)
class NearIdentity(Side):
    """S = I + blockdiag(up_1 down_1, ..., up_n down_n), with ``up [n, m, k]``, ``down [n, k, m]`` and d = n m.

    >>> NearIdentity(torch.ones(1, 2, 1), torch.ones(1, 1, 2)).apply(torch.tensor([1.0, 0.0]))
    tensor([2., 1.])
    """

    up: Tensor
    down: Tensor

    def apply(self, x: Tensor) -> Tensor:
        up, down = self.up.to(x.dtype), self.down.to(x.dtype)
        if len(up) == 1:
            return x + x @ down[0].T @ up[0].T
        parts = x.unflatten(-1, up.shape[:2])  # [..., n, m]
        rows = parts.reshape(-1, *parts.shape[-2:]).transpose(0, 1)  # [n, tokens, m]
        h = torch.bmm(rows, down.mT)
        return (parts + torch.bmm(h, up.mT).transpose(0, 1).reshape(parts.shape)).flatten(-2)

    def transposed(self) -> NearIdentity:
        return NearIdentity(self.down.mT, self.up.mT)

    def excess(self) -> LowRank:
        return LowRank(torch.block_diag(*self.up), torch.block_diag(*self.down))

    def largest(self) -> float:
        return (1 + _size(self.up)) * (1 + _size(self.down))


@dataclass(frozen=True)
class BlockDiagonal(Side):
    """S = blockdiag(S_1, ..., S_n), with ``blocks [n, m, m]`` and d = n m.

    >>> swap = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    >>> BlockDiagonal(torch.stack([swap, swap])).apply(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    tensor([2., 1., 4., 3.])
    """

    blocks: Tensor

    def apply(self, x: Tensor) -> Tensor:
        blocks = self.blocks.to(x.dtype)
        return torch.einsum("...nj,nij->...ni", x.unflatten(-1, blocks.shape[:2]), blocks).flatten(-2)

    def transposed(self) -> BlockDiagonal:
        return BlockDiagonal(self.blocks.mT)

    def excess(self) -> None:
        return None

    def largest(self) -> float:
        return 1 + _size(self.blocks)


@dataclass(frozen=True)
class Diagonal(Side):
    """S = diag(scale), with ``scale [d]``.

    >>> Diagonal(torch.tensor([1.0, 2.0])).apply(torch.tensor([3.0, 3.0]))
    tensor([3., 6.])
    """

    scale: Tensor

    def apply(self, x: Tensor) -> Tensor:
        return x * self.scale.to(x.dtype)

    def transposed(self) -> Diagonal:
        return self

    def excess(self) -> None:
        return None

    def largest(self) -> float:
        return 1 + _size(self.scale)


@dataclass(frozen=True)
class TwoSided(Update):
    """W' = left W right; a side that is None is the identity. The bias does not change.

    ``forward`` transforms the layer's input and output and does not read W, so a quantised base needs no conversion. The
    input of a convolution or an embedding is not a vector and cannot be transformed: there ``right`` makes every forward
    build the merged matrix, and so does ``left`` for a convolution with groups, whose outputs come from different inputs.

    >>> TwoSided(left=Diagonal(torch.tensor([1.0, 2.0]))).merge(torch.ones(2, 3))
    tensor([[1., 1., 1.],
            [2., 2., 2.]])
    """

    left: Side | None = None
    right: Side | None = None

    def merge(self, W: Tensor) -> Tensor:
        if self.right is not None:
            W = self.right.transposed().apply(W)
        return W if self.left is None else self.left.apply(W.mT).mT

    def forward(self, host: Any, dropout: float, x: Tensor) -> Tensor:
        if (self.right is not None and not host.linear) or (self.left is not None and not host.mixes):
            return host.run(x, self.merge(host.weight()))
        if self.right is None:
            y = host.layer(x)
        else:
            y = host.layer(self.right.apply(x).to(x.dtype))  # autocast may have made it narrower
        return y if self.left is None else host.mixed(y, self.left.apply)

    def rows(self, start: int, stop: int) -> TwoSided | None:
        return self if self.left is None else None

    def largest(self, size: float) -> float:
        return size * math.prod(side.largest() for side in (self.left, self.right) if side is not None)

    @takes_frozen
    def low_rank(self, W: Frozen) -> LowRank | None:
        """``(I + a b) W (I + c d) - W = [W c, a] [d; b W + (b W c) d]``."""
        right, left = (None if side is None else side.excess() for side in (self.right, self.left))
        if (right is None) != (self.right is None) or (left is None) != (self.left is None):
            return None
        if right is None and left is None:
            return None
        c = W.new_empty(W.shape[1], 0) if right is None else right.up
        b = W.new_empty(0, len(W)) if left is None else left.down
        Wc, bW = W.products(c, b)
        if left is None or right is None:
            return LowRank(Wc, right.down) if right else LowRank(left.up, bW) if left else None
        return LowRank(torch.cat([Wc, left.up], dim=1), torch.cat([right.down, bW + (b @ Wc) @ right.down]))


# ---------------------------------------------------------------- scales


@dataclass(frozen=True)
class Rescaled(Update):
    """W' = diag(scale) (W + up down), with ``scale [out]`` and the factors of ``inner``; the bias does not change.

    >>> Rescaled(torch.tensor([1.0, 2.0]), LowRank(torch.ones(2, 1), torch.ones(1, 2))).merge(torch.zeros(2, 2))
    tensor([[1., 1.],
            [2., 2.]])
    """

    scale: Tensor
    inner: LowRank

    def merge(self, W: Tensor) -> Tensor:
        return self.scale[:, None] * self.inner.merge(W)

    def rows(self, start: int, stop: int) -> Rescaled:
        return Rescaled(self.scale[start:stop], self.inner.rows(start, stop))

    def largest(self, size: float) -> float:
        return (1 + _size(self.scale)) * self.inner.largest(size)

    def forward(self, host: Any, dropout: float, x: Tensor) -> Tensor:
        y = host.layer(x)
        if not dropout:
            return host.mixed(self.inner.onto(y, host, 0.0, x), self._rescale)
        # Dropout applies to the change alone: W x + (diag(scale) (W + up down) - W) drop(x). The entries of token ids
        # cannot be dropped: there it applies to up down.
        on_values = x.is_floating_point()
        dropped = torch.nn.functional.dropout(x, dropout) if on_values else x
        z = host.layer(dropped) if on_values else y
        branch = self.inner.onto(z, host, 0.0 if on_values else dropout, dropped)
        return y + (host.mixed(branch, self._rescale) - z)

    def _rescale(self, y: Tensor) -> Tensor:
        return y * self.scale.to(y.dtype)


@dataclass(frozen=True)
class Affine(Update):
    """y' = scale y + shift for every channel of the output: W' = diag(scale) W, b' = scale b + shift. Either can be None.

    >>> Affine(shift=torch.ones(2)).bias(None)
    tensor([1., 1.])
    """

    scale: Tensor | None = None
    shift: Tensor | None = None

    def merge(self, W: Tensor) -> Tensor:
        return W if self.scale is None else self.scale[:, None] * W

    def rows(self, start: int, stop: int) -> Affine:
        return Affine(*(None if part is None else part[start:stop] for part in (self.scale, self.shift)))

    def largest(self, size: float) -> float:
        return size if self.scale is None else (1 + _size(self.scale)) * size

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
    """y' = fn(y, dropout) for the output y [..., channels] of a module of any kind; no weight can express this change.

    >>> from delora.hosts import host
    >>> layer = host(torch.nn.Linear(2, 3))
    >>> Edited(lambda y, dropout: 0 * y + 5).forward(layer, 0.0, torch.ones(1, 2)).tolist()
    [[5.0, 5.0, 5.0]]
    """

    fn: Callable[[Tensor, float], Tensor]
    mergeable: ClassVar[bool] = False

    def merge(self, W: Tensor) -> Tensor:
        raise ValueError("it edits the output of the layer, which no weight can express: it cannot be merged")

    def forward(self, host: Any, dropout: float, *args: Any, **kwargs: Any) -> Any:
        return host.edited(lambda y: self.fn(y, dropout), *args, **kwargs)

    def scaled(self, strength: float) -> Edited:
        return Edited(lambda y, dropout: torch.lerp(y, self.fn(y, dropout), strength))


@dataclass(frozen=True)
class Scaled(Update):
    """W' = W + strength (W'' - W) and b' = b + strength (b'' - b), with W'' and b'' the weights of the update ``inner``.

    >>> Scaled(TwoSided(left=Diagonal(torch.tensor([3.0]))), strength=0.5).merge(torch.ones(1, 2))
    tensor([[2., 2.]])
    """

    inner: Update
    strength: float

    def merge(self, W: Tensor) -> Tensor:
        return torch.lerp(W, self.inner.merge(W), self.strength)

    def rows(self, start: int, stop: int) -> Scaled | None:
        part = self.inner.rows(start, stop)
        return None if part is None else Scaled(part, self.strength)

    def largest(self, size: float) -> float:
        return (1 + abs(self.strength)) * (size + self.inner.largest(size))

    def bias(self, b: Tensor | None) -> Tensor | None:
        new = self.inner.bias(b)
        return b if new is None or new is b else torch.lerp(torch.zeros_like(new) if b is None else b, new, self.strength)

    def forward(self, host: Any, dropout: float, *args: Any, **kwargs: Any) -> Any:
        return torch.lerp(host.layer(*args, **kwargs), self.inner.forward(host, dropout, *args, **kwargs), self.strength)

    @takes_frozen
    def low_rank(self, W: Frozen) -> LowRank | None:
        factors = given(self.inner.low_rank, W)
        return None if factors is None else factors.scaled(self.strength)


# ---------------------------------------------------------------- changes of some rows each

Rows = slice | Tensor  # of a matrix: from one to before another, or ascending indices


@dataclass(frozen=True)
class Sliced(Update):
    """W' [out, in] is W with ``W[rows]`` replaced by what their own update makes of them; no row is in two parts.

    ``forward`` runs the layer once and each part's update on its share of the output.

    >>> half = Sliced(2, ((slice(0, 1), Affine(scale=torch.tensor([3.0]))),))
    >>> half.merge(torch.ones(2, 2)).tolist()
    [[3.0, 3.0], [1.0, 1.0]]
    """

    out: int
    parts: tuple[tuple[Rows, Update], ...]

    def merge(self, W: Tensor) -> Tensor:
        for rows, update in self.parts:
            W = W.index_copy(0, _index(rows, W), update.merge(W[rows]))
        return W

    def bias(self, b: Tensor | None) -> Tensor | None:
        new = b
        for rows, update in self.parts:
            own = None if b is None else b[rows]
            changed = update.bias(own)
            if changed is not None and changed is not own:
                new = changed.new_zeros(self.out) if new is None else new
                new = new.index_copy(0, _index(rows, new), changed)
        return new

    def forward(self, host: Any, dropout: float, *args: Any, **kwargs: Any) -> Any:
        y = host.layer(*args, **kwargs)
        new = y
        for rows, update in self.parts:
            part = update.forward(host.at(rows, y, args), dropout, *args, **kwargs)
            (dim,) = [i for i, (a, b) in enumerate(zip(y.shape, part.shape, strict=True)) if a != b] or (None,)
            new = part if dim is None else new.index_copy(dim, _index(rows, y), part.to(y.dtype))
        return new

    def rows(self, start: int, stop: int) -> Sliced | None:
        parts: list[tuple[Rows, Update]] = []
        for rows, update in self.parts:
            index = torch.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows
            first, last = (int((index < n).sum()) for n in (start, stop))
            part = update.rows(first, last)
            if part is None:
                return None
            parts.append((index[first:last] - start, part))
        return Sliced(stop - start, tuple(parts))

    def largest(self, size: float) -> float:
        return size + sum(update.largest(size) for _, update in self.parts)

    @takes_frozen
    def low_rank(self, W: Frozen) -> LowRank | None:
        factors = [(rows, given(update.low_rank, Frozen(W.dense()[rows]))) for rows, update in self.parts]
        if any(change is None for _, change in factors):
            return None
        change = joined(self.out, factors)
        assert isinstance(change, LowRank)
        return change


def _index(rows: Rows, like: Tensor) -> Tensor:
    return torch.arange(rows.start, rows.stop, device=like.device) if isinstance(rows, slice) else rows.to(like.device)


def joined(out: int, parts: Iterable[tuple[Rows, Any]]) -> Update:
    """The change of a matrix [out, in] of which some rows change, each part by its own update.

    Low-rank parts are one low-rank change: ``up`` has their factors in their rows and zeros elsewhere, and the ranks add up.

    >>> one = LowRank(torch.ones(1, 1), torch.ones(1, 3))
    >>> joined(3, [(slice(0, 1), one), (torch.tensor([2]), one)]).up.tolist()
    [[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]]
    """
    each = tuple(parts)
    if not all(isinstance(update, LowRank) for _, update in each):
        return Sliced(out, each)
    # The terms that train, of all parts, then the constant ones.
    ups: tuple[list[Tensor], list[Tensor]] = ([], [])
    downs: tuple[list[Tensor], list[Tensor]] = ([], [])
    constant = 0
    for rows, update in each:
        if isinstance(rows, slice):
            up = torch.nn.functional.pad(update.up, (0, 0, rows.start, out - rows.stop))
        else:
            up = update.up.new_zeros(out, update.up.shape[1]).index_copy(0, rows.to(update.up.device), update.up)
        learned = up.shape[1] - update.constant
        for i, terms in enumerate((slice(None, learned), slice(learned, None)) if update.constant else (slice(None),)):
            ups[i].append(up[:, terms])
            downs[i].append(update.down[terms])
        constant += update.constant
    if len(each) == 1:
        return LowRank(up, each[0][1].down, constant)
    return LowRank(torch.cat([*ups[0], *ups[1]], 1), torch.cat([*downs[0], *downs[1]]), constant)
