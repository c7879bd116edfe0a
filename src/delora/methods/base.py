"""What a method is: a frozen dataclass of hyperparameters with two pure functions, ``init`` and ``update``.

Nothing has to be inherited or registered. More members are read where a method has them:

* ``measure(W) -> {name: Tensor}``: what ``update`` needs to know of the frozen W, such as its column norms. It is never
  saved, and it is taken anew whenever W may have changed (a checkpoint is loaded, a meta model is materialised).
* ``reads_weight``: True if ``update`` needs W itself (in the layer's own dtype); the others get ``W=None``, so a quantised
  base stays as it is.
* ``edits_output``: True if the method changes what a module puts out, so that it suits modules of every kind. Its ``init``
  may use of W only the number of rows, which is that of the output's channels.
* ``stacks``: True if ``update`` also takes the tensors of several layers of one shape, stacked in a new first dimension, and
  answers with a `LowRank` of stacked factors: then the layers of a model are asked together, in one go for each forward.
* ``starts_at_base``: False if the change is not zero at the start.
* ``has_dropout``: False if the change has no input of its own that could be dropped.
* ``bound(p) -> Tensor``: an upper bound of the Frobenius norm of W' - W, if the method guarantees one.
* ``reachable(p) -> Tensor``: that norm for directions that have nothing in common, where it follows from the strengths.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, Literal, Protocol, TypeGuard, get_args, get_origin, get_type_hints, runtime_checkable

import torch
from torch import Tensor

from delora.updates import Update


@runtime_checkable
class Method(Protocol):
    """A way to change a weight matrix. ``p`` holds the tensors of ``init`` and ``measure``, in float32 or wider."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    def init(self, W: Tensor) -> dict[str, Tensor]:
        """The tensors for one matrix W [out, in]: an ``nn.Parameter`` trains, a plain Tensor is kept and saved."""
        ...

    def update(self, W: Tensor | None, p: dict[str, Tensor]) -> Update: ...


def reads_weight(method: Method) -> bool:
    return getattr(method, "reads_weight", False)


def starts_at_base(method: Method) -> bool:
    """False for the methods whose change is never zero at the start (ETHER's reflections)."""
    return getattr(method, "starts_at_base", True)


def edits_output(method: Method) -> bool:
    return getattr(method, "edits_output", False)


def has_dropout(method: Method) -> bool:
    return getattr(method, "has_dropout", True)


def measure(method: Method, W: Tensor) -> dict[str, Tensor]:
    return method.measure(W) if hasattr(method, "measure") else {}


def bound(method: Method, p: dict[str, Tensor]) -> Tensor | None:
    return method.bound(p) if hasattr(method, "bound") else None


def reachable(method: Method, p: dict[str, Tensor]) -> Tensor | None:
    return method.reachable(p) if hasattr(method, "reachable") else None


def name_of(method: object) -> str:
    """The name of a method in files, recipes and tables: its class name in lower case."""
    return (method if isinstance(method, type) else type(method)).__name__.lower()


def fields_of(method: Any) -> dict[str, Any]:
    return {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}


def checked_replace(method: Any, changes: dict[str, Any], where: str) -> Any:
    """``method`` with some fields changed; an unknown field or a bad value is an error that says where."""
    if not changes:
        return method
    known = fields_of(method)
    for field in changes:
        if field not in known:
            raise ValueError(f"{where}: {type(method).__name__} has no field {field!r}; its fields are {list(known)}")
    try:
        return dataclasses.replace(method, **changes)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def kaiming(rows: int, columns: int, like: Tensor) -> Tensor:
    """[rows, columns] drawn from U(-1/sqrt(columns), 1/sqrt(columns)): what nn.Linear and LoRA start from."""
    limit = 1 / math.sqrt(columns)
    return like.new_empty(rows, columns).uniform_(-limit, limit)


# A vector of exact zeros has no direction. Below this length (that of torch's F.normalize) it counts as this long.
TINY = 1e-12


def unit(v: Tensor) -> Tensor:
    """v / |v| for every vector v in the last dimension."""
    return v / torch.linalg.vector_norm(v, dim=-1, keepdim=True).clamp_min(TINY)


def block_size(dimension: int, blocks: int, side: str) -> int:
    """The size of each of ``blocks`` equal blocks of a layer's ``side`` ("input" or "output")."""
    if dimension % blocks:
        fitting = [n for n in range(1, min(dimension, 64) + 1) if dimension % n == 0]
        raise ValueError(f"blocks = {blocks} do not divide the {side} of size {dimension}; {fitting} do")
    return dimension // blocks


def require_count(name: str, value: object, what: str = "it") -> None:
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} = {value!r}: {what} must be an integer of at least 1")


def require_rank(r: object) -> None:
    require_count("r", r, "the rank")


def is_number(value: object) -> TypeGuard[float]:
    """A finite int or float; not a bool, which Python counts among the ints."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def require_positive(name: str, value: object) -> None:
    if not is_number(value) or value <= 0:
        raise ValueError(f"{name} = {value!r}: must be a finite number above 0")


def require_flags(method: Method) -> None:
    """Every field annotated ``bool`` or ``Literal[...]`` holds one of its values."""
    for name, kind in get_type_hints(type(method)).items():
        value = getattr(method, name)
        if kind is bool and type(value) is not bool:
            raise ValueError(f"{name} = {value!r}: must be True or False")
        if get_origin(kind) is Literal and value not in get_args(kind):
            raise ValueError(f"{name} = {value!r}: must be one of {', '.join(map(repr, get_args(kind)))}")
