"""Finds the layers that the arguments of `inject` name, and the method of each."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from delora.hosts import Slot, codes_of, fused, host, host_class, host_type, quantised_host, quantised_layers, slots
from delora.layer import Adapted, look
from delora.methods import Full, Method
from delora.methods.base import checked_replace, edits_output
from delora.models import places, walk
from delora.zero import full_shape, outlined

__all__ = ["Patterns", "Targets", "fresh_heads", "rank_limit", "resolve", "told"]

Patterns = str | Sequence[str]
Targets = Patterns | Mapping[str, Sequence[str] | None]  # with a mapping, the slices of each name; None: all of it


def _select(patterns: Patterns, names: Sequence[str], what: str, first: Collection[str] = ()) -> set[str]:
    """The names that fully match a regular expression, or that end, after a dot, with one of a list of suffixes.

    Where a suffix is that of some names in ``first``, it stands for these alone.
    """
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
        selected |= {name for name in hits if name in first} or hits
    return selected


def _all_linear(
    model: nn.Module, method: Method | Full, modules: Mapping[str, nn.Module], out: set[str]
) -> tuple[set[str], dict[str, str]]:
    """Every linear layer but the output head that the method can adapt; and what is left out, with the reason."""
    heads = _heads(model)
    inside = {id(m) for _, m in walk(_body(model))}
    routers = _routers(modules)
    chosen, left_out = set(), {}
    for name, module in modules.items():
        base = module.base if isinstance(module, Adapted) else module
        if id(module) not in inside or id(base) in heads or name in out or not out.isdisjoint(_outer(name)):
            continue
        kind = host_type(type(base))
        if name in routers:
            left_out[name] = f"it chooses among {routers[name]} experts"
            continue
        own = [key for key, p in base._parameters.items() if p is not None and len(full_shape(p)) > 1]
        if getattr(kind, "linear", False):
            try:
                host(base)
            except (TypeError, ValueError) as error:
                left_out[name] = str(error).partition(";")[0]
                continue
            limit = rank_limit(method, base)
            if limit is None:
                chosen.add(name)
            else:
                left_out[name] = limit
        elif parts := slots(base):
            for key, slot in parts.items():
                if f"{name}.{key}" in out:
                    continue
                limit = rank_limit(method, slot)
                if limit is None:
                    chosen.add(f"{name}.{key}")
                else:
                    left_out[f"{name}.{key}"] = limit
        elif kind is None and (codes := codes_of(base)) is not None:
            left_out[name] = f"a {type(base).__name__} keeps {codes}: quantised in a way that is not known here"
        elif own and not isinstance(base, (nn.Embedding, nn.EmbeddingBag)):
            why = f"a {type(base).__name__} is no linear layer" if kind else f"a {type(base).__name__} keeps its weights itself"
            left_out[name] = why
    for key, p in model._parameters.items():
        if p is not None and len(full_shape(p)) > 1:
            left_out[key] = "the model itself owns it, and no layer"
    return chosen, left_out


def _routers(modules: Mapping[str, nn.Module]) -> dict[str, int]:
    """The layers that choose among experts, with their number: beside n experts, those with n outputs."""
    routers: dict[str, int] = {}
    for name, module in modules.items():
        indices = [slot.index for slot in slots(module.base if isinstance(module, Adapted) else module).values()]
        count = len({index for index in indices if index is not None})
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)) and "experts" in name.rpartition(".")[2]:
            count = len(module)
        if not count:
            continue
        for outer in _outer(name):  # the nearest module that has more than these experts
            beside = [n for n in modules if n.startswith(f"{outer}.") and not f"{n}.".startswith(f"{name}.")]
            if any(modules[n]._parameters for n in beside):
                break
        else:
            continue
        routers |= {n: count for n in beside if getattr(modules[n], "out_features", None) == count}
    return routers


def _body(model: nn.Module) -> nn.Module:
    """A model without its head: what transformers calls its ``base_model``."""
    body = getattr(model, "base_model", model)
    return body if isinstance(body, nn.Module) else model


def _heads(model: nn.Module) -> set[int]:
    """The ids of the layers that put out the model's answer: transformers' output embeddings, and the linear layers that a task
    model of it (``...For...``) has beside its body."""
    heads = set()
    get = getattr(model, "get_output_embeddings", None)
    try:
        layer = get() if callable(get) else None
    except (AttributeError, NotImplementedError):  # the model has none
        layer = None
    if isinstance(layer, nn.Module):
        heads.add(id(layer.base if isinstance(layer, Adapted) else layer))
    if _body(model) is model and hasattr(model, "base_model_prefix") and "For" in type(model).__name__:
        for child in model._modules.values():
            base = child.base if isinstance(child, Adapted) else child
            parts = base.modules() if isinstance(base, (nn.ModuleList, nn.Sequential)) else [base]
            heads |= {id(m) for m in parts if m is not None and getattr(host_type(type(m)), "linear", False)}
    return heads


def fresh_heads(model: nn.Module, trained: Iterable[str]) -> list[str]:
    """The names of a pretrained transformers model's heads that look newly initialised and are not among the names that train.

    A head that was never trained has a bias of zeros and weights of the deviation that the configuration gives. Where all of
    the model is so, it is not a pretrained one, and no head of it is named.
    """
    deviation = getattr(getattr(model, "config", None), "initializer_range", None)
    if "For" not in type(model).__name__ or not isinstance(deviation, float):
        return []
    if not any(type(m) is nn.Linear and m.bias is not None and not m.bias.is_meta and m.bias.any() for _, m in walk(model)):
        return []
    names, trained = [], list(trained)
    body = {id(m) for _, m in walk(_body(model))} if _body(model) is not model else set()
    embeddings = _heads(model) if body else set()
    for name, module in walk(model):
        if id(module) in body or id(module) in embeddings or type(module) is not nn.Linear or module.weight.is_meta:
            continue
        if quantised_host(module) is not None:
            continue
        if not body and id(module) not in _heads(model):
            continue
        bare = module.bias is not None and not module.bias.any()
        near = 0.7 < module.weight.float().std().item() / deviation < 1.4
        if bare and near and not any(name == t or name.startswith(f"{t}.") for t in trained):
            names.append(name)
    return names


def rank_limit(method: Method | Full, layer: nn.Module | Slot) -> str | None:
    """Why the method's rank is too high for a layer, or None.

    >>> from delora.methods import LoRA
    >>> rank_limit(LoRA(r=4), nn.Linear(8, 2))
    'r = 4 is more than a matrix of shape [2, 8] can have, which is 2'
    """
    r = getattr(method, "r", 0)
    if isinstance(method, Full) or not isinstance(r, int):
        return None
    shape = look(method, layer).shape[: 1 if edits_output(method) else None]
    if r <= min(shape):
        return None
    what = "an output of" if len(shape) == 1 else "a matrix of shape"
    return f"r = {r} is more than {what} {list(shape)} can have, which is {min(shape)}"


def told(model: nn.Module, left_out: Mapping[str, str]) -> str:
    """What ``targets="all-linear"`` left out, by kind of layer and reason, with its share of the model's weights."""
    found: dict[str, Any] = {**model._parameters, **places(model)}
    owned = {name: _owned(found[name]) for name in left_out}
    total = sum(full_shape(p).numel() for p in model.parameters())
    total += sum(each.weights() - each.counted() for each in quantised_layers(model))
    kinds: dict[tuple[str, str], list[str]] = {}
    for name, why in left_out.items():
        kind = f"{found[name].key} of a {type(found[name].owner).__name__}" if isinstance(found[name], Slot) else owned[name]
        kinds.setdefault((kind if isinstance(kind, str) else type(kind).__name__, why), []).append(name)
    lines = []
    for (kind, why), names in kinds.items():
        parts = [owned[n] for n in names]
        tensors = [p for part in parts for p in (part._parameters.values() if isinstance(part, nn.Module) else [part])]
        count = sum(full_shape(p).numel() for p in tensors if p is not None)
        count += sum(q.weights() - q.counted() for p in parts if isinstance(p, nn.Module) and (q := quantised_host(p)))
        lines.append(f"{len(names)} {kind} ({count / total:.1%} of the weights; {why}), such as {names[0]!r}")
    return 'targets="all-linear" left out: ' + "; ".join(lines)


def _owned(place: Any) -> Any:
    if isinstance(place, Slot):
        with outlined(place.owner):
            return place.part()
    return place.base if isinstance(place, Adapted) else place


def _outer(name: str) -> Iterator[str]:
    """The names of the modules that contain a module: a.b and a, for a.b.c."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def resolve(
    model: nn.Module,
    method: Method | Full,
    targets: Targets,
    also_train: Patterns = (),
    exclude: Patterns = (),
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
) -> tuple[dict[str, Method | Full], dict[str, str]]:
    """The method of each layer for the checked arguments of `inject`; and what "all-linear" leaves out, with the reason.

    Raises:
        TypeError, ValueError: an argument is wrong; the message says which and why.

    >>> from delora.methods import LoRA
    >>> model = nn.ModuleDict({"query": nn.Linear(4, 4), "key": nn.Linear(4, 4), "head": nn.Linear(4, 2)})
    >>> resolve(model, LoRA(r=2), ["query"], also_train=["head"])
    ({'query': LoRA(r=2, alpha=16.0, rslora=False), 'head': Full()}, {})
    """
    if not isinstance(method, (Method, Full)) or isinstance(method, type):
        raise TypeError(f"expected a method such as DeLoRA(r=8), got {method!r}")
    if type(model).__module__.partition(".")[0] == "peft":
        raise TypeError(
            f"a {type(model).__name__} has PEFT's adapters in it: give delora the model itself (model.unload(), or "
            "model.merge_and_unload() to keep their change)"
        )
    if not isinstance(targets, (str, Sequence, Mapping)):
        raise TypeError(
            f"targets={targets!r}: must be a list of names, a regular expression, 'all-linear', or a dictionary of names with "
            "the slices of each, such as {'qkv_proj': ['q', 'v']}"
        )
    modules = dict(walk(model))
    if not modules:
        raise ValueError(
            f"a {type(model).__name__} has no module inside that could be replaced: wrap it, as nn.Sequential(layer)"
        )
    named = places(model)
    experts = _experts(named)
    names = [*named, *experts]
    whole = _select(also_train, list(modules), "also_train") if also_train else set()
    out = _spread(_select(exclude, names, "exclude"), experts) if exclude else set()
    left_out: dict[str, str] = {}
    if targets == "all-linear":
        chosen, left_out = _all_linear(model, method, modules, whole | out)
    elif isinstance(targets, Mapping):
        chosen = _of_slices(targets, named, names, modules, experts)
    else:
        try:
            chosen = _spread(_select(targets, names, "targets", modules), experts)
        except ValueError as error:
            raise ValueError(f"{error}{_how_to_slice(targets, named)}") from error
        if isinstance(targets, str):  # an expression that matches a matrix may match its slices, too
            chosen -= {name for name in chosen if _whole(name, named) in chosen - {name}}
    chosen -= out
    if cut := sorted(name for name in out if name in named and _whole(name, named) in chosen - {name}):
        raise ValueError(
            f"exclude takes {cut[0]!r} away, but {_whole(cut[0], named)!r} is adapted as one matrix: name the slices to adapt "
            "in targets instead"
        )
    if not chosen:
        reasons = f": {told(model, left_out)}" if left_out else ""
        raise ValueError(f"targets={targets!r} with exclude={exclude!r} leaves no layer to adapt{reasons}")
    nested = [
        n
        for n in chosen | whole
        if any(outer in whole for outer in _outer(n)) or (n in whole and any(o in chosen for o in _outer(n)))
    ]
    nested += [n for n in chosen if isinstance(slot := named[n], Slot) and n.removesuffix(f".{slot.name}") in chosen]
    nested += [n for n in chosen if _whole(n, named) in chosen - {n}]
    if both := sorted((chosen & whole) | set(nested)):
        raise ValueError(f"{both[0]!r} is named twice: it, or a module that contains it, is also a target or in also_train")

    first: dict[Any, str] = {}  # a module in two places is one layer, under its first name
    for name, place in named.items():
        first.setdefault(place, name)
    plan: dict[str, Method | Full] = {first[named[n]]: method for n in named if n in chosen}
    for pattern, changes in (overrides or {}).items():
        hits = [name for name in plan if re.search(pattern, name)]
        if not hits:
            raise ValueError(
                f"overrides: no adapted layer's name contains {pattern!r}; one of the names is {next(iter(plan))!r}"
            )
        for name in hits:
            plan[name] = checked_replace(plan[name], dict(changes), f"overrides[{pattern!r}]")
    plan |= {first[modules[n]]: Full() for n in modules if n in whole}
    expanded: dict[str, Method | Full] = {}
    for name, each in plan.items():
        parts = _called(name, modules) if isinstance(each, Full) and name in modules else [name]
        expanded |= {first[named[part]]: each for part in parts}
    return expanded, left_out


def _experts(named: Mapping[str, nn.Module | Slot]) -> dict[str, list[str]]:
    """The names of the matrices in a parameter of three dimensions, by the parameter's name."""
    experts: dict[str, list[str]] = {}
    for name, place in named.items():
        if isinstance(place, Slot) and place.index is not None and place.fused is None:
            experts.setdefault(name.rpartition(".")[0], []).append(name)
    return experts


def _whole(name: str, named: Mapping[str, nn.Module | Slot]) -> str:
    """The name of the matrix that a slice is of; of anything else, its own."""
    place = named[name]
    return name.removesuffix(f".{place.cut}") if isinstance(place, Slot) and place.fused is not None else name


def _of_slices(
    targets: Mapping[str, Sequence[str] | None],
    named: Mapping[str, nn.Module | Slot],
    names: Sequence[str],
    modules: Mapping[str, nn.Module],
    experts: Mapping[str, list[str]],
) -> set[str]:
    """What a dictionary of names chooses: of each, the slices that it lists, or all of it."""
    chosen: set[str] = set()
    for key, cuts in targets.items():
        if isinstance(cuts, str) or not isinstance(cuts, (Sequence, type(None))) or cuts == []:
            raise TypeError(f"targets[{key!r}] = {cuts!r}: must be a list of slices, such as ['q', 'v'], or None for all of it")
        for hit in _spread(_select([key], names, "targets", modules), experts):
            for cut in cuts or [""]:
                name = f"{hit}.{cut}" if cut else hit
                if name not in named:
                    known = [n.rpartition(".")[2] for n in named if _whole(n, named) == hit != n]
                    has = f"its slices are {', '.join(known)}" if known else _how(hit, named)
                    raise ValueError(f"{hit!r} has no slice {cut!r} (targets[{key!r}]): {has}")
                chosen.add(name)
    return chosen


def _how_to_slice(targets: Patterns, named: Mapping[str, nn.Module | Slot]) -> str:
    """What to add to an error about a name that may be meant as a slice's."""
    for pattern in () if isinstance(targets, str) else targets:
        matrix, _, cut = pattern.rpartition(".")
        hits = [name for name in named if matrix and f".{name}".endswith(f".{matrix}")]
        if hits and cut.isidentifier() and not any(f".{name}".endswith(f".{pattern}") for name in named):
            if any(_whole(name, named) == hits[0] != name for name in named):
                return ""
            if isinstance(place := named[hits[0]], Slot) or host_class(_base(place)) is not None:
                return f". If a slice of {hits[0]!r} is meant: {_how(hits[0], named)}"
    return ""


def _how(name: str, named: Mapping[str, nn.Module | Slot]) -> str:
    """How to say which rows of a matrix are whose."""
    place, (parent, _, key) = named[name], name.rpartition(".")
    if isinstance(place, Slot):
        owner, key, rows = place.owner, place.key, place.look().shape[0]
    else:
        look = host_class(_base(place))
        if look is None:
            return f"a {type(place).__name__} is no layer whose rows could be those of several matrices"
        owner, rows = _base(named[parent]) if parent else nn.Module(), look(_base(place)).shape[0]
    kind = type(owner).__name__
    fits = "what is known does not fit" if key in fused.known(owner) else "it is not known whose they are"
    return (
        f"of the {rows} rows of the {key} of a {kind}, {fits}; say it by delora.hosts.fused.register({kind}, {{{key!r}: "
        "delora.hosts.Fused({'q': ..., 'k': ..., 'v': ...}, repeats=1)}), with sizes in the order of the rows that add up to "
        f"{rows} (repeats: how often they follow one another, as where each head has its own q, k and v)"
    )


def _base(module: Any) -> Any:
    return module.base if isinstance(module, Adapted) else module


def _spread(chosen: set[str], experts: Mapping[str, list[str]]) -> set[str]:
    """The names with those of all experts in place of a parameter's that holds them."""
    return {each for name in chosen for each in experts.get(name, [name])}


def _called(name: str, modules: Mapping[str, nn.Module]) -> list[str]:
    """The modules that run when a module is used: the module itself or, for a container without a forward, its items."""
    module = modules[name]
    if isinstance(module, (nn.ParameterList, nn.ParameterDict)):
        raise ValueError(
            f"also_train: {name!r} is a {type(module).__name__}, which is never called: name the module that uses it"
        )
    if type(module).forward is not nn.Module.forward:
        return [name]
    return [part for key, child in module._modules.items() if child is not None for part in _called(f"{name}.{key}", modules)]
