"""Put adapters into a model, switch them, take them out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from delora.layer import Adapted, Adapter, Copy, attach
from delora.methods import Full, Method
from delora.methods.base import edits_output, has_dropout, is_number
from delora.models import active_adapter, adapted_layers, adapter_names, adapters, unwrapped, walk
from delora.targets import Patterns, resolve
from delora.together import unwatch, watch

__all__ = ["activate", "check_name", "disabled", "eject", "inject", "install", "put_back", "strength", "swap"]


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
