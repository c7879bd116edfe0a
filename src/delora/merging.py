"""Put the change into the weights: for good, for a while, or several adapters into one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from delora.injection import check_name, install, put_back, swap
from delora.layer import Adapted, Adapter, Copy
from delora.methods import LoRA
from delora.methods.base import is_number
from delora.models import active_adapter, adapted_layers, adapters, unwrapped


def _plain(model: nn.Module) -> dict[Adapted, nn.Module]:
    """The layers in force as plain modules, every one finite, before anything in the model is changed."""
    active_adapter(model)
    plain = {}
    for name, layer in adapted_layers(model).items():
        try:
            plain[layer] = layer.plain()
        except ValueError as error:
            raise ValueError(f"cannot merge {name!r}: {error}") from error
        bad = [key for key, p in plain[layer].named_parameters() if not _finite(p)]
        if bad:
            raise ValueError(f"cannot merge {name!r}: its new {bad[0]} would hold NaN or infinity")
    return plain


def _finite(t: Tensor) -> bool:
    """A finite sum has finite terms, and is had without a mask as large as t."""
    return bool(t.sum().isfinite() or t.isfinite().all())


def _unties(model: nn.Module, plain: Mapping[Adapted, nn.Module]) -> bool:
    """Does a weight that is about to be replaced sit in another layer too (embedding and output head)?"""
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    kept = {id(p) for module in plain.values() for p in module.parameters()}
    return any(owners[id(p)] > 1 and id(p) not in kept for layer in plain for p in layer.base.parameters())


def merge(model: nn.Module) -> nn.Module:
    """W' in the place of W, computed in float32 or wider: plain layers of the original types, no trace of us.

    What is merged is what is in force: the active adapter at its present strength; other adapters are dropped. A layer
    that was tied to a merged one and was not adapted itself keeps the old weight: the two are untied, and a transformers
    ``config.tie_word_embeddings`` becomes False, so that a saved checkpoint reads back as it was.
    """
    root = unwrapped(model)
    plain = _plain(model)
    if _unties(root, plain) and hasattr(root, "config"):
        root.config.tie_word_embeddings = False  # type: ignore[union-attr]
    put_back(model, plain)
    return model


@contextmanager
def merged(model: nn.Module) -> Iterator[nn.Module]:
    """Within the context the model is a plain one with the change in its weights; afterwards as before, bit for bit.

    ``with merged(model): model.save_pretrained(path)`` writes a plain checkpoint and keeps the adapter.
    """
    root = unwrapped(model)
    plain = _plain(model)
    config = getattr(root, "config", None) if _unties(root, plain) else None
    tied = getattr(config, "tie_word_embeddings", None)
    try:
        if tied:
            config.tie_word_embeddings = False  # type: ignore[union-attr]
        swap(root, plain)
        yield model
    finally:
        swap(root, {module: layer for layer, module in plain.items()})
        if tied:
            config.tie_word_embeddings = tied  # type: ignore[union-attr]


def blend(model: nn.Module, weights: Mapping[str, float], name: str) -> None:
    """A new active adapter whose change is the weighted sum of others' changes, exactly: ranks add up.

    ``blend(model, {"a": 0.7, "b": 0.3}, name="ab")`` takes each adapter at its present strength. Low-rank changes become
    one `LoRA` of scale 1; modules trained whole become W + sum of weight * (W' - W).
    """
    root = unwrapped(model)
    check_name(root, name)
    if not weights:
        raise ValueError("blend needs at least one adapter: {'a': 0.7, 'b': 0.3}")
    for key, w in weights.items():
        if not is_number(w):
            raise ValueError(f"the weight of {key!r} is {w!r}: must be a finite number")
    parts: dict[str, list[tuple[float, Adapter | Copy]]] = {}
    for key, w in weights.items():
        for layer, adapter in adapters(root, key).items():
            parts.setdefault(layer, []).append((float(w), adapter))
    install(root, {layer: _blended(layer, terms) for layer, terms in parts.items()}, name)


@torch.no_grad()
def _blended(layer: str, terms: list[tuple[float, Adapter | Copy]]) -> Adapter | Copy:
    first = terms[0][1]
    if isinstance(first, Copy):
        new = Copy(first.host)
        base = first.host.layer.state_dict()
        total = {key: t.clone() for key, t in base.items()}
        for w, adapter in terms:
            for key, t in adapter.at_strength().items():  # type: ignore[operator]
                if t.is_floating_point():
                    total[key] += w * (t - base[key])
        new.module.load_state_dict(total)
        return new
    ups: list[Tensor] = []
    downs: list[Tensor] = []
    for w, adapter in terms:
        factors = adapter.low_rank()  # type: ignore[operator]
        if factors is None:
            raise ValueError(f"cannot blend {layer!r}: {adapter.method} is not a low-rank change; merge it instead")
        ups.append(factors.up * w)
        downs.append(factors.down)
    up, down = torch.cat(ups, dim=1), torch.cat(downs)
    lora = Adapter(LoRA(r=len(down), alpha=len(down)), first.host)
    lora.A.copy_(down)  # type: ignore[operator]
    lora.B.copy_(up)  # type: ignore[operator]
    return lora
