"""Finds things in a model: its modules by name, its adapted layers, its adapters, and what is known of all of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from delora.hosts import Slot, fused, host_class, slices, slots
from delora.layer import Adapted, Placed

__all__ = [
    "State",
    "active_adapter",
    "adapted_layers",
    "adapter_names",
    "adapters",
    "by_layer",
    "clean_name",
    "inner",
    "open_context",
    "places",
    "refuse_inside",
    "states",
    "unwrapped",
    "walk",
]


@dataclass
class State:
    """What is known of the adapters of a model: one object, on the module that `inject` was called on.

    ``trained``: the parameters that trained before the first `inject`; ``contexts``: the open `merged` and `disabled`,
    outermost first; ``left_out``: the words for what ``targets="all-linear"`` could not adapt, and why; ``drawn``: a sum over
    the bytes that `inject` drew, to compare with other processes'.
    """

    trained: list[str]
    contexts: list[str] = field(default_factory=list)
    left_out: str = ""
    ties: dict[str, dict[str, str]] = field(default_factory=dict)  # what a transformers model says of tied weights
    drawn: str = ""


def states(model: nn.Module) -> list[State]:
    """The states of a model and of everything in it.

    >>> import delora
    >>> model = delora.inject(nn.Sequential(nn.Linear(4, 4)), delora.LoRA(r=2), ["0"])
    >>> [state.trained for state in states(model)]
    [['0.weight', '0.bias']]
    """
    return [module.__dict__["_delora"] for module in model.modules() if "_delora" in module.__dict__]


def open_context(model: nn.Module) -> str | None:
    """The name of the innermost open context of `delora.merged` or `delora.disabled`, or None."""
    return next((state.contexts[-1] for state in states(model) if state.contexts), None)


def refuse_inside(model: nn.Module, what: str, *contexts: str) -> None:
    """Raise a ValueError if ``what`` is called within one of the open contexts (of any, if none is named).

    >>> import delora
    >>> model = delora.inject(nn.Sequential(nn.Linear(4, 4)), delora.LoRA(r=2), ["0"])
    >>> with delora.merged(model):
    ...     refuse_inside(model, "eject")
    Traceback (most recent call last):
    ValueError: eject inside delora.merged(model): leave that context first
    """
    inside = open_context(model)
    if inside is not None and (not contexts or inside in contexts):
        raise ValueError(f"{what} inside delora.{inside}(model): leave that context first")


# The wrappers that put a module inside another one, by the name that they give it there. None of these names is in a file.
WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
PARALLEL = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "DeepSpeedEngine")  # which call it "module"


def inner(module: nn.Module) -> nn.Module | None:
    """The module inside a wrapper (torch.compile's, a checkpointed or a parallel one), or None if it is no wrapper.

    >>> import torch
    >>> layer = nn.Linear(2, 2)
    >>> inner(torch.compile(layer)) is layer, inner(layer) is None
    (True, True)
    """
    names = ("module", *WRAPPERS) if type(module).__name__ in PARALLEL else WRAPPERS
    return next((child for key in names if (child := module._modules.get(key)) is not None), None)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside any number of wrappers, such as those of torch.compile and DistributedDataParallel.

    >>> import torch
    >>> model = nn.Linear(2, 2)
    >>> unwrapped(torch.compile(model)) is model
    True
    """
    while (inside := inner(model)) is not None:
        model = inside
    return model


def clean_name(name: str) -> str:
    """A module's name without those that wrappers add.

    >>> clean_name("module.layers.0._orig_mod.q"), clean_name("module")
    ('layers.0.q', 'module')
    """
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    return ".".join(parts[1:] if parts[0] == "module" and len(parts) > 1 else parts)


def walk(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """All modules with their dotted names, a shared module once per name.

    Wrappers are looked through and have no part in a name. The parametrizations of a weight are left out. The inside of an
    `Adapted` is left out, but for its base, if that has modules of its own: these have the names that they had before.

    >>> [name for name, _ in walk(nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.ReLU()))]
    ['0', '0.0', '1']
    """
    for key, child in unwrapped(model)._modules.items():
        if child is not None and not (key == "parametrizations" and is_parametrized(model)):
            module = unwrapped(child)
            yield prefix + key, module
            yield from walk(module.base if isinstance(module, Adapted) else module, f"{prefix}{key}.")


def places(model: nn.Module) -> dict[str, nn.Module | Slot]:
    """All that an adapter can be given to, by name: the modules, the matrices in their own parameters, the slices of both.

    >>> list(places(nn.Sequential(nn.MultiheadAttention(4, 2))))
    ['0', '0.in_proj_weight', '0.in_proj_weight.q', '0.in_proj_weight.k', '0.in_proj_weight.v', '0.out_proj']
    """
    found: dict[str, nn.Module | Slot] = _slices_of_layers(unwrapped(model), "")
    for name, module in walk(model):
        base = module.base if isinstance(module, Adapted) else module
        found[name] = module
        for slot in slots(base).values():
            found[f"{name}.{slot.name}"] = slot
            found |= {f"{name}.{part.name}": part for part in slices(slot)}
        found |= _slices_of_layers(base, f"{name}.")
    return found


def _slices_of_layers(module: nn.Module, prefix: str) -> dict[str, nn.Module | Slot]:
    """The slices of the fused layers that are children of a module, by name."""
    found: dict[str, nn.Module | Slot] = {}
    for key in fused.known(module):
        child = module._modules.get(key)
        if child is None:
            continue
        child = unwrapped(child)
        layer = child.base if isinstance(child, Adapted) else child
        if (kind := host_class(layer)) is not None and (how := fused(module, key, kind(layer).shape[0])) is not None:
            found |= {f"{prefix}{key}.{slot.name}": slot for slot in slices(layer, how)}
    return found


def by_layer(model: nn.Module, name: str | None = None) -> dict[str, Placed]:
    """As `adapters`, but with the adapters of all slices of one layer as one of that layer: `delora.parts.Slices`.

    >>> import delora
    >>> model = delora.inject(nn.Sequential(nn.MultiheadAttention(4, 2)), delora.LoRA(r=2), ["out_proj"])
    >>> list(by_layer(model))
    ['0.out_proj']
    """
    joined: dict[str, Placed] = {}
    name = active_adapter(model) if name is None else name
    modules = adapted_layers(model)
    for each, placed in adapters(model, name).items():
        slot = placed.base
        if isinstance(slot, Slot) and not slot.key:
            layer = each.removesuffix(f".{slot.name}")
            joined[layer] = modules[layer].placed(name)
        else:
            joined[each] = placed
    return joined


def adapted_layers(model: nn.Module) -> dict[str, Adapted]:
    """The adapted layers by name (by the first name if a layer has several).

    >>> import delora
    >>> list(adapted_layers(delora.inject(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), delora.LoRA(r=2), ["0"])))
    ['0']
    """
    layers: dict[nn.Module, str] = {}
    for name, module in walk(unwrapped(model)):
        if isinstance(module, Adapted):
            layers.setdefault(module, name)
    return {name: module for module, name in layers.items()}  # type: ignore[misc]


def adapter_names(model: nn.Module) -> list[str]:
    """The names of all adapters of a model, sorted.

    >>> import delora
    >>> adapter_names(delora.inject(nn.Sequential(nn.Linear(4, 4)), delora.LoRA(r=2), ["0"], name="a"))
    ['a']
    """
    return sorted({name for layer in adapted_layers(model).values() for name in layer.adapters})


def active_adapter(model: nn.Module) -> str:
    """The name of the active adapter.

    Raises:
        ValueError: no adapter is active.

    >>> import delora
    >>> active_adapter(delora.inject(nn.Sequential(nn.Linear(4, 4)), delora.LoRA(r=2), ["0"]))
    'default'
    """
    layers = adapted_layers(model).values()
    for layer in layers:
        if layer.active is not None:
            return layer.active
    if (inside := open_context(model)) is not None:
        raise ValueError(f"inside delora.{inside}(model) no adapter is active: leave that context first")
    if layers:
        raise ValueError(f"no adapter is active: delora.activate one of {adapter_names(model)}")
    raise ValueError("this model has no adapter: delora.inject or delora.load one first")


def adapters(model: nn.Module, name: str | None = None) -> dict[str, Placed]:
    """The adapter called ``name`` (the active one, if None) of each layer, with the layer.

    Raises:
        ValueError: there is no adapter of this name.

    >>> import delora
    >>> model = delora.inject(nn.Sequential(nn.Linear(4, 4)), delora.LoRA(r=2), ["0"])
    >>> {layer: adapter.method for layer, adapter in adapters(model).items()}
    {'0': LoRA(r=2, alpha=16.0, rslora=False)}
    """
    name = active_adapter(model) if name is None else name
    by_layer: dict[str, Placed] = {}
    for layer, module in adapted_layers(model).items():
        if name in module.adapters:
            each = module.adapters[name].each(layer, module.base)  # type: ignore[operator]
            by_layer |= {inside: Placed(adapter, what) for inside, adapter, what in each}
    if not by_layer:
        raise ValueError(f"no adapter is named {name!r}: this model has {adapter_names(model) or 'none'}")
    return by_layer
