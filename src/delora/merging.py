"""Merges adapters: into the weights, permanently or within a context, or several adapters into one."""

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

__all__ = ["blend", "merge", "merged"]


def _plain(model: nn.Module) -> dict[Adapted, nn.Module]:
    """A plain, finite layer for every adapted one; nothing in the model is changed."""
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
    """Whether all entries are finite. A finite sum has finite terms, and computing it needs no mask as large as t."""
    return bool(t.sum().isfinite() or t.isfinite().all())


def _unties(model: nn.Module, plain: Mapping[Adapted, nn.Module]) -> bool:
    """Whether a weight to be replaced is also in another layer (as in an embedding and the output head)."""
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    kept = {id(p) for module in plain.values() for p in module.parameters()}
    return any(owners[id(p)] > 1 and id(p) not in kept for layer in plain for p in layer.base.parameters())


def merge(model: nn.Module) -> nn.Module:
    """Replace W by W', computed in float32 or wider, in plain layers of the original types. Returns the changed model.

    The active adapter is merged at its current strength; other adapters are dropped. A layer that shared its weight with a
    merged one, and was not adapted itself, keeps the old weight: the two are untied, and a transformers
    ``config.tie_word_embeddings`` becomes False, so that a saved checkpoint loads as the same model.

    Raises:
        ValueError: no weight can express the change, or a new weight is not finite; nothing is changed then.

    >>> import delora
    >>> model = delora.inject(nn.Sequential(nn.Linear(4, 4)), delora.ETHER(), ["0"])
    >>> y = model(torch.eye(4))
    >>> torch.allclose(delora.merge(model)(torch.eye(4)), y, atol=1e-6), type(model[0]).__name__
    (True, 'Linear')
    """
    root = unwrapped(model)
    plain = _plain(model)
    if _unties(root, plain) and hasattr(root, "config"):
        root.config.tie_word_embeddings = False  # type: ignore[union-attr]
    put_back(model, plain)
    return model


@contextmanager
def merged(model: nn.Module) -> Iterator[nn.Module]:
    """A context in which the change is in the model's weights, in plain layers; afterwards it is as before, bit for bit.

    ``with merged(model): model.save_pretrained(path)`` writes a plain checkpoint and keeps the adapter.

    >>> import delora
    >>> model = delora.inject(nn.Sequential(nn.Linear(4, 4)), delora.DeLoRA(r=2), ["0"])
    >>> with delora.merged(model):
    ...     list(model.state_dict())
    ['0.weight', '0.bias']
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
    """Add an active adapter whose change is exactly the weighted sum of other adapters' changes.

    Each adapter counts at its current strength. Low-rank changes become one `LoRA` of scale 1, whose rank is the sum of
    their ranks; modules trained whole become W + sum of weight * (W' - W).

    Raises:
        ValueError: an adapter is missing or not low-rank, a weight is not a finite number, or the name is taken.

    >>> import delora
    >>> model = delora.inject(nn.Sequential(nn.Linear(4, 4)), delora.LoRA(r=1), ["0"], name="a")
    >>> model = delora.inject(model, delora.DeLoRA(r=1, start="soft"), ["0"], name="b")
    >>> delora.blend(model, {"a": 0.7, "b": 0.3}, name="ab")
    >>> model[0].active, model[0].adapter.method.r
    ('ab', 2)
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
