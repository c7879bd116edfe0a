"""`Adapted`: a frozen layer with named adapters, at most one of them active."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from delora.frozen import Frozen, Known, given
from delora.hosts import Host, Quantised, Slot, any_host, host, quantised_host
from delora.hosts.base import ELSEWHERE, brought, run_changed
from delora.lowrank import traced, without_autocast
from delora.methods.base import Method, edits_output, initial, measure, reads_weight
from delora.methods.full import Full
from delora.reading import ReadWeight, reading
from delora.sharded import agreed, exact, fill, gathered, in_plan, is_dtensor, is_parallel, like, numbers, whole
from delora.together import built, unsaved
from delora.updates import LowRank, Update, wide

__all__ = [
    "STOP",
    "Adapted",
    "Adapter",
    "Changing",
    "Copy",
    "Kept",
    "Placed",
    "attach",
    "check_parallel",
    "is_stop",
    "look",
    "on_meta",
]


class Kept(nn.Module):
    """What an adapter of any kind keeps: its method and tensors, and nothing of the layer, which every call is given."""

    strength: float

    def each(self, name: str, layer: Any) -> Iterator[tuple[str, Any, Any]]:
        """What is adapted, by its name, with its adapter and what that changes: the layer itself, or matrices of its own."""
        yield name, self, layer

    def at(self, strength: float) -> Self:
        """The same adapter, which shares its tensors, at another strength."""
        other = copy.copy(self)
        other.strength = strength
        return other

    def read(self, layer: nn.Module, name: str) -> Callable[[], Tensor] | None:
        """What computes the changed tensor of the layer for one who reads it by this name; None if it does not change."""
        return None

    def _apply(self, fn: Any, recurse: bool = True) -> Kept:
        """Move the tensors as ``fn`` does, but never to a narrower dtype: what trains stays in float32.

        A strength of 8.0 in bfloat16 could not learn: the next number is 8.06.
        """

        def move(t: Tensor) -> Tensor:
            moved: Tensor = fn(t)
            narrower = t.is_floating_point() and torch.finfo(moved.dtype).bits < torch.finfo(t.dtype).bits
            return t.to(moved.device) if narrower else moved

        super()._apply(move, recurse)
        return self


class Changing(Kept):
    """An adapter whose change of its layer is one `Update`."""

    kind: type[Host]  # makes a look at the layer of each call

    @property
    def dropped(self) -> float:
        """The probability with which entries of the layer's input are dropped now."""
        raise NotImplementedError

    def update(self, host: Host) -> Update:
        """The change of a layer at the current strength, computed in float32 or wider even under autocast."""
        raise NotImplementedError

    def forward(self, host: Host, *args: Any, **kwargs: Any) -> Any:
        """The output of the layer that ``host`` looks at, with the change.

        The layer itself is no argument: what moves arguments to a device (accelerate's hooks) would move it.
        """
        if self.strength == 0:
            return host.layer(*args, **kwargs)
        if not args and len(kwargs) == 1 and host.weight_name is not None:  # layer(input=x)
            args, kwargs = tuple(kwargs.values()), {}
        return self.update(host).forward(host, self.dropped, *args, **kwargs)

    def read(self, layer: nn.Module, name: str) -> Callable[[], Tensor] | None:
        host = self.kind(layer)
        if name not in ("weight", "bias") or host.weight_name is None or self.strength == 0:
            return None
        value: Tensor = getattr(layer, name)

        def compute() -> Tensor:
            with _here(self):
                update = self.update(host)
            if name == host.weight_name:
                return host.as_weight(update.merge(host.weight())).to(host.dtype)  # a quantised layer's value holds codes
            new = update.bias(host.bias())
            return value if new is None else new.to(value.dtype)

        return compute


class Adapter(Changing):
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
        self.kind = type(host)
        if dropout:  # a module, because some trainers look for these to turn them off (TRL, for DPO)
            self.drop = nn.Dropout(dropout)
        self.strength = 1.0
        self.known = Known()
        start, measured = self._start(host, blank)
        for name, tensor in start.items():
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor)
        for name, tensor in measured.items():
            self.register_buffer(name, tensor, persistent=False)
        self.names = (*start, *measured)
        self.itemsize = min((p.itemsize for p in self.parameters()), default=0)  # bytes of a number of what trains

    @property
    def dropout(self) -> float:
        """The probability with which entries of the layer's input are dropped in training."""
        return self.drop.p if "drop" in self._modules else 0.0

    @property
    def dropped(self) -> float:
        return self.drop.p if "drop" in self._modules and self.drop.training else 0.0

    def _start(self, host: Host, blank: bool = False) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        W = Frozen(host, self.known)
        with torch.no_grad():
            start = initial(self.method, W.on_meta() if blank else W, host.lookup)
            # A method may make its tensors without looking where W is.
            device = torch.device("meta") if blank else W.device
            moved = {name: t if t.device == device else _moved(t, device) for name, t in start.items()}
            return moved, measure(self.method, W)

    def put(self, name: str, value: Tensor, device: torch.device | None = None) -> None:
        """Set a tensor to a value from elsewhere, such as a file; on a device, if it is to be moved there."""
        old = self.tensors()[name]
        self._put(name, value.to(device or old.device, old.dtype))

    def _put(self, name: str, value: Tensor) -> None:
        if name in self._parameters:
            self._parameters[name] = nn.Parameter(value)
        else:
            self._buffers[name] = value

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name: those that train, those that stay fixed, and those measured from W."""
        return {name: getattr(self, name) for name in self.names}

    def numbers(self) -> dict[str, Tensor]:
        """All tensors by name, each whole, also where several processes hold parts of them."""
        return {name: whole(t) for name, t in self.tensors().items()}

    def saved(self) -> dict[str, Tensor]:
        """The tensors that belong in a file: all but those measured from W."""
        with _here(self):
            return {k: t for k, t in self.tensors().items() if k not in self._non_persistent_buffers_set}

    def refresh(self, layer: Any, redraw: bool) -> None:
        """Measure W again and, if ``redraw``, initialise the other tensors again, too."""
        host = self.kind(layer)
        self.known = Known()
        start, measured = self._start(host) if redraw else ({}, measure(self.method, Frozen(host, self.known)))
        current = self.tensors()
        base = next(iter(host.module.parameters()), None)
        for name, drawn in (start | measured).items():
            tensor = agreed(drawn, base)
            if current[name].device == tensor.device:
                fill(current[name], tensor)  # in place, so that an optimizer keeps its parameter
            else:
                self._put(name, tensor)

    def update(self, host: Host, ready: Update | None = None) -> Update:
        """The change of a layer at the current strength, computed in float32 or wider even under autocast.

        ``ready``: the change at full strength, where it is computed already.
        """
        update = ready or (None if traced() else built(self)) or self._own_update(host)
        return update if self.strength == 1 else update.scaled(self.strength)

    def _own_update(self, host: Host) -> Update:
        p = self.numbers()
        if (narrow := self.rounding()) is not None:
            p = {k: t.to(narrow) if t.is_floating_point() else t for k, t in p.items()}
        p = {k: t.to(wide(t.dtype)) for k, t in p.items()}
        # Not converted to float32: an update computes a few products with W, which need no copy of it.
        takes = getattr(self.method.update, "takes_frozen", False)
        W: Any = None if not reads_weight(self.method) else Frozen(host) if takes else host.read()
        # The update of a method that stacks may come from one of two places in each run of a checkpoint.
        free = getattr(self.method, "stacks", False) and not traced()
        with without_autocast(next(iter(p.values()))), unsaved() if free else nullcontext():
            return self.method.update(W, p)

    def rounding(self) -> torch.dtype | None:
        """The narrower dtype in which FSDP2 (MixedPrecisionPolicy) gives the parameters now; None if it is their own.

        The tensors that it does not give are then rounded alike: the frozen half of a start must cancel the one that trains.
        """
        return next((p.dtype for p in self._parameters.values() if p is not None and p.itemsize < self.itemsize), None)

    def extra_repr(self) -> str:
        return f"{self.method}, dropout={self.dropout}, strength={self.strength}"


class Copy(Kept):
    """The adapter of `Full`: a copy of a layer of any kind, which trains while the original stays fixed.

    The copy of a layer in half precision is kept, and trains, in float32; it is computed in the layer's own dtype.

    >>> from delora import Full
    >>> adapter = attach(Full(), nn.Linear(4, 3))
    >>> list(adapter.saved())
    ['weight', 'bias']
    """

    kind: ClassVar[type[Host]] = Host  # any module's

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.method = Full()
        self.strength = 1.0
        self.dropout = 0.0
        self.module = _trainable(layer)

    def saved(self) -> dict[str, Tensor]:
        """The tensors of the copy, as its own state dict names them."""
        with _here(self.module):
            return dict(self.module.state_dict(keep_vars=True))

    def put(self, name: str, value: Tensor, device: torch.device | None = None) -> None:
        """Set a tensor to a value from elsewhere."""
        fill(self.saved()[name], value)

    def refresh(self, layer: nn.Module, redraw: bool) -> None:
        """Take the layer's tensors again if ``redraw``."""
        if redraw and on_meta(self.module):
            self.module = _trainable(layer)
        elif redraw:
            for name, tensor in layer.state_dict(keep_vars=True).items():
                fill(self.saved()[name], numbers(tensor))

    def at_strength(self, layer: nn.Module) -> dict[str, Tensor]:
        """W + strength (W' - W) for every floating-point tensor of the layer, in the layer's dtype."""
        base, new = _tensors(layer), _tensors(self.module)
        for name, tensor in new.items():
            old, tensor = whole(base[name]), whole(tensor)
            new[name] = tensor
            if tensor.is_floating_point() and (self.strength != 1 or tensor.dtype != old.dtype):
                new[name] = torch.lerp(old.to(tensor.dtype), tensor, self.strength).to(old.dtype)
        return new

    def forward(self, host: Host, *args: Any, **kwargs: Any) -> Any:
        layer = host.layer
        if self.strength == 0:
            return layer(*args, **kwargs)
        parts = any(map(is_dtensor, self.module.parameters()))
        if self.strength == 1 and not parts and _dtype(self.module) == _dtype(layer):
            return self.module(*args, **kwargs)
        if on_meta(self.module):
            raise ValueError(
                f"a {type(layer).__name__} that was trained whole {ELSEWHERE.partition(':')[0]}: it runs there at strength 1 "
                "and in its layer's own dtype only; delora.merge the model before it is sent elsewhere"
            )
        return run_changed(self.module, self.at_strength(layer), args, kwargs)

    def extra_repr(self) -> str:
        return f"{self.method}, strength={self.strength}"


@contextmanager
def _here(module: nn.Module) -> Iterator[None]:
    """A context in which the tensors of a module and of all in it are here, also where hooks keep them elsewhere."""
    with ExitStack() as stack:
        for part in module.modules():
            stack.enter_context(brought(part))
        yield


def _moved(t: Tensor, device: torch.device) -> Tensor:
    return nn.Parameter(t.data.to(device)) if isinstance(t, nn.Parameter) else t.to(device)


def _trainable(layer: nn.Module) -> nn.Module:
    with ExitStack() as stack:
        for part in layer.modules():
            stack.enter_context(gathered(part))
        module = copy.deepcopy(layer).requires_grad_(True)
    for t in (*module.parameters(), *module.buffers()):
        if t.dtype in (torch.float16, torch.bfloat16):
            t.data = t.data.float()
    return module


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers; of a replica of nn.DataParallel, which has no parameters, the tensors in their place."""
    tensors: dict[str, Tensor] = {}
    for path, part in module.named_modules(remove_duplicate=False):
        for registry in (part.__dict__.get("_former_parameters", {}), part._parameters, part._buffers):
            # By their names, because in a forward DeepSpeed gathers what is looked up, for the module that runs.
            # Each is looked up once; a name assigned within the comprehension could not be compiled.
            held = {key: registry[key] for key in registry}
            tensors |= {f"{path}.{key}" if path else key: t for key, t in held.items() if t is not None}
    return tensors


def _dtype(module: nn.Module) -> torch.dtype | None:
    return next((t.dtype for t in _tensors(module).values() if t.is_floating_point()), None)


@dataclass(frozen=True)
class Placed:
    """An adapter together with the layer it changes: for one look, kept by nobody.

    What is asked of it and concerns the adapter alone (``method``, ``strength``, its tensors) is the adapter's.

    >>> import delora
    >>> model = delora.inject(nn.Sequential(nn.Linear(4, 3)), delora.LoRA(r=2), ["0"])
    >>> placed = model[0].adapter
    >>> placed.method.r, placed.host.matrix().shape
    (2, torch.Size([3, 4]))
    """

    adapter: Any  # Adapter, Copy, Slices or Parts
    base: Any  # the layer, or the Slot of a matrix

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("adapter", "base"):  # being copied or unpickled
            raise AttributeError(name)
        return getattr(self.adapter, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.adapter(self.adapter.kind(self.base), *args, **kwargs)

    @property
    def whole(self) -> bool:
        """Whether the layer is trained whole (`Full`)."""
        return isinstance(self.adapter, Copy)

    @property
    def host(self) -> Host:
        """A look at the layer."""
        return self.adapter.kind(self.base)

    @contextmanager
    def here(self) -> Iterator[None]:
        """A context in which the tensors of both are here, also where hooks keep them elsewhere (offloading)."""
        with _here(self.host.module), _here(self.adapter):
            yield

    @property
    def frozen(self) -> Frozen:
        """What may be asked of the layer's weight; what is known of it is kept beside the adapter."""
        return Frozen(self.host, self.adapter.known if isinstance(self.adapter, Adapter) else None)

    def update(self) -> Update:
        """The change of the layer at the current strength."""
        assert isinstance(self.adapter, Changing)
        with _here(self.adapter), exact(self.adapter):
            return self.adapter.update(self.host)

    @torch.no_grad()
    def low_rank(self) -> LowRank | None:
        """W' - W at the current strength as exact low-rank factors, or None if it is not low-rank."""
        return None if self.whole else given(self.update().low_rank, self.frozen)

    def mergeable(self, update: Update | None = None) -> bool:
        """Whether the layer's weights can express the change, which may be given where it is computed already."""
        return self.whole or (self.host.weight_name is not None and (update or self.update()).mergeable)

    def at_strength(self) -> dict[str, Tensor]:
        """Of a layer that is trained whole, its tensors at the current strength."""
        assert isinstance(self.adapter, Copy)
        kept = self.adapter.saved()
        with self.here():
            return {name: t for name, t in self.adapter.at_strength(self.base).items() if name in kept}

    @torch.no_grad()
    def is_finite(self) -> bool:
        """Whether `changed` is known to give finite numbers before it is computed, from |W| and the size of the change.

        Raises:
            ValueError: the layer's parameters cannot take a change.
        """
        host = self.host
        if not isinstance(self.adapter, Changing) or self.strength == 0 or isinstance(host, Quantised):
            return False
        host.check_change()
        update = self.update()
        b = update.bias(host.bias())
        size = update.largest(self.frozen.norm().item()) + (0.0 if b is None else torch.linalg.vector_norm(b).item())
        return update.mergeable and size < 0.99 * torch.finfo(host.dtype).max

    @torch.no_grad()
    def changed(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The layer's tensors with the change in them, by name; only those that change. ``dtype``: of a quantised layer's.

        Raises:
            ValueError: no weight of the layer can express the change.
        """
        if not isinstance(self.adapter, (Changing, Copy)):  # adapters of several matrices of the layer's own
            return dict(self.adapter.changed(self.base))
        if self.strength == 0:
            return {}
        if not self.whole:
            host = self.host
            return dict(host.changed(self.update(), dtype) if isinstance(host, Quantised) else host.changed(self.update()))
        base = _tensors(self.base)
        if on_meta(self.base):
            raise ValueError(f"a weight of it {ELSEWHERE}")
        return {
            name: nn.Parameter(like(t.detach().clone(), base[name]), base[name].requires_grad)
            if isinstance(base[name], nn.Parameter)
            else t.clone()
            for name, t in self.at_strength().items()
        }


def look(method: Method | Full, layer: nn.Module | Slot) -> Host:
    """How a method sees a layer, or a matrix in a parameter.

    Raises:
        TypeError, ValueError: it cannot be adapted; the message says why.

    >>> from delora import LoRA
    >>> look(LoRA(r=2), nn.Linear(4, 3)).shape
    (3, 4)
    """
    if isinstance(layer, Slot):
        look = layer.look()
        look.check()
        return look
    return any_host(layer) if not isinstance(method, Full) and edits_output(method) else host(layer)


def attach(method: Method | Full, layer: nn.Module | Slot, dropout: float = 0.0, blank: bool = False) -> Adapter | Copy:
    """A new adapter for a layer, which itself is not changed.

    Raises:
        TypeError, ValueError: the method does not fit this layer; the message says why.

    >>> from delora import DeLoRA
    >>> layer, x = nn.Linear(4, 3), torch.ones(1, 4)
    >>> torch.allclose(Placed(attach(DeLoRA(r=2), layer), layer)(x), layer(x), atol=1e-6)  # training starts at the base
    True
    """
    if isinstance(method, Full):
        if isinstance(layer, Slot):
            raise TypeError("a matrix in a parameter, or a slice of one, cannot be trained whole: name its module")
        for part in layer.modules():
            if in_plan(part):  # a copy would go on computing with the tensors of the original
                raise ValueError(f"a tensor parallel {type(part).__name__} cannot be trained whole: give it an adapter")
            if (codes := quantised_host(part)) is not None:
                raise ValueError(
                    f"a {codes.kind} layer cannot be trained whole: codes take no gradient; give it an adapter, or load the "
                    "model with this module unquantised (llm_int8_skip_modules, modules_to_not_convert)"
                )
        return Copy(layer)
    made = Adapter(method, look(method, layer), dropout, blank)
    if isinstance(layer, Slot) and edits_output(method):
        update, b = Placed(made, layer).update(), made.kind(layer).bias()
        if not update.mergeable or (b is None and update.bias(None) is not None and layer.key):
            what = "has no bias" if update.mergeable else "is no layer whose output could be edited"
            it = "parameter" if layer.key else "slice of a layer"
            raise TypeError(f"cannot adapt it by {type(method).__name__}: a {it} {what}")
    return made


def check_parallel(made: Kept, layer: Any) -> None:
    """Find out whether a layer can have this adapter where each process computes a part of it.

    Raises:
        TypeError: its change is anything but up down.

    >>> check_parallel(attach(Full(), nn.Linear(4, 3)), nn.Linear(4, 3))  # which is computed as a whole
    """
    if not is_parallel(layer):
        return
    with torch.no_grad():
        fits = isinstance(made, Adapter) and not edits_output(made.method)
        fits = fits and isinstance(Placed(made, layer).update(), LowRank)
    if not fits:
        how = f"by {type(made.method).__name__}" if isinstance(made, Adapter) else "by single matrices in it"
        raise TypeError(
            f"cannot adapt a tensor parallel {type(layer).__name__} {how}: each process computes a part of it, which is known "
            "for layers whose change is up down alone (DeLoRA, LoRA)"
        )


_OF_HOOKS = ("_hf_hook", "_old_forward")  # what accelerate sets on a module is that module's alone


class Adapted(nn.Module):
    """``base`` with named ``adapters``; ``active`` is the name of the one in use, or None for the base alone.

    Attributes that it does not have itself (``weight``, ``in_features``, ...) are those of the base, or of the active
    copy (`Full`), because some models read them; a weight that is read while a forward runs is the adapted one
    (`delora.reading`). What is set on such a name is set on the base. A checkpoint of the base saved before injection loads
    into it.

    >>> import delora
    >>> model = delora.inject(nn.Sequential(nn.Linear(4, 3)), delora.LoRA(r=2), ["0"])
    >>> isinstance(model[0], Adapted), model[0].active, model[0].in_features
    (True, 'default', 4)
    """

    route: Any = None  # within `delora.routed` and `delora.serving`, what runs the layer in place of an active adapter

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.adapters = nn.ModuleDict()
        self.active: str | None = None
        self.fed: torch.dtype | None = None  # the dtype of what it was given when it ran first
        self.ran = False  # whether it has run, or its weight was read, since its adapter was made active
        self._blank = False  # moved here from the meta device: the adapters' memory is not initialised
        self._arrived = (False, False)  # whether the state dict being loaded holds the base, the adapters
        self.train(base.training)
        self.register_load_state_dict_post_hook(_refresh_after_load)

    def placed(self, name: str) -> Placed:
        """The adapter ``name`` with the base."""
        return Placed(cast("Adapter | Copy", self.adapters[name]), self.base)

    @property
    def adapter(self) -> Placed | None:
        """The active adapter with the base, or None."""
        return None if self.active is None else self.placed(self.active)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not traced() and not self.ran:
            self.ran = True
            floats = (t.dtype for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.is_floating_point())
            self.fed = next(floats, None)
        if self._blank:
            self.refresh()
        if self.route is not None:
            return self.route(self, *args, **kwargs)
        if self.active is None:
            return self.base(*args, **kwargs)
        if traced():
            adapter: Any = self.adapters[self.active]
            return adapter(adapter.kind(self.base), *args, **kwargs)
        modules = self._modules  # read directly: looking a module up as an attribute takes as long as a small product
        adapter = cast(Any, modules["adapters"])._modules[self.active]
        return adapter(adapter.kind(modules["base"]), *args, **kwargs)

    def refresh(self) -> None:
        """Measure the frozen weight again. Call this after you changed that weight by hand."""
        for adapter in self.adapters.values():
            cast("Adapter | Copy", adapter).refresh(self.base, redraw=self._blank)
        self._blank = False

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or name in _OF_HOOKS or "base" not in self.__dict__.get("_modules", {}):  # or being copied
                raise
        active = self.__dict__.get("active")
        if active is None:
            value = getattr(self.base, name)
            routed = self.__dict__.get("route") is not None and name in ("weight", "bias") and isinstance(value, Tensor)
            return ReadWeight.of(value, lambda: self.route.read(name, value)) if routed and reading() else value
        adapter = self.adapters[active]
        if isinstance(adapter, Copy):
            if reading() and name in ("weight", "bias"):
                self.ran = True
                return adapter.at_strength(self.base).get(name, getattr(adapter.module, name))
            return getattr(adapter.module, name)
        value = getattr(self.base, name)
        if isinstance(value, Tensor) and reading() and (read := cast(Kept, adapter).read(self.base, name)) is not None:
            trained = [
                p for _, each, _ in cast(Kept, adapter).each("", None) for p in each.tensors().values() if p.requires_grad
            ]
            return ReadWeight.of(value, self._seen(read), trained)
        return value

    def _seen(self, compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def seen() -> Tensor:
            self.ran = True
            return compute()

        return seen

    def __setattr__(self, name: str, value: Any) -> None:
        base = self.__dict__.get("_modules", {}).get("base")
        if base is not None and (name in base._parameters or name in base._buffers):
            value = value.parameter if isinstance(value, ReadWeight) else value
            if value is not getattr(self, name):  # what was read from here and is set again changes nothing
                setattr(base, name, value)
        else:
            super().__setattr__(name, value)

    def _apply(self, fn: Any, recurse: bool = True) -> Adapted:
        was_meta, dtype = on_meta(self.adapters), _dtype(self.base)
        super()._apply(fn, recurse)
        self._blank |= was_meta and not on_meta(self.adapters)
        if _dtype(self.base) != dtype and not on_meta(self):  # what was measured of W is measured of the W that is there now
            self.refresh()
        return self

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        base, adapters = prefix + "base.", prefix + "adapters."
        # A checkpoint from before injection has the keys of the base.
        for key in [k for k in state if k.startswith(prefix) and not k.startswith((base, adapters))]:
            own, value = key.removeprefix(prefix), state.pop(key)
            if own != "weight" or not is_stop(value, self.base):
                state[base + own] = value
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


STOP = (1,)  # the shape of what stands in the place of an adapted weight in a file (`delora.pretrained`)


def is_stop(value: Any, layer: nn.Module) -> bool:
    """Whether a weight in a state dict is none, but is there to let readers stop that know nothing of adapters.

    >>> is_stop(torch.zeros(1), nn.Linear(2, 2)), is_stop(torch.zeros(2, 2), nn.Linear(2, 2))
    (True, False)
    """
    return isinstance(value, Tensor) and value.shape == STOP and getattr(getattr(layer, "weight", None), "shape", STOP) != STOP


def on_meta(module: nn.Module) -> bool:
    """Whether a parameter or buffer of a module is on the meta device.

    >>> on_meta(nn.Linear(2, 2)), on_meta(nn.Linear(2, 2, device="meta"))
    (False, True)
    """
    return any(t.is_meta for t in (*module.parameters(), *module.buffers()))
