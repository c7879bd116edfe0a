"""From target names to layers: put adapters into a model, switch them, take them out."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from delora.hosts import host_type
from delora.layer import Adapted, Adapter, Copy, attach
from delora.methods.base import Method, checked_replace, edits_output, has_dropout, is_number
from delora.methods.full import Full
from delora.together import unwatch, watch

Patterns = str | Sequence[str]

# ---------------------------------------------------------------- looking


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's and DistributedDataParallel's wrappers."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := model._modules.get("_orig_mod"), nn.Module):
            model = inner
        else:
            return model


def walk(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every module under each of its dotted names. An `Adapted` counts as the layer it stands for: it is not entered."""
    for key, child in model._modules.items():
        if child is not None:
            yield prefix + key, child
            if not isinstance(child, Adapted):
                yield from walk(child, f"{prefix}{key}.")


def adapted_layers(model: nn.Module) -> dict[str, Adapted]:
    """The adapted layers by name (the first name, where a layer has several)."""
    layers: dict[nn.Module, str] = {}
    for name, module in walk(unwrapped(model)):
        if isinstance(module, Adapted):
            layers.setdefault(module, name)
    return {name: module for module, name in layers.items()}  # type: ignore[misc]


def adapter_names(model: nn.Module) -> list[str]:
    return sorted({name for layer in adapted_layers(model).values() for name in layer.adapters})


def active_adapter(model: nn.Module) -> str:
    """The name of the active adapter; an error if there is none."""
    layers = adapted_layers(model).values()
    for layer in layers:
        if layer.active is not None:
            return layer.active
    if layers:
        raise ValueError(f"no adapter is active: delora.activate one of {adapter_names(model)}")
    raise ValueError("this model has no adapter: delora.inject or delora.load one first")


def adapters(model: nn.Module, name: str | None = None) -> dict[str, Adapter | Copy]:
    """The adapters called ``name`` (the active one, if None) by layer."""
    name = active_adapter(model) if name is None else name
    found = {layer: module.adapters[name] for layer, module in adapted_layers(model).items() if name in module.adapters}
    if not found:
        raise ValueError(f"no adapter is named {name!r}: this model has {adapter_names(model) or 'none'}")
    return found  # type: ignore[return-value]


# ---------------------------------------------------------------- targets


def _select(patterns: Patterns, names: Sequence[str], what: str) -> set[str]:
    """The names that a regex matches as a whole, or that end with one of a list of suffixes at a dot."""
    if isinstance(patterns, str):
        try:
            regex = re.compile(patterns)
        except re.error as error:
            raise ValueError(f"{what}={patterns!r} is not a regular expression: {error}") from error
        found = {name for name in names if regex.fullmatch(name)}
        if not found:
            example = max(names, key=lambda name: name.count("."), default="")
            raise ValueError(
                f"no module's whole name matches the regular expression {what}={patterns!r}; a name looks like "
                f"{example!r}; a list such as [{patterns!r}] is matched by suffix"
            )
        return found
    found = set()
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
        found |= hits
    return found


def _all_linear(model: nn.Module, modules: Mapping[str, nn.Module]) -> set[str]:
    """Every linear layer but the output head: for a transformers model, what lies outside its ``base_model``."""
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
    """The names of the modules around a module: a.b and a, for a.b.c."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _layer_type(module: nn.Module) -> type:
    return type(module.base if isinstance(module, Adapted) else module)


def _refuse_bypass(name: str, parent: nn.Module) -> None:
    """Layers whose weights are read by the module around them: an adapter there would be skipped in silence."""
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
    """The method of each layer that the arguments of `inject` name, every one of them checked."""
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

    first: dict[int, str] = {}  # one name for each module: a module that sits in two places is one layer
    for name in names:
        first.setdefault(id(modules[name]), name)
    plan: dict[str, Method | Full] = {first[id(modules[n])]: method for n in names if n in chosen}
    for pattern, changes in (overrides or {}).items():
        hits = [name for name in plan if re.search(pattern, name)]
        if not hits:
            raise ValueError(f"overrides: {pattern!r} is found in no adapted layer's name; one of them is {next(iter(plan))!r}")
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
    """What of a module is called when the model runs: itself, but of a list of layers its items."""
    module = modules[name]
    if type(module).forward is not nn.Module.forward:
        return [name]
    return [part for key, child in module._modules.items() if child is not None for part in _called(f"{name}.{key}", modules)]


def _build(model: nn.Module, plan: Mapping[str, Method | Full], dropout: float) -> dict[str, Adapter | Copy]:
    modules = dict(walk(model))
    built = {}
    for name, method in plan.items():
        module = modules[name]
        if not isinstance(module, Adapted) and (inside := list(adapted_layers(module))):
            raise ValueError(f"{name}: {inside[0]!r} inside it is adapted already; delora.eject or delora.merge that first")
        try:
            built[name] = attach(method, module.base if isinstance(module, Adapted) else module, dropout)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from error
        _check_rank(name, built[name])
    return built


def _check_rank(name: str, adapter: Adapter | Copy) -> None:
    if isinstance(adapter, Adapter):
        shape = tuple(adapter.host.matrix().shape)
        shape = shape[:1] if edits_output(adapter.method) else shape
        r = getattr(adapter.method, "r", 0)
        if r > min(shape):
            what = "an output of" if len(shape) == 1 else "a matrix of shape"
            raise ValueError(f"{name}: r = {r} is more than {what} {list(shape)} can have, which is {min(shape)}")


# ---------------------------------------------------------------- changing


def inject(
    model: nn.Module,
    method: Method | Full,
    targets: Patterns,
    *,
    dropout: float = 0.0,
    also_train: Patterns = (),
    exclude: Patterns = (),
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    name: str = "default",
) -> nn.Module:
    """Give the named layers an adapter, make it the active one, and freeze all else. Changes the model and returns it.

    Args:
        model: any model; it is changed in place.
        method: such as ``DeLoRA(r=8, lam=4.0)``.
        targets: names of layers: a list of suffixes (``["query", "value"]``, matched at dots), one regular expression
            (matched as a whole), or ``"all-linear"`` (every linear layer but the output head).
        dropout: probability in [0, 1) that an entry of a layer's input is dropped on the way of its change.
        also_train: modules that are trained whole and saved with the adapter, such as ``["classifier"]``.
        exclude: names to leave out of the targets, written as those.
        overrides: ``{regex: {field: value}}``, other hyperparameters for the layers in whose name the regex is found.
        name: the adapter's name; a model can hold several.

    Raises:
        ValueError, TypeError: in words, before anything is changed.
    """
    root = unwrapped(model)
    plan = resolve(root, method, targets, also_train, exclude, overrides)
    if not is_number(dropout) or not 0 <= dropout < 1:
        raise ValueError(f"dropout = {dropout!r}: must be a probability, at least 0 and below 1")
    for layer, each in plan.items():
        if dropout and not isinstance(each, Full) and not has_dropout(each):
            raise ValueError(f"{layer}: dropout = {dropout!r}, but {type(each).__name__} has no input of its own to drop")
    check_name(root, name)
    install(root, _build(root, plan, float(dropout)), name)
    return model


def check_name(model: nn.Module, name: str) -> None:
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name) or hasattr(nn.ModuleDict(), name):
        raise ValueError(f"name = {name!r}: an adapter's name is made of letters, digits, '_' and '-', and is no torch word")
    if name in adapter_names(model):
        raise ValueError(f"this model already has an adapter named {name!r}: choose another name=, or delora.eject it first")


def install(model: nn.Module, built: Mapping[str, Adapter | Copy], name: str) -> None:
    """Put built adapters into their layers, make them active, freeze all else."""
    modules = dict(walk(model))
    if not adapted_layers(model):
        model._delora_frozen = [n for n, p in model.named_parameters() if p.requires_grad]  # type: ignore[assignment]
    swap(model, {modules[layer]: Adapted(modules[layer]) for layer in built if not isinstance(modules[layer], Adapted)})
    for layer, module in adapted_layers(model).items():
        if layer in built:
            module.adapters[name] = built[layer].train(module.training)
    model.requires_grad_(False)
    activate(model, name)
    watch(model, adapted_layers(model).values())


def swap(model: nn.Module, new: Mapping[Any, nn.Module]) -> None:
    """Put new modules in the places of old ones, in every place where an old one sits."""
    for parent in [model, *(module for _, module in walk(model) if not isinstance(module, Adapted))]:
        for key, child in parent._modules.items():
            if child is not None and child in new:
                parent._modules[key] = new[child]


def activate(model: nn.Module, name: str) -> None:
    """Make the adapter ``name`` the one that is in force and that trains. Layers it does not have run as the base."""
    adapters(model, name)
    for layer in adapted_layers(model).values():
        layer.active = name if name in layer.adapters else None
        for key, adapter in layer.adapters.items():
            adapter.requires_grad_(key == name)


def eject(model: nn.Module, name: str | None = None) -> nn.Module:
    """Take an adapter out (all, if no name is given). With the last one gone the model is as before `inject`."""
    if name is not None:
        adapters(model, name)
    layers = adapted_layers(model)
    for layer in layers.values():
        for key in list(layer.adapters) if name is None else [name]:
            if key in layer.adapters:
                del layer.adapters[key]
            if layer.active == key:
                layer.active = None
    put_back(model, {layer: layer.base for layer in layers.values() if not len(layer.adapters)})
    return model


def put_back(model: nn.Module, plain: Mapping[Adapted, nn.Module]) -> None:
    """Plain layers in the places of adapted ones; with the last one gone, what was frozen trains again."""
    root = unwrapped(model)
    for layer, module in plain.items():
        module.train(layer.training)
    swap(root, plain)
    for owner in root.modules():
        unwatch(owner)
    if left := adapted_layers(root):
        watch(root, left.values())
    else:
        for owner in root.modules():
            frozen = set(owner.__dict__.pop("_delora_frozen", ()))
            for key, parameter in owner.named_parameters():
                if key in frozen:
                    parameter.requires_grad_(True)


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Within the context, the base model exactly."""
    active_adapter(model)
    layers = adapted_layers(model).values()
    before = [layer.active for layer in layers]
    try:
        for layer in layers:
            layer.active = None
        yield
    finally:
        for layer, active in zip(layers, before, strict=True):
            layer.active = active


def strength(model: nn.Module, s: float, name: str | None = None) -> None:
    """Scale the change of an adapter (the active one) at run time: 0 is the base exactly, 1 what was trained."""
    if not is_number(s) or s < 0:
        raise ValueError(f"strength {s!r}: must be a finite number, at least 0")
    for adapter in adapters(model, name).values():
        adapter.strength = float(s)


# ---------------------------------------------------------------- training


def param_groups(
    model: nn.Module,
    lr: float,
    lam_lr: float | None = None,
    head_lr: float | None = None,
    weight_decay: float = 0.0,
    lam_weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Optimizer groups in which every trainable tensor is exactly once.

    Args:
        lr: rate of the adapters, and of whatever else trains.
        lam_lr: rate of the strengths lam (``lr`` if None). They are not decayed unless ``lam_weight_decay`` is given.
        head_lr: rate of the modules in ``also_train`` (``lr`` if None).
        weight_decay: for matrices; biases, norms' scales and other vectors are never decayed.
    """
    rates = {"lr": lr, "lam_lr": lam_lr, "head_lr": head_lr, "weight_decay": weight_decay, "lam_weight_decay": lam_weight_decay}
    for key, value in rates.items():
        if value is not None and (not is_number(value) or value < 0):
            raise ValueError(f"{key} = {value!r}: must be a finite number, at least 0")
    lam = {id(a.lam) for m in model.modules() if isinstance(m, Adapted) for a in m.adapters.values() if hasattr(a, "lam")}
    head = {id(p) for m in model.modules() if isinstance(m, Copy) for p in m.parameters()}
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            kind = "lam" if id(parameter) in lam else "head" if id(parameter) in head else "adapter"
            groups.setdefault((kind, parameter.ndim > 1), []).append(parameter)
    if not groups:
        raise ValueError("nothing in this model trains: delora.inject or delora.activate an adapter first")
    rate = {"adapter": lr, "head": lr if head_lr is None else head_lr, "lam": lr if lam_lr is None else lam_lr}
    return [
        {
            "name": kind if kind == "lam" or matrix else f"{kind} vectors",
            "params": parameters,
            "lr": rate[kind],
            "weight_decay": lam_weight_decay if kind == "lam" else weight_decay if matrix else 0.0,
        }
        for (kind, matrix), parameters in sorted(groups.items(), key=lambda item: (item[0][0], not item[0][1]))
    ]


@dataclass(frozen=True)
class Summary:
    """How much of a model trains. ``share`` is trainable / base."""

    rows: tuple[tuple[str, int, int], ...]  # method, layers, trainable parameters
    other: int  # trainable parameters outside the adapters
    base: int

    @property
    def trainable(self) -> int:
        return sum(row[2] for row in self.rows) + self.other

    @property
    def share(self) -> float:
        return self.trainable / self.base

    def __str__(self) -> str:
        width = max(len(row[0]) for row in self.rows)
        lines = [f"{method:<{width}}  {layers:>5} layers  {count:>13,} trainable" for method, layers, count in self.rows]
        if self.other:
            lines.append(f"{'outside the adapters':<{width}}  {'':>12}  {self.other:>13,} trainable")
        lines.append(f"{self.trainable:,} of the base model's {self.base:,} parameters: {self.share:.3%}")
        return "\n".join(lines)


def summary(model: nn.Module) -> Summary:
    """What trains in a model, to be printed."""
    layers = adapted_layers(model)
    active_adapter(model)
    ours = {id(p) for layer in layers.values() for p in layer.adapters.parameters()}
    counts: dict[str, list[int]] = {}
    for layer in layers.values():
        if layer.adapter is not None:
            n = sum(p.numel() for p in layer.adapter.parameters() if p.requires_grad)
            counts.setdefault(str(layer.adapter.method), []).append(n)
    rows = tuple((method, len(ns), sum(ns)) for method, ns in counts.items())
    rest = [p for p in model.parameters() if id(p) not in ours]
    return Summary(rows, sum(p.numel() for p in rest if p.requires_grad), sum(p.numel() for p in rest))
