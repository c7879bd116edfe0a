"""Hosts: how one kind of layer shows its weight as a matrix ``[out, in]`` and applies another matrix in its place.

``host(layer)`` finds the host by the layer's type. A layer of your own takes one line:
``delora.host.register(MyConv, delora.hosts.Conv2d)``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import singledispatch
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from delora.updates import wide


class Host:
    """A layer of any kind, for what changes a layer as a whole."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer


class MatrixHost(Host):
    """A layer seen as the linear map ``x -> W x`` (and a bias, which is left alone)."""

    linear: ClassVar[bool] = False  # counted by targets="all-linear"

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

    def matrix(self) -> Tensor:
        """The weight as a matrix [out, in], a view where the layer allows it."""
        raise NotImplementedError

    def write(self, W: Tensor) -> None:
        """Give the layer a *new* weight parameter with the values of W, in the old one's dtype and memory layout.

        A new one, because the old may be shared: a tied layer that was not adapted must not change.
        """
        raise NotImplementedError

    def project(self, x: Tensor, down: Tensor, dropout: float) -> Tensor:
        """``down [k, in]`` in the place of W, without bias: k features where the layer has ``out``."""
        raise NotImplementedError

    def add(self, y: Tensor, h: Tensor, up: Tensor) -> Tensor:
        """``y + up h``: the k features of `project` mapped by ``up [out, k]`` onto the layer's output y."""
        raise NotImplementedError

    def weight(self) -> Tensor:
        """The matrix as numbers to compute with: detached, in float32 or wider."""
        W = self.matrix().detach()
        return W.to(wide(W.dtype))

    def _new_weight(self, W: Tensor) -> None:
        old = self.layer.weight
        self.layer.weight = nn.Parameter(torch.empty_like(old).copy_(W), requires_grad=old.requires_grad)


class Linear(MatrixHost):
    """``nn.Linear``: weight [out, in]."""

    linear = True

    def matrix(self) -> Tensor:
        return self.layer.weight

    def write(self, W: Tensor) -> None:
        self._new_weight(W)

    def project(self, x: Tensor, down: Tensor, dropout: float) -> Tensor:
        return F.linear(F.dropout(x, dropout) if dropout else x, down)

    def add(self, y: Tensor, h: Tensor, up: Tensor) -> Tensor:
        # One fused kernel and no [tokens, out] temporary for up h.
        return torch.addmm(y.flatten(0, -2), h.flatten(0, -2), up.T).view_as(y) if y.dim() > 1 else y + F.linear(h, up)


class Conv1D(Linear):
    """transformers' ``Conv1D`` (GPT-2): a linear layer whose weight is stored as [in, out]."""

    def matrix(self) -> Tensor:
        return self.layer.weight.T

    def write(self, W: Tensor) -> None:
        self._new_weight(W.T)


class Embedding(MatrixHost):
    """``nn.Embedding``: the map from one-hot ids to vectors; weight [ids, out], matrix [out, ids].

    Dropout of a one-hot input drops the whole change of a token.
    """

    def __init__(self, layer: nn.Embedding) -> None:
        super().__init__(layer)
        if layer.max_norm is not None:
            raise ValueError("cannot adapt an Embedding with max_norm: it rewrites its own weight at every look-up")

    def matrix(self) -> Tensor:
        return self.layer.weight.T

    def write(self, W: Tensor) -> None:
        self._new_weight(W.T)

    def project(self, x: Tensor, down: Tensor, dropout: float) -> Tensor:
        h = F.embedding(x, down.T)
        return h * F.dropout(h.new_ones(*x.shape, 1), dropout) if dropout else h

    def add(self, y: Tensor, h: Tensor, up: Tensor) -> Tensor:
        return y + F.linear(h, up).to(y.dtype)


class _Conv(MatrixHost):
    """A convolution: weight [out, in, *kernel], matrix [out, in * kernel]. ``project`` convolves, ``add`` mixes channels."""

    dims: ClassVar[int]

    def __init__(self, layer: Any) -> None:
        super().__init__(layer)
        if layer.groups != 1:
            raise ValueError(
                f"cannot adapt a {type(layer).__name__} with groups = {layer.groups}: "
                "its weight is not one matrix but one for each group"
            )

    def matrix(self) -> Tensor:
        return self.layer.weight.flatten(1)

    def write(self, W: Tensor) -> None:
        self._new_weight(W.view_as(self.layer.weight))

    def project(self, x: Tensor, down: Tensor, dropout: float) -> Tensor:
        kernel = down.reshape(-1, *self.layer.weight.shape[1:])  # [k, in, *kernel]
        # The layer's own method, for its stride, padding and padding mode.
        return self.layer._conv_forward(F.dropout(x, dropout) if dropout else x, kernel, None)

    def add(self, y: Tensor, h: Tensor, up: Tensor) -> Tensor:
        conv = (F.conv1d, F.conv2d, F.conv3d)[self.dims - 1]
        return y + conv(h, up.reshape(*up.shape, *(1,) * self.dims))


class Conv1d(_Conv):
    """``nn.Conv1d``."""

    dims = 1


class Conv2d(_Conv):
    """``nn.Conv2d``."""

    dims = 2


class Conv3d(_Conv):
    """``nn.Conv3d``."""

    dims = 3


# Layers of libraries that may not be loaded, by their full name; registered when the first one is met.
_BY_NAME: dict[str, type[MatrixHost]] = {"transformers.pytorch_utils.Conv1D": Conv1D}


@singledispatch
def host(layer: nn.Module) -> MatrixHost:
    """The host of a layer, found by its type; a TypeError that lists the known layers where there is none."""
    found = host_type(type(layer))
    if found is not None:
        return found(layer)
    names = {kind.__name__ for kind in host.registry if kind is not object} | {n.rpartition(".")[2] for n in _BY_NAME}
    raise TypeError(f"cannot adapt a {type(layer).__name__}: known layers are {', '.join(sorted(names))}")


def host_type(kind: type) -> Callable[[Any], MatrixHost] | None:
    """What `host` calls for layers of this type, or None if they are unknown."""
    for base in kind.__mro__:
        known = _BY_NAME.get(f"{base.__module__}.{base.__qualname__}")
        if known is not None and base not in host.registry:
            host.register(base, known)
    found = host.dispatch(kind)
    return None if found is host.registry[object] else found


host.register(nn.Linear, Linear)
host.register(nn.Embedding, Embedding)
host.register(nn.Conv1d, Conv1d)
host.register(nn.Conv2d, Conv2d)
host.register(nn.Conv3d, Conv3d)
