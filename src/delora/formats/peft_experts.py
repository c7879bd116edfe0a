"""Experts in PEFT's format: the factors of all experts in a parameter as two tensors, or each expert's own.

PEFT's ``target_parameters`` has them together. vLLM reads those of most mixtures one by one, under the names that their
checkpoints give to the weights of each expert (``model.layers.0.mlp.experts.3.gate_proj``): its ``get_moe_expert_mapping`` and
``process_packed_modules_mapping`` (vllm/lora/utils.py, 0.32) take the names of the factors from those of the weights.
transformers knows these names (``conversion_mapping``), by which it writes such checkpoints.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from delora.formats.nearest import Approximation
from delora.hosts import Slot
from delora.layer import Placed
from delora.parts import joined_slices
from delora.updates import LowRank

__all__ = ["Stacked", "by_wrapper", "low_rank", "one_by_one"]


@dataclass(frozen=True)
class Stacked:
    """The factors of all experts in one parameter, ``down [experts * r, in]`` and ``up [out, r * experts]``; or of one alone.

    >>> Stacked("experts.down_proj", 2, nn.Linear(3, 8).weight, nn.Linear(8, 5).weight).rank
    2
    """

    parameter: str
    rank: int
    down: Tensor
    up: Tensor


def by_wrapper(slots: Mapping[str, Placed], form: Approximation) -> dict[str, Stacked]:
    """The factors of experts by the name that PEFT gives to the wrapper of their parameter.

    Of several parameters of one module, the wrapper of the last is outermost; a rank that is smaller than the largest of a
    parameter is filled up with zeros.

    Raises:
        ValueError: PEFT cannot adapt a parameter, or its change is not low-rank.

    >>> by_wrapper({}, Approximation())
    {}
    """
    modules: dict[str, dict[str, list[Placed]]] = {}
    for name, placed in slots.items():
        slot: Slot = placed.base
        if slot.layout.experts is not True:
            raise ValueError(
                f"{name} is a parameter that a {type(slot.owner).__name__} or its parent reads, which PEFT cannot adapt; "
                "delora.merge writes it into the weights"
            )
        modules.setdefault(name.removesuffix(f".{slot.name}"), {}).setdefault(slot.key, []).append(placed)
    stacked = {}
    for module, parameters in modules.items():
        owner = next(iter(parameters.values()))[0].base.owner
        for depth, key in enumerate(key for key in reversed(owner._parameters) if key in parameters):
            stacked[module + ".base_layer" * depth] = _one(f"{module}.{key}", owner, parameters[key], form)
    return stacked


def _one(parameter: str, owner: nn.Module, members: list[Placed], form: Approximation) -> Stacked:
    W = members[0].base.layout.apart(owner, getattr(owner, members[0].base.key))
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for index, factors in low_rank(parameter, members).items():
        factors = form.of(f"{parameter}.{index}", factors)
        pair = (factors.down.T, factors.up.T) if members[0].base.layout.transposed else (factors.up, factors.down)
        # PEFT takes B A for the stored matrix or, of a module that says so, for its transpose.
        found[index] = (pair[1].T, pair[0].T) if getattr(owner, "is_transposed", False) else pair
    rank = max(up.shape[1] for up, _ in found.values())
    first_up, first_down = next(iter(found.values()))
    up = first_up.new_zeros(len(first_up), rank, len(W))
    down = first_up.new_zeros(len(W), rank, first_down.shape[1])
    for i, (u, d) in found.items():
        up[:, : u.shape[1], i] = u
        down[i, : len(d)] = d
    return Stacked(parameter, rank, down.flatten(0, 1), up.flatten(1))


def low_rank(parameter: str, members: list[Placed]) -> dict[int, LowRank]:
    """The change of each expert in a parameter as [out, in] factors, those of its slices joined.

    Raises:
        ValueError: a change is not low-rank.

    >>> low_rank("experts.down_proj", [])
    {}
    """
    each: dict[int, list[tuple[Slot, LowRank]]] = {}
    for placed in members:
        factors = placed.low_rank()
        if factors is None:
            raise ValueError(f"{parameter}: {placed.method} is not a low-rank change; delora.merge writes it into the weights")
        each.setdefault(placed.base.index, []).append((placed.base, factors))
    return {index: cast(LowRank, joined_slices(parts)) for index, parts in each.items()}


def one_by_one(model: nn.Module, slots: Mapping[str, Placed], form: Approximation) -> dict[str, Stacked]:
    """The factors of each expert by the name that the weight of each has in the model's checkpoints.

    All experts of a mixture with an adapter are there, those without a change with zeros, and the same projection of all
    experts has one rank: that is how vLLM packs them (``PackedLoRALayerWeights.pack_moe``).

    Raises:
        ValueError: it is not known how checkpoints name these experts, or a change is not low-rank.

    >>> one_by_one(nn.Linear(2, 2), {}, Approximation())
    {}
    """
    modules: dict[str, dict[str, list[Placed]]] = {}
    for name, placed in slots.items():
        modules.setdefault(name.removesuffix(f".{placed.base.name}"), {}).setdefault(placed.base.key, []).append(placed)
    written: dict[str, Stacked] = {}
    for module, parameters in modules.items():
        owner = next(iter(parameters.values()))[0].base.owner
        for key in (key for key, p in owner._parameters.items() if p is not None and p.ndim == 3):
            names = _of_checkpoint(model, f"{module}.{key}", owner)
            written |= _each(names, getattr(owner, key), parameters.get(key, []), form)
    return written


def _each(names: list[str], W: Tensor, members: list[Placed], form: Approximation) -> dict[str, Stacked]:
    """The factors of each projection of each expert; ``names`` are those of the projections, ``*`` for the expert's number."""
    count, (out, inp) = len(names), W.shape[1:]
    parts: dict[tuple[int, int], list[LowRank]] = {}
    for placed in members:
        slot: Slot = placed.base
        factors = low_rank(slot.key, [Placed(placed.adapter, slot)])[cast(int, slot.index)]
        for i in range(count):
            rows = slice(i * out // count, (i + 1) * out // count)
            if slot.fused is None or slot.fused.span(slot.cut) == rows:
                parts.setdefault((i, cast(int, slot.index)), []).append(LowRank(factors.up[rows], factors.down))
    written = {}
    for i, pattern in enumerate(names):
        changes = {}
        for expert in range(len(W)):
            if each := parts.get((i, expert)):
                change = LowRank(torch.cat([c.up for c in each], 1), torch.cat([c.down for c in each]))
                changes[expert] = form.of(pattern.replace("*", str(expert)), change)
        rank = max((len(change.down) for change in changes.values()), default=1)
        like = next(iter(changes.values())).down if changes else W.new_empty(0, dtype=torch.float32)
        for expert in range(len(W)):
            up, down = like.new_zeros(out // count, rank), like.new_zeros(rank, inp)
            if (found := changes.get(expert)) is not None:
                up[:, : found.up.shape[1]], down[: len(found.down)] = found.up, found.down
            name = pattern.replace("*", str(expert))
            written[name] = Stacked(name, rank, down, up)
    return written


def _of_checkpoint(model: nn.Module, parameter: str, owner: nn.Module) -> list[str]:
    """The names, with ``*`` for the expert's number, of the projections that a checkpoint has for one parameter of experts."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    conversions: list[Any] = get_model_conversion_mapping(model)  # type: ignore[arg-type]
    for each in conversions:
        steps = [type(step).__name__ for step in getattr(each, "operations", None) or ()]
        along = [getattr(step, "dim", None) for step in getattr(each, "operations", None) or ()]
        target = each.target_patterns[0].lstrip(".")
        if not f".{parameter}".endswith(f".{target}") or (steps, along) not in _KNOWN:
            continue
        names = [_plain(source).lstrip(".").removesuffix(".weight") for source in each.source_patterns]
        return [_renamed(f"{parameter.removesuffix(target)}{name}", conversions) for name in names]
    raise ValueError(
        f"{parameter}: it is not known how checkpoints of a {type(model).__name__} name the weights of each expert in a "
        f"{type(owner).__name__}; delora.merge writes the change into the weights"
    )


_KNOWN = ((["MergeModulelist"], [0]), (["MergeModulelist", "Concatenate"], [0, 1]))


def _plain(pattern: str) -> str:
    return pattern.replace("\\", "")


def _renamed(name: str, conversions: list[Any]) -> str:
    """A name with what transformers renames on loading (``.block_sparse_moe.`` to ``.mlp.``) as it is in the checkpoint."""
    for each in conversions:
        source, target = each.source_patterns[0], each.target_patterns[0]
        if type(each).__name__ == "WeightRenaming" and re.fullmatch(r"[\w.]+", source + target) and target in f".{name}.":
            return name.replace(target, source)
    return name
