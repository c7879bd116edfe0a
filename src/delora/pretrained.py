"""``save_pretrained`` of a model that has adapters: never a folder that loads as another model."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import nn

from delora.layer import STOP, Adapted
from delora.sharded import is_sharded

__all__ = ["SavePretrained", "guard", "unguard"]


class SavePretrained:
    """What stands in place of a model's own ``save_pretrained`` while adapters are in it.

    It writes what the model's own would, from which a Trainer goes on, and in the place of each adapted weight a tensor of
    another shape: ``from_pretrained`` stops there, instead of drawing these layers anew. Beside it stands the adapter, which
    `delora.load` reads.
    """

    adapter: ClassVar[Callable[[nn.Module, Path], Any]]  # delora.save, set where that is defined

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        model, own = self.model, cast(Any, type(self.model)).save_pretrained
        layers = {name: part for name, part in model.named_modules() if isinstance(part, Adapted)}
        if not layers:  # within delora.merged(model)
            own(model, save_directory, *args, **kwargs)
            return
        state = dict(kwargs.pop("state_dict", None) or model.state_dict())
        state |= {f"{name}.weight": torch.zeros(STOP) for name in layers if f"{name}.base.weight" in state}
        own(model, save_directory, *args, state_dict=state, **kwargs)
        sharded = any(map(is_sharded, model.parameters()))  # which all processes would have to write together
        if kwargs.get("is_main_process", True) and not sharded and any(layer.active for layer in layers.values()):
            type(self).adapter(model, Path(save_directory))
        warnings.warn(
            f"{save_directory}: a model with adapters is written so that a Trainer goes on from it and delora.load reads its "
            "adapter; from_pretrained does not read it. For a plain model: with delora.merged(model): "
            "model.save_pretrained(folder)",
            stacklevel=2,
        )


def guard(model: nn.Module) -> None:
    """Put `SavePretrained` in place of every ``save_pretrained`` of a model, and of the models in it, that adapters are in.

    >>> guard(nn.Linear(2, 2))
    """
    for part in model.modules():
        if callable(getattr(type(part), "save_pretrained", None)) and any(isinstance(m, Adapted) for m in part.modules()):
            part.__dict__.setdefault("save_pretrained", SavePretrained(part))


def unguard(model: nn.Module) -> None:
    """Undo `guard`.

    >>> unguard(nn.Linear(2, 2))
    """
    for part in model.modules():
        if isinstance(part.__dict__.get("save_pretrained"), SavePretrained):
            del part.__dict__["save_pretrained"]
