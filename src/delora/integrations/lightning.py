"""Lightning: checkpoints that hold what trains and not the frozen base."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from delora.ambient import apart
from delora.formats.bases import entry, is_same
from delora.formats.files import AdapterError
from delora.layer import Adapted
from delora.models import adapted_layers

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError:
    from pytorch_lightning import Callback, LightningModule, Trainer

__all__ = ["LightningAdapter"]

KEY = "delora.base"


class LightningAdapter(Callback):
    """Keeps the frozen base of adapted models out of Lightning's checkpoints: ``Trainer(callbacks=[LightningAdapter()])``.

    A checkpoint holds everything else as before (adapters, heads, buffers, optimizer, loops), so that training goes on from it
    exactly. Of the base it holds a fingerprint of each adapted layer's weight; where the base is another one, it is refused.
    ``delora.save`` and `delora.load` of the model itself write and read an adapter that needs no Lightning.

    Raises:
        AdapterError: a checkpoint is read into a model with another base.

    >>> LightningAdapter().state_key
    'LightningAdapter'
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if getattr(self, "_hook", None) is None:
            self._hook = pl_module.register_load_state_dict_pre_hook(_complete)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._hook.remove()
        self._hook = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        for name, _ in _frozen(pl_module):
            state.pop(name, None)
        state[KEY] = _described(pl_module)


def _roots(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that `delora.inject` was called on."""
    return ((name, part) for name, part in module.named_modules() if "_delora" in part.__dict__)


def _frozen(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The frozen parameters of adapted models, but for those of adapters, by all their names."""
    for root, model in _roots(module):
        layers = [part for part in model.modules() if isinstance(part, Adapted)]
        inside = {id(p) for layer in layers for p in layer.adapters.parameters()}
        for name, p in model.named_parameters(remove_duplicate=False):
            if not p.requires_grad and id(p) not in inside:
                yield f"{root}.{name}" if root else name, p


@apart
def _described(module: nn.Module) -> dict[str, dict[str, Any]]:
    described = {}
    for root, model in _roots(module):
        for name, layer in adapted_layers(model).items():
            if layer.adapter is not None and not layer.adapter.whole:
                described[f"{root}.{name}"] = entry(layer.adapter.frozen)
    return described


@apart
def _complete(module: nn.Module, state: dict[str, Any], *_: Any) -> None:
    """Let the base that is there be what the checkpoint lacks, if it is the one that it was written with."""
    described = state.pop(KEY, None)
    if described is None:
        return
    for root, model in _roots(module):
        for name, layer in adapted_layers(model).items():
            saved = described.get(f"{root}.{name}")
            if saved is not None and layer.adapter is not None and not is_same(saved, layer.adapter.frozen):
                raise AdapterError(
                    f"the weights of {root}.{name} are not those that the checkpoint was written with: load the right base "
                    "model"
                )
    with torch.no_grad():
        state |= {name: p.detach() for name, p in _frozen(module) if name not in state}
