"""What PEFT does with the names in a file before it looks for them in a transformers model.

For models whose experts are one parameter, PEFT takes some names of layers for the experts', and it renames tensors as
transformers renames those of its checkpoints. Both is asked of the installed transformers here, as PEFT asks it.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterable, Iterator
from functools import cache
from types import CodeType
from typing import Any

from torch import nn

from delora.models import walk

__all__ = ["EXPERTS", "experts", "read_by_parent", "renamed"]

# Layers that PEFT takes for experts and a router, by the kind of model (its ``_MOE_TARGET_MODULE_MAPPING``).
EXPERTS = {
    "mixtral": frozenset({"gate", "w1", "w2", "w3"}),
    "qwen2_moe": frozenset({"gate", "gate_proj", "up_proj", "down_proj"}),
}


def experts(model: nn.Module) -> frozenset[str]:
    """The last parts of names that PEFT takes for experts in this model, whatever layers bear them.

    It reads such layers right if they are named by their parameter, the weight, and in a list.

    >>> experts(nn.Linear(2, 2))
    frozenset()
    """
    kind = _converted_type(model)
    if kind is None:
        return frozenset()
    from transformers import conversion_mapping

    like = {**conversion_mapping._MODEL_TO_CONVERSION_PATTERN, "mixtral": "mixtral"}.get(kind)
    return EXPERTS.get(like or "", frozenset())


def renamed(model: nn.Module, layers: Iterable[str]) -> dict[str, str]:
    """The layers whose tensors PEFT would look for elsewhere, and where.

    >>> renamed(nn.Sequential(nn.Linear(2, 2)), ["0"])
    {}
    """
    if _converted_type(model) is None:
        return {}
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    renamings = [c for c in get_model_conversion_mapping(model) if isinstance(c, WeightRenaming)]  # type: ignore[arg-type]
    moved = {}
    for layer in layers:
        key = f"{layer}.lora_A.weight"
        new = rename_source_key(key, renamings, [])[0]
        if not key.endswith(new):  # PEFT undoes what only takes away a beginning
            moved[layer] = new.removesuffix(".lora_A.weight")
    return moved


def read_by_parent(model: nn.Module, layers: Iterable[str]) -> dict[str, str]:
    """The layers whose parent's code computes with their weight itself, and the parent's class: PEFT adapts only their call.

    >>> model = nn.Sequential(nn.MultiheadAttention(4, 2))
    >>> read_by_parent(model, ["0.out_proj"])
    {'0.out_proj': 'MultiheadAttention'}
    """
    modules = {"": model, **dict(walk(model))}
    read = {}
    for layer in layers:
        parent, _, name = layer.rpartition(".")
        kind: Any = type(modules[parent])
        if name in _weights_read(kind):
            read[layer] = kind.__name__
    return read


@cache
def _weights_read(kind: Any) -> frozenset[str]:
    """The names of children whose ``weight`` the code of a class reads, not only its dtype and the like."""
    classes = kind.__mro__[: kind.__mro__.index(nn.Module)]
    functions = [f for c in classes for value in vars(c).values() if inspect.isfunction(f := inspect.unwrap(value))]
    setting_up = ("__init__", "_init_", "reset_", "_reset_")
    return frozenset(name for f in functions if not f.__name__.startswith(setting_up) for name in _children_read(f.__code__))


_KNOWN_WITHOUT_IT = ("dtype", "device", "shape", "is_meta", "requires_grad")


def _children_read(code: CodeType) -> Iterator[str]:
    """The name x for every x.weight that code reads."""
    steps = [(step.opname in ("LOAD_ATTR", "LOAD_METHOD"), str(step.argval)) for step in dis.get_instructions(code)]
    steps += [(False, ""), (False, "")]
    for (reads, child), weight, (_, after), (_, then) in zip(steps, steps[1:], steps[2:], steps[3:], strict=False):
        is_asked_for_its_type = (after, then) == ("torch", "Tensor")
        if reads and weight == (True, "weight") and after not in _KNOWN_WITHOUT_IT and not is_asked_for_its_type:
            yield child
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _children_read(constant)


def _converted_type(model: nn.Module) -> Any:
    """The type of a transformers model whose checkpoints are converted, or None."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind is None:
        return None
    try:
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    except ImportError:  # PEFT converts nothing without it
        return None
    return None if get_checkpoint_conversion_mapping(kind) is None else kind
