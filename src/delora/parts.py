"""`Parts`: the adapters of matrices that a module keeps as parameters of its own.

Such a module (``nn.MultiheadAttention`` with its ``in_proj_weight``, a mixture with its experts) multiplies by them itself: it
runs with the changed parameters in place of its own. In the model it is held by an `Adapted`, as any layer, and `Parts` is the
adapter in there.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Self, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from delora.hosts import Host, Slice, Slot
from delora.hosts.base import run_changed
from delora.layer import Adapter, Kept, Placed
from delora.lowrank import traced, without_autocast
from delora.sharded import gathered, like
from delora.together import stacked
from delora.updates import LowRank, Update, wide

__all__ = ["Parts"]


class Parts(Kept):
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

    def __init__(self, parts: Mapping[Slot, Adapter]) -> None:
        super().__init__()
        self.parts = nn.ModuleDict()
        self.layouts = {slot.key: slot.layout for slot in parts}
        for slot, part in parts.items():
            if slot.index is None:
                self.parts[slot.key] = part
                continue
            if slot.key not in self.parts:
                self.parts[slot.key] = nn.ModuleDict()
            cast(nn.ModuleDict, self.parts[slot.key])[str(slot.index)] = part

    def _slots(self, layer: nn.Module) -> Iterator[tuple[Slot, Adapter]]:
        for key, layout in self.layouts.items():
            part = self.parts[key]
            if isinstance(part, Adapter):
                yield Slot(layer, key, layout), part
            else:
                experts = cast("Iterable[tuple[str, Adapter]]", cast(nn.ModuleDict, part).items())
                yield from ((Slot(layer, key, layout, int(i)), each) for i, each in experts)

    def each(self, name: str, layer: Any) -> Iterator[tuple[str, Any, Any]]:
        for slot, part in self._slots(layer):
            yield f"{name}.{slot.name}", part, slot

    def at(self, strength: float) -> Self:
        """The same adapters, which share their tensors, at another strength."""
        other, parts = copy.copy(self), nn.ModuleDict()
        for key, part in self.parts.items():
            if isinstance(part, Adapter):
                parts[key] = part.at(strength)
            else:
                experts = cast("Iterable[tuple[str, Adapter]]", cast(nn.ModuleDict, part).items())
                parts[key] = nn.ModuleDict({i: each.at(strength) for i, each in experts})
        other._modules = self._modules | {"parts": parts}
        return other

    def refresh(self, layer: nn.Module, redraw: bool) -> None:
        """Measure the matrices again and, if ``redraw``, initialise the other tensors again, too."""
        for slot, part in self._slots(layer):
            part.refresh(slot, redraw)

    def tensors(self, layer: nn.Module) -> dict[str, Tensor]:
        """The parameters of the layer with the change in them, by name; only those that change."""
        if "_hf_hook" in layer.__dict__:  # accelerate may keep the numbers elsewhere between calls
            with Placed(self, layer).here():
                return self._tensors(layer)
        return self._tensors(layer)

    def _tensors(self, layer: nn.Module) -> dict[str, Tensor]:
        groups: dict[str, list[tuple[Slice, Adapter]]] = {}
        for slot, part in self._slots(layer):
            if part.strength:
                groups.setdefault(slot.key, []).append((Slice(slot), part))
        changed: dict[str, Tensor] = {}
        for key, members in groups.items():
            ready = {} if traced() else stacked(part for _, part in members)
            updates = [(host, part.update(host, ready.get(part))) for host, part in members]
            with without_autocast(getattr(layer, key)):
                changed[key] = _weight(getattr(layer, key), updates)
                for host, update in updates:
                    if (at := host.bias_at()) is not None:
                        _add_bias(changed, layer, at, update.bias(b := host.bias()), b)
        return {key: t.to(getattr(layer, key).dtype) for key, t in changed.items()}

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
            return run_changed(layer, self.tensors(layer), args, kwargs)


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
