"""Merges adapters: into the weights, permanently or within a context, or several adapters into one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from delora.ambient import put_aside
from delora.hosts import Quantised
from delora.injection import check_name, install, put_back, refuse_parallel, swap
from delora.layer import Adapted, Adapter, Copy, Placed
from delora.meeting import collective, meet
from delora.methods import LoRA
from delora.methods.base import is_number
from delora.models import active_adapter, adapted_layers, adapters, refuse_inside, states, unwrapped
from delora.quantisers import account
from delora.sharded import fill, is_sharded, kept, numbers, settle, whole
from delora.ties import owners, untie
from delora.together import watched
from delora.torch_private import only_here
from delora.updates import wide

__all__ = ["blend", "merge", "merged"]


@dataclass
class _Change:
    """What becomes of an adapted layer: ``module`` takes its place, with the tensors ``new``; None: those are computed then."""

    layer: Adapted
    module: nn.Module
    new: dict[str, Tensor] | None

    def tensors(self) -> dict[str, Tensor]:
        """The new tensors by name."""
        if self.new is not None:
            return self.new
        return self.layer.adapter.changed() if self.layer.adapter is not None else {}


def _changes(model: nn.Module, unused: bool, requantise: bool, ahead: bool) -> dict[str, _Change]:
    """What becomes of every adapted layer: finite numbers. Nothing in the model is changed.

    ``ahead``: compute all new tensors now. Else only those are that must be looked at first: of layers that share a weight, of
    quantised ones, and where the sizes of W and its change leave open whether a number is infinite.
    """
    active_adapter(model)
    changes: dict[str, _Change] = {}
    shared = {name for group in owners(unwrapped(model)).values() for name in group}
    layers = adapted_layers(model)
    hooks = watched(unwrapped(model))
    seen = hooks is not None and hooks.finished and any(layer.ran for layer in layers.values())
    for name, layer in layers.items():
        if seen and layer.active and not layer.ran and not unused:
            raise ValueError(
                f"cannot merge {name!r}: it did not run in the forwards so far, where its adapter changed nothing; merged, it "
                "might. Leave it out (delora.inject(..., exclude=...)), or say unused=True to merge it nevertheless"
            )
        if layer._blank:
            layer.refresh()
        adapter, later = layer.adapter, not ahead and not any(f"{name}.{key}" in shared for key in layer.base._parameters)
        try:
            if later and adapter is not None and adapter.is_finite():
                changes[name] = _Change(layer, layer.base, None)
                continue
            dtype = torch.float32 if requantise else layer.fed
            new = {} if adapter is None else adapter.changed(dtype)
        except ValueError as error:
            raise ValueError(f"cannot merge {name!r}: {error}") from error
        bad = [key for key, t in new.items() if t.is_floating_point() and not _finite(t)]
        if bad:
            raise ValueError(f"cannot merge {name!r}: its new {bad[0]} would hold NaN or infinity")
        changes[name] = _Change(layer, layer.base, new)
    _keep_ties(unwrapped(model), changes)
    return changes


def _replaced(layer: Adapted, new: dict[str, Any], requantise: bool) -> nn.Module:
    """The plain layer: the very one, to be given its new tensors; of a quantised one with a new weight, a new one."""
    look = None if layer.adapter is None or layer.adapter.whole else layer.adapter.host
    return look.replaced(new, requantise) if isinstance(look, Quantised) and "weight" in new else layer.base


def _replace(changes: Mapping[str, _Change], requantise: bool) -> None:
    """Make the layers that take the place of quantised ones."""
    for name, change in changes.items():
        if not change.new:
            continue
        try:
            change.module = _replaced(change.layer, change.new, requantise)
        except ValueError as error:
            raise ValueError(f"cannot merge {name!r}: {error}") from error
        if change.module is not change.layer.base:
            change.new = {}


def _by_name(changes: Mapping[str, _Change]) -> dict[str, tuple[dict[str, Tensor], str]]:
    """Where each new tensor that is computed already stands, by its name in the model."""
    return {f"{name}.{key}": (change.new, key) for name, change in changes.items() if change.new for key in change.new}


def _keep_ties(model: nn.Module, changes: Mapping[str, _Change]) -> None:
    """Let layers that share a parameter, and all get the same new one, share that.

    Raises:
        ValueError: one of them keeps the old one, and processes hold parts of it: it cannot be two.
    """
    place = _by_name(changes)
    for group in owners(model).values():
        if all(name in place for name in group):
            first, key = place[group[0]]
            if all(torch.equal(whole(first[key]), whole(new[other])) for new, other in (place[name] for name in group[1:])):
                for name in group[1:]:
                    new, other = place[name]
                    new[other] = first[key]
                continue
        changed = [name for name in group if name in place]
        if changed and is_sharded(place[changed[0]][0][place[changed[0]][1]]):
            some = ", ".join(repr(name.rpartition(".")[0]) for name in group if name != changed[0])
            raise ValueError(
                f"cannot merge {changed[0].rpartition('.')[0]!r}: several processes hold parts of its weight, which it shares "
                f"with {some}: save the adapter, and load and merge it in one process"
            )


def _finite(t: Tensor) -> bool:
    """Whether all entries are finite. A finite sum has finite terms, and computing it needs no mask as large as t."""
    return bool(whole(t.sum()).isfinite() or whole(t.isfinite().all()))


def _put(layer: nn.Module, tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
    """Set tensors of a layer by their dotted names; the old ones are returned."""
    old: dict[str, Tensor | None] = {}
    for name, tensor in tensors.items():
        path, _, key = name.rpartition(".")
        owner = layer.get_submodule(path)
        registry: Any = owner._buffers if key in owner._buffers else owner._parameters
        there = old[name] = registry.get(key)
        if is_sharded(there) and tensor is not None:  # what divided it keeps this very parameter
            old[name] = kept(there)
            fill(there, tensor)
        else:
            registry[key] = tensor
    return old


def _put_in_place(layer: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Set parameters of a layer: in the memory of the old ones where nobody else can see that, as fresh memory costs time."""
    for name in list(tensors):
        path, _, key = name.rpartition(".")
        registry = layer.get_submodule(path)._parameters
        new, old = tensors[name], registry.get(key)
        fits = (
            old is not None and not is_sharded(old) and (old.shape, old.dtype, old.device) == (new.shape, new.dtype, new.device)
        )
        del old
        if fits and only_here(registry, key):
            with torch.no_grad():
                registry[key].copy_(new)  # type: ignore[union-attr]
        else:
            _put(layer, {name: new})


@contextmanager
def _untied(configs: list[tuple[Any, bool]], again: bool) -> Iterator[None]:
    """Set ``tie_word_embeddings`` to False; within the context alone if ``again``."""
    for config, _ in configs:
        config.tie_word_embeddings = False
    try:
        yield
    finally:
        for config, tied in configs if again else ():
            config.tie_word_embeddings = tied


@collective
def merge(model: nn.Module, *, unused: bool = False, requantise: bool = False) -> nn.Module:
    """Replace W by W', computed in float32 or wider, in plain layers of the original types. Returns the changed model.

    The active adapter is merged at its current strength; other adapters are dropped. The layers are the very ones that were
    there before `inject`, with new parameters, so that their hooks go on working. A layer that shared its weight with a merged
    one, and was not adapted itself, keeps the old weight: the two are untied, and a transformers ``config.tie_word_embeddings``
    becomes False, so that a saved checkpoint loads as the same model.

    A quantised layer becomes a dense ``nn.Linear``, in the dtype of what it was given when it ran first, or that it was
    quantised from; with ``requantise`` it is quantised anew by its own scheme, which rounds the change as coarsely as W.

    Args:
        unused: merge also adapters of layers that were seen not to run.
        requantise: quantise the layers that are quantised anew, instead of making them dense.

    Raises:
        ValueError: no weight can express the change, a new weight is not finite, the model would tie the weights again when it
            is loaded, a layer was seen not to run, or cannot be quantised anew; nothing is changed then.

    >>> import delora
    >>> model = delora.inject(nn.Sequential(nn.Linear(4, 4)), delora.ETHER(), ["0"])
    >>> y = model(torch.eye(4))
    >>> torch.allclose(delora.merge(model)(torch.eye(4)), y, atol=1e-6), type(model[0]).__name__
    (True, 'Linear')
    """
    refuse_inside(model, "merge")
    root = unwrapped(model)
    changes = _changes(model, unused, requantise, ahead=False)
    configs = untie(root, {name: new[key] for name, (new, key) in _by_name(changes).items()})
    _replace(changes, requantise)
    plain: dict[Adapted, nn.Module] = {}
    with _untied(configs, again=False):
        try:
            for change in changes.values():  # one by one: the old tensors of a layer go before the new ones of the next come
                _put_in_place(change.module, change.tensors())
                plain[change.layer] = change.module
        finally:  # also out of memory: each layer is then merged or adapted, and the model computes what it did
            put_back(model, plain)
            account(root)
    return model


@contextmanager
def merged(model: nn.Module, *, unused: bool = False, requantise: bool = False) -> Iterator[nn.Module]:
    """A context in which the change is in the model's weights, in plain layers; afterwards it is as before, bit for bit.

    ``with merged(model): model.save_pretrained(path)`` writes a plain checkpoint and keeps the adapter. ``unused``,
    ``requantise`` and the errors are those of `merge`.

    >>> import delora
    >>> model = delora.inject(nn.Sequential(nn.Linear(4, 4)), delora.DeLoRA(r=2), ["0"])
    >>> with delora.merged(model):
    ...     list(model.state_dict())
    ['0.weight', '0.bias']
    """
    refuse_inside(model, "merged")
    root = unwrapped(model)
    with put_aside(), meet(model, "delora.merged"):
        changes = _changes(model, unused, requantise, ahead=True)
        configs = untie(root, {name: new[key] for name, (new, key) in _by_name(changes).items()})
        _replace(changes, requantise)
    opened = states(model)
    restore: Callable[[], None] | None = None
    old: list[tuple[nn.Module, dict[str, Tensor | None]]] = []
    with _untied(configs, again=True):
        try:
            for state in opened:
                state.contexts.append("merged")
            old += [(change.module, _put(change.module, change.tensors())) for change in changes.values()]
            swap(root, {change.layer: change.module for change in changes.values()})
            restore = account(root)
            yield model
        finally:
            settle(root)
            swap(root, {change.module: change.layer for change in changes.values()})
            if restore is not None:
                restore()
            for base, tensors in old:
                _put(base, tensors)
            for state in opened:
                state.contexts.pop()


@collective
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
    refuse_parallel(model, "blend")
    refuse_inside(root, "blend")
    check_name(root, name)
    if not weights:
        raise ValueError("blend needs at least one adapter: {'a': 0.7, 'b': 0.3}")
    for key, w in weights.items():
        if not is_number(w):
            raise ValueError(f"the weight of {key!r} is {w!r}: must be a finite number")
    parts: dict[str, list[tuple[float, Placed]]] = {}
    for key, w in weights.items():
        for layer, adapter in adapters(root, key).items():
            parts.setdefault(layer, []).append((float(w), adapter))
    install(root, {layer: _blended(layer, terms) for layer, terms in parts.items()}, name)


@torch.no_grad()
def _blended(layer: str, terms: list[tuple[float, Placed]]) -> Adapter | Copy:
    first = terms[0][1]
    if first.whole:
        new = Copy(first.base)
        base = dict(first.base.named_parameters()) | dict(first.base.named_buffers())
        base = {key: numbers(t) for key, t in base.items()}
        total = {key: t.detach().to(wide(t.dtype)).clone() if t.is_floating_point() else t for key, t in base.items()}
        for w, placed in terms:
            for key, t in placed.at_strength().items():
                if t.is_floating_point() and key in total:
                    total[key] += w * (t.to(total[key].dtype) - base[key].to(total[key].dtype))
        for key, t in (*new.module.named_parameters(), *new.module.named_buffers()):
            fill(t, total[key])
        return new
    ups: list[Tensor] = []
    downs: list[Tensor] = []
    for w, placed in terms:
        factors = placed.low_rank()
        if factors is None:
            raise ValueError(f"cannot blend {layer!r}: {placed.method} is not a low-rank change; merge it instead")
        ups.append(factors.up * w)
        downs.append(factors.down)
    up, down = torch.cat(ups, dim=1), torch.cat(downs)
    lora = Adapter(LoRA(r=len(down), alpha=len(down)), first.host)
    lora.A.copy_(down)  # type: ignore[operator]
    lora.B.copy_(up)  # type: ignore[operator]
    return lora
