"""Which layers share a weight: the modules that hold one parameter, and those that a transformers model declares to be tied."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn

from delora.layer import Adapted, Adapter, Copy
from delora.methods import Full, Method
from delora.models import State, walk

__all__ = ["declared", "owners", "rename_declared", "restore_declared", "share_copies", "untie", "with_ties"]


def owners(model: nn.Module) -> dict[int, list[str]]:
    """The names of all parameters that are one object with others, by that object's id.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    >>> model[1].weight = model[0].weight
    >>> list(owners(model).values())
    [['0.weight', '1.weight']]
    """
    names: dict[int, list[str]] = {}
    seen = set()
    for name, module in [("", model), *walk(model)]:
        base = module.base if isinstance(module, Adapted) else module
        if id(base) in seen:
            continue
        seen.add(id(base))
        for key, parameter in base._parameters.items():
            if parameter is not None:
                names.setdefault(id(parameter), []).append(f"{name}.{key}" if name else key)
    return {key: group for key, group in names.items() if len(group) > 1}


def with_ties(model: nn.Module, plan: Mapping[str, Method | Full]) -> dict[str, Method | Full]:
    """The plan of `inject` with the modules that share a weight with one that is trained whole, so that they go on sharing it.

    Raises:
        ValueError: such a module is to have an adapter of another kind.
    """
    result = dict(plan)
    groups = list(owners(model).values())
    for name in [name for name, method in plan.items() if isinstance(method, Full)]:
        for group in groups:
            if not any(key == name or key.startswith(f"{name}.") for key in group):
                continue
            for key in group:
                other = key.rpartition(".")[0]
                if any(other == whole or other.startswith(f"{whole}.") for whole, m in result.items() if isinstance(m, Full)):
                    continue
                if other in result:
                    raise ValueError(f"{other}, a target, shares its weight with {name}, which is trained whole: choose one")
                result[other] = Full()
                warnings.warn(
                    f"{name}, trained whole, shares its weight with {other}: both are trained as one weight",
                    stacklevel=4,
                )
    return result


def share_copies(built: Mapping[str, tuple[Any, Adapter | Copy]]) -> None:
    """Let copies of modules that share a parameter share the copy of it, too."""
    first: dict[int, nn.Parameter] = {}
    for module, made in built.values():
        base = module.base if isinstance(module, Adapted) else module
        if not isinstance(made, Copy):
            continue
        for name, old in base.named_parameters(remove_duplicate=False):
            path, _, key = name.rpartition(".")
            owner = made.module.get_submodule(path)
            owner._parameters[key] = first.setdefault(id(old), owner._parameters[key])  # type: ignore[arg-type]


def declared(model: nn.Module) -> dict[str, dict[str, str]]:
    """What a transformers model says of tied weights: for each model in it, by its name, the tied parameter and its source.

    >>> declared(nn.Linear(2, 2))
    {}
    """
    ties = {}
    for name, module in model.named_modules():
        expand = getattr(type(module), "get_expanded_tied_weights_keys", None)
        if expand is not None and (pairs := expand(module, all_submodels=False)):
            ties[name] = dict(pairs)
    return ties


def rename_declared(model: nn.Module) -> None:
    """Keep a transformers model's account of tied weights true to the names that they have inside adapted layers.

    It ties and writes checkpoints by that account.
    """
    state: State | None = model.__dict__.get("_delora")
    if state is None or not state.ties:
        return
    for name, pairs in state.ties.items():
        module = model.get_submodule(name)
        now = {key.replace(".base.", "."): key for key, _ in module.named_parameters(remove_duplicate=False)}
        module.__dict__["_tied_weights_keys"] = {now.get(a, a): now.get(b, b) for a, b in pairs.items()}
    _expand(model)


def restore_declared(model: nn.Module, state: State | None) -> None:
    """Undo `rename_declared`."""
    if state is not None and state.ties:
        for name in state.ties:
            model.get_submodule(name).__dict__.pop("_tied_weights_keys", None)
        _expand(model)


def _expand(model: nn.Module) -> None:
    if hasattr(model, "all_tied_weights_keys"):
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)  # type: ignore[operator]


def untie(model: nn.Module, changed: Mapping[str, Any]) -> list[tuple[Any, bool]]:
    """What must be set so that weights which are about to become different stay so when the model is saved and loaded.

    Args:
        changed: the parameters that get new values, by name.

    Returns:
        The configurations with their ``tie_word_embeddings``, to be set to False.

    Raises:
        ValueError: the model would tie the weights again; says what to do.
    """
    groups = [group for group in owners(model).values() if any(name in changed for name in group)]
    broken = [group for group in groups if len({id(changed.get(name)) for name in group}) > 1]  # not all the same new one
    if not broken or not hasattr(model, "config"):
        return []
    config: Any = model.config
    state: State | None = model.__dict__.get("_delora")
    ties = declared(model) if state is None else state.ties
    pairs = [(f"{m}.{a}" if m else a, f"{m}.{b}" if m else b) for m, each in ties.items() for a, b in each.items()]
    for group in broken:
        others = [name for name in group if name not in changed]
        # One flag unties all that a model ties. It may be set only if that is this one pair.
        if len(group) > 2 or len(broken) > 1 or any({a, b} != set(group) for a, b in pairs):
            some = ", ".join(map(repr, others or group))
            raise ValueError(
                f"cannot merge {next(name for name in group if name in changed)!r}: the same weight is that of {some}, and a "
                f"{type(model).__name__} ties them again when it is loaded. Keep the adapter (delora.save, delora.export.peft) "
                "or give the layer a weight of its own before inject"
            )
    texts = [config, *(c for key in ("text_config", "decoder") if (c := getattr(config, key, None)) is not None)]
    return [(c, c.tie_word_embeddings) for c in texts if getattr(c, "tie_word_embeddings", None)]
