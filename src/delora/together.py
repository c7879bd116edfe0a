"""Builds all updates of one shape once per forward of a model, so that many small operations become few.

Such an update serves the first call of its layer within that forward, if the layer's tensors have not changed since. In all
other cases (a second call, a layer called outside the model, sharded or compiled tensors) the layer builds its update itself.
Nothing is kept from one forward to the next, so an optimizer step, a load or a change by hand in between always takes effect.

A part of the model that is checkpointed runs twice, and has to save the same number of tensors in both runs: there, building an
update saves none that count (`unsaved`). In the second run, which is part of the backward, the updates of all layers are again
built together; gradients go through those of the first run.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from delora.lowrank import traced, without_autocast
from delora.meeting import differs
from delora.reading import Reading, readers
from delora.sharded import partners, processes
from delora.torch_private import checkpoint_part, is_compiled, saved_tensors_hooks, unhook, versions
from delora.updates import LowRank, wide

__all__ = ["Together", "built", "stacked", "unsaved", "unwatch", "watch", "watched"]

_Entry = tuple[tuple[Tensor, ...], list[Any], LowRank]  # with the tensors it was built from and their versions then
_Updates = dict[Any, _Entry]  # by adapter
_Columns = dict[str, tuple[Tensor, ...]]  # by name, a tensor of each layer
_PLAIN = (Tensor, nn.Parameter)


@dataclass
class _Forward:
    """A running forward of a model. ``outer`` is the forward of another model that contains it, if any."""

    model: Together
    outer: _Forward | None
    updates: _Updates = field(default_factory=dict)
    saving: object = field(default_factory=saved_tensors_hooks)
    grad: bool = field(default_factory=torch.is_grad_enabled)
    part: str | None = field(default_factory=checkpoint_part)  # of a checkpoint that the model itself runs in


_current: ContextVar[_Forward | None] = ContextVar("delora_forward", default=None)  # one per thread
# Of an adapter that ran in a checkpoint: the hooks of the model, which build the updates of the second run.
_checkpointed: weakref.WeakKeyDictionary[Any, weakref.ref[Together]] = weakref.WeakKeyDictionary()


class Together:
    """The hooks around the forward of the model that `inject` was called on. ``layers`` are its adapted layers by name.

    After the first whole forward it names, once, the active layers that did not run.

    >>> import delora
    >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    >>> model = delora.inject(model, delora.DeLoRA(r=2), ["0", "1"])
    >>> hooks = Together(model, {"0": model[0], "1": model[1]})
    >>> hooks.before(model, ())
    >>> adapter = model[0].adapters["default"]
    >>> built(adapter) is not None, built(adapter) is not None  # for one call only
    (True, False)
    >>> hooks.after(model, (), None)
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, Any]) -> None:
        self.model, self.layers = model, dict(layers)
        self.finished = False  # whether a whole forward has run since the adapter was made active
        self.parts = False  # whether processes hold parts of the adapters between forwards
        self.groups = _Groups()
        self.compared: tuple[int, ...] = ()  # the processes that are known to have drawn the same adapters
        self.recomputed: _Updates = {}  # for what is left of a second run

    def __getstate__(self) -> dict[str, Any]:
        # The updates are part of a graph and could not be copied; the groups are of these adapters, not of their copies.
        return self.__dict__ | {"recomputed": {}, "groups": _Groups()}

    def before(self, model: nn.Module, args: Any) -> None:
        if not traced():
            forward = _Forward(self, _current.get())
            _current.set(forward)
            self.recomputed = {}
            # A replica of the model (nn.DataParallel) has layers of its own, which build their updates themselves.
            forward.updates = self._updates() if model is self.model else {}

    def after(self, model: nn.Module, args: Any, output: Any) -> None:
        if not traced():
            forward = _current.get()
            if forward is not None and forward.model is self:
                _current.set(forward.outer)
            if model is self.model and output is not None and not self.finished:
                self.finished = True
                self._tell()

    def _updates(self) -> _Updates:
        layers = self.layers.values()
        # Not layer.adapters: looking up a module's module that way costs more than all else here.
        adapters = [layer._modules["adapters"]._modules[layer.active] for layer in layers if layer.active and not layer._blank]
        self.parts = self.parts or self._divided(adapters)
        # What is gathered for a layer alone must be used by it alone: its gradient is sent away when that layer is through.
        if self.parts:
            return {}
        groups = self.groups if self.groups.fit(adapters) else _Groups(adapters)
        self.groups = groups  # in one step: another thread may run this model, too
        return groups.updates()

    def again(self, adapter: Any) -> _Entry | None:
        """The update for the second run of a checkpointed layer."""
        self.recomputed = self.recomputed or self._updates()
        return self.recomputed.pop(adapter, None)

    def _divided(self, active: list[Any]) -> bool:
        """Whether processes hold parts of the adapters. All that train them together must have drawn the same."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return False
        tensors = [p for adapter in active for p in adapter.parameters()]
        ranks = partners(tensors)
        if not ranks:
            return False
        state = self.model.__dict__.get("_delora")
        drawn = "" if state is None else state.drawn
        if ranks != self.compared and (other := differs(ranks, "the first forward", drawn)) is not None:
            raise ValueError(
                f"process {other} drew other adapters than process {torch.distributed.get_rank()}, and they train them as one: "
                "call torch.manual_seed with one number on all of them before delora.inject, or inject after fully_shard or "
                "zero.Init"
            )
        self.compared = ranks
        return bool(processes(tensors))

    def _tell(self) -> None:
        layers = set(self.layers.values())
        for part in self.model.modules():
            if is_compiled(part):  # what ran in there cannot be seen
                for layer in layers & set(part.modules()):
                    layer.ran = True
        active = {name: layer for name, layer in self.layers.items() if layer.active is not None}
        silent = [name for name, layer in active.items() if not layer.ran]
        if silent:
            some = ", ".join(map(repr, silent[:5])) + (" ..." if len(silent) > 5 else "")
            warnings.warn(
                f"{len(silent)} of {len(active)} adapted layers did not run in the first forward, so their adapters changed "
                f"nothing and get no gradient: {some}. If the model never calls them, leave them out with exclude=; parts for "
                "other inputs (experts, a decoder, another modality) may run later",
                stacklevel=2,
            )


def watch(model: nn.Module, layers: Mapping[str, Any]) -> None:
    """Put hooks around the forward of a model, and of those modules in it that may read the weights of its adapted layers.

    >>> model = nn.Sequential()
    >>> watch(model, {})
    >>> len(model._forward_pre_hooks)
    2
    """
    unwatch(model)
    together, reading = Together(model, layers), Reading()
    model.register_forward_pre_hook(together.before)
    model.register_forward_hook(together.after, always_call=True)
    for module in (model, *readers(model, layers)):
        module.register_forward_pre_hook(reading.before)
        module.register_forward_hook(reading.after, always_call=True)


def unwatch(model: nn.Module) -> None:
    """Undo `watch`.

    >>> model = nn.Sequential()
    >>> watch(model, {})
    >>> unwatch(model)
    >>> len(model._forward_pre_hooks)
    0
    """
    for module in model.modules():
        unhook(module, (Together, Reading))


def watched(model: nn.Module) -> Together | None:
    """The hooks that `watch` put around this model's forward, or None.

    >>> watched(nn.Sequential()) is None
    True
    """
    owners = (getattr(hook, "__self__", None) for hook in model._forward_pre_hooks.values())
    return next((owner for owner in owners if isinstance(owner, Together)), None)


def built(adapter: Any) -> LowRank | None:
    """The update built for an adapter in the running forward, or None if it was used before or is no longer valid.

    >>> from delora.layer import attach
    >>> from delora.methods import LoRA
    >>> built(attach(LoRA(r=2), nn.Linear(4, 4))) is None  # no model is running
    True
    """
    forward, entry = _current.get(), None
    if forward is not None and saved_tensors_hooks() == forward.saving:
        part = forward.part
    else:
        part = checkpoint_part()
        if part is None and forward is not None:
            return None
    if forward is not None:
        if not forward.grad and torch.is_grad_enabled():
            return None
        entry = forward.updates.pop(adapter, None)
        if part == "forward" and entry is not None:
            _checkpointed[adapter] = weakref.ref(forward.model)
    elif part == "recomputation" and (together := _checkpointed.get(adapter, lambda: None)()) is not None:
        entry = together.again(adapter)
    if entry is None:
        return None
    now, (tensors, marks, update) = _of(adapter), entry
    return update if len(now) == len(tensors) and all(map(is_, now, tensors)) and versions(now) == marks else None


def stacked(adapters: Iterable[Any]) -> dict[Any, LowRank]:
    """The updates of those adapters that can be built together: ready ones of the running forward, or built now.

    >>> from delora.layer import attach
    >>> from delora.methods import DeLoRA
    >>> pair = [attach(DeLoRA(r=2), nn.Linear(4, 4)) for _ in range(2)]
    >>> len(stacked(pair))
    2
    """
    ready, rest = {}, []
    for adapter in adapters:
        update = built(adapter)
        if update is None:
            rest.append(adapter)
        else:
            ready[adapter] = update
    return ready | {adapter: update for adapter, (_, _, update) in _Groups(rest).updates().items()}


def unsaved() -> AbstractContextManager[Any]:
    """A context in which nothing is counted as saved in a checkpoint: each of its two runs may compute there in its own way.

    >>> from torch.utils.checkpoint import checkpoint
    >>> x, runs = torch.ones(2, requires_grad=True), [1, 2]
    >>> def run(x):
    ...     with unsaved():
    ...         for _ in range(runs.pop()):
    ...             factor = x.square()
    ...     return factor * x
    >>> checkpoint(run, x, use_reentrant=False).sum().backward()
    >>> x.grad
    tensor([3., 3.])
    """
    if checkpoint_part() is None:
        return nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)


class _Groups:
    """The adapters whose tensors can be stacked, sorted by method and shapes, but none of the numbers in their tensors."""

    def __init__(self, adapters: Iterable[Any] = ()) -> None:
        self.adapters = list(adapters)
        parts = [part for adapter in self.adapters for _, part, _ in adapter.each("", None)]
        self.parts = [part for part in parts if getattr(part.method, "stacks", False)]
        self.tensors = [t for part in self.parts for t in _of(part)]
        self.marks = _marks(self.tensors)
        alike: dict[Any, list[Any]] = {}
        for part in self.parts:
            names, tensors = (*part._parameters, *part._buffers), _of(part)
            if part.rounding() is None and sorted(names) == sorted(part.names) and all(map(_plain, tensors)):
                kind = tuple((t.shape, t.dtype, t.device, t.requires_grad) for t in tensors)
                alike.setdefault((part.method, names, kind), []).append(part)
        self.groups = [(method, names, members) for (method, names, _), members in alike.items() if len(members) > 1]

    def fit(self, adapters: list[Any]) -> bool:
        """Whether sorting these adapters anew would give the same."""
        if not _same(adapters, self.adapters):
            return False
        tensors = [t for part in self.parts for t in _of(part)]
        return _same(tensors, self.tensors) and _marks(tensors) == self.marks

    def updates(self) -> _Updates:
        updates: _Updates = {}
        for method, names, members in self.groups:
            tensors = [_of(part) for part in members]
            with unsaved():
                together = _updates(method, names, tensors)
            for part, each, update in zip(members, tensors, together, strict=True):
                updates[part] = each, versions(each), update
        return updates


def _of(adapter: Any) -> tuple[Tensor, ...]:
    """All tensors of an adapter, in any order."""
    return (*adapter._parameters.values(), *adapter._buffers.values())


def _same(some: Sequence[Any], others: Sequence[Any]) -> bool:
    return len(some) == len(others) and all(map(is_, some, others))


def _marks(tensors: list[Tensor]) -> list[Any]:
    """What is known of tensors besides their numbers, where they are and how many bytes."""
    return [(t.requires_grad, t.data_ptr(), t.nbytes) if type(t) in _PLAIN else None for t in tensors]


def _plain(t: Tensor) -> bool:
    """Whether a tensor can be stacked with others: it is here and whole, not sharded, offloaded or made in inference mode."""
    return type(t) in _PLAIN and t.numel() > 0 and not t.is_inference() and not t.is_meta


def _updates(method: Any, names: Sequence[str], layers: list[tuple[Tensor, ...]]) -> list[LowRank]:
    n, columns = len(layers), dict(zip(names, map(_widened, zip(*layers, strict=True)), strict=True))
    trained = {name: column for name, column in columns.items() if column[0].requires_grad}
    constants = {name: column for name, column in columns.items() if name not in trained}
    if not trained:
        update = _update(method, {name: torch.stack(column) for name, column in constants.items()})
        return [LowRank(up, down) for up, down in zip(update.up.unbind(), update.down.unbind(), strict=True)]
    same: list[str] = []
    constant: list[int] = []
    tensors = (t for column in trained.values() for t in column)
    factors = _Stacked.apply(method, (*trained,), constants, same, constant, *tensors)
    downs, ups = factors[:n], columns[same[0]] if same else factors[n:]
    return [LowRank(up, down, constant[0]) for up, down in zip(ups, downs, strict=True)]


def _widened(column: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    dtype = wide(column[0].dtype)
    return column if column[0].dtype == dtype else tuple(t.to(dtype) for t in column)


class _Stacked(torch.autograd.Function):
    """The factors of all layers from the tensors of all layers; backward keeps these tensors and no copy of them.

    Those that do not train come as ``constants``, in lists by name: what has no gradient is dearer as an argument.
    If the method returns one of the tensors unchanged as ``up``, it is not returned again: its name is put into ``same``.
    The update's ``constant`` is put into the list of that name.
    """

    @staticmethod
    def forward(
        ctx: Any,
        method: Any,
        names: tuple[str, ...],
        constants: _Columns,
        same: list[str],
        constant: list[int],
        *trained: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.method, ctx.names, ctx.constants = method, names, constants
        ctx.versions = [versions(column) for column in constants.values()]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*trained)
        # They are told apart as outside, where a method may ask what trains.
        stacked = {name: t.requires_grad_() for name, t in _stack(names, trained).items()}
        stacked |= {name: torch.stack(column) for name, column in constants.items()}
        update = _update(method, stacked)
        same += [name for name, t in stacked.items() if t is update.up]
        constant.append(update.constant)
        ctx.whole = not same
        return (*update.down.unbind(), *(update.up.unbind() if ctx.whole else ()))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        names, constants = ctx.names, ctx.constants
        if [versions(column) for column in constants.values()] != ctx.versions:
            raise RuntimeError(
                f"a tensor of an adapter ({', '.join(constants)}) was written to or replaced between forward and backward, "
                "which needs what it was: change it after the backward"
            )
        stacked = {name: t.requires_grad_() for name, t in _stack(names, ctx.saved_tensors).items()}
        fixed = {name: torch.stack(column) for name, column in constants.items()}
        with torch.enable_grad():
            update = _update(ctx.method, stacked | fixed)
        outputs = (update.down, update.up) if ctx.whole else (update.down,)
        n = len(update.down)
        grad_outputs = [_stacked_or_zero(grads[i * n : (i + 1) * n], out) for i, out in enumerate(outputs)]
        grad_inputs: list[Sequence[Tensor | None]] = [
            t.unbind() for t in torch.autograd.grad(outputs, [*stacked.values()], grad_outputs)
        ]
        # A layer without influence on the loss gets None, not zeros, on which an optimizer would act.
        unused = [layer for layer in range(n) if all(grads[i * n + layer] is None for i in range(len(outputs)))]
        if unused:
            grad_inputs = [[None if i in unused else g for i, g in enumerate(column)] for column in grad_inputs]
        return (None, None, None, None, None, *(g for column in grad_inputs for g in column))


def _stack(names: Sequence[str], tensors: tuple[Tensor, ...]) -> dict[str, Tensor]:
    n = len(tensors) // len(names)
    return {name: torch.stack(tensors[i * n : (i + 1) * n]) for i, name in enumerate(names)}


def _update(method: Any, stacked: dict[str, Tensor]) -> LowRank:
    with without_autocast(next(iter(stacked.values()))):
        update: LowRank = method.update(None, stacked)
    return update


def _stacked_or_zero(grads: tuple[Tensor | None, ...], like: Tensor) -> Tensor:
    zero = None if all(g is not None for g in grads) else torch.zeros_like(like[0])
    return torch.stack([zero if g is None else g for g in grads])  # type: ignore[misc]
