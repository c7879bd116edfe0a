"""Matrices that are no layer: attention's packed projection, a mixture's experts, the slices of a fused layer.

A `Slot` says where such a matrix is. One in a parameter has no layer that could be called: its module multiplies by it
somewhere in its forward, and runs with the changed parameter in place (`delora.parts`). Which parameters of a module are such
matrices is known for ``nn.MultiheadAttention``; a module of your own takes one line:
``delora.hosts.parameters.register(MyAttention, {"qkv": delora.hosts.Layout()})``. A slice is some rows of a layer's matrix, or
of one in a parameter (`delora.hosts.fusing`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from delora.frozen import mark
from delora.hosts.base import Host, host_class
from delora.hosts.fusing import Fused, fused
from delora.hosts.registry import ByType
from delora.updates import wide
from delora.zero import full_shape, outlined

__all__ = ["LayerSlice", "Layout", "Parameters", "Slice", "Slot", "parameters", "slices", "slots"]


@dataclass(frozen=True)
class Layout:
    """How a parameter holds a matrix: as [out, in], or ``transposed`` as [in, out].

    With ``experts`` it holds one for each expert, in its first of three dimensions; where it has only two, ``experts`` is the
    name of the module's attribute that counts them.

    ``bias`` names the parameter that is added to what the matrix gives, if there is one; ``part`` says which of how many equal
    parts of it.

    >>> Layout(transposed=True)
    Layout(transposed=True, bias=None, part=(0, 1), experts=False)
    """

    transposed: bool = False
    bias: str | None = None
    part: tuple[int, int] = (0, 1)
    experts: bool | str = False

    def apart(self, module: nn.Module, W: Tensor) -> Tensor:
        """The parameter with one matrix for each expert: [experts, ...]."""
        return W.unflatten(0, (getattr(module, self.experts), -1)) if isinstance(self.experts, str) else W


@dataclass(frozen=True)
class Slot:
    """One matrix in a parameter of a module, or a slice of it; with an empty ``key``, a slice of a layer's matrix.

    >>> attention = nn.MultiheadAttention(4, 2)
    >>> slot = slots(attention)["in_proj_weight"]
    >>> slot.name, Slice(slot).shape
    ('in_proj_weight', (12, 4))
    >>> [(slot.name, Slice(slot).shape) for slot in slices(slot)][0]
    ('in_proj_weight.q', (4, 4))
    """

    owner: nn.Module
    key: str
    layout: Layout
    index: int | None = None  # of the expert
    fused: Fused | None = None  # whose rows the matrix has
    cut: str = ""  # the name of the slice

    @property
    def name(self) -> str:
        """The name inside the module: that of the parameter, of an expert its number, of a slice its name."""
        return ".".join(part for part in (self.key, "" if self.index is None else str(self.index), self.cut) if part)

    @property
    def whole(self) -> Slot:
        """The matrix that this is a slice of, or the matrix itself."""
        return self if self.fused is None else replace(self, fused=None, cut="")

    def part(self) -> Tensor:
        """What of the parameter the matrix is, whole, in the parameter's own layout."""
        W: Tensor = getattr(self.owner, self.key)
        return W if self.index is None else self.layout.apart(self.owner, W)[self.index]

    def look(self) -> Slice:
        """A look at the matrix."""
        return Slice(self) if self.key else LayerSlice(self)


class Parameters(ByType[Layout]):
    """The parameters of modules that are matrices, by the module's type; of your own: ``parameters.register(kind, layouts)``.

    >>> parameters(nn.MultiheadAttention(4, 2))
    {'in_proj_weight': Layout(transposed=False, bias='in_proj_bias', part=(0, 1), experts=False)}
    >>> parameters(nn.Linear(2, 2))
    {}
    """

    def register(self, kind: type, layouts: Mapping[str, Layout]) -> None:
        """Let these parameters of modules of a type, and of types derived from it, be matrices that can be adapted.

        >>> class Projection(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.w = nn.Parameter(nn.Linear(3, 2).weight)
        >>> parameters.register(Projection, {"w": Layout()})
        >>> list(slots(Projection()))
        ['w']
        """
        if not isinstance(layouts, Mapping) or not all(isinstance(each, Layout) for each in layouts.values()):
            raise TypeError(f"parameters.register({kind.__name__}, ...): expected a Layout for each parameter, got {layouts!r}")
        self.registry[kind] = dict(layouts)

    def __call__(self, module: nn.Module) -> dict[str, Layout]:
        found = {}
        for key, layout in self.known(module).items():
            W = getattr(module, key, None)
            # Numbers of one byte mean nothing without their scale.
            if not isinstance(W, Tensor) or not W.is_floating_point() or W.element_size() == 1:
                continue
            if len(full_shape(W)) == (3 if layout.experts is True else 2):
                found[key] = layout
        return found


parameters = Parameters()
parameters.register(
    nn.MultiheadAttention,
    {
        "in_proj_weight": Layout(bias="in_proj_bias"),
        **{f"{name}_proj_weight": Layout(bias="in_proj_bias", part=(i, 3)) for i, name in enumerate("qkv")},
    },
)


def slots(module: nn.Module) -> dict[str, Slot]:
    """The matrices in a module's own parameters, by their names inside the module.

    >>> list(slots(nn.MultiheadAttention(4, 2, kdim=3)))
    ['q_proj_weight', 'k_proj_weight', 'v_proj_weight']
    """
    found = {}
    for key, layout in parameters(module).items():
        with outlined(module):
            count = len(layout.apart(module, getattr(module, key))) if layout.experts else 0
        for slot in [Slot(module, key, layout, i) for i in range(count)] or [Slot(module, key, layout)]:
            found[slot.name] = slot
    return found


def slices(matrix: Slot | nn.Module, how: Fused | None = None) -> Iterator[Slot]:
    """The slices of a matrix in a parameter, as far as its rows are known to be those of several; of a layer, as ``how`` says.

    >>> [slot.name for slot in slices(nn.Linear(4, 6), Fused({"k": 3, "v": 3}))]
    ['k', 'v']
    """
    if isinstance(matrix, nn.Module):
        matrix = Slot(matrix, "", Layout())
    else:
        how = fused(matrix.owner, matrix.key, Slice(matrix).shape[0])
    for name in () if how is None else how.names:
        yield replace(matrix, fused=how, cut=name)


class Slice(Host):
    """The matrix [out, in] of a `Slot`. It cannot be run: its module runs with another parameter in place of its own.

    >>> Slice(slots(nn.MultiheadAttention(4, 2))["in_proj_weight"]).bias().shape
    torch.Size([12])
    """

    weight_name = "weight"  # a change can be merged
    linear = True
    layer: Slot

    @property
    def module(self) -> nn.Module:
        return self.layer.owner

    def matrix(self) -> Tensor:
        W = self.as_weight(self.layer.part())
        return W if self.layer.fused is None else self.layer.fused.of(self.layer.cut, W)

    @property
    def shape(self) -> tuple[int, int]:
        with outlined(self.module):
            out, inp = self.as_weight(self.layer.part()).shape
        return (out if self.layer.fused is None else self.layer.fused.count(self.layer.cut)), inp

    def as_weight(self, W: Tensor) -> Tensor:
        return W.T if self.layer.layout.transposed else W

    def bias_at(self) -> tuple[str, Any] | None:
        """The parameter that is added to what the matrix, whole, gives, and where in it; None if there is none."""
        name = self.layer.layout.bias
        if name is None or not isinstance(b := getattr(self.module, name, None), Tensor):
            return None
        if self.layer.index is not None:
            return name, self.layer.index
        i, n = self.layer.layout.part
        return name, slice(i * len(b) // n, (i + 1) * len(b) // n)

    def bias(self) -> Tensor | None:
        at = self.bias_at()
        if at is None:
            return None
        with self.held():
            b: Tensor = getattr(self.module, at[0])[at[1]].detach()
            b = b if self.layer.fused is None else self.layer.fused.of(self.layer.cut, b)
            return b.to(wide(b.dtype))

    def mark(self) -> object:
        return mark([self.layer.part().detach()])

    def changed(self, update: Any) -> Any:
        raise NotImplementedError  # all matrices of a parameter change together


class LayerSlice(Slice):
    """Some rows of a layer's matrix. It cannot be run: the layer runs, with all changes of its rows.

    >>> key = list(slices(nn.Linear(4, 6), Fused({"k": 2, "v": 1}, repeats=2)))[0]
    >>> LayerSlice(key).shape, torch.equal(LayerSlice(key).read(), key.owner.weight[[0, 1, 3, 4]])
    ((4, 4), True)
    """

    def __init__(self, slot: Slot) -> None:
        super().__init__(slot)
        make = host_class(slot.owner)
        assert make is not None
        assert slot.fused is not None
        self.of, self.fused, self.cut = make(slot.owner), slot.fused, slot.cut

    def check(self) -> None:
        self.of.check()
        if not self.of.mixes:
            raise ValueError(
                "cannot adapt a slice of a convolution with groups, whose rows see different inputs: adapt all of it"
            )

    def matrix(self) -> Tensor:
        return self.fused.of(self.cut, self.of.matrix())

    @property
    def shape(self) -> tuple[int, int]:
        return self.fused.count(self.cut), self.of.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.of.dtype

    @property
    def device(self) -> torch.device:
        return self.of.device

    def held(self) -> AbstractContextManager[Any]:
        return self.of.held()

    def rows(self, start: int, stop: int) -> Tensor:
        span = self.fused.span(self.cut)
        if span is not None:
            return self.of.rows(span.start + start, span.start + stop)
        index = self.fused.rows(self.cut)[start:stop]
        if not len(index):
            return self.of.rows(0, 0)
        first, last = int(index[0]), int(index[-1])
        return self.of.rows(first, last + 1)[(index - first).to(self.device)]

    def read(self) -> Tensor:
        return self.fused.of(self.cut, self.of.read())

    def mark(self) -> object:
        return self.of.mark()

    def bias(self) -> Tensor | None:
        b = self.of.bias()
        return None if b is None else self.fused.of(self.cut, b)
