"""Tensors that several processes hold in parts: the DTensors of FSDP2.

Reading such a tensor is a call that all its processes make together: each of them gets the whole of it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "agreed",
    "drawn",
    "fill",
    "gathered",
    "is_sharded",
    "like",
    "processes",
    "refuse_flat",
    "settle",
    "spread",
    "whole",
]


def _is_dtensor(t: Any) -> bool:
    module = sys.modules.get("torch.distributed.tensor")  # without it, there is none
    return module is not None and isinstance(t, module.DTensor)


def _fsdp() -> Any:
    """The class of modules that FSDP2 has sharded; without its library loaded, there is none."""
    return getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())


def is_sharded(t: Any) -> bool:
    """Whether this process holds only a part of a tensor.

    >>> is_sharded(torch.ones(2)), is_sharded(None)
    (False, False)
    """
    return _is_dtensor(t)


def whole(t: Tensor) -> Tensor:
    """The whole tensor, differentiably; a tensor that is whole is returned as it is.

    Each process computes the gradient of its part of the batch; the parameter gets their mean, as FSDP2 and DDP give it.

    >>> t = torch.ones(2)
    >>> whole(t) is t
    True
    """
    if _is_dtensor(t):
        d: Any = t
        if not (t.requires_grad and torch.is_grad_enabled()):
            full: Tensor = d.detach().full_tensor()
            return full
        from torch.distributed.tensor import Partial

        mesh = d.device_mesh
        full = d.full_tensor(grad_placements=[Partial()] * mesh.ndim)
        full.register_hook(lambda grad: grad / mesh.size())  # gloo knows no mean
        return full
    return t


@torch.no_grad()
def like(value: Tensor, old: Tensor) -> Tensor:
    """This process's part of a value that it holds whole, divided as ``old`` is. A whole ``old``: the value itself.

    >>> like(torch.ones(2), torch.zeros(2)).tolist()
    [1.0, 1.0]
    """
    if not _is_dtensor(old):
        return value
    from torch.distributed.tensor import DTensor, Replicate

    d: Any = old
    everywhere = DTensor.from_local(value.detach(), d.device_mesh, [Replicate()] * d.device_mesh.ndim, run_check=False)
    return everywhere.redistribute(placements=d.placements)


@torch.no_grad()
def fill(old: Tensor, value: Tensor) -> None:
    """Write a value that every process holds whole, or that is divided as ``old`` is, into ``old``: in place.

    >>> t = torch.zeros(2)
    >>> fill(t, torch.ones(2))
    >>> t.tolist()
    [1.0, 1.0]
    """
    if _is_dtensor(old):
        part: Any = value if _is_dtensor(value) else like(value, old)
        old.to_local().copy_(part.to_local())  # type: ignore[attr-defined]
    else:
        old.data.copy_(value)


def agreed(value: Tensor, base: Any) -> Tensor:
    """A value as the first of the processes has it that hold parts of ``base``. A whole ``base``: the value itself.

    >>> agreed(torch.ones(2), torch.zeros(2)).tolist()
    [1.0, 1.0]
    """
    return _everywhere(value, base).to_local() if _is_dtensor(base) else value


def _everywhere(value: Tensor, base: Any) -> Any:
    from torch.distributed.tensor import Replicate, distribute_tensor

    mesh = base.device_mesh
    return distribute_tensor(value.detach().to(base.device), mesh, [Replicate()] * mesh.ndim)


def spread(module: nn.Module, base: Tensor) -> None:
    """Let a module's tensors be those of the first of the processes that hold parts of ``base``, on all of them.

    Its parameters become DTensors that every process holds whole, so that their gradients are those of the whole batch.

    >>> spread(nn.Linear(2, 2), torch.ones(2))  # which is whole
    """
    if not _is_dtensor(base):
        return
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None and not _is_dtensor(p):
                part._parameters[name] = nn.Parameter(_everywhere(p, base), requires_grad=p.requires_grad)
        for name, t in part._buffers.items():
            if t is not None and not _is_dtensor(t):
                part._buffers[name] = agreed(t, base)


def drawn(modules: Iterable[Any]) -> str:
    """A sum over the bytes of what ``inject`` drew for layers that will be divided among processes, for `meeting.differs`.

    Empty in a process that is alone.

    >>> drawn([])
    ''
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return ""
    tensors = [t.detach() for module in modules for t in module.saved().values() if not is_sharded(t) and not t.is_meta]
    return ",".join(str(t.contiguous().view(-1).view(torch.uint8).sum(dtype=torch.int64).item()) for t in tensors)


@contextmanager
def gathered(layer: nn.Module) -> Iterator[None]:
    """A context in which the parameters of a layer are whole, to be read.

    >>> with gathered(nn.Linear(2, 2)):
    ...     pass
    """
    parts = {name: p for name, p in layer._parameters.items() if is_sharded(p)}
    try:
        for name, p in parts.items():
            layer._parameters[name] = nn.Parameter(whole(p.detach()), requires_grad=False)  # type: ignore[union-attr]
        yield
    finally:
        layer._parameters.update(parts)


def processes(tensors: Iterable[Any]) -> tuple[int, ...]:
    """The ranks of the processes that hold parts of one of the tensors; none if each is whole.

    >>> processes([torch.ones(2)])
    ()
    """
    ranks: set[int] = set()
    seen = set()
    for t in tensors:
        if _is_dtensor(t) and id(t.device_mesh) not in seen:
            seen.add(id(t.device_mesh))
            ranks |= set(t.device_mesh.mesh.flatten().tolist())
    return tuple(sorted(ranks))


def refuse_flat(model: nn.Module, what: str) -> None:
    """Raise a ValueError if a model's weights are divided in a way in which no layer's can be told: by FSDP1, by ZeRO-3, or by
    tensor parallelism.

    >>> refuse_flat(nn.Linear(2, 2), "delora.save")
    """
    if next((p for p in model.parameters() if hasattr(p, "ds_id") and not p.numel()), None) is not None:
        raise ValueError(
            f"{what} of a model that DeepSpeed's ZeRO-3 divides among processes, so that its weights are empty: shard with "
            "torch.distributed.fsdp.fully_shard (FSDP2) instead, or call it inside deepspeed.zero.GatheredParameters"
        )
    fsdp = _fsdp()
    known = {part for module in model.modules() if isinstance(module, fsdp) for part in module.modules()}
    for module in model.modules():
        if module not in known and any(_is_dtensor(p) for p in module._parameters.values()):
            raise ValueError(
                f"{what} of a model with tensor parallel layers (a {type(module).__name__}): each process computes a part of "
                "their output, which an adapter does not; load it without tp_plan, and shard it with fully_shard"
            )
        if type(module).__name__ == "FullyShardedDataParallel" and module.training_state.name != "SUMMON_FULL_PARAMS":  # type: ignore[union-attr]
            raise ValueError(
                f"{what} of a FullyShardedDataParallel (FSDP1), which keeps its parameters in one flat tensor: shard with "
                "torch.distributed.fsdp.fully_shard (FSDP2) instead, or call it inside "
                "FullyShardedDataParallel.summon_full_params(model, writeback=True)"
            )


def settle(model: nn.Module) -> None:
    """Free what FSDP2 has gathered for a forward and kept: what is read and written is each process's part.

    >>> settle(nn.Linear(2, 2))
    """
    for module in model.modules():
        if isinstance(module, _fsdp()):
            module.reshard()
