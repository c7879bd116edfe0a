"""Puts adapters into a model, switches them, and takes them out."""

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
    """Give the named layers an adapter, make it the active one, and freeze everything else.

    Args:
        model: any model; it is changed in place and returned.
        method: such as ``DeLoRA(r=8, lam=4.0)``.
        targets: names of layers: a list of suffixes (``["query", "value"]``, which begin after a dot), one regular
            expression (which must match the whole name), or ``"all-linear"`` (every linear layer but the output head).
        dropout: probability in [0, 1) with which entries of a layer's input are dropped where its change is computed.
        also_train: modules that are trained whole and saved with the adapter, such as ``["classifier"]``.
        exclude: names to leave out of the targets, in the same form.
        overrides: ``{regex: {field: value}}``, other hyperparameters for layers whose name contains a match of the regex.
        name: the adapter's name; a model can hold several adapters.

    Raises:
        ValueError, TypeError: an argument is wrong; nothing is changed then.

    >>> import delora
    >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> model = delora.inject(model, delora.DeLoRA(r=2), ["0"], also_train=["2"])
    >>> print(delora.summary(model))
    DeLoRA(r=2, lam=8.0, norm='columns', start='subtract', softness=0.03, learn_lam=True)      1 layers             17 trainable
    Full()                                                                                     1 layers             10 trainable
    27 of the base model's 30 parameters: 90.000%
    """
    root = unwrapped(model)
    plan = resolve(root, method, targets, also_train, exclude, overrides)
    if not is_number(dropout) or not 0 <= dropout < 1:
        raise ValueError(f"dropout = {dropout!r}: must be a probability, at least 0 and below 1")
    for layer, each in plan.items():
        if dropout and not isinstance(each, Full) and not has_dropout(each):
            raise ValueError(f"{layer}: dropout = {dropout!r}, but {type(each).__name__} does not support dropout")
    check_name(root, name)
    install(root, _build(root, plan, float(dropout)), name)
    return model


def check_name(model: nn.Module, name: str) -> None:
    """Raise a ValueError unless ``name`` is valid and free in this model.

    >>> check_name(nn.Sequential(), "a.b")
    Traceback (most recent call last):
    ValueError: name = 'a.b': an adapter's name is made of letters, digits, '_' and '-', and no attribute of nn.ModuleDict
    """
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name) or hasattr(nn.ModuleDict(), name):
        raise ValueError(
            f"name = {name!r}: an adapter's name is made of letters, digits, '_' and '-', and no attribute of nn.ModuleDict"
        )
    if name in adapter_names(model):
        raise ValueError(f"this model already has an adapter named {name!r}: choose another name=, or delora.eject it first")


def install(model: nn.Module, built: Mapping[str, Adapter | Copy], name: str) -> None:
    """Put adapters into their layers, make them active, and freeze everything else.

    >>> from delora.methods import LoRA
    >>> model = nn.Sequential(nn.Linear(4, 4))
    >>> install(model, {"0": attach(LoRA(r=2), model[0])}, "a")
    >>> model[0].active
    'a'
    """
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
    """Replace modules by new ones, in every place where they occur.

    >>> old, new = nn.ReLU(), nn.Tanh()
    >>> model = nn.Sequential(old, nn.Sequential(old))
    >>> swap(model, {old: new})
    >>> model[0] is new, model[1][0] is new
    (True, True)
    """
    for parent in [model, *(module for _, module in walk(model) if not isinstance(module, Adapted))]:
        for key, child in parent._modules.items():
            if child is not None and child in new:
                parent._modules[key] = new[child]


def activate(model: nn.Module, name: str) -> None:
    """Make ``name`` the adapter that is used and that trains. Layers for which it has no adapter run as the base.

    >>> import delora
    >>> model = delora.inject(nn.Sequential(nn.Linear(4, 4)), delora.LoRA(r=2), ["0"], name="a")
    >>> model = delora.inject(model, delora.DeLoRA(r=2), ["0"], name="b")
    >>> delora.activate(model, "a")
    >>> model[0].active
    'a'
    """
    adapters(model, name)
    for layer in adapted_layers(model).values():
        layer.active = name if name in layer.adapters else None
        for key, adapter in layer.adapters.items():
            adapter.requires_grad_(key == name)


def eject(model: nn.Module, name: str | None = None) -> nn.Module:
    """Remove an adapter (all, if no name is given). Without adapters, the model is as it was before `inject`.

    >>> import delora
    >>> layer = nn.Linear(4, 4)
    >>> model = delora.inject(nn.Sequential(layer), delora.LoRA(r=2), ["0"])
    >>> delora.eject(model)[0] is layer
    True
    """
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
    """Replace adapted layers by plain ones; after the last one, the parameters that `install` froze train again.

    >>> import delora
    >>> model = delora.inject(nn.Sequential(nn.Linear(4, 4)), delora.LoRA(r=2), ["0"])
    >>> put_back(model, {model[0]: model[0].base})
    >>> model[0].weight.requires_grad
    True
    """
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
    """A context in which the model is exactly the base model.

    >>> import delora
    >>> model = delora.inject(nn.Sequential(nn.Linear(4, 4)), delora.ETHER(), ["0"])
    >>> x = nn.init.ones_(model[0].weight.new_empty(1, 4))
    >>> with delora.disabled(model):
    ...     bool((model(x) == model[0].base(x)).all())
    True
    """
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
    """Scale the change of an adapter (the active one, if ``name`` is None): 0 is the base exactly, 1 what was trained.

    >>> import delora
    >>> model = delora.inject(nn.Sequential(nn.Linear(4, 4)), delora.ETHER(), ["0"])
    >>> full = delora.distances(model)["0"]
    >>> delora.strength(model, 0.5)
    >>> round(delora.distances(model)["0"] / full, 4)
    0.5
    """
    if not is_number(s) or s < 0:
        raise ValueError(f"strength {s!r}: must be a finite number, at least 0")
    for adapter in adapters(model, name).values():
        adapter.strength = float(s)
