"""Finds the layers that the arguments of `inject` name, and the method of each."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from delora.hosts import host_type
from delora.layer import Adapted
from delora.methods import Full, Method
from delora.methods.base import checked_replace
from delora.models import walk

__all__ = ["Patterns", "resolve"]

Patterns = str | Sequence[str]


def _select(patterns: Patterns, names: Sequence[str], what: str) -> set[str]:
    """The names that fully match a regular expression, or that end, after a dot, with one of a list of suffixes."""
    if isinstance(patterns, str):
        try:
            regex = re.compile(patterns)
        except re.error as error:
            raise ValueError(f"{what}={patterns!r} is not a regular expression: {error}") from error
        selected = {name for name in names if regex.fullmatch(name)}
        if not selected:
            example = max(names, key=lambda name: name.count("."), default="")
            raise ValueError(
                f"no module's whole name matches the regular expression {what}={patterns!r}; a name looks like "
                f"{example!r}; a list such as [{patterns!r}] is matched by suffix"
            )
        return selected
    selected = set()
    ends: dict[str, set[str]] = {}  # every name under each of its suffixes: a.b.c under a.b.c, b.c and c
    for name in names:
        parts = name.split(".")
        for start in range(len(parts)):
            ends.setdefault(".".join(parts[start:]), set()).add(name)
    for pattern in patterns:
        if not isinstance(pattern, str) or not pattern:
            raise TypeError(f"{what} must be a regular expression or a list of names, got {pattern!r} in it")
        hits = ends.get(pattern, set())
        if not hits:
            depth = pattern.count(".") + 1
            suffixes = sorted({".".join(name.split(".")[-depth:]) for name in names})
            close = difflib.get_close_matches(pattern, suffixes, n=3)
            hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"names end with {', '.join(suffixes[:20])}"
            raise ValueError(f"no module ends with {pattern!r} ({what}); {hint}")
        selected |= hits
    return selected


def _all_linear(model: nn.Module, modules: Mapping[str, nn.Module]) -> set[str]:
    """Every linear layer but the output head: in a transformers model, those inside its ``base_model``."""
    base = getattr(model, "base_model", model)
    inside = {id(m) for _, m in walk(base)}
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    return {
        name
        for name, module in modules.items()
        if id(module) in inside and module is not head and getattr(host_type(_layer_type(module)), "linear", False)
    }


def _outer(name: str) -> Iterator[str]:
    """The names of the modules that contain a module: a.b and a, for a.b.c."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _layer_type(module: nn.Module) -> type:
    return type(module.base if isinstance(module, Adapted) else module)


def _refuse_bypass(name: str, parent: nn.Module) -> None:
    """Raise an error if the parent module reads the layer's weights itself, so that an adapter would have no effect."""
    if isinstance(parent, nn.MultiheadAttention):
        raise ValueError(
            f"cannot adapt {name!r}: nn.MultiheadAttention reads the weights of its layers itself and would bypass the "
            f"adapter; leave it out with exclude=[{name!r}]"
        )
    if isinstance(parent, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
        raise ValueError(
            f"cannot adapt {name!r}: the fast path of nn.TransformerEncoderLayer reads the weights of its layers itself in "
            "evaluation and would bypass the adapter; call torch.backends.mha.set_fastpath_enabled(False) first"
        )


def resolve(
    model: nn.Module,
    method: Method | Full,
    targets: Patterns,
    also_train: Patterns = (),
    exclude: Patterns = (),
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Method | Full]:
    """The method of each layer for the arguments of `inject`, after they are checked.

    Raises:
        TypeError, ValueError: an argument is wrong; the message says which and why.

    >>> from delora.methods import LoRA
    >>> model = nn.ModuleDict({"query": nn.Linear(4, 4), "key": nn.Linear(4, 4), "head": nn.Linear(4, 2)})
    >>> resolve(model, LoRA(r=2), ["query"], also_train=["head"])
    {'query': LoRA(r=2, alpha=16.0, rslora=False), 'head': Full()}
    """
    if not isinstance(method, (Method, Full)) or isinstance(method, type):
        raise TypeError(f"expected a method such as DeLoRA(r=8), got {method!r}")
    modules = dict(walk(model))
    names = list(modules)
    if not names:
        raise ValueError(
            f"a {type(model).__name__} has no module inside that could be replaced: wrap it, as nn.Sequential(layer)"
        )
    whole = _select(also_train, names, "also_train") if also_train else set()
    out = _select(exclude, names, "exclude") if exclude else set()
    if targets == "all-linear":
        chosen = {n for n in _all_linear(model, modules) if n not in whole and whole.isdisjoint(_outer(n))}
    else:
        chosen = _select(targets, names, "targets")
    chosen -= out
    if not chosen:
        raise ValueError(f"targets={targets!r} with exclude={exclude!r} leaves no layer to adapt")
    named = chosen | whole
    nested = [n for n in named if any(outer in named for outer in _outer(n))]
    if both := sorted((chosen & whole) | set(nested)):
        raise ValueError(f"{both[0]!r} is named twice: it, or a module that contains it, is also a target or in also_train")

    first: dict[int, str] = {}  # a module in two places is one layer, under its first name
    for name in names:
        first.setdefault(id(modules[name]), name)
    plan: dict[str, Method | Full] = {first[id(modules[n])]: method for n in names if n in chosen}
    for pattern, changes in (overrides or {}).items():
        hits = [name for name in plan if re.search(pattern, name)]
        if not hits:
            raise ValueError(
                f"overrides: no adapted layer's name contains {pattern!r}; one of the names is {next(iter(plan))!r}"
            )
        for name in hits:
            plan[name] = checked_replace(plan[name], dict(changes), f"overrides[{pattern!r}]")
    for name in plan:
        _refuse_bypass(name, modules.get(name.rpartition(".")[0], model))
    plan |= {first[id(modules[n])]: Full() for n in names if n in whole}
    expanded: dict[str, Method | Full] = {}
    for name, each in plan.items():
        parts = _called(name, modules) if isinstance(each, Full) else [name]
        expanded |= {first[id(modules[part])]: each for part in parts}
    return expanded


def _called(name: str, modules: Mapping[str, nn.Module]) -> list[str]:
    """The modules that run when a module is used: the module itself or, for a container without a forward, its items."""
    module = modules[name]
    if type(module).forward is not nn.Module.forward:
        return [name]
    return [part for key, child in module._modules.items() if child is not None for part in _called(f"{name}.{key}", modules)]
