"""What a host is: it presents the weight of one kind of layer as a matrix ``[out, in]`` and runs the layer with another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from delora import zero
from delora.frozen import Frozen, mark, memory
from delora.sharded import gathered, is_parallel, is_sharded, like, whole
from delora.torch_private import is_view
from delora.updates import PerRow, Update, wide

__all__ = [
    "BY_NAME",
    "BY_WEIGHT",
    "ELSEWHERE",
    "PARALLEL",
    "Host",
    "Hosts",
    "MatrixHost",
    "Norm",
    "any_host",
    "brought",
    "by_rows",
    "codes_of",
    "host",
    "host_class",
    "host_type",
    "is_bare",
    "run_changed",
]


ELSEWHERE = "is kept elsewhere by a hook (offloading), or was never loaded: keep the adapter beside it"


class Host:
    """A look at one layer, made anew for each call and kept by nobody: a replica, a copy or a moved layer is looked at itself.

    This one is for a module of any kind whose output [..., channels], or the first element of an output tuple, can be edited.

    The number of channels is the length of the module's last parameter: the scale or bias of its last norm, or the number
    of rows of its last matrix.

    >>> block = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    >>> Host(block).edited(lambda y: 0 * y + 5, torch.ones(1, 4)).tolist()
    [[5.0, 5.0, 5.0]]
    """

    weight_name: ClassVar[str | None] = None  # the parameter that holds the matrix; None: nothing can be merged
    lookup: ClassVar[bool] = False  # looks up columns of the matrix, instead of multiplying by it
    linear: ClassVar[bool] = False  # a linear map of the last dimension; chosen by targets="all-linear"

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def check(self) -> None:
        """Find out whether the layer can be adapted; asked once, when an adapter is made.

        Raises:
            TypeError, ValueError: it cannot; the message says why.
        """

    @property
    def mixes(self) -> bool:
        """Whether a sum of output channels is what the same sum of rows of the matrix gives: all see the same input."""
        return True

    @property
    def module(self) -> Any:
        """The module that holds the weight: the layer itself."""
        return self.layer

    def matrix(self) -> Tensor:
        """The weight as a matrix [out, in], a view where possible; of other modules any matrix with one row per channel."""
        last = [p for p in self.layer.parameters() if p.is_floating_point()][-1]
        return last.reshape(len(last), -1)

    @property
    def shape(self) -> tuple[int, int]:
        """The shape [out, in] of the matrix. Like ``dtype`` and ``device`` it is known without reading the weight."""
        with zero.outlined(self.module):
            out, inp = self.matrix().shape
        return out, inp

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of `rows`: the one that the layer computes in."""
        with zero.outlined(self.module):
            return self.matrix().dtype

    @property
    def device(self) -> torch.device:
        """Where `rows` are: where the layer computes, also if a hook keeps its weights elsewhere between its calls."""
        if _is_offloaded(self.module):
            return torch.device(self.module._hf_hook.execution_device)
        with zero.outlined(self.module):
            return self.matrix().device

    def held(self) -> AbstractContextManager[Any]:
        """A context in which the weights are where the layer computes; around several calls of `rows`, they come there once."""
        return _held(self.module)

    def rows(self, start: int, stop: int) -> Tensor:
        """The rows from ``start`` to before ``stop`` of the matrix [out, in], detached, in ``dtype``; a view where possible.

        A host whose weight is kept in another form (quantised, sharded) overrides this and ``shape``, ``dtype``, ``device``.

        >>> host(nn.Linear(3, 4)).rows(1, 3).shape
        torch.Size([2, 3])
        """
        with self.held():
            return self.matrix().detach()[start:stop]

    def read(self) -> Tensor:
        """The matrix [out, in], detached: its numbers, also of a weight that is offloaded or sharded."""
        with self.held():
            return whole(self.matrix().detach())

    def mark(self) -> object:
        """A value that changes with the weight, cheap to compute; None if there is none: then what was measured is not kept."""
        return mark((*self.layer.parameters(), *self.layer.buffers()))

    def weight(self) -> Tensor:
        """The matrix [out, in] to compute with: detached, in float32 or wider."""
        W = self.read()
        return W.to(wide(W.dtype))

    def as_weight(self, W: Tensor) -> Tensor:
        """The inverse of `matrix`: W [out, in] in the layout of the layer's parameter."""
        raise NotImplementedError

    def bias(self) -> Tensor | None:
        """The bias [out], detached, in float32 or wider."""
        with self.held():
            b = getattr(self.layer, "bias", None) if self.weight_name else None
            return b.detach().to(wide(b.dtype)) if isinstance(b, Tensor) else None

    def fold(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The pair (W, b); for a layer without a bias parameter, the pair (W + b, None), which computes the same."""
        return W, b

    def channels_last(self, y: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
        """Move the channels of the output y to the last dimension, apply ``fn``, and move them back."""
        return fn(y)

    def edited(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Any:
        """The layer's output with ``fn`` applied to its tensor, which is the first element if the output is a tuple."""
        out = self.layer(*args, **kwargs)
        if isinstance(out, tuple):
            return (self.channels_last(out[0], self._checked(fn)), *out[1:])
        return self.channels_last(out, self._checked(fn))

    def _checked(self, fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def checked(y: Any) -> Tensor:
            channels = self.shape[0]
            if not isinstance(y, Tensor) or y.shape[-1] != channels:
                got = f"shape {list(y.shape)}" if isinstance(y, Tensor) else f"a {type(y).__name__}"
                raise ValueError(
                    f"cannot edit the output of a {type(self.layer).__name__}: expected a tensor with {channels} channels (the "
                    f"length of its last parameter) in the last dimension, or a tuple that begins with one, got {got}"
                )
            return fn(y)

        return checked

    def mixed(self, y: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
        """``fn(y - b) + b`` for an output y with bias b and a linear map ``fn`` of the channels."""
        b = self.bias()
        if b is None:
            return self.channels_last(y, fn)
        shift = b - fn(b)
        return self.channels_last(y, lambda y: fn(y) + shift.to(y.dtype))

    @torch.no_grad()
    def changed(self, update: Update) -> dict[str, nn.Parameter]:
        """The layer's parameters with the change in them, by name; only those that change.

        They are new tensors, because other layers may share the old ones. The layer keeps its own until it is given these, so
        that its hooks, and whatever forward was set on it, run with either.

        Raises:
            ValueError: no weight of the layer can express the change.

        >>> from delora.updates import LowRank
        >>> linear = host(nn.Linear(2, 3))
        >>> list(linear.changed(LowRank(up=torch.ones(3, 1), down=torch.ones(1, 2))))
        ['weight']
        """
        self.check_change()
        assert self.weight_name is not None
        old = self.layer.get_parameter(self.weight_name)
        new = {}
        W, b = self._changed(update)
        if W is not None:
            new[self.weight_name] = _parameter(self.as_weight(W), old, fresh=True)
        if b is not None:
            if self.layer.bias is None and zero.is_divided(old):
                raise ValueError("it has no bias, and DeepSpeed divides its weight: it cannot be given one")
            new["bias"] = _parameter(b, old if self.layer.bias is None else self.layer.bias)
        return new

    def check_change(self) -> None:
        """Raise a ValueError, which says why, if the layer's parameters cannot take a change."""
        if self.weight_name is None:
            raise ValueError(f"a {type(self.layer).__name__} has no weight that could express the change: it cannot be merged")
        if self.weight_name not in self.layer._parameters:
            raise ValueError(
                "its weight is computed from other parameters (weight_norm, spectral_norm, pruning): make it a plain one "
                "first, with torch.nn.utils.parametrize.remove_parametrizations or prune.remove"
            )
        if self.layer.get_parameter(self.weight_name).is_meta:
            raise ValueError(f"its weight {ELSEWHERE}")
        if not (dtype := self.layer.get_parameter(self.weight_name).dtype).is_floating_point:
            raise ValueError(f"its weight is {dtype}, which cannot hold the new values")

    def _changed(self, update: Update) -> tuple[Tensor | None, Tensor | None]:
        """The new matrix in the layer's dtype and the new bias; None for what stays. Computed in float32, in blocks of rows."""
        old_b = self.bias()
        b = update.bias(old_b)
        W: Tensor | None = None
        folded = b
        with self.held():
            for start, block, part in by_rows(update, Frozen(self), summed=False):
                stop = start + block.shape[0]
                rows, folded = self.fold(part.merge(block), None if b is None else b[start:stop])
                if rows is block:  # the weight stays
                    return None, None if b is old_b else b
                W = memory(self.shape, block, self.dtype) if W is None else W
                W[start:stop] = rows
        return W, b if folded is not None and b is not old_b else None


def by_rows(update: Update, W: Frozen, summed: bool = True) -> Iterator[tuple[int, Tensor, Update]]:
    """W in blocks of rows (`Frozen.blocks`), each with the update of these rows; in one block if the update mixes rows.

    >>> from delora.updates import Affine
    >>> update = Affine(scale=torch.tensor([1.0, 2.0]))
    >>> [(start, part.merge(block).tolist()) for start, block, part in by_rows(update, Frozen(torch.ones(2, 1)))]
    [(0, [[1.0], [2.0]])]
    """
    if update.rows(0, 0) is None:
        yield 0, W.dense(), update
        return
    for start, block in W.blocks(summed):
        part = update.rows(start, start + block.shape[0])
        assert part is not None
        yield start, block, part


def _is_offloaded(layer: nn.Module) -> bool:
    """Whether a hook of accelerate keeps the weights of a layer, which are on the meta device until it runs."""
    hook = layer.__dict__.get("_hf_hook")
    if hook is None or getattr(hook, "execution_device", None) is None:
        return False
    return any(p.is_meta for p in layer._parameters.values() if p is not None)


def _held(layer: nn.Module) -> AbstractContextManager[Any]:
    """A context in which the weights of a layer that is offloaded, or divided among processes, are where it computes."""
    if any(is_sharded(p) for p in layer._parameters.values()):
        return gathered(layer)
    return brought(layer)


def brought(layer: nn.Module) -> AbstractContextManager[Any]:
    """A context in which the weights of a layer that accelerate offloads are where it computes.

    >>> with brought(nn.Linear(2, 2)):
    ...     pass
    """
    if not _is_offloaded(layer):
        return nullcontext()
    from accelerate.utils import align_module_device  # the hook is accelerate's

    context: AbstractContextManager[Any] = align_module_device(layer)
    return context


def _parameter(value: Tensor, old: Tensor, fresh: bool = False) -> nn.Parameter:
    """A parameter with ``value`` in the dtype of ``old`` and, if the shapes agree, in its memory layout and its parts.

    ``fresh``: nobody else has the value, which may be a view.
    """
    if not old.is_floating_point():
        raise ValueError(f"its weight is {old.dtype}, which cannot hold the new values")
    if is_sharded(old):
        return nn.Parameter(like(value.to(old.dtype), old), requires_grad=old.requires_grad)
    fresh = not value.requires_grad and (fresh or not is_view(value))  # shares its memory with no other tensor
    if not (fresh and value.dtype == old.dtype and value.shape == old.shape and value.stride() == old.stride()):
        value = (torch.empty_like(old) if old.shape == value.shape else old.new_empty(value.shape)).copy_(value)
    return nn.Parameter(value, requires_grad=old.requires_grad)


def is_bare(layer: nn.Module) -> bool:
    """Whether calling a layer runs its type's forward and nothing else: no hooks, no forward set on the instance.

    Accelerate sets such a forward.

    >>> layer = nn.Linear(2, 2)
    >>> is_bare(layer)
    True
    >>> _ = layer.register_forward_hook(print)
    >>> is_bare(layer)
    False
    """
    d = layer.__dict__
    hooks = d["_forward_pre_hooks"] or d["_forward_hooks"] or d["_backward_pre_hooks"] or d["_backward_hooks"]
    return not hooks and "forward" not in d


def run_changed(layer: Any, changed: Mapping[str, Tensor], args: Any, kwargs: Any = None) -> Any:
    """The output of a layer with other tensors in place of parameters and buffers.

    They are put there after hooks have brought the layer's own ones, if accelerate or DeepSpeed set such.

    Raises:
        ValueError: DeepSpeed gathers the parameters of modules inside the layer, when these run.

    >>> run_changed(nn.Linear(2, 1, bias=False), {"weight": torch.ones(1, 2)}, (torch.ones(2),)).tolist()
    [2.0]
    """
    if "_hf_hook" in layer.__dict__:
        place = "_old_forward"
    elif any(map(zero.is_divided, layer.parameters())):
        if inside := [name for name in changed if "." in name]:
            raise ValueError(
                f"DeepSpeed's ZeRO-3 gathers {inside[0]} of a {type(layer).__name__} where that is used, so that the module "
                "cannot run with other weights: trained whole, it runs at strength 1 and in the dtype of its base only"
            )
        place = "forward"
    else:
        return torch.func.functional_call(layer, dict(changed), args, kwargs)
    forward, of_its_own = getattr(layer, place), layer.__dict__.get(place)
    registries: list[Any] = [layer._parameters, layer._buffers]

    def run(*args: Any, **kwargs: Any) -> Any:
        kept = [(registry, {key: registry[key] for key in changed if key in registry}) for registry in registries]
        for registry, own in kept:
            registry.update({key: changed[key] for key in own})
        try:
            return forward(*args, **kwargs)
        finally:
            for registry, own in kept:
                registry.update(own)

    layer.__dict__[place] = run
    try:
        return layer(*args, **(kwargs or {}))
    finally:
        if of_its_own is None:
            del layer.__dict__[place]
        else:
            layer.__dict__[place] = of_its_own


class Norm(Host):
    """``nn.LayerNorm``: the scale of every channel is the matrix [channels, 1], the shift is the bias.

    >>> Norm(nn.LayerNorm(3)).matrix().shape
    torch.Size([3, 1])
    """

    weight_name = "weight"

    def matrix(self) -> Tensor:
        return self.layer.weight[:, None]

    def as_weight(self, W: Tensor) -> Tensor:
        return W[:, 0]


class MatrixHost(Host):
    """A layer seen as a linear map ``x -> W x`` with a bias.

    >>> linear = host(nn.Linear(2, 3, bias=False))
    >>> linear.run(torch.ones(1, 2), W=torch.ones(3, 2)).tolist()
    [[2.0, 2.0, 2.0]]
    """

    weight_name = "weight"

    def check(self) -> None:
        super().check()
        kind: Any = type(self.layer)
        known: Any = next(base for base in kind.__mro__ if base in host.registry)
        if not self.dtype.is_floating_point or self.dtype.itemsize == 1:
            raise TypeError(f"cannot adapt a {kind.__name__}: its weight is {self.dtype}, {_seems_quantised(kind)}")
        # A subclass that computes something else would be adapted wrongly, without an error.
        if kind.forward is not known.forward and not self.is_product():
            raise TypeError(
                f"cannot adapt a {kind.__name__}: it has a forward of its own, which {known.__name__}'s host does not know; "
                f"if it still multiplies by one matrix, register a host for it: delora.host.register({kind.__name__}, ...)"
            )

    def is_product(self) -> bool:
        """Whether a forward of the layer's own computes what this host does. Only a linear layer can tell, by being run."""
        return False

    def project(self, x: Tensor, down: Tensor, dropout: float) -> Tensor:
        """The k features ``down drop(x)``, for ``down [k, in]`` in place of W and no bias."""
        raise NotImplementedError

    def add(self, y: Tensor, h: Tensor, up: Tensor) -> Tensor:
        """``y + up h``, for the layer's output y, the k features h of `project` and ``up [out, k]``."""
        raise NotImplementedError

    def branch(self, y: Tensor, x: Tensor, down: Tensor, up: Tensor, dropout: float, constant: int = 0) -> Tensor:
        """``y + up down drop(x)``, for the layer's output y, which may be overwritten.

        The last ``constant`` of the k terms do not depend on anything that trains: their gradient need not be computed.
        """
        return self.add(y, self.project(x, down, dropout), up)

    def with_branch(self, x: Tensor, down: Tensor, up: Tensor, dropout: float, constant: int = 0) -> Tensor:
        """The layer's output plus ``up down drop(x)``, with ``constant`` as in `branch`."""
        return self.branch(self.layer(x), x, down, up, dropout, constant)

    def with_rows(self, x: Tensor, rows: PerRow) -> Tensor:
        """The layer's output plus its own ``up down x`` for each row of x: all features are computed, a row keeps its own."""
        y = self.layer(x)
        dtype = x.dtype if x.is_floating_point() else y.dtype
        h = self.channels_last(self.project(x, rows.all_down(dtype), 0.0), rows.own)
        return self.add(y, h, rows.all_up(dtype))

    def run(self, x: Tensor, W: Tensor) -> Tensor:
        """The layer's output with W in place of its own matrix."""
        weight = self.as_weight(W).to(self.dtype)
        output: Tensor = run_changed(self.layer, {self.weight_name: weight}, (x,))
        return output

    def at(self, rows: Any, y: Tensor, args: tuple[Any, ...]) -> MatrixHost:
        """A look at some rows of the matrix alone, for the layer's output y of these arguments.

        >>> x, linear = torch.ones(1, 2), host(nn.Linear(2, 3))
        >>> linear.at(slice(0, 2), linear.layer(x), (x,)).layer(x).shape
        torch.Size([1, 2])
        """
        return _SomeRows(self, rows, y, args)


class _SomeRows(MatrixHost):
    """Some rows of the matrix of a layer, as an update sees them while the layer runs."""

    def __init__(self, of: MatrixHost, rows: Any, y: Tensor, args: tuple[Any, ...]) -> None:
        super().__init__(self._run)
        self.of, self.index, self.y, self.args = of, rows, y, args
        self.linear, self.lookup = of.linear, of.lookup  # type: ignore[misc]

    def _run(self, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output at these rows; it ran with these arguments already, or runs now."""
        same = len(args) == len(self.args) and all(a is b for a, b in zip(args, self.args, strict=True))
        y = self.y if same else self.of.layer(*args, **kwargs)
        return self.of.channels_last(y, lambda t: t[..., self.index])

    @property
    def shape(self) -> tuple[int, int]:
        return len(torch.arange(self.of.shape[0])[self.index]), self.of.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.of.dtype

    def weight(self) -> Tensor:
        return self.of.weight()[self.index]

    def bias(self) -> Tensor | None:
        b = self.of.bias()
        return None if b is None else b[self.index]

    def channels_last(self, y: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
        return self.of.channels_last(y, fn)

    def project(self, x: Tensor, down: Tensor, dropout: float) -> Tensor:
        return self.of.project(x, down, dropout)

    def add(self, y: Tensor, h: Tensor, up: Tensor) -> Tensor:
        return self.of.add(y, h, up)

    def run(self, x: Tensor, W: Tensor) -> Tensor:
        y, b = self.of.project(x, W.to(self.dtype), 0.0), self.bias()
        return y if b is None else self.channels_last(y, lambda t: t + b.to(t.dtype))


# Hosts by full class name, for libraries that may not be loaded; each is registered when its first layer is looked up.
BY_NAME: dict[str, type[MatrixHost]] = {}
# Hosts of layers of which each process computes a part, by that of a layer that one computes alone.
PARALLEL: dict[type[MatrixHost], type[MatrixHost]] = {}
# Hosts of layers that keep their type and have a weight of another kind, by the full name of a class of that weight.
BY_WEIGHT: dict[str, type[MatrixHost]] = {}


def _seems_quantised(kind: type) -> str:
    """What to say of a layer that seems to be quantised in a way that no host knows."""
    return (
        "so it seems to be quantised in a way that is not known here; a host of your own needs two functions, "
        "rows(start, stop) and requantised(W, b): derive it from delora.hosts.Quantised and register it with "
        f"delora.host.register({kind.__name__}, YourHost), as examples/own_quantised.py does"
    )


class Hosts:
    """The host of a layer, found by its type: ``host(layer)``; of a type of your own: ``host.register(MyLayer, MyHost)``.

    Raises:
        TypeError, ValueError: the type is unknown (the message lists the known ones), or the layer cannot be adapted.

    >>> host(nn.Conv2d(2, 4, kernel_size=3)).matrix().shape
    torch.Size([4, 18])
    """

    def __init__(self) -> None:
        self.registry: dict[type, type[MatrixHost]] = {}

    def register(self, kind: type, make: type[MatrixHost]) -> None:
        """Let layers of a type, and of types derived from it that have the same forward, have this host.

        >>> class Projection(nn.Linear):
        ...     pass
        >>> host.register(Projection, type(host(nn.Linear(2, 2))))
        """
        if not (isinstance(make, type) and issubclass(make, MatrixHost)):
            raise TypeError(
                f"host.register({kind.__name__}, ...): expected a class derived from hosts.MatrixHost, got {make!r}"
            )
        self.registry[kind] = make

    def __call__(self, layer: nn.Module) -> MatrixHost:
        make = host_class(layer)
        if make is None:
            if is_parallel(layer):
                raise TypeError(f"cannot adapt a {type(layer).__name__} that is tensor parallel: only Linear, Embedding can be")
            if (codes := codes_of(layer)) is not None:
                raise TypeError(f"cannot adapt a {type(layer).__name__}: it keeps {codes}, {_seems_quantised(type(layer))}")
            names = {kind.__name__ for kind in self.registry} | {n.rpartition(".")[2] for n in BY_NAME}
            raise TypeError(f"cannot adapt a {type(layer).__name__}: known layers are {', '.join(sorted(names))}")
        made = make(layer)
        made.check()
        return made


host = Hosts()


def any_host(layer: nn.Module) -> Host:
    """The host of a module of any type, for methods that edit its output.

    Raises:
        TypeError: the module has no parameter.

    >>> type(any_host(nn.Linear(2, 3))).__name__, type(any_host(nn.Sequential(nn.Linear(2, 3)))).__name__
    ('Linear', 'Host')
    """
    if host_class(layer) is not None:
        return host(layer)
    if not any(p.is_floating_point() for p in layer.parameters()):
        raise TypeError(f"cannot adapt a {type(layer).__name__}: it has no parameter that tells its number of output channels")
    is_norm = type(layer) is nn.LayerNorm and layer.elementwise_affine and len(layer.normalized_shape) == 1
    return Norm(layer) if is_norm else Host(layer)


def host_class(layer: nn.Module) -> type[MatrixHost] | None:
    """The host's class for a layer, by the kind of its weight or else by its own type, or None if both are unknown.

    >>> host_class(nn.Linear(2, 2)).__name__, host_class(nn.ReLU())
    ('Linear', None)
    """
    weight = layer._parameters.get("weight")
    if type(weight) not in (nn.Parameter, type(None)):
        for base in type(weight).__mro__:
            if (known := BY_WEIGHT.get(f"{base.__module__}.{base.__qualname__}")) is not None:
                return known
    known = host_type(type(layer))
    return PARALLEL.get(known) if known is not None and is_parallel(layer) else known


def codes_of(layer: nn.Module) -> str | None:
    """The first matrix of codes (numbers that no layer computes with) that a layer keeps itself, in words, or None.

    >>> layer = nn.Module()
    >>> layer.register_buffer("qweight", torch.zeros(2, 2, dtype=torch.uint8))
    >>> codes_of(layer)
    'qweight in torch.uint8'
    """
    kept = layer._parameters | {k: t for k, t in layer._buffers.items() if k not in layer._non_persistent_buffers_set}
    for name, t in kept.items():
        if t is None or t.ndim < 2:
            continue
        if not (t.is_floating_point() and t.element_size() > 1) and t.dtype not in (torch.bool, torch.int64):
            return f"{name} in {t.dtype}"
    return None


def host_type(kind: type) -> type[MatrixHost] | None:
    """The host's class for layers of this type, or None if the type is unknown.

    >>> host_type(nn.ReLU) is None
    True
    """
    for base in kind.__mro__:
        known = BY_NAME.get(f"{base.__module__}.{base.__qualname__}")
        if known is not None and base not in host.registry:
            host.register(base, known)
    return next((host.registry[base] for base in kind.__mro__ if base in host.registry), None)
