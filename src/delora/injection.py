"""Puts adapters into a model, switches them, and takes them out."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

from torch import nn

from delora.hosts import Slot, quantised_layers, slots
from delora.layer import Adapted, Adapter, Copy, attach, check_parallel
from delora.meeting import collective
from delora.methods import Full, Method
from delora.methods.base import has_dropout, is_number
from delora.models import (
    State,
    active_adapter,
    adapted_layers,
    adapter_names,
    adapters,
    inner,
    open_context,
    places,
    refuse_inside,
    states,
    unwrapped,
    walk,
)
from delora.parts import Parts, Several, Slices
from delora.pretrained import guard, unguard
from delora.sharded import drawn, is_dtensor, is_parallel, spread
from delora.targets import Patterns, Targets, fresh_heads, rank_limit, resolve, told
from delora.ties import declared, rename_declared, restore_declared, share_copies, with_ties
from delora.together import unwatch, watch
from delora.zero import in_engine

__all__ = [
    "activate",
    "check_name",
    "disabled",
    "eject",
    "inject",
    "install",
    "put_back",
    "refuse_parallel",
    "strength",
    "swap",
]


def _build(model: nn.Module, plan: Mapping[str, Method | Full], dropout: float) -> dict[str, Adapter | Copy]:
    modules = places(model)
    built: dict[str, Adapter | Copy] = {}
    for name, method in plan.items():
        module = modules[name]
        base = module.base if isinstance(module, Adapted) else module
        if isinstance(method, Full) and isinstance(base, nn.Module) and (inside := list(adapted_layers(base))):
            raise ValueError(f"{name}: {inside[0]!r} inside it is adapted already; delora.eject or delora.merge that first")
        try:
            built[name] = attach(method, base, 0.0 if isinstance(base, Slot) and base.key else dropout)
        except (TypeError, ValueError) as error:
            inside = list(slots(base)) if isinstance(base, nn.Module) else []
            way_in = f"; its matrices can be named: {f'{name}.{inside[0]}'!r}" if inside else ""
            raise type(error)(f"{name}: {error}{way_in}; to leave it out: exclude=[{name!r}]") from error
        if isinstance(built[name], Adapter):
            if (limit := rank_limit(method, base)) is not None:
                raise ValueError(
                    f"{name}: {limit}; leave it out with exclude=[{name!r}], or give it a rank of its own with overrides="
                )
            bad = [key for key, t in cast(Adapter, built[name]).tensors().items() if not t.is_meta and not t.isfinite().all()]
            if bad:
                raise ValueError(f"{name}: its weight holds NaN or infinity: load the model's weights anew")
    share_copies({name: (modules[name], made) for name, made in built.items()})
    return built


@collective
def inject(
    model: nn.Module,
    method: Method | Full,
    targets: Targets,
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
            expression (which must match the whole name), ``"all-linear"`` (every linear layer but the output head), or a
            dictionary of names with the slices of each (``{"qkv_proj": ["q", "v"], "o_proj": None}``; None: all of it).
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
    >>> print(delora.summary(model))  # doctest: +NORMALIZE_WHITESPACE
    DeLoRA(r=2, lam=8.0, norm='columns', start='subtract', softness=0.03, learn_lam=False)  1 layers  16 trainable
    Full()                                                                                  1 layers  10 trainable
    26 of the base model's 30 parameters: 86.667%
    """
    root = unwrapped(model)
    refuse_parallel(model, "inject")
    refuse_inside(root, "inject")
    plan, left_out = resolve(root, method, targets, also_train, exclude, overrides)
    if not is_number(dropout) or not 0 <= dropout < 1:
        raise ValueError(f"dropout = {dropout!r}: must be a probability, at least 0 and below 1")
    for layer, each in plan.items():
        if dropout and not isinstance(each, Full) and not has_dropout(each):
            raise ValueError(f"{layer}: dropout = {dropout!r}, but {type(each).__name__} does not support dropout")
    check_name(root, name)
    plan = with_ties(root, plan)
    words = told(root, left_out) if left_out else ""
    built = _build(root, plan, float(dropout))
    install(root, built, name, words)
    root.__dict__["_delora"].drawn += drawn(built.values())
    if words:
        warnings.warn(words, stacklevel=3)
    placed = adapters(root, name)
    if dropout and (without := [layer for layer, a in placed.items() if isinstance(a.base, Slot) and a.base.key]):
        warnings.warn(
            f"dropout = {dropout!r} does not apply to {without[0]!r} (so for {len(without)} of {len(plan)} layers): what a "
            "module multiplies by its own parameters is not seen",
            stacklevel=3,
        )
    if fresh := fresh_heads(root, plan):
        warnings.warn(
            f"{', '.join(map(repr, fresh))} looks newly initialised and would stay so: train it with also_train={fresh}",
            stacklevel=3,
        )
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


def install(model: nn.Module, built: Mapping[str, Adapter | Copy], name: str, left_out: str = "") -> None:
    """Put adapters into their layers, make them active, and freeze everything else.

    >>> from delora.methods import LoRA
    >>> model = nn.Sequential(nn.Linear(4, 4))
    >>> install(model, {"0": attach(LoRA(r=2), model[0])}, "a")
    >>> model[0].active
    'a'
    """
    modules = dict(walk(model))
    whole = _by_module(places(model), built)
    for layer, made in whole.items():
        module = modules[layer]
        try:
            check_parallel(made, module.base if isinstance(module, Adapted) else module)
        except TypeError as error:
            raise TypeError(f"{layer}: {error}; to leave it out: exclude=[{layer!r}]") from error
    for look in quantised_layers(model):  # also those without an adapter: gradients pass through them
        look.settle()
    if "_delora" not in model.__dict__:
        model.__dict__["_delora"] = State([n for n, p in model.named_parameters() if p.requires_grad], ties=declared(model))
    model.__dict__["_delora"].left_out = left_out
    parallel = [p for m in model.modules() if is_parallel(m) for p in m._parameters.values() if is_dtensor(p)]
    swap(model, {modules[layer]: Adapted(modules[layer]) for layer in whole if not isinstance(modules[layer], Adapted)})
    for layer, module in adapted_layers(model).items():
        if layer in whole:
            if (base := next(iter(parallel or list(module.base.parameters())), None)) is not None:
                spread(whole[layer], base, plain=bool(parallel))
            module.adapters[name] = whole[layer].train(module.training)
    model.requires_grad_(False)
    rename_declared(model)
    guard(model)
    activate(model, name)


def _by_module(named: Mapping[str, Any], built: Mapping[str, Adapter | Copy]) -> dict[str, Adapter | Copy | Several]:
    """The adapters by the module that they go into; those of matrices in its parameters, and of its slices, together."""
    whole: dict[str, Adapter | Copy | Several] = {}
    parts: dict[str, dict[Slot, Any]] = {}
    for name, adapter in built.items():
        if isinstance(slot := named[name], Slot):
            parts.setdefault(name.removesuffix(f".{slot.name}"), {})[slot] = adapter
        else:
            whole[name] = adapter
    if both := sorted(whole.keys() & parts.keys()):
        raise ValueError(
            f"{both[0]!r} cannot have an adapter, and its parameters or slices others, under one name: choose one of the two"
        )
    return whole | {module: (Parts if next(iter(each)).key else Slices)(each) for module, each in parts.items()}


def swap(model: nn.Module, new: Mapping[Any, nn.Module]) -> None:
    """Replace modules by new ones, in every place where they occur, a module's plain lists included.

    >>> old, new = nn.ReLU(), nn.Tanh()
    >>> model = nn.Sequential(old, nn.Sequential(old))
    >>> swap(model, {old: new})
    >>> model[0] is new, model[1][0] is new
    (True, True)
    """
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child is not None and unwrapped(child) in new:
                parent._modules[key] = new[unwrapped(child)]
        # Some models call their layers from a list that they keep beside the registered ones (MaskFormer, DETR's heads).
        for kept in [value for value in parent.__dict__.values() if type(value) is list]:
            for i, item in enumerate(kept):
                if isinstance(item, nn.Module) and unwrapped(item) in new:
                    kept[i] = new[unwrapped(item)]


def activate(model: nn.Module, name: str) -> None:
    """Make ``name`` the adapter that is used and that trains. Layers for which it has no adapter run as the base.

    >>> import delora
    >>> model = delora.inject(nn.Sequential(nn.Linear(4, 4)), delora.LoRA(r=2), ["0"], name="a")
    >>> model = delora.inject(model, delora.DeLoRA(r=2), ["0"], name="b")
    >>> delora.activate(model, "a")
    >>> model[0].active
    'a'
    """
    refuse_parallel(model, "activate")
    refuse_inside(model, "activate")
    adapters(model, name)
    layers = adapted_layers(model)
    for layer in layers.values():
        layer.active = name if name in layer.adapters else None
        layer.ran = False
        for key, adapter in layer.adapters.items():
            adapter.requires_grad_(key == name)
    watch(unwrapped(model), layers)


def eject(model: nn.Module, name: str | None = None) -> nn.Module:
    """Remove an adapter (all, if no name is given). Without adapters, the model is as it was before `inject`.

    >>> import delora
    >>> layer = nn.Linear(4, 4)
    >>> model = delora.inject(nn.Sequential(layer), delora.LoRA(r=2), ["0"])
    >>> delora.eject(model)[0] is layer
    True
    """
    refuse_inside(model, "eject")
    if name is not None:
        adapters(model, name)
    layers = adapted_layers(model)
    was_active = any(layer.active == name for layer in layers.values())
    for layer in layers.values():
        for key in list(layer.adapters) if name is None else [name]:
            if key in layer.adapters:
                del layer.adapters[key]
            if layer.active == key:
                layer.active = None
    put_back(model, {layer: layer.base for layer in layers.values() if not len(layer.adapters)})
    if was_active and (left := adapter_names(model)):
        warnings.warn(f"{name!r} was the active adapter: none is active now; delora.activate one of {left}", stacklevel=2)
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
    rename_declared(root)
    unwatch(root)
    if left := adapted_layers(root):
        watch(root, left)
    else:
        unguard(root)
        for owner in list(root.modules()):
            state = owner.__dict__.pop("_delora", None)
            restore_declared(owner, state)
            trained = set(() if state is None else state.trained)
            for key, parameter in owner.named_parameters():
                if key in trained:
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
    refuse_inside(model, "disabled", "merged", "routed", "serving")
    if open_context(model) is None:
        active_adapter(model)
    layers = adapted_layers(model).values()
    before = [layer.active for layer in layers]
    opened = states(model)
    try:
        for state in opened:
            state.contexts.append("disabled")
        for layer in layers:
            layer.active = None
        yield
    finally:
        for layer, active in zip(layers, before, strict=True):
            layer.active = active
        for state in opened:
            state.contexts.pop()


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
    refuse_inside(model, "strength")
    for placed in adapters(model, name).values():
        placed.adapter.strength = float(s)


def refuse_parallel(model: nn.Module, what: str) -> None:
    """Raise a ValueError if ``what`` would change the structure of a model that is wrapped to train in several processes.

    >>> refuse_parallel(nn.Linear(2, 2), "inject")
    """
    initialized = in_engine(model)
    while (inside := inner(model)) is not None:
        initialized |= type(model).__name__ == "DeepSpeedEngine"
        if type(model).__name__ in ("DistributedDataParallel", "FullyShardedDataParallel"):
            raise ValueError(
                f"{what} of a {type(model).__name__}: it knows the parameters already, and new ones would not be kept equal "
                f"between processes; call delora.{what} first, then wrap the model"
            )
        model = inside
    if initialized:
        raise ValueError(
            f"{what} of a model that deepspeed.initialize was given: its optimizer knows the parameters already, and would not "
            f"train others; call delora.{what} first, then deepspeed.initialize"
        )
