"""Tensors that several processes hold in parts: the DTensors of FSDP2, and what DeepSpeed divides (`delora.zero`).

Reading such a tensor is a call that all its processes make together: each of them gets the whole of it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from delora import zero

__all__ = [
    "agreed",
    "divided_dims",
    "drawn",
    "exact",
    "fill",
    "gathered",
    "in_plan",
    "is_dtensor",
    "is_parallel",
    "is_sharded",
    "kept",
    "like",
    "numbers",
    "partners",
    "processes",
    "refuse_flat",
    "settle",
    "spread",
    "whole",
]


def is_dtensor(t: Any) -> bool:
    """Whether a tensor is divided by torch, which computes with it as with a whole one.

    >>> is_dtensor(torch.ones(2))
    False
    """
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
    return is_dtensor(t) or zero.is_divided(t) or isinstance(t, zero.Part)


def in_plan(module: nn.Module) -> bool:
    """Whether torch's ``parallelize_module`` or transformers' ``tp_plan`` has put hooks around a module, or its own forward.

    >>> in_plan(nn.Linear(2, 2))
    False
    """
    return bool(module.__dict__.get("_distribute_module_applied") or module.__dict__.get("_is_hooked"))


def is_parallel(module: nn.Module) -> bool:
    """Whether each process computes a part of a layer: tensor parallelism.

    >>> is_parallel(nn.Linear(2, 2))
    False
    """
    return in_plan(module) and any(map(is_dtensor, module._parameters.values()))


def divided_dims(t: Any) -> list[int] | None:
    """The dimensions in which processes divide a tensor evenly, at most one; None if they divide it otherwise.

    >>> divided_dims(torch.ones(2))
    []
    """
    if not is_dtensor(t):
        return []
    from torch.distributed.tensor import Replicate, Shard

    if t.device_mesh.ndim != 1 or type(t.placements[0]) not in (Shard, Replicate):
        return None
    return [p.dim for p in t.placements if type(p) is Shard]


def numbers(t: Tensor) -> Tensor:
    """The whole tensor, detached, as exact as it is kept: for files and measures.

    >>> numbers(nn.Parameter(torch.ones(2)))
    tensor([1., 1.])
    """
    return whole(t.detach()) if is_dtensor(t) else zero.numbers(t)


def whole(t: Tensor) -> Tensor:
    """The whole tensor, differentiably; a tensor that is whole is returned as it is.

    Each process computes the gradient of its part of the batch; the parameter gets their mean, as FSDP2 and DDP give it.

    Raises:
        RuntimeError: a gradient is wanted of a parameter that DeepSpeed gathers in the forward of its model only.

    >>> t = torch.ones(2)
    >>> whole(t) is t
    True
    """
    if is_dtensor(t):
        d: Any = t
        if not (t.requires_grad and torch.is_grad_enabled()):
            full: Tensor = d.detach().full_tensor()
            return full
        from torch.distributed.tensor import Partial

        mesh = d.device_mesh
        full = d.full_tensor(grad_placements=[Partial()] * mesh.ndim)
        full.register_hook(lambda grad: grad / mesh.size())  # gloo knows no mean
        return full
    if zero.is_away(t):
        if t.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                "a parameter that DeepSpeed's ZeRO-3 divides was read with gradients outside of its engine's forward, where "
                "it gathers none: run the engine that deepspeed.initialize returned, or read it under torch.no_grad()"
            )
        return zero.numbers(t)
    return t


@torch.no_grad()
def like(value: Tensor, old: Tensor) -> Tensor:
    """This process's part of a value that it holds whole, divided as ``old`` is. A whole ``old``: the value itself.

    >>> like(torch.ones(2), torch.zeros(2)).tolist()
    [1.0, 1.0]
    """
    if not is_dtensor(old):
        return zero.apart(value, old) if zero.is_divided(old) else value
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
    if is_dtensor(old):
        part: Any = value if is_dtensor(value) else like(value, old)
        old.to_local().copy_(part.to_local())  # type: ignore[attr-defined]
    else:
        zero.fill(old, value)


def kept(t: Tensor) -> Tensor:
    """A copy of what this process holds of a tensor that is divided, for `fill` to write back.

    >>> kept(torch.ones(2)).tolist()
    [1.0, 1.0]
    """
    return zero.kept(t) if zero.is_divided(t) else t.detach().clone()


def agreed(value: Tensor, base: Any) -> Tensor:
    """A value as the first of the processes has it that hold parts of ``base``. A whole ``base``: the value itself.

    >>> agreed(torch.ones(2), torch.zeros(2)).tolist()
    [1.0, 1.0]
    """
    if zero.is_divided(base):
        return zero.broadcast(value, base)
    return _everywhere(value, base).to_local() if is_dtensor(base) else value


def _everywhere(value: Tensor, base: Any) -> Any:
    from torch.distributed.tensor import Replicate, distribute_tensor

    mesh = base.device_mesh
    return distribute_tensor(value.detach().to(base.device), mesh, [Replicate()] * mesh.ndim)


def spread(module: nn.Module, base: Tensor, plain: bool = False) -> None:
    """Let a module's tensors be those of the first of the processes that hold parts of ``base``, on all of them.

    With FSDP2 its parameters become DTensors that every process holds whole, so that their gradients are those of the whole
    batch; unless ``plain``, as all processes of a tensor parallel model compute the same batch. DeepSpeed divides them when it
    is given the model.

    >>> spread(nn.Linear(2, 2), torch.ones(2))  # which is whole
    """
    if not is_sharded(base):
        return
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None and not is_sharded(p):
                value = _everywhere(p, base) if is_dtensor(base) and not plain else agreed(p, base)
                part._parameters[name] = nn.Parameter(value, requires_grad=p.requires_grad)
        for name, t in part._buffers.items():
            if t is not None and not is_dtensor(t):
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
    # By their names, because in a forward DeepSpeed gathers what is looked up, for the module that runs.
    parameters = {name: layer._parameters[name] for name in layer._parameters}
    with _in_place(layer, {name: p for name, p in parameters.items() if is_dtensor(p) or zero.is_away(p)}):
        yield


@contextmanager
def exact(module: nn.Module) -> Iterator[None]:
    """A context in which what DeepSpeed holds of a module's own parameters is whole and as exact as it is kept, to be read.

    >>> with exact(nn.Linear(2, 2)):
    ...     pass
    """
    parameters = {name: p for name, p in module._parameters.items() if p is not None}
    with _in_place(module, {name: p for name, p in parameters.items() if zero.is_away(p) or zero.is_narrowed(p)}):
        yield


@contextmanager
def _in_place(layer: nn.Module, parts: dict[str, Any]) -> Iterator[None]:
    try:
        for name, p in parts.items():
            layer._parameters[name] = nn.Parameter(numbers(p), requires_grad=False)
        yield
    finally:
        layer._parameters.update(parts)


def processes(tensors: Iterable[Any]) -> tuple[int, ...]:
    """The ranks of the processes that hold parts of one of the tensors; none if each is whole.

    >>> processes([torch.ones(2)])
    ()
    """
    return _ranks(tensors, copies=False)


def partners(tensors: Iterable[Any]) -> tuple[int, ...]:
    """The ranks of the processes that train one of the tensors together, in parts or as copies, as far as it tells.

    >>> partners([torch.ones(2)])
    ()
    """
    return _ranks(tensors, copies=True)


def _ranks(tensors: Iterable[Any], copies: bool) -> tuple[int, ...]:
    ranks: set[int] = set()
    groups = set()
    for t in tensors:
        group = t.device_mesh if is_dtensor(t) else zero.group(t, copies)
        if group is not None and id(group) not in groups:
            groups.add(id(group))
            ranks |= set(group.mesh.flatten().tolist() if is_dtensor(t) else torch.distributed.get_process_group_ranks(group))
    return tuple(sorted(ranks))


def refuse_flat(model: nn.Module, what: str) -> None:
    """Raise a ValueError if a model's weights are divided in a way in which no layer's can be told: by FSDP1, by FSDP2 and
    tensor parallelism at once, or by ZeRO-3 with one of its rarer settings.

    >>> refuse_flat(nn.Linear(2, 2), "delora.save")
    """
    for name, p in model.named_parameters():
        if (how := zero.unknown(p)) is not None:
            raise ValueError(
                f"{what} of a model in which DeepSpeed's ZeRO-3 keeps {name} {how}: that is not known here; leave the setting "
                "out of its configuration"
            )
    fsdp = _fsdp()
    known = {part for module in model.modules() if isinstance(module, fsdp) for part in module.modules()}
    for module in model.modules():
        if any(is_dtensor(p) for p in module._parameters.values()) and is_parallel(module) == (module in known):
            how = "both tensor parallel and sharded" if module in known else "divided among processes in a way not known here"
            raise ValueError(
                f"{what} of a model with a {type(module).__name__} that is {how}: divide the model by fully_shard, or by "
                "tp_plan or parallelize_module, and by no other"
            )
        if type(module).__name__ == "FullyShardedDataParallel" and module.training_state.name != "SUMMON_FULL_PARAMS":  # type: ignore[union-attr]
            raise ValueError(
                f"{what} of a FullyShardedDataParallel (FSDP1), which keeps its parameters in one flat tensor: shard with "
                "torch.distributed.fsdp.fully_shard (FSDP2) instead, or call it inside "
                "FullyShardedDataParallel.summon_full_params(model, writeback=True)"
            )


def settle(model: nn.Module) -> None:
    """Free what FSDP2 or DeepSpeed has gathered for a forward and kept: what is read and written is each process's part.

    >>> settle(nn.Linear(2, 2))
    """
    for module in model.modules():
        if isinstance(module, _fsdp()):
            module.reshard()
        zero.settle(module)
