"""Matrices that a module keeps as parameters of its own: attention's packed projection, a mixture's experts.

Such a matrix has no layer that could be called: its module multiplies by it somewhere in its forward. So a `Slot` says where
it is, and the module runs with the changed parameter in place (`delora.parts`). Which parameters of a module are such matrices
is known for ``nn.MultiheadAttention``; a module of your own takes one line:
``delora.hosts.parameters.register(MyAttention, {"qkv": delora.hosts.Layout()})``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from delora.frozen import mark
from delora.hosts.base import Host
from delora.updates import wide
from delora.zero import full_shape, outlined

__all__ = ["Layout", "Parameters", "Slice", "Slot", "parameters", "slots"]


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
    """One matrix in a parameter of a module.

    >>> attention = nn.MultiheadAttention(4, 2)
    >>> slot = slots(attention)["in_proj_weight"]
    >>> slot.name, Slice(slot).shape
    ('in_proj_weight', (12, 4))
    """

    owner: nn.Module
    key: str
    layout: Layout
    index: int | None = None  # of the expert

    @property
    def name(self) -> str:
        """The name inside the module: that of the parameter and, of an expert, its number."""
        return self.key if self.index is None else f"{self.key}.{self.index}"

    def part(self) -> Tensor:
        """What of the parameter is this matrix, in the parameter's own layout."""
        W: Tensor = getattr(self.owner, self.key)
        return W if self.index is None else self.layout.apart(self.owner, W)[self.index]


class Parameters:
    """The parameters of modules that are matrices, by the module's type; of your own: ``parameters.register(kind, layouts)``.

    >>> parameters(nn.MultiheadAttention(4, 2))
    {'in_proj_weight': Layout(transposed=False, bias='in_proj_bias', part=(0, 1), experts=False)}
    >>> parameters(nn.Linear(2, 2))
    {}
    """

    def __init__(self) -> None:
        self.registry: dict[type, Mapping[str, Layout]] = {}
        self.by_name: dict[str, Mapping[str, Layout]] = {}  # by full class name, for libraries that may not be loaded
        self.finders: list[Callable[[nn.Module], Mapping[str, Layout]]] = []  # asked for modules of all other types

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
        for key, layout in self._known(module).items():
            W = getattr(module, key, None)
            # Numbers of one byte mean nothing without their scale.
            if not isinstance(W, Tensor) or not W.is_floating_point() or W.element_size() == 1:
                continue
            if len(full_shape(W)) == (3 if layout.experts is True else 2):
                found[key] = layout
        return found

    def _known(self, module: nn.Module) -> Mapping[str, Layout]:
        for kind in type(module).__mro__:
            if kind in self.registry:
                return self.registry[kind]
            if (name := f"{kind.__module__}.{kind.__qualname__}") in self.by_name:
                return self.by_name[name]
        for find in self.finders:
            if found := find(module):
                return found
        return {}


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
        W = self.layer.part()
        return W.T if self.layer.layout.transposed else W

    def as_weight(self, W: Tensor) -> Tensor:
        return W.T if self.layer.layout.transposed else W

    def bias_at(self) -> tuple[str, Any] | None:
        """The parameter that is added to what the matrix gives, and where in it; None if there is none."""
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
            return b.to(wide(b.dtype))

    def mark(self) -> object:
        return mark([self.layer.part().detach()])

    def changed(self, update: Any) -> Any:
        raise NotImplementedError  # all matrices of a parameter change together
