"""Finds things in a model: its modules by name, its adapted layers, its adapters."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from delora.layer import Adapted, Adapter, Copy

__all__ = ["active_adapter", "adapted_layers", "adapter_names", "adapters", "unwrapped", "walk"]


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of torch.compile and DistributedDataParallel.

    >>> import torch
    >>> model = nn.Linear(2, 2)
    >>> unwrapped(torch.compile(model)) is model
    True
    """
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := model._modules.get("_orig_mod"), nn.Module):
            model = inner
        else:
            return model


def walk(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """All modules with their dotted names, a shared module once per name. The inside of an `Adapted` is left out.

    >>> [name for name, _ in walk(nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.ReLU()))]
    ['0', '0.0', '1']
    """
    for key, child in model._modules.items():
        if child is not None:
            yield prefix + key, child
            if not isinstance(child, Adapted):
                yield from walk(child, f"{prefix}{key}.")


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
    if layers:
        raise ValueError(f"no adapter is active: delora.activate one of {adapter_names(model)}")
    raise ValueError("this model has no adapter: delora.inject or delora.load one first")


def adapters(model: nn.Module, name: str | None = None) -> dict[str, Adapter | Copy]:
    """The adapter of each layer under the name ``name`` (the active one, if None).

    Raises:
        ValueError: there is no adapter of this name.

    >>> import delora
    >>> model = delora.inject(nn.Sequential(nn.Linear(4, 4)), delora.LoRA(r=2), ["0"])
    >>> {layer: adapter.method for layer, adapter in adapters(model).items()}
    {'0': LoRA(r=2, alpha=16.0, rslora=False)}
    """
    name = active_adapter(model) if name is None else name
    by_layer = {layer: module.adapters[name] for layer, module in adapted_layers(model).items() if name in module.adapters}
    if not by_layer:
        raise ValueError(f"no adapter is named {name!r}: this model has {adapter_names(model) or 'none'}")
    return by_layer  # type: ignore[return-value]
