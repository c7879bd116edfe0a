"""What a method is: a frozen dataclass of hyperparameters with two pure functions, ``init`` and ``update``.

A method need not inherit from anything or be registered. Its W is a tensor; a function under ``@takes_frozen``
(`delora.frozen`) gets a `Frozen` instead, of which it asks what it needs (shape, norms, products), so that W is read once, in
blocks, or not at all. A method may also have these members:

* ``measure(W) -> {name: Tensor}``: what ``update`` needs to know of the frozen W, such as its column norms. It is never
  saved, and it is measured again whenever W may have changed (a checkpoint is loaded, a meta model is materialised).
* ``reads_weight``: True if ``update`` needs W itself (in the layer's own dtype). Other methods get ``W=None``, so a
  quantised base is never converted.
* ``edits_output``: True if the method changes the output of a module, which may then be of any kind. Its ``init`` may use
  only the number of rows of W, which is the number of the output's channels.
* ``stacks``: True if ``update`` also accepts the tensors of several layers of one shape, stacked in a new first dimension,
  and returns a `LowRank` of stacked factors. Then one call builds the updates of all these layers in every forward.
* ``init_lookup(W)``: takes the place of ``init`` on a layer that looks up columns of W, an embedding.
* ``starts_at_base``: False if the change is not zero at initialisation.
* ``has_dropout``: False if dropout cannot be applied to the change.
* ``bound(p) -> Tensor``: an upper bound of the Frobenius norm of W' - W, if the method guarantees one.
* ``reachable(p) -> Tensor``: the Frobenius norm of W' - W if its rank-one terms are orthogonal, if the strengths determine it.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, Literal, Protocol, TypeGuard, get_args, get_origin, get_type_hints, runtime_checkable

import torch
from torch import Tensor

from delora.frozen import Frozen, given
from delora.updates import Update

__all__ = [
    "TINY",
    "Method",
    "block_size",
    "bound",
    "checked_replace",
    "edits_output",
    "fields_of",
    "has_dropout",
    "initial",
    "is_number",
    "kaiming",
    "measure",
    "name_of",
    "one_of",
    "reachable",
    "reads_weight",
    "require_count",
    "require_flags",
    "require_positive",
    "require_rank",
    "starts_at_base",
    "unit",
    "unsaid",
]


@runtime_checkable
class Method(Protocol):
    """A way to change a weight matrix. ``p`` holds the tensors of ``init`` and ``measure``, in float32 or wider.

    Example: a method that learns a scale for every output.

    >>> from torch import nn
    >>> from delora.updates import Affine
    >>> @dataclasses.dataclass(frozen=True)
    ... class Scale:
    ...     def init(self, W):
    ...         return {"s": nn.Parameter(W.new_ones(len(W)))}
    ...     def update(self, W, p):
    ...         return Affine(scale=p["s"])
    >>> import delora
    >>> model = delora.inject(nn.Sequential(nn.Linear(4, 3)), Scale(), ["0"])
    >>> isinstance(Scale(), Method), model[0].adapter.s.shape
    (True, torch.Size([3]))
    """

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    def init(self, W: Tensor) -> dict[str, Tensor]:
        """The tensors for one matrix W [out, in]: an ``nn.Parameter`` trains, a plain Tensor stays fixed; both are saved."""
        ...

    def update(self, W: Tensor | None, p: dict[str, Tensor]) -> Update:
        """The change of the layer for the tensors ``p``."""
        ...


def reads_weight(method: Method) -> bool:
    """Whether ``update`` needs W itself.

    >>> import delora
    >>> reads_weight(delora.DoRA()), reads_weight(delora.LoRA())
    (True, False)
    """
    return getattr(method, "reads_weight", False)


def starts_at_base(method: Method) -> bool:
    """Whether the change is zero at initialisation; it is not for ETHER, whose reflections are never the identity.

    >>> import delora
    >>> starts_at_base(delora.DeLoRA()), starts_at_base(delora.ETHER())
    (True, False)
    """
    return getattr(method, "starts_at_base", True)


def edits_output(method: Method) -> bool:
    """Whether the method changes the output of a module, which may then be of any kind.

    >>> import delora
    >>> edits_output(delora.Bottleneck()), edits_output(delora.LoRA())
    (True, False)
    """
    return getattr(method, "edits_output", False)


def has_dropout(method: Method) -> bool:
    """Whether dropout can be applied to the change.

    >>> import delora
    >>> has_dropout(delora.LoRA()), has_dropout(delora.BitFit())
    (True, False)
    """
    return getattr(method, "has_dropout", True)


def initial(method: Method, W: Tensor | Frozen, lookup: bool = False) -> dict[str, Tensor]:
    """The tensors that training starts with; ``lookup``: for a layer that looks up columns of W.

    >>> import delora
    >>> initial(delora.LoRA(r=2), torch.ones(4, 9), lookup=True)["A"].any()
    tensor(False)
    """
    W = Frozen(W) if isinstance(W, Tensor) else W
    return given(getattr(method, "init_lookup", method.init) if lookup else method.init, W)


def measure(method: Method, W: Tensor | Frozen) -> dict[str, Tensor]:
    """What the method measures of the frozen W; empty if nothing.

    >>> import delora
    >>> measure(delora.DeLoRA(), torch.tensor([[3.0, 0.0], [4.0, 1.0]]))
    {'c': tensor([5., 1.])}
    """
    W = Frozen(W) if isinstance(W, Tensor) else W
    return given(method.measure, W) if hasattr(method, "measure") else {}


def bound(method: Method, p: dict[str, Tensor]) -> Tensor | None:
    """The upper bound of |W' - W|_F that the method guarantees, or None.

    >>> import delora
    >>> p = {"lam": torch.tensor([2.0]), "c": torch.tensor([5.0, 1.0])}
    >>> bound(delora.DeLoRA(start="paired"), p), bound(delora.LoRA(), {})
    (tensor([10.]), None)
    """
    return method.bound(p) if hasattr(method, "bound") else None


def reachable(method: Method, p: dict[str, Tensor]) -> Tensor | None:
    """|W' - W|_F if the rank-one terms are orthogonal, or None if the strengths do not determine it.

    >>> import delora
    >>> p = {"lam": torch.tensor([2.0]), "c": torch.tensor([5.0, 5.0])}
    >>> reachable(delora.DeLoRA(r=4, start="paired"), p)  # 5 * 2 / sqrt(4)
    tensor([5.])
    """
    return method.reachable(p) if hasattr(method, "reachable") else None


def name_of(method: object) -> str:
    """The name of a method in files, recipes and tables: its class name in lower case.

    >>> import delora
    >>> name_of(delora.DeLoRA())
    'delora'
    """
    return (method if isinstance(method, type) else type(method)).__name__.lower()


def fields_of(method: Any) -> dict[str, Any]:
    """The hyperparameters of a method by name.

    >>> import delora
    >>> fields_of(delora.LoRA(r=4))
    {'r': 4, 'alpha': 16.0, 'rslora': False}
    """
    return {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}


def one_of(method: type) -> tuple[str, ...]:
    """The names of those fields of a method of which only one is given: naming one puts the others aside.

    >>> import delora
    >>> one_of(delora.DeLoRA), one_of(delora.LoRA)
    (('lam', 'reach'), ())
    """
    return getattr(method, "one_of", ())


def unsaid(method: type) -> dict[str, Any]:
    """Fields of a method that a file may lack, with what they then are: their defaults when it was written.

    >>> import delora
    >>> unsaid(delora.DeLoRA), unsaid(delora.LoRA)
    ({'learn_lam': True}, {})
    """
    return getattr(method, "unsaid", {})


def checked_replace(method: Any, changes: dict[str, Any], where: str) -> Any:
    """``method`` with some fields changed. A field of which only one of several is given replaces the others (`one_of`).

    Raises:
        ValueError: a field is unknown or a value is invalid; ``where`` begins the message.

    >>> import delora
    >>> checked_replace(delora.LoRA(r=4), {"alpha": 8.0}, "overrides")
    LoRA(r=4, alpha=8.0, rslora=False)
    """
    if not changes:
        return method
    known = fields_of(method)
    for field in changes:
        if field not in known:
            raise ValueError(f"{where}: {type(method).__name__} has no field {field!r}; its fields are {list(known)}")
    alternatives = one_of(type(method))
    others = dict.fromkeys(alternatives) if changes.keys() & set(alternatives) else {}
    try:
        return dataclasses.replace(method, **others | changes)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def kaiming(rows: int, columns: int, like: Tensor | Frozen) -> Tensor:
    """A matrix [rows, columns] drawn from U(-1/sqrt(columns), 1/sqrt(columns)), as nn.Linear and LoRA initialise.

    >>> A = kaiming(2, 100, like=torch.ones(1))
    >>> A.shape, bool(A.abs().max() <= 0.1)
    (torch.Size([2, 100]), True)
    """
    limit = 1 / math.sqrt(columns)
    return like.new_empty(rows, columns).uniform_(-limit, limit)


# A zero vector has no direction. A vector shorter than this (the eps of torch's F.normalize) counts as this long.
TINY = 1e-12


def unit(v: Tensor) -> Tensor:
    """v / |v| for every vector v in the last dimension.

    >>> unit(torch.tensor([3.0, 4.0]))
    tensor([0.6000, 0.8000])
    """
    return v / torch.linalg.vector_norm(v, dim=-1, keepdim=True).clamp_min(TINY)


def block_size(dimension: int, blocks: int, side: str) -> int:
    """The size of each of ``blocks`` equal blocks of a layer's ``side`` ("input" or "output").

    >>> block_size(12, 4, "input")
    3
    """
    if dimension % blocks:
        fitting = [n for n in range(1, min(dimension, 64) + 1) if dimension % n == 0]
        raise ValueError(f"blocks = {blocks} do not divide the {side} of size {dimension}; {fitting} do")
    return dimension // blocks


def require_count(name: str, value: object, what: str = "it") -> None:
    """Raise a ValueError unless a value is an integer of at least 1.

    >>> require_count("blocks", 0)
    Traceback (most recent call last):
    ValueError: blocks = 0: it must be an integer of at least 1
    """
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} = {value!r}: {what} must be an integer of at least 1")


def require_rank(r: object) -> None:
    """Raise a ValueError unless r is a rank.

    >>> require_rank(0)
    Traceback (most recent call last):
    ValueError: r = 0: the rank must be an integer of at least 1
    """
    require_count("r", r, "the rank")


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a finite int or float, and not a bool.

    >>> is_number(1), is_number(True), is_number(math.inf), is_number(10**400)
    (True, False, False, False)
    """
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False


def require_positive(name: str, value: object) -> None:
    """Raise a ValueError unless a value is a finite number above 0, of those that float32 has.

    >>> require_positive("lam", -1.0)
    Traceback (most recent call last):
    ValueError: lam = -1.0: must be a finite number above 0
    """
    if not is_number(value) or value <= 0:
        raise ValueError(f"{name} = {value!r}: must be a finite number above 0")
    if value > torch.finfo(torch.float32).max:
        raise ValueError(f"{name} = {value!r} is beyond float32's numbers")


def require_flags(method: Method) -> None:
    """Raise a ValueError unless every field annotated ``bool`` or ``Literal[...]`` holds one of its values.

    >>> import delora
    >>> require_flags(delora.LoRA(rslora=True))
    >>> delora.IA3(side="left")
    Traceback (most recent call last):
    ValueError: side = 'left': must be one of 'output', 'input'
    """
    for name, kind in get_type_hints(type(method)).items():
        value = getattr(method, name)
        if kind is bool and type(value) is not bool:
            raise ValueError(f"{name} = {value!r}: must be True or False")
        if get_origin(kind) is Literal and value not in get_args(kind):
            raise ValueError(f"{name} = {value!r}: must be one of {', '.join(map(repr, get_args(kind)))}")
