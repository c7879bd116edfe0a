"""What may be asked of a frozen weight, whatever holds it: it is read once, in blocks of rows, and never copied whole."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor

from delora.lowrank import without_autocast
from delora.sharded import is_sharded
from delora.torch_private import versions

__all__ = ["Frozen", "Known", "Matrix", "given", "mark", "memory", "takes_frozen", "wide"]

# Entries of one block: in float32 two megabytes, which a core's cache holds; on a device that starts kernels slowly, more.
ON_CPU, ELSEWHERE = 2**19, 2**25
SAMPLE = 256
Result = TypeVar("Result")


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which updates are built and merged: float32, or wider if the weight's is.

    >>> wide(torch.bfloat16), wide(torch.float64)
    (torch.float32, torch.float64)
    """
    return torch.promote_types(dtype, torch.float32)


class Matrix(Protocol):
    """What holds a matrix [out, in] and reads its rows: a host (`delora.hosts`)."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of `rows`."""
        ...

    @property
    def device(self) -> torch.device:
        """Where `rows` are."""
        ...

    def held(self) -> AbstractContextManager[Any]:
        """A context around several calls of `rows`."""
        ...

    def rows(self, start: int, stop: int) -> Tensor:
        """The rows from ``start`` to before ``stop``, detached."""
        ...

    def mark(self) -> object:
        """A value that changes with the numbers, cheap to compute; None if there is none."""
        ...


@dataclass
class Known:
    """What one reading of W told, kept until W changes: |W|_F, p' W q (`Frozen.fingerprint`) and the mark of that W."""

    mark: object = None
    norm: float = math.nan
    probe: float = math.nan


class Frozen:
    """A frozen weight W [out, in], of which a method may ask its shape, its norms and products with it.

    ``shape``, ``dtype`` (the layer's) and ``device`` are known without reading W. The first norm asked for reads W once, in
    blocks of rows, for all norms and the fingerprint together. All results, and tensors made by ``new_zeros`` and its like,
    are on the device of W and in float32 or wider.

    Args:
        matrix: the host of a layer, or a tensor [out, in].
        known: keeps norm and fingerprint from one `Frozen` of this matrix to the next.

    >>> W = Frozen(torch.tensor([[3.0, 0.0], [4.0, 1.0]]))
    >>> W.shape, W.column_norms(), W.row_norms()
    ((2, 2), tensor([5., 1.]), tensor([3.0000, 4.1231]))
    """

    def __init__(self, matrix: Matrix | Tensor, known: Known | None = None) -> None:
        self.matrix: Matrix = _Plain(matrix) if isinstance(matrix, Tensor) else matrix
        self.known = Known() if known is None else known
        self._sums: _Sums | None = None
        self._dense: Tensor | None = None

    # ---------------------------------------------------------------- without reading

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.matrix.shape

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the layer computes."""
        return self.matrix.dtype

    @property
    def device(self) -> torch.device:
        """Where W is when it is read."""
        return self.matrix.device

    def __len__(self) -> int:
        return self.shape[0]

    def new_empty(self, *size: int) -> Tensor:
        """A tensor for an adapter of W, not initialised."""
        return torch.empty(size, dtype=wide(self.dtype), device=self.device)

    def new_zeros(self, *size: int) -> Tensor:
        """Zeros for an adapter of W."""
        return self.new_empty(*size).zero_()

    def new_ones(self, *size: int) -> Tensor:
        """Ones for an adapter of W."""
        return self.new_empty(*size).fill_(1.0)

    def new_full(self, size: tuple[int, ...], value: float) -> Tensor:
        """A tensor for an adapter of W, all of one value."""
        return self.new_empty(*size).fill_(value)

    def on_meta(self) -> Frozen:
        """A matrix of this shape and dtype on the meta device: what is asked of it has shapes and no numbers."""
        return Frozen(torch.empty(self.shape, dtype=self.dtype, device="meta"))

    # ---------------------------------------------------------------- one reading for all of these

    def column_norms(self) -> Tensor:
        """The norm of every column, [in]."""
        return self._read().columns.sqrt().to(wide(self.dtype))

    def row_norms(self) -> Tensor:
        """The norm of every row, [out]."""
        return self._read().rows.sqrt().to(wide(self.dtype))

    def norm(self) -> Tensor:
        """|W|_F, without dimensions.

        >>> Frozen(torch.ones(2, 8)).norm()
        tensor(4.)
        """
        if self._sums is None and self._is_known():
            return self.new_full((), self.known.norm)
        return self._read().rows.sum().sqrt().to(wide(self.dtype))

    def fingerprint(self) -> tuple[float, float]:
        """|W|_F and p' W q with p_i = cos(i), q_j = sin(j): two numbers that another dtype changes only by its rounding.

        Other signs or another order of the entries change the second, but not the first.

        >>> norm, probe = Frozen(torch.eye(2)).fingerprint()
        >>> round(norm, 4), round(probe, 4)  # probe: cos 1 sin 1 + cos 2 sin 2
        (1.4142, 0.0762)
        """
        if self._sums is None and self._is_known():
            return self.known.norm, self.known.probe
        return self._read().fingerprint()

    # ---------------------------------------------------------------- a reading for each

    def times(self, x: Tensor) -> Tensor:
        """W x for x [in, k], computed in the dtype of x.

        >>> Frozen(torch.eye(2)).times(torch.ones(2, 1)).tolist()
        [[1.0], [1.0]]
        """
        out, step = len(self), max(1, ELSEWHERE // max(1, self.shape[1]))
        with self.matrix.held():
            parts = [self.matrix.rows(n, min(n + step, out)).to(x.dtype) @ x for n in range(0, max(1, out), step)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def products(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """W x and y W for x [in, k] and y [k, out], in float32 or wider, from one reading.

        >>> Frozen(torch.tensor([[1.0, 2.0]])).products(torch.eye(2), torch.tensor([[3.0]]))
        (tensor([[1., 2.]]), tensor([[3., 6.]]))
        """
        right, left = x.new_empty(len(self), x.shape[1]), y.new_zeros(len(y), self.shape[1])
        for start, block in self.blocks():
            stop = start + block.shape[0]
            right[start:stop] = block @ x
            left += y[:, start:stop] @ block
        return right, left

    def dense(self) -> Tensor:
        """W itself, in float32 or wider: for who needs all entries at once."""
        if self._dense is None:
            with self.matrix.held():
                self._dense = self.matrix.rows(0, len(self)).to(wide(self.dtype))
        return self._dense

    def blocks(self, summed: bool = True) -> Iterator[tuple[int, Tensor]]:
        """W in blocks of rows, in float32 or wider: the index of each block's first row, and the block.

        A block is not to be written to, and holds its numbers until the next one. If ``summed``, the norms and the fingerprint
        are gathered on the way where they are not known yet.

        >>> [(start, block.shape) for start, block in Frozen(torch.zeros(3, 2)).blocks()]
        [(0, torch.Size([3, 2]))]
        """
        (out, inp), dtype = self.shape, wide(self.dtype)
        step = max(1, (ON_CPU if self.device.type == "cpu" else ELSEWHERE) // max(1, inp))
        sums = _Sums(self) if summed and self._sums is None and not self._is_known() else None
        converted: Tensor | None = None
        with self.matrix.held():
            for start in range(0, out, step):
                stop = min(start + step, out)
                block = self.matrix.rows(start, stop) if self._dense is None else self._dense[start:stop]
                if block.dtype != dtype:
                    converted = memory(block.shape, block, dtype) if converted is None else converted
                    block = converted[: stop - start].copy_(block)
                if sums is not None:
                    sums.add(start, block)
                yield start, block
        if sums is not None:
            self._sums = sums
            if self.device.type != "meta":
                self.known.mark = self.matrix.mark()
                self.known.norm, self.known.probe = sums.fingerprint()

    def _read(self) -> _Sums:
        if self._sums is None:
            self.known.mark = None
            for _ in self.blocks():
                pass
        assert self._sums is not None
        return self._sums

    def _is_known(self) -> bool:
        """Whether W was read before and has not changed since."""
        return self.known.mark is not None and self.known.mark == self.matrix.mark()


class _Sums:
    """What is summed up over the blocks of one reading."""

    def __init__(self, W: Frozen) -> None:
        (out, inp), self.dtype = W.shape, wide(W.dtype)
        # Sums over blocks are kept in float64, where the device has it.
        exact = torch.float32 if W.device.type == "mps" else torch.float64
        self.rows = torch.zeros(out, dtype=exact, device=W.device)  # the squared norm of each row
        self.columns = torch.zeros(inp, dtype=exact, device=W.device)
        self.probe = torch.zeros((), dtype=exact, device=W.device)
        self.p, self.q = _wave(out, torch.cos).to(W.device, self.dtype), _wave(inp, torch.sin).to(W.device, self.dtype)
        self.squares: Tensor | None = None

    def add(self, start: int, block: Tensor) -> None:
        stop = start + block.shape[0]
        self.squares = memory(block.shape, block, self.dtype) if self.squares is None else self.squares
        squares = torch.mul(block, block, out=self.squares[: stop - start])
        self.rows[start:stop] = squares.sum(1)
        self.columns += squares.sum(0)
        with without_autocast(block):
            self.probe += torch.dot(self.p[start:stop], block @ self.q)

    def fingerprint(self) -> tuple[float, float]:
        return self.rows.sum().sqrt().item(), self.probe.item()


@functools.lru_cache(maxsize=32)
def _wave(n: int, fn: Callable[[Tensor], Tensor]) -> Tensor:
    return fn(torch.arange(1, n + 1, dtype=torch.float64, device="cpu"))


def memory(shape: Sequence[int], like: Tensor, dtype: torch.dtype) -> Tensor:
    """A matrix, not initialised, whose columns lie beside each other in memory if they do so in ``like``, else its rows.

    >>> memory((2, 3), torch.ones(4, 5).T, torch.float32).stride()
    (1, 2)
    """
    if like.stride(0) < like.stride(1):
        return torch.empty(*reversed(shape), dtype=dtype, device=like.device).T
    return torch.empty(*shape, dtype=dtype, device=like.device)


@dataclass(frozen=True)
class _Plain:
    """A tensor as a `Matrix`."""

    W: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        out, inp = self.W.shape
        return out, inp

    @property
    def dtype(self) -> torch.dtype:
        return self.W.dtype

    @property
    def device(self) -> torch.device:
        return self.W.device

    def held(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def rows(self, start: int, stop: int) -> Tensor:
        return self.W.detach()[start:stop]

    def mark(self) -> object:
        return mark([self.W])


def mark(tensors: Iterable[Tensor]) -> object:
    """A value that changes when one of the tensors is replaced, moved or written to; None if that cannot be told.

    Beside address and version it holds a few entries of each tensor, because ``t.data.copy_`` leaves both as they were.

    >>> t = torch.zeros(4, 4)
    >>> before = mark([t])
    >>> _ = t.data.fill_(1.0)
    >>> mark([t]) == before
    False
    """
    entries: list[Any] = []
    for t in tensors:
        if t.is_meta or t.is_inference() or is_sharded(t):
            return None
        plain = t.data  # also of bitsandbytes' parameters
        if type(plain) is not Tensor:
            return None
        n = t.numel()
        if n:
            # A step of n over the golden ratio comes by all parts of the tensor.
            at = torch.arange(SAMPLE, device=t.device) * max(1, round(n * 0.618)) % n
            few = plain.view(-1)[at] if plain.is_contiguous() else plain[torch.unravel_index(at, plain.shape)]
            entries.append(few.tolist())
        entries += [t.shape, t.dtype, t.device, *versions([t])]
    return entries


# ---------------------------------------------------------------- who is given a Frozen


def takes_frozen(function: Callable[..., Result]) -> Callable[..., Result]:
    """Marks a function ``(self, W, ...)`` of a method or an update: its W is a `Frozen`; others are given a tensor.

    Who calls it with a tensor [out, in] need not know. None stays None.

    >>> class Sizes:
    ...     @takes_frozen
    ...     def measure(self, W):
    ...         return {"size": W.norm()}
    >>> Sizes().measure(torch.ones(2, 2))
    {'size': tensor(2.)}
    """

    @functools.wraps(function)
    def call(self: Any, W: Any, *args: Any) -> Result:
        return function(self, Frozen(W) if isinstance(W, Tensor) else W, *args)

    cast(Any, call).takes_frozen = True
    return call


def given(function: Callable[..., Result], W: Frozen, *args: Any) -> Result:
    """``function(W, ...)``, with the whole matrix as a tensor in float32 or wider if the function does not take a `Frozen`.

    >>> given(torch.trace, Frozen(torch.eye(3)))
    tensor(3.)
    """
    return function(W if getattr(function, "takes_frozen", False) else W.dense(), *args)
