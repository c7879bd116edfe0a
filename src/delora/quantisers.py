"""What a transformers model says of its quantised layers, kept true when some of them become dense."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import nn

from delora.hosts import quantised_host
from delora.layer import Adapted
from delora.models import walk

__all__ = ["account"]

SKIPPED = ("llm_int8_skip_modules", "modules_to_not_convert", "skip_modules")  # as the libraries' configurations call it
LOADED = ("hf_quantizer", "quantization_method", "is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit")


def account(model: nn.Module) -> Callable[[], None]:
    """Make the model's configuration say which layers are quantised now, so that what it saves can be loaded.

    Without any quantised layer, it is a plain model. Returns a function that sets all back.

    >>> account(nn.Sequential(nn.Linear(2, 2)))()
    """
    undo: list[Callable[[], None]] = []
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if module.__dict__.get("hf_quantizer") is None or getattr(config, "quantization_config", None) is None:
            continue
        layers = {name: m.base if isinstance(m, Adapted) else m for name, m in walk(module)}
        plain = [name for name, m in layers.items() if type(m) is nn.Linear and quantised_host(m) is None]
        old = config.quantization_config
        undo.append(lambda config=config, old=old: setattr(config, "quantization_config", old))  # type: ignore[misc]
        if any(quantised_host(m) is not None for m in layers.values()):
            new = copy.copy(old)
            for key in SKIPPED:
                if hasattr(new, key):
                    setattr(new, key, plain)
            config.quantization_config = new
            continue
        before = {key: module.__dict__[key] for key in LOADED if key in module.__dict__}
        undo.append(lambda module=module, before=before: module.__dict__.update(before))  # type: ignore[misc]
        for key in before:
            del module.__dict__[key]
        module.__dict__["is_quantized"] = False
        del config.quantization_config

    def restore() -> None:
        for step in undo:
            step()

    return restore
