"""What is known of modules by their type."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

from torch import nn

__all__ = ["ByType"]

Known = TypeVar("Known")


class ByType(Generic[Known]):
    """What is known of the parameters and layers of a module, by their names in it.

    Asked for the module's type and, in turn, those that it is derived from; then of each finder, the first answer that is not
    empty counts.

    >>> table = ByType[str]()
    >>> table.registry[nn.Linear] = {"weight": "a matrix"}
    >>> table.known(nn.Linear(2, 2)), table.known(nn.ReLU())
    ({'weight': 'a matrix'}, {})
    """

    def __init__(self) -> None:
        self.registry: dict[type, Mapping[str, Known]] = {}
        self.by_name: dict[str, Mapping[str, Known]] = {}  # by full class name, for libraries that may not be loaded
        self.finders: list[Callable[[nn.Module], Mapping[str, Known]]] = []  # asked for modules of all other types

    def known(self, module: nn.Module) -> Mapping[str, Known]:
        """What is known of a module; empty if nothing is."""
        for kind in type(module).__mro__:
            if kind in self.registry:
                return self.registry[kind]
            if (name := f"{kind.__module__}.{kind.__qualname__}") in self.by_name:
                return self.by_name[name]
        return next((known for find in self.finders if (known := find(module))), {})
