"""A parameter of experts with their low-rank changes beside it: who multiplies by it multiplies by the small factors.

The experts' own forward runs, whichever it is: a loop over experts, or the grouped and batched products of transformers'
``experts_implementation``. It takes one expert out of the parameter, transposes it, multiplies by it; each of these gives what
it would for W' = W + left right, without W'. Whatever else is computed with it gets W' itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from delora.lowrank import can_fuse, linear, traced
from delora.reading import ReadWeight
from delora.torch_private import wrapper_tensor

__all__ = ["Factored"]

Pair = tuple[Tensor, Tensor]  # left [m, k] and right [k, n], in the dtype of the parameter
STEP = 8  # of ranks in grouped products: a GPU's kernel wants rows of a multiple of 16 bytes


class Factored(ReadWeight):
    """W + left right for a frozen W [experts, m, n] or [m, n], as its reader sees it.

    >>> W = torch.zeros(2, 2, 2)
    >>> changed = Factored.beside(W, [None, (torch.ones(2, 1), torch.ones(1, 2))], lambda: W)
    >>> (torch.ones(1, 2) @ changed[1]).tolist(), (torch.ones(1, 2) @ changed[0]).tolist()
    ([[2.0, 2.0]], [[0.0, 0.0]])
    """

    pairs: Sequence[Pair | None]  # of each expert; of one matrix, one
    both: Pair | None  # of all experts, stacked

    @staticmethod
    def beside(W: Tensor, pairs: Sequence[Pair | None], compute: Callable[[], Tensor]) -> Tensor:
        """What a reader gets in place of W, for the factors of each expert (None: it has no change). ``compute`` gives W'."""
        changed = None if traced() else wrapper_tensor(Factored, W, False)
        if changed is None:
            return compute()
        changed.parameter, changed.pairs, changed.both, changed.compute = W, pairs, None, compute
        return cast(Tensor, changed)

    def factors(self) -> Pair:
        """The factors of all experts as two tensors, filled up with zeros to one rank."""
        if self.both is None:
            W, pairs = self.parameter, self.pairs
            k = max(pair[1].shape[0] for pair in pairs if pair is not None)
            k = -(-k // STEP) * STEP
            zeros = (W.new_zeros(W.shape[-2], k), W.new_zeros(k, W.shape[-1]))
            filled = [zeros if pair is None else _filled(pair, k) for pair in pairs]
            self.both = torch.stack([left for left, _ in filled]), torch.stack([right for _, right in filled])
        return self.both

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = _RULES.get(getattr(func, "__name__", ""))
        if made is not None:
            result = made(func, *args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        return super().__torch_function__(func, types, args, kwargs)


def _filled(pair: Pair, k: int) -> Pair:
    more = k - pair[1].shape[0]
    return (F.pad(pair[0], (0, more)), F.pad(pair[1], (0, 0, 0, more))) if more else pair


def _of(W: Tensor, both: Pair | None, pairs: Sequence[Pair | None]) -> Any:
    """A part or another view of a factored parameter."""

    def compute() -> Tensor:
        left, right = cast(Factored, changed).factors()
        return W + (left @ right if W.ndim == 3 else (left @ right)[0])

    if both is None and all(pair is None for pair in pairs):
        return W
    changed = Factored.beside(W, pairs, compute)
    cast(Factored, changed).both = both
    return changed


def _item(func: Any, W: Any, index: Any) -> Any:
    """W[i] of one expert, W[[i, j]] of some."""
    if not isinstance(W, Factored) or W.ndim != 3:
        return NotImplemented
    T = W.parameter
    if type(index) is int or (isinstance(index, Tensor) and index.ndim == 0 and not index.is_floating_point()):
        return _of(T[int(index)], None, [W.pairs[int(index)]])
    if isinstance(index, Tensor) and index.ndim == 1 and index.dtype in (torch.int32, torch.int64):
        left, right = W.factors()
        return _of(T[index], (left[index], right[index]), [])
    return NotImplemented


def _transposed(func: Any, W: Any, *dims: Any) -> Any:
    """W.T, W.mT, W.transpose(-2, -1)."""
    n = W.ndim
    if dims and {d % n for d in dims if isinstance(d, int)} != {n - 2, n - 1}:
        return NotImplemented
    both = None if W.both is None else (W.both[1].mT, W.both[0].mT)
    pairs = [None if pair is None else (pair[1].mT, pair[0].mT) for pair in W.pairs]
    return _of(W.parameter.mT, both, pairs)


def _attribute(func: Any, W: Any) -> Any:
    """The attributes T and mT."""
    name = getattr(getattr(func, "__self__", None), "__name__", "")
    return _transposed(func, W) if name == "mT" or (name == "T" and W.ndim == 2) else NotImplemented


def _linear(func: Any, x: Any, W: Any, b: Any = None, **more: Any) -> Any:
    """F.linear(x, W, b) of one matrix."""
    b = more.get("bias", b)
    if isinstance(x, Factored) or not isinstance(W, Factored) or W.ndim != 2:
        return NotImplemented
    ((left, right),) = cast("list[Pair]", W.pairs)
    return _product(x, W.parameter, b, right, left)


def _product(x: Tensor, W: Tensor, b: Tensor | None, down: Tensor, up: Tensor) -> Tensor:
    """x W^T + b + x down^T up^T."""
    if can_fuse(x, W, b):
        return linear(x, W, b, down, up, 0.0)
    y = F.linear(x, W, b)
    return y + F.linear(F.linear(x, down), up).to(y.dtype)


def _matmul(func: Any, a: Any, b: Any) -> Any:
    """a @ b where one is factored: two matrices, or batches of them."""
    if isinstance(a, Factored) and isinstance(b, Factored):
        return NotImplemented
    if isinstance(b, Factored) and b.ndim == 2:
        ((left, right),) = cast("list[Pair]", b.pairs)
        return _product(a, b.parameter.mT, None, left.mT, right.mT)
    if isinstance(a, Factored) and a.ndim == 2:
        return NotImplemented
    if isinstance(b, Factored):
        left, right = b.factors()
        return a @ b.parameter + (a @ left) @ right
    left, right = a.factors()
    return a.parameter @ b + left @ (right @ b)


def _grouped(func: Any, x: Any, W: Any, *args: Any, **kwargs: Any) -> Any:
    """Rows of x, sorted by expert, times the matrix of their expert; also transformers' own replacement of that product."""
    if isinstance(x, Factored) or not isinstance(W, Factored) or W.ndim != 3:
        return NotImplemented
    left, right = W.factors()
    y = func(x, W.parameter, *args, **kwargs)
    return y + func(func(x, left, *args, **kwargs), right, *args, **kwargs)


_RULES: dict[str, Callable[..., Any]] = {
    "__getitem__": _item,
    "__get__": _attribute,
    "transpose": _transposed,
    "swapaxes": _transposed,
    "linear": _linear,
    "matmul": _matmul,
    "__matmul__": _matmul,
    "__rmatmul__": lambda func, b, a: _matmul(func, a, b),
    "bmm": _matmul,
    "grouped_mm": _grouped,
    "_grouped_mm": _grouped,
    "grouped_mm_fallback": _grouped,
}
