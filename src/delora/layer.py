"""`Adapted`: a frozen layer with named adapters, at most one of them active."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn

from delora.hosts import Host, any_host, host
from delora.lowrank import traced, without_autocast
from delora.methods.base import Method, edits_output, measure, reads_weight
from delora.methods.full import Full
from delora.together import built
from delora.updates import LowRank, Update, wide

__all__ = ["Adapted", "Adapter", "Copy", "attach", "on_meta"]


class Adapter(nn.Module):
    """A method's tensors for one layer, in float32 or wider whatever the dtype of the layer.

    >>> from delora import LoRA
    >>> adapter = attach(LoRA(r=2), nn.Linear(4, 3))
    >>> {name: list(t.shape) for name, t in adapter.tensors().items()}
    {'A': [2, 4], 'B': [3, 2]}
    """

    def __init__(self, method: Method, host: Host, dropout: float = 0.0, blank: bool = False) -> None:
        """With ``blank`` the initial tensors are on the meta device, until `put` gives them values."""
        super().__init__()
        self.method = method
        self.host = host
        self.dropout = dropout
        self.strength = 1.0
        start, measured = self._start(blank)
        for name, tensor in start.items():
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor)
        for name, tensor in measured.items():
            self.register_buffer(name, tensor, persistent=False)

    def _start(self, blank: bool = False) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        W = self.host.weight()
        with torch.no_grad():
            return self.method.init(W.to("meta") if blank else W), measure(self.method, W)

    def put(self, name: str, value: Tensor) -> None:
        """Set a tensor to a value from elsewhere, such as a file."""
        old = self.tensors()[name]
        self._put(name, value.to(self.host.matrix().device, old.dtype))

    def _put(self, name: str, value: Tensor) -> None:
        if name in self._parameters:
            self._parameters[name] = nn.Parameter(value)
        else:
            self._buffers[name] = value

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name: those that train, those that stay fixed, and those measured from W."""
        return {k: t for k, t in (*self._parameters.items(), *self._buffers.items()) if t is not None}

    def saved(self) -> dict[str, Tensor]:
        """The tensors that belong in a file: all but those measured from W."""
        return {k: t for k, t in self.tensors().items() if k not in self._non_persistent_buffers_set}

    def refresh(self, redraw: bool) -> None:
        """Measure W again and, if ``redraw``, initialise the other tensors again, too."""
        start, measured = self._start() if redraw else ({}, measure(self.method, self.host.weight()))
        current = self.tensors()
        for name, tensor in (start | measured).items():
            if current[name].device == tensor.device:
                current[name].data.copy_(tensor)  # in place, so that an optimizer keeps its parameter
            else:
                self._put(name, tensor)

    def update(self) -> Update:
        """The change of the layer at the current strength, computed in float32 or wider even under autocast."""
        update = (None if traced() else built(self)) or self._own_update()
        return update if self.strength == 1 else update.scaled(self.strength)

    def _own_update(self) -> Update:
        p = {k: t.to(wide(t.dtype)) for k, t in self.tensors().items()}
        # Not converted to float32: an update computes a few products with W, which need no copy of it.
        W = self.host.matrix().detach() if reads_weight(self.method) else None
        with without_autocast(next(iter(p.values()))):
            return self.method.update(W, p)

    @torch.no_grad()
    def low_rank(self) -> LowRank | None:
        """W' - W at the current strength as exact low-rank factors, or None if it is not low-rank."""
        return self.update().low_rank(self.host.weight())

    def mergeable(self) -> bool:
        """Whether the layer's weights can express the change."""
        return self.host.weight_name is not None and self.update().mergeable

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.strength == 0:
            return self.host.layer(*args, **kwargs)
        return self.update().forward(self.host, self.dropout if self.training else 0.0, *args, **kwargs)

    def plain(self) -> nn.Module:
        """A layer of the original type with the change in its weights; a ValueError if no weight can express it."""
        return self.host.layer if self.strength == 0 else self.host.plain(self.update())

    def extra_repr(self) -> str:
        return f"{self.method}, dropout={self.dropout}, strength={self.strength}"


class Copy(nn.Module):
    """The adapter of `Full`: a copy of a layer of any kind, which trains while the original stays fixed.

    >>> from delora import Full
    >>> adapter = attach(Full(), nn.Linear(4, 3))
    >>> list(adapter.saved())
    ['weight', 'bias']
    """

    def __init__(self, host: Host) -> None:
        super().__init__()
        self.method = Full()
        self.host = host
        self.strength = 1.0
        self.module = copy.deepcopy(host.layer).requires_grad_(True)

    def saved(self) -> dict[str, Tensor]:
        return dict(self.module.state_dict(keep_vars=True))

    def put(self, name: str, value: Tensor) -> None:
        self.saved()[name].data.copy_(value)

    def refresh(self, redraw: bool) -> None:
        if redraw and on_meta(self.module):
            self.module = copy.deepcopy(self.host.layer).requires_grad_(True)
        elif redraw:
            self.module.load_state_dict(self.host.layer.state_dict())

    def at_strength(self) -> dict[str, Tensor]:
        """W + strength (W' - W) for every floating-point tensor of the layer."""
        base = self.host.layer.state_dict(keep_vars=True)
        return {
            name: torch.lerp(base[name], tensor, self.strength) if tensor.is_floating_point() else tensor
            for name, tensor in self.saved().items()
        }

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.strength == 0:
            return self.host.layer(*args, **kwargs)
        if self.strength == 1:
            return self.module(*args, **kwargs)
        return torch.func.functional_call(self.module, self.at_strength(), args, kwargs)

    def plain(self) -> nn.Module:
        new = copy.deepcopy(self.host.layer)
        if self.strength != 0:
            with torch.no_grad():
                new.load_state_dict(self.at_strength())
        return new

    def extra_repr(self) -> str:
        return f"{self.method}, strength={self.strength}"


def attach(method: Method | Full, layer: nn.Module, dropout: float = 0.0, blank: bool = False) -> Adapter | Copy:
    """A new adapter for a layer, which itself is not changed.

    Raises:
        TypeError, ValueError: the method does not fit this layer; the message says why.

    >>> from delora import DeLoRA
    >>> layer, x = nn.Linear(4, 3), torch.ones(1, 4)
    >>> torch.allclose(attach(DeLoRA(r=2), layer)(x), layer(x), atol=1e-6)  # training starts at the base
    True
    """
    if isinstance(method, Full):
        return Copy(Host(layer))
    return Adapter(method, any_host(layer) if edits_output(method) else host(layer), dropout, blank)


class Adapted(nn.Module):
    """``base`` with named ``adapters``; ``active`` is the name of the one in use, or None for the base alone.

    Attributes that it does not have itself (``weight``, ``in_features``, ...) are those of the base, or of the active copy
    (`Full`), because some models read them. A checkpoint of the base saved before injection loads into it.

    >>> import delora
    >>> model = delora.inject(nn.Sequential(nn.Linear(4, 3)), delora.LoRA(r=2), ["0"])
    >>> isinstance(model[0], Adapted), model[0].active, model[0].in_features
    (True, 'default', 4)
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.adapters = nn.ModuleDict()
        self.active: str | None = None
        self._blank = False  # moved here from the meta device: the adapters' memory is not initialised
        self._arrived = (False, False)  # whether the state dict being loaded holds the base, the adapters
        self.train(base.training)
        self.register_load_state_dict_post_hook(_refresh_after_load)

    @property
    def adapter(self) -> Adapter | Copy | None:
        """The active adapter, or None."""
        return None if self.active is None else cast("Adapter | Copy", self.adapters[self.active])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._blank:
            self.refresh()
        if self.active is None:
            return self.base(*args, **kwargs)
        return self.adapters[self.active](*args, **kwargs)

    def plain(self) -> nn.Module:
        """The base layer, or one of its type with the active change in its weights."""
        if self._blank:
            self.refresh()
        adapter = self.adapter
        return self.base if adapter is None else adapter.plain()

    def refresh(self) -> None:
        """Measure the frozen weight again. Call this after you changed that weight by hand."""
        for adapter in self.adapters.values():
            cast("Adapter | Copy", adapter).refresh(redraw=self._blank)
        self._blank = False

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "base" not in self.__dict__.get("_modules", {}):  # being copied or unpickled
                raise
            adapter = self.adapter
            return getattr(adapter.module if isinstance(adapter, Copy) else self.base, name)

    def _apply(self, fn: Any, recurse: bool = True) -> Adapted:
        was_meta = on_meta(self.adapters)
        super()._apply(fn, recurse)
        self._blank |= was_meta and not on_meta(self.adapters)
        return self

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        base, adapters = prefix + "base.", prefix + "adapters."
        # A checkpoint from before injection has the keys of the base.
        for key in [k for k in state if k.startswith(prefix) and not k.startswith((base, adapters))]:
            state[base + key.removeprefix(prefix)] = state.pop(key)
        self._arrived = tuple(any(k.startswith(p) for k in state) for p in (base, adapters))  # type: ignore[assignment]
        if not self._arrived[1]:  # no adapters in it: they keep their values and do not count as missing
            state |= {adapters + k: t for k, t in self.adapters.state_dict(keep_vars=True).items()}
        super()._load_from_state_dict(state, prefix, *args)


def _refresh_after_load(adapted: Adapted, _: Any) -> None:
    base, adapters = adapted._arrived
    blank = adapted._blank or on_meta(adapted.adapters)
    adapted._blank = blank and not adapters
    if base and not on_meta(adapted.base):
        adapted.refresh()


def on_meta(module: nn.Module) -> bool:
    """Whether a parameter or buffer of a module is on the meta device.

    >>> on_meta(nn.Linear(2, 2)), on_meta(nn.Linear(2, 2, device="meta"))
    (False, True)
    """
    return any(t.is_meta for t in (*module.parameters(), *module.buffers()))
