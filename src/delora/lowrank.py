"""The low-rank branch of a linear layer, with a backward written by hand that keeps little in memory."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from delora.torch_private import transforms_active

__all__ = [
    "add_low_rank",
    "can_add_in_place",
    "can_fuse",
    "drop",
    "linear",
    "traced",
    "under_autocast",
    "without_autocast",
]


def traced() -> bool:
    """Whether torch.compile traces this call or a transform of torch.func runs: both need plain operations.

    >>> traced()
    False
    >>> _ = torch.func.vmap(lambda x: print(traced()) or x)(torch.ones(2))
    True
    """
    return torch.compiler.is_compiling() or transforms_active() or torch.jit.is_tracing()  # type: ignore[attr-defined]


def under_autocast(x: Tensor) -> bool:
    """Whether autocast is on for a tensor's device. The meta device, which only infers shapes, has no autocast.

    >>> with torch.autocast("cpu", torch.bfloat16):
    ...     under_autocast(torch.ones(2)), under_autocast(torch.ones(2, device="meta"))
    (True, False)
    """
    kind = x.device.type
    return kind != "meta" and torch.is_autocast_enabled(kind)


def without_autocast(x: Tensor) -> AbstractContextManager[None]:
    """A context in which autocast is off for a tensor's device.

    >>> A = torch.ones(2, 2)
    >>> with torch.autocast("cpu", torch.bfloat16), without_autocast(A):
    ...     (A @ A).dtype
    torch.float32
    """
    return torch.autocast(x.device.type, enabled=False) if under_autocast(x) else nullcontext()


def can_add_in_place(y: Tensor, x: Tensor) -> bool:
    """Whether `add_low_rank` can write into y. Not under autocast, which chooses the dtype of every product.

    >>> can_add_in_place(torch.ones(2, 3), torch.ones(2, 4)), can_add_in_place(torch.ones(3, 2).T, torch.ones(2, 4))
    (True, False)
    """
    special = traced() or under_autocast(x)
    return not special and y.dtype == x.dtype and y.dim() > 1 and y.is_contiguous() and not (y.is_leaf and y.requires_grad)


def can_fuse(x: Tensor, W: Tensor, b: Tensor | None) -> bool:
    """Whether `linear` supports these: W and b are frozen plain tensors, neither quantised nor sharded, with the dtype of x.

    >>> x, W = torch.ones(2, 4), torch.ones(3, 4)
    >>> can_fuse(x, W, None), can_fuse(x, W.requires_grad_(), None)
    (True, False)
    """
    return _plain(W, x.dtype) and (b is None or _plain(b, x.dtype)) and x.dim() > 1 and not (under_autocast(x) or traced())


def _plain(t: Tensor, dtype: torch.dtype) -> bool:
    return t.dtype == dtype and not t.requires_grad and type(t) in (Tensor, torch.nn.Parameter)


def add_low_rank(y: Tensor, x: Tensor, down: Tensor, up: Tensor, dropout: float, constant: int = 0) -> Tensor:
    """``y + up down drop(x)`` for x [..., in], down [k, in], up [out, k] and y [..., out], which is overwritten.

    Backward keeps x itself (shared by all layers that read it), the k features of every token and, for dropout, a seed from
    which it draws the dropped entries again. Differentiable once. The last ``constant`` of the k terms have no gradient: it is
    given as zero, which is right where nothing that trains is behind them.

    >>> add_low_rank(torch.ones(1, 2), torch.ones(1, 3), torch.ones(1, 3), torch.ones(2, 1), 0.0)
    tensor([[4., 4.]])
    """
    seed = int(torch.randint(2**62, ()).item()) if dropout else 0  # from the CPU's generator: no wait for a GPU
    return _AddLowRank.apply(y, x, down, up, dropout, seed, constant)


def linear(x: Tensor, W: Tensor, b: Tensor | None, down: Tensor, up: Tensor, dropout: float, constant: int = 0) -> Tensor:
    """``W x + b + up down drop(x)`` for a frozen W [out, in]: as `add_low_rank`, and backward adds in place, too.

    >>> linear(torch.ones(1, 3), torch.ones(2, 3), None, torch.ones(1, 3), torch.ones(2, 1), 0.0)
    tensor([[6., 6.]])
    """
    seed = int(torch.randint(2**62, ()).item()) if dropout else 0
    return _Linear.apply(x, W, b, down, up, dropout, seed, constant)


class _AddLowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, down: Tensor, up: Tensor, dropout: float, seed: int, constant: int) -> Tensor:
        h = _add(y, x, down, up, dropout, seed)
        ctx.mark_dirty(y)
        ctx.save_for_backward(x, down, up, h)
        ctx.dropout, ctx.seed, ctx.learned = dropout, seed, len(down) - constant
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, down, up, h = ctx.saved_tensors
        _, needs_x, *needs, _, _, _ = ctx.needs_input_grad
        inner, grad_down, grad_up = _factors(grad, x, up, h, needs, ctx.dropout, ctx.seed, ctx.learned)
        grad_x = drop((inner @ down).view_as(x), ctx.dropout, ctx.seed) if needs_x else None
        return grad, grad_x, grad_down, grad_up, None, None, None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W: Tensor,
        b: Tensor | None,
        down: Tensor,
        up: Tensor,
        dropout: float,
        seed: int,
        constant: int,
    ) -> Tensor:
        y = F.linear(x, W, b)
        # The same memory as a tensor that is no view: a view that comes out of here could not be written to by what follows.
        y = torch.empty(0, dtype=y.dtype, device=y.device).set_(y.untyped_storage(), y.storage_offset(), y.shape, y.stride())
        h = _add(y, x, down, up, dropout, seed)
        ctx.save_for_backward(x, W, down, up, h)
        ctx.dropout, ctx.seed, ctx.learned = dropout, seed, len(down) - constant
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, W, down, up, h = ctx.saved_tensors
        needs_x, _, _, *needs, _, _, _ = ctx.needs_input_grad
        inner, grad_down, grad_up = _factors(grad, x, up, h, needs, ctx.dropout, ctx.seed, ctx.learned)
        grad_x = grad @ W if needs_x else None
        if grad_x is not None and ctx.dropout:
            grad_x += drop((inner @ down).view_as(x), ctx.dropout, ctx.seed)
        elif grad_x is not None:
            grad_x.view(-1, x.shape[-1]).addmm_(inner, down)
        return grad_x, None, None, grad_down, grad_up, None, None, None


def _add(y: Tensor, x: Tensor, down: Tensor, up: Tensor, dropout: float, seed: int) -> Tensor:
    """y += up down drop(x). Returns the k features [tokens, k]."""
    h = torch.mm(drop(x, dropout, seed).flatten(0, -2), down.t())
    y.view(-1, y.shape[-1]).addmm_(h, up.t())
    return h


def _factors(
    grad: Tensor, x: Tensor, up: Tensor, h: Tensor, needs: list[bool], dropout: float, seed: int, learned: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients of the features [tokens, k], of ``down`` and of ``up``; None for a factor that needs none.

    Those of the factors are zero from the term number ``learned`` on.
    """
    tokens = grad.flatten(0, -2)
    inner = torch.mm(tokens, up)
    grad_down = grad_up = None
    if needs[0]:
        grad_down = _padded(torch.mm(inner[:, :learned].t(), drop(x, dropout, seed).flatten(0, -2)), up.shape[1], 0)
    if needs[1]:
        grad_up = _padded(torch.mm(tokens.t(), h[:, :learned]), up.shape[1], 1)
    return inner, grad_down, grad_up


def _padded(t: Tensor, size: int, dim: int) -> Tensor:
    """A matrix with zeros at the end of a dimension."""
    missing = size - t.shape[dim]
    return F.pad(t, (0, 0, 0, missing) if dim == 0 else (0, missing)) if missing else t


def drop(x: Tensor, probability: float, seed: int) -> Tensor:
    """Dropout: x with random entries set to zero, which the seed determines, and the others scaled up to keep the mean.

    Each entry is decided by 16 random bits, a quarter of what torch's dropout draws; the probability is exact to 2^-17.

    >>> x = torch.ones(1000)
    >>> torch.equal(drop(x, 0.5, seed=1), drop(x, 0.5, seed=1)), drop(x, 0.5, seed=1).unique().tolist()
    (True, [0.0, 2.0])
    """
    if not probability:
        return x
    generator = torch.Generator(x.device).manual_seed(seed)
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device)
    bits = words.random_(-(2**63), None, generator=generator).view(torch.int16)[: x.numel()].view(x.shape)
    dropped = min(round(probability * 2**16), 2**16 - 1)
    kept = bits >= dropped - 2**15
    return torch.where(kept, x, 0).mul_(2**16 / (2**16 - dropped))
