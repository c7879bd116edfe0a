"""Walking a model: its modules by name, its adapted layers, its adapters."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from delora.layer import Adapted, Adapter, Copy

__all__ = ["active_adapter", "adapted_layers", "adapter_names", "adapters", "unwrapped", "walk"]


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
