"""Adapters of several matrices of one layer: `Slices` of a fused one, `Parts` of a module that keeps matrices as parameters.

Such a module (``nn.MultiheadAttention`` with its ``in_proj_weight``, a mixture with its experts) multiplies by them itself: it
runs with the changed parameters in place of its own. A fused layer runs as any layer, with one change of all its slices. In the
model both are held by an `Adapted`, as any layer, and `Parts` or `Slices` is the adapter in there.
"""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Self, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from delora import zero
from delora.factored import Factored
from delora.hosts import Host, LayerSlice, Slice, Slot
from delora.hosts.base import run_changed
from delora.layer import Adapter, Changing, Kept, Placed
from delora.lowrank import traced, without_autocast
from delora.sharded import gathered, like
from delora.together import stacked
from delora.updates import LowRank, Update, joined, wide

__all__ = ["Parts", "Several", "Slices", "joined_slices"]


class Several(Kept):
    """Adapters of several matrices of one layer, each in ``parts`` by the name of its matrix inside."""

    def __init__(self, parts: Mapping[Slot, Adapter]) -> None:
        super().__init__()
        self.parts = nn.ModuleDict()
        self.places = [(slot.key, slot.layout, slot.index, slot.fused, slot.cut) for slot in parts]
        for slot, part in parts.items():
            inside, (*path, name) = self.parts, slot.name.split(".")
            for key in path:
                if key not in inside:
                    inside[key] = nn.ModuleDict()
                inside = cast(nn.ModuleDict, inside[key])
            inside[name] = part

    def _slots(self, layer: nn.Module) -> Iterator[tuple[Slot, Adapter]]:
        for place in self.places:
            slot, part = Slot(layer, *place), self.parts
            for key in slot.name.split("."):
                part = cast(nn.ModuleDict, part._modules[key])
            yield slot, cast(Adapter, part)

    def each(self, name: str, layer: Any) -> Iterator[tuple[str, Any, Any]]:
        for slot, part in self._slots(layer):
            yield f"{name}.{slot.name}", part, slot

    def at(self, strength: float) -> Self:
        """The same adapters, which share their tensors, at another strength."""
        other = copy.copy(self)
        other._modules = self._modules | {"parts": _at(self.parts, strength)}
        return other

    def refresh(self, layer: nn.Module, redraw: bool) -> None:
        """Measure the matrices again and, if ``redraw``, initialise the other tensors again, too."""
        for slot, part in self._slots(layer):
            part.refresh(slot, redraw)


def _at(part: nn.Module, strength: float) -> nn.Module:
    if isinstance(part, Adapter):
        return part.at(strength)
    return nn.ModuleDict({key: _at(inner, strength) for key, inner in part.named_children()})


def _updates(parts: Iterable[tuple[Slot, Adapter]]) -> list[tuple[Slice, Update]]:
    """The changes of whole matrices: those of the slices of one are joined."""
    members = [(slot, part) for slot, part in parts if part.strength]
    ready = {} if traced() else stacked(part for _, part in members)
    whole: dict[Slot, list[tuple[Slot, Update]]] = {}
    for slot, part in members:
        whole.setdefault(slot.whole, []).append((slot, part.update(slot.look(), ready.get(part))))
    return [(Slice(slot), joined_slices(each)) for slot, each in whole.items()]


def joined_slices(changes: Iterable[tuple[Slot, Any]]) -> Update:
    """The change of a whole matrix by those of its slices, or by its own.

    >>> from delora.hosts import Fused, slices
    >>> k, v = slices(nn.Linear(3, 4), Fused({"k": 2, "v": 2}))
    >>> joined_slices([(v, LowRank(torch.ones(2, 1), torch.ones(1, 3)))]).up.flatten().tolist()
    [0.0, 0.0, 1.0, 1.0]
    """
    each = list(changes)
    slot, update = each[0]
    if slot.fused is None:
        return cast(Update, update)
    fused = slot.fused
    return joined(fused.total, [(fused.place(slot.cut), update) for slot, update in each])


class Slices(Several, Changing):
    """Adapters of slices of a layer's matrix, each some rows of it. Their changes are one of the layer: all run in one branch.

    >>> from delora import LoRA
    >>> from delora.hosts import Fused, slices
    >>> from delora.layer import attach
    >>> layer = nn.Linear(4, 6)
    >>> adapter = Slices({slot: attach(LoRA(r=1), slot) for slot in slices(layer, Fused({"q": 4, "v": 2}))})
    >>> {name: list(p.shape) for name, p in adapter.named_parameters()}
    {'parts.q.A': [1, 4], 'parts.q.B': [4, 1], 'parts.v.A': [1, 4], 'parts.v.B': [2, 1]}
    """

    def __init__(self, parts: Mapping[Slot, Adapter]) -> None:
        super().__init__(parts)
        self.kind = type(cast(LayerSlice, next(iter(parts)).look()).of)
        if len({part.dropout for part in parts.values()}) > 1:
            rates = {slot.name: part.dropout for slot, part in parts.items()}
            raise ValueError(f"the slices of one layer drop the same entries of its input, but have dropout {rates}")

    def _first(self) -> Adapter:
        return next(part for _, part in self._slots(cast(nn.Module, None)))

    @property
    def method(self) -> Any:
        """The method of the first slice."""
        return self._first().method

    @property
    def dropout(self) -> float:
        """The probability with which entries of the layer's input are dropped in training."""
        return self._first().dropout

    @property
    def dropped(self) -> float:
        return self._first().dropped

    @property
    def strength(self) -> float:
        """The strength of the slices; NaN if they differ."""
        strengths = {part.strength for _, part in self._slots(cast(nn.Module, None))}
        return strengths.pop() if len(strengths) == 1 else math.nan

    @strength.setter
    def strength(self, s: float) -> None:
        for _, part in self._slots(cast(nn.Module, None)):
            part.strength = s

    def update(self, host: Host) -> Update:
        return joined_slices((slot, part.update(slot.look())) for slot, part in self._slots(host.layer))


class Parts(Several):
    """Adapters of the matrices in a module's own parameters: of a parameter or, with a number after a dot, of one expert in it.

    >>> from delora import LoRA
    >>> from delora.hosts import slots
    >>> from delora.layer import attach
    >>> attention = nn.MultiheadAttention(4, 2)
    >>> parts = Parts({slot: attach(LoRA(r=2), slot) for slot in slots(attention).values()})
    >>> {name: p.shape for name, p in parts.named_parameters()}
    {'parts.in_proj_weight.A': torch.Size([2, 4]), 'parts.in_proj_weight.B': torch.Size([12, 2])}
    """

    kind: ClassVar[type[Host]] = Host

    def tensors(self, layer: nn.Module) -> dict[str, Tensor]:
        """The parameters of the layer with the change in them, by name; only those that change."""
        if "_hf_hook" in layer.__dict__:  # accelerate may keep the numbers elsewhere between calls
            with Placed(self, layer).here():
                return self._tensors(layer)
        return self._tensors(layer)

    def _tensors(self, layer: nn.Module, factored: bool = False) -> dict[str, Tensor]:
        groups: dict[str, list[tuple[Slice, Update]]] = {}
        for host, update in _updates(self._slots(layer)):
            groups.setdefault(host.layer.key, []).append((host, update))
        changed: dict[str, Tensor] = {}
        for key, updates in groups.items():
            W = getattr(layer, key)
            if factored and _can_factor(W, updates):
                changed[key] = _beside(W, updates)
                continue
            with without_autocast(W):
                changed[key] = _weight(W, updates).to(W.dtype)
                for host, update in updates:
                    if (at := host.bias_at()) is not None:
                        _add_bias(changed, layer, at, update.bias(b := host.bias()), b)
        return {key: t if isinstance(t, Factored) else t.to(getattr(layer, key).dtype) for key, t in changed.items()}

    @torch.no_grad()
    def changed(self, layer: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters of the layer with the change in them, as new ones.

        Raises:
            ValueError: a parameter is computed from others, or kept elsewhere.
        """
        new = {}
        with gathered(layer):
            values = self.tensors(layer)
        for key, value in values.items():
            old = layer._parameters.get(key)
            if old is None:
                raise ValueError(f"its {key} is computed from other parameters: make it a plain one first")
            if old.is_meta:
                raise ValueError(f"its {key} is kept elsewhere by a hook (offloading), or was never loaded")
            new[key] = nn.Parameter(like(value.contiguous(), old), requires_grad=old.requires_grad)
        return new

    def read(self, layer: nn.Module, name: str) -> Callable[[], Tensor] | None:
        biases = {at[0] for slot, _ in self._slots(layer) if (at := Slice(slot).bias_at()) is not None}
        if name not in self.parts and name not in biases:
            return None
        return lambda: self.tensors(layer).get(name, getattr(layer, name))

    def forward(self, host: Host, *args: Any, **kwargs: Any) -> Any:
        layer = host.layer
        with _alone(layer):
            # Where hooks bring the parameters, they are not there yet.
            away = "_hf_hook" in layer.__dict__ or any(map(zero.is_divided, layer.parameters()))
            changed = self.tensors(layer) if away else self._tensors(layer, factored=not traced())
            return run_changed(layer, changed, args, kwargs)


def _can_factor(W: Tensor, updates: list[tuple[Slice, Update]]) -> bool:
    """Whether a parameter of experts can stay as it is, with the factors of all changes beside it."""
    low = all(isinstance(update, LowRank) for _, update in updates)
    return low and updates[0][0].layer.layout.experts is True and not W.requires_grad and type(W) in (Tensor, nn.Parameter)


def _beside(W: Tensor, updates: list[tuple[Slice, Update]]) -> Tensor:
    """The parameter with the factors of its experts' changes beside it."""
    pairs: list[tuple[Tensor, Tensor] | None] = [None] * len(W)
    each = iter(_Each.apply(*(t for _, update in updates for t in cast(LowRank, update).within(W.dtype))))
    for (host, _), up, down in zip(updates, each, each, strict=True):
        pairs[cast(int, host.layer.index)] = (down.mT, up.mT) if host.layer.layout.transposed else (up, down)
    return Factored.beside(W, pairs, lambda: _weight(W, updates).to(W.dtype))


class _Each(torch.autograd.Function):
    """The tensors themselves. If one of them gets a gradient, all do: zeros, for an expert that no token was sent to.

    So which parameters get one does not depend on the batch: optimizers, and processes that train together, count on that.
    """

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return grads


def _weight(W: Tensor, updates: list[tuple[Slice, Update]]) -> Tensor:
    """The parameter with all its matrices changed, in float32 or wider."""
    W = W.to(wide(W.dtype))
    host, first = updates[0]
    if host.layer.index is None:
        return host.as_weight(first.merge(host.as_weight(W)))
    shape, W = W.shape, host.layer.layout.apart(host.module, W)
    ranks: dict[int | None, list[tuple[int, Any]]] = {}
    for host, update in updates:
        k = update.up.shape[1] if isinstance(update, LowRank) else None
        ranks.setdefault(k, []).append((cast(int, host.layer.index), update))
    for k, members in ranks.items():
        index = torch.tensor([i for i, _ in members], device=W.device)
        if k is None:
            new = torch.stack([host.as_weight(u.merge(host.as_weight(W[i]))) for i, u in members])
            W = W.index_copy(0, index, new)
        else:
            up, down = torch.stack([u.up for _, u in members]), torch.stack([u.down for _, u in members])
            pair = (down.mT, up.mT) if host.layer.layout.transposed else (up, down)
            everyone = [i for i, _ in members] == list(range(len(W)))
            W = torch.baddbmm(W, *pair) if everyone else W.index_add(0, index, torch.bmm(*pair))
    return W.reshape(shape)


def _add_bias(
    changed: dict[str, Tensor], layer: nn.Module, at: tuple[str, Any], new: Tensor | None, old: Tensor | None
) -> None:
    name, where = at
    if new is None or new is old:
        return
    if name not in changed:
        b: Tensor = getattr(layer, name)
        changed[name] = b.to(wide(b.dtype), copy=True)
    changed[name][where] = new


_locks: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
_lock = threading.Lock()


def _alone(layer: nn.Module) -> AbstractContextManager[Any]:
    """A context in which no other thread runs this layer: it must not take the changed parameters for the layer's own."""
    if traced():
        return nullcontext()
    with _lock:
        return _locks.setdefault(layer, threading.RLock())
