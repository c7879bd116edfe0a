"""Parameters that DeepSpeed holds: divided among processes by ZeRO-3, or with their full numbers in ZeRO's optimizer alone.

ZeRO-3 gathers the parameters of a module for its forward and its backward; in between they are empty. What is read and written
at other times is gathered here. Without DeepSpeed loaded nothing of this does anything.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "Part",
    "apart",
    "broadcast",
    "fill",
    "full_shape",
    "group",
    "in_engine",
    "is_away",
    "is_divided",
    "is_narrowed",
    "kept",
    "numbers",
    "outlined",
    "outside_init",
    "settle",
    "unknown",
]


class Part(Tensor):
    """What one process holds of a divided parameter, as ZeRO-3 divides it: flat.

    >>> type(nn.Parameter(torch.ones(2).as_subclass(Part))).__name__
    'Part'
    """


def _loaded() -> bool:
    return "deepspeed" in sys.modules


def is_divided(t: Any) -> bool:
    """Whether ZeRO-3 divides a parameter among processes.

    >>> is_divided(nn.Parameter(torch.ones(2)))
    False
    """
    return _loaded() and hasattr(t, "ds_tensor")


def is_away(t: Any) -> bool:
    """Whether ZeRO-3 divides a parameter and has not gathered it now.

    >>> is_away(nn.Parameter(torch.ones(2)))
    False
    """
    return is_divided(t) and t.ds_status.name != "AVAILABLE"


def is_narrowed(t: Any) -> bool:
    """Whether a parameter holds rounded numbers, and ZeRO's optimizer the full ones, of which each process has a part.

    >>> is_narrowed(nn.Parameter(torch.ones(2)))
    False
    """
    return t.itemsize < 4 and _is_optimized(t)


def _is_optimized(t: Any) -> bool:
    """Whether ZeRO's optimizer keeps the numbers of a parameter, to write them back after its next step."""
    if not _loaded() or not t.requires_grad:
        return False
    if hasattr(t, "_z3_optimizer"):  # which every parameter of a model has, those too that it was not given
        return t._z3_optimizer.get_param_id(t) in t._z3_optimizer.grad_position
    return hasattr(t, "_hp_mapping")


def full_shape(t: Tensor) -> torch.Size:
    """The shape of a parameter, also where it is empty between two forwards.

    >>> full_shape(torch.ones(2, 3))
    torch.Size([2, 3])
    """
    shape: torch.Size = t.ds_shape if is_divided(t) else t.shape  # type: ignore[attr-defined]
    return shape


def group(t: Any, copies: bool = False) -> Any:
    """The group of the processes that read a parameter together, with ``copies`` of those that train it together; or None.

    >>> group(nn.Parameter(torch.ones(2))) is None
    True
    """
    if is_divided(t):
        return t.ds_process_group
    return t._dp_group if _loaded() and hasattr(t, "_hp_mapping") and (copies or is_narrowed(t)) else None


@torch.no_grad()
def numbers(t: Any) -> Tensor:
    """All numbers of a parameter, detached, as exact as they are kept. All processes that hold it call this together.

    >>> numbers(nn.Parameter(torch.ones(2)))
    tensor([1., 1.])
    """
    if is_narrowed(t):
        from deepspeed.utils import safe_get_full_fp32_param

        full: Tensor = safe_get_full_fp32_param(t)
        return full.view(full_shape(t))
    if not is_away(t):
        return t.detach()
    from deepspeed import zero

    with zero.GatheredParameters([t]):
        return t.detach()  # afterwards DeepSpeed gives the parameter other, empty memory


@torch.no_grad()
def fill(t: Any, value: Tensor) -> None:
    """Write a value that this process holds whole, or a `Part`, into a parameter and into what an optimizer keeps of it.

    Nothing is sent: each process writes its own part.

    >>> t = nn.Parameter(torch.zeros(2))
    >>> fill(t, torch.ones(2))
    >>> t.data
    tensor([1., 1.])
    """
    if not is_divided(t):
        t.data.copy_(value)
    elif isinstance(value, Part):
        t.ds_tensor.copy_(value)
        if not is_away(t):
            t.partition()  # what is gathered is no longer true
    else:
        if is_away(t):
            t.data = value.detach().to(t.device, t.dtype).reshape(full_shape(t))
            t.ds_status = type(t.ds_status).AVAILABLE
        else:
            t.data.copy_(value)
        t.partition(has_been_updated=True)
    if not _is_optimized(t):
        return
    if is_divided(t):
        from deepspeed.utils import safe_set_local_fp32_param

        safe_set_local_fp32_param(t, apart(value, t, torch.float32))
    else:
        from deepspeed.utils import safe_set_full_fp32_param

        safe_set_full_fp32_param(t, value.detach().float())


@torch.no_grad()
def kept(t: Any) -> Part:
    """A copy of this process's part of a divided parameter."""
    copy: Part = t.ds_tensor.clone().as_subclass(Part)
    return copy


@torch.no_grad()
def apart(value: Tensor, t: Any, dtype: torch.dtype | None = None) -> Part:
    """This process's part of a value that it holds whole, divided as the parameter is."""
    n, rank = t.ds_tensor.ds_numel, torch.distributed.get_rank(t.ds_process_group)
    part = torch.zeros_like(t.ds_tensor, dtype=dtype)
    own = value.detach().flatten()[n * rank : n * (rank + 1)]
    part[: len(own)] = own.to(part.device, part.dtype)
    return part.as_subclass(Part)


@torch.no_grad()
def broadcast(value: Tensor, t: Any) -> Tensor:
    """A value as the first of the processes has it that hold parts of a parameter."""
    value = value.detach().to(t.device).contiguous().clone()
    torch.distributed.broadcast(value, group_src=0, group=t.ds_process_group)
    return value


def outlined(module: nn.Module) -> AbstractContextManager[None]:
    """A context in which parameters that are empty have their shape, dtype and device, but no numbers.

    >>> with outlined(nn.Linear(2, 2)):
    ...     pass
    """
    return _outlined(module) if _loaded() else nullcontext()  # asked in every forward


@contextmanager
def _outlined(module: nn.Module) -> Iterator[None]:
    away = {name: p for name, p in module._parameters.items() if is_away(p)}
    for name, p in away.items():
        assert p is not None
        outline = torch.zeros(1, dtype=p.dtype, device=p.device).expand(full_shape(p))
        module._parameters[name] = nn.Parameter(outline, requires_grad=p.requires_grad)
    try:
        yield
    finally:
        module._parameters.update(away)


@contextmanager
def outside_init() -> Iterator[None]:
    """A context in which new tensors and modules are as ever, also within ``deepspeed.zero.Init``.

    >>> with outside_init():
    ...     pass
    """
    module: Any = sys.modules.get("deepspeed.runtime.zero.partition_parameters")
    context = getattr(module, "top_level_context", None)
    if context is None or not context.patched:
        yield
        return
    module.shutdown_init_context()
    try:
        yield
    finally:
        module.restore_init_context()


def settle(module: nn.Module) -> None:
    """Let go of what DeepSpeed gathers ahead for a module that it expected to run next.

    >>> settle(nn.Linear(2, 2))
    """
    registry = module.__dict__.get("ds_inflight_param_registry", {})
    for parameter, handle in registry.items():
        handle.wait()
        if not parameter.ds_active_sub_modules:
            parameter.partition()
    registry.clear()


def in_engine(model: nn.Module) -> bool:
    """Whether ``deepspeed.initialize`` was called with a model, so that an optimizer knows its parameters.

    >>> in_engine(nn.Linear(2, 2))
    False
    """
    return _loaded() and any(hasattr(p, "_z3_optimizer") or hasattr(p, "_hp_mapping") for p in model.parameters())


def unknown(t: Any) -> str | None:
    """How DeepSpeed keeps a divided parameter, in words, if that is not known here; else None.

    >>> unknown(nn.Parameter(torch.ones(2))) is None
    True
    """
    if not is_divided(t):
        return None
    if not t.is_floating_point() or hasattr(t.ds_tensor, "ds_quant_scale"):
        return "quantised"
    if t.nvme_swapper is not None:
        return "on NVMe"
    return "twice (zero_hpz_partition_size)" if t.ds_secondary_tensor is not None else None
