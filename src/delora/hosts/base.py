"""What a host is: how one kind of layer shows its weight as a matrix ``[out, in]`` and applies another matrix in its place."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import singledispatch
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from delora.torch_private import is_view
from delora.updates import Update, wide


class Host:
    """A module of any kind, whose output [..., channels] (or the first part of a tuple) can be edited.

    The number of channels is the length of the module's last parameter: the scale or bias of its last norm, the last
    matrix's rows.
    """

    weight_name: ClassVar[str | None] = None  # the parameter that holds the matrix; None: no weight can take a change
    linear: ClassVar[bool] = False  # a map of the last dimension; counted by targets="all-linear"

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def matrix(self) -> Tensor:
        """The weight as a matrix [out, in], a view where the layer allows it; else what stands for it: [channels, any]."""
        last = [p for p in self.layer.parameters() if p.is_floating_point()][-1]
        return last.reshape(len(last), -1)

    def weight(self) -> Tensor:
        """The matrix as numbers to compute with: detached, in float32 or wider."""
        W = self.matrix().detach()
        return W.to(wide(W.dtype))

    def as_weight(self, W: Tensor) -> Tensor:
        """The opposite of `matrix`: W [out, in] in the layout of the layer's own parameter."""
        raise NotImplementedError

    def bias(self) -> Tensor | None:
        """The bias [out], detached, in float32 or wider."""
        b = getattr(self.layer, "bias", None) if self.weight_name else None
        return b.detach().to(wide(b.dtype)) if isinstance(b, Tensor) else None

    def fold(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The weights of a layer that computes W x + b, where the layer's kind has no place for a bias."""
        return W, b

    def channels_last(self, y: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
        """``fn`` of the output with its channels in the last dimension, put back."""
        return fn(y)

    def edited(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Any:
        """The layer's output with ``fn`` of its tensor, which is the first part where the output is a tuple."""
        out = self.layer(*args, **kwargs)
        if isinstance(out, tuple):
            return (self.channels_last(out[0], self._checked(fn)), *out[1:])
        return self.channels_last(out, self._checked(fn))

    def _checked(self, fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def checked(y: Any) -> Tensor:
            channels = len(self.matrix())
            if not isinstance(y, Tensor) or y.shape[-1] != channels:
                got = f"shape {list(y.shape)}" if isinstance(y, Tensor) else f"a {type(y).__name__}"
                raise ValueError(
                    f"cannot edit the output of a {type(self.layer).__name__}: expected a tensor with {channels} channels (the "
                    f"length of its last parameter) in the last dimension, or a tuple that begins with one, got {got}"
                )
            return fn(y)

        return checked

    def mixed(self, y: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
        """``fn``, a linear map of the channels, of the output y without its bias, which is added back unmapped."""
        b = self.bias()
        if b is None:
            return self.channels_last(y, fn)
        shift = b - fn(b)
        return self.channels_last(y, lambda y: fn(y) + shift.to(y.dtype))

    @torch.no_grad()
    def plain(self, update: Update) -> nn.Module:
        """A layer of the original type with the change in its weights; it shares all else with the original.

        Raises:
            ValueError: no weight of the layer can take the change.
        """
        if self.weight_name is None:
            raise ValueError(f"a {type(self.layer).__name__} has no weight that could take the change: it cannot be merged")
        W, b = self.weight(), self.bias()
        new_W, new_b = self.fold(update.merge(W), update.bias(b))
        new = shallow(self.layer)
        old = self.layer.get_parameter(self.weight_name)
        # Parameters of their own, because the old ones may be shared; and only where there is something new, because
        # what is left as it is must stay shared.
        if new_W is not W:
            _put(new, self.weight_name, self.as_weight(new_W), old)
        if new_b is not None and new_b is not b:
            _put(new, "bias", new_b, old if self.layer.bias is None else self.layer.bias)
        return new


def shallow(module: nn.Module) -> nn.Module:
    """A module of the same type with the same tensors, on which others can be set without changing the original."""
    new = copy.copy(module)
    for registry in ("_parameters", "_buffers", "_modules"):
        new.__dict__[registry] = module.__dict__[registry].copy()
    return new


def _put(module: nn.Module, name: str, value: Tensor, like: Tensor) -> None:
    """Set a new parameter in the dtype, and the memory layout where the shape is the same, of an old one."""
    fresh = not value.requires_grad and not is_view(value)  # nobody else's
    if not (fresh and value.dtype == like.dtype and value.shape == like.shape and value.stride() == like.stride()):
        value = (torch.empty_like(like) if like.shape == value.shape else like.new_empty(value.shape)).copy_(value)
    setattr(module, name, nn.Parameter(value, requires_grad=like.requires_grad))


def is_bare(layer: nn.Module) -> bool:
    """Is calling the layer no more than its type's forward? Hooks and a forward of its own (Accelerate's) have to be run."""
    d = layer.__dict__
    hooks = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    return "forward" not in d and not any(d[name] for name in hooks)


class Norm(Host):
    """``nn.LayerNorm``, whose scale and shift of every channel are a weight [channels, 1] and a bias."""

    weight_name = "weight"

    def matrix(self) -> Tensor:
        return self.layer.weight[:, None]

    def as_weight(self, W: Tensor) -> Tensor:
        return W[:, 0]


class MatrixHost(Host):
    """A layer seen as the linear map ``x -> W x`` and a bias."""

    weight_name = "weight"

    def __init__(self, layer: Any) -> None:
        kind: Any = type(layer)
        known: Any = next(base for base in kind.__mro__ if base in host.registry)
        # A subclass that computes something else would be adapted wrongly and in silence.
        if kind.forward is not known.forward:
            raise TypeError(
                f"cannot adapt a {kind.__name__}: it has a forward of its own, which {known.__name__}'s host does not know; "
                f"if it is one matrix all the same, register its host: delora.host.register({kind.__name__}, ...)"
            )
        super().__init__(layer)
        if not self.matrix().is_floating_point():
            raise TypeError(f"cannot adapt a {kind.__name__} whose weight is {self.matrix().dtype}: it seems to be quantised")

    def project(self, x: Tensor, down: Tensor, dropout: float) -> Tensor:
        """``down [k, in]`` in the place of W, without bias: k features where the layer has ``out``."""
        raise NotImplementedError

    def add(self, y: Tensor, h: Tensor, up: Tensor) -> Tensor:
        """``y + up h``: the k features of `project` mapped by ``up [out, k]`` onto the layer's output y."""
        raise NotImplementedError

    def branch(self, y: Tensor, x: Tensor, down: Tensor, up: Tensor, dropout: float) -> Tensor:
        """``y + up down x``; y is the layer's own output and may be overwritten."""
        return self.add(y, self.project(x, down, dropout), up)

    def with_branch(self, x: Tensor, down: Tensor, up: Tensor, dropout: float) -> Tensor:
        """The layer's output plus ``up down x``."""
        return self.branch(self.layer(x), x, down, up, dropout)

    def run(self, x: Tensor, W: Tensor) -> Tensor:
        """The layer's output with W in the place of its own matrix."""
        weight = self.as_weight(W).to(self.matrix().dtype)
        return torch.func.functional_call(self.layer, {self.weight_name: weight}, (x,))


# Layers of libraries that may not be loaded, by their full name; registered when the first one is met.
BY_NAME: dict[str, type[MatrixHost]] = {}


@singledispatch
def host(layer: nn.Module) -> MatrixHost:
    """The host of a layer, found by its type; a TypeError that lists the known layers where there is none."""
    found = host_type(type(layer))
    if found is not None:
        return found(layer)
    names = {kind.__name__ for kind in host.registry if kind is not object} | {n.rpartition(".")[2] for n in BY_NAME}
    raise TypeError(f"cannot adapt a {type(layer).__name__}: known layers are {', '.join(sorted(names))}")


def any_host(layer: nn.Module) -> Host:
    """The host of a module of any type, for methods that edit what it puts out."""
    if host_type(type(layer)) is not None:
        return host(layer)
    if not any(p.is_floating_point() for p in layer.parameters()):
        raise TypeError(f"cannot adapt a {type(layer).__name__}: it has no parameter that tells how many channels it puts out")
    is_norm = type(layer) is nn.LayerNorm and layer.elementwise_affine and len(layer.normalized_shape) == 1
    return Norm(layer) if is_norm else Host(layer)


def host_type(kind: type) -> Callable[[Any], MatrixHost] | None:
    """What `host` calls for layers of this type, or None if they are unknown."""
    for base in kind.__mro__:
        known = BY_NAME.get(f"{base.__module__}.{base.__qualname__}")
        if known is not None and base not in host.registry:
            host.register(base, known)
    found = host.dispatch(kind)
    return None if found is host.registry[object] else found
