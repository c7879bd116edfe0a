"""A frozen model that stays what a model was, and shares its base's memory."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from delora.ambient import apart
from delora.injection import refuse_parallel
from delora.models import adapted_layers, refuse_inside

__all__ = ["reference"]


@apart
def reference(model: nn.Module) -> nn.Module:
    """The model as it is now, frozen and in eval mode, for DPO, GRPO, KTO, KL penalties and distillation.

    What does not train (the base, frozen or quantised) is one memory for both. What trains is copied: the active adapter with
    its strength, the modules trained whole, running statistics. So the reference of a new adapter is the base, that of a
    continued one the adapter as it was loaded, and neither moves when the model trains, switches its adapter, is merged or
    ejected. Other adapters are not in it. Within ``delora.disabled(model)`` it is the reference of the base alone.

    Args:
        model: any model, with or without adapters; it is not changed.

    Raises:
        ValueError: the model is wrapped to train in several processes, or merged at the moment.

    Source: the reference policy of Rafailov et al. 2023, arXiv:2305.18290, Eq. 7.

    >>> import delora
    >>> model = delora.inject(nn.Sequential(nn.Linear(4, 4)), delora.DeLoRA(r=2), ["0"])
    >>> ref, x = delora.reference(model), torch.ones(1, 4)
    >>> ref[0].base.weight is model[0].base.weight, bool((ref(x) == model(x)).all())
    (True, True)
    >>> with torch.no_grad():
    ...     before, _ = model(x), model[0].adapter.B.add_(1.0)
    >>> bool((ref(x) == before).all()), bool((model(x) == before).all())
    (True, False)
    """
    refuse_parallel(model, "reference")
    refuse_inside(model, "reference", "merged")
    layers = adapted_layers(model).values()
    own = {id(t) for layer in layers for t in (*layer.adapters.parameters(), *layer.adapters.buffers())}
    own |= {id(p) for p in model.parameters() if p.requires_grad}
    own |= {id(t) for part in model.modules() if isinstance(part, _NormBase) for t in part._buffers.values()}
    memo: dict[int, Any] = {id(t): t for t in _tensors(model) if id(t) not in own}
    made = copy.deepcopy(model, memo)
    for layer in adapted_layers(made).values():
        for name in [name for name in layer.adapters if name != layer.active]:
            del layer.adapters[name]
    for state in (part.__dict__["_delora"] for part in made.modules() if "_delora" in part.__dict__):
        state.contexts.clear()
    for p in made.parameters():
        if p.requires_grad:  # of a copy: what is shared is frozen
            p.requires_grad_(False)
    return made.eval()


def _tensors(root: Any) -> Iterator[Tensor]:
    """All tensors that are reached from an object through attributes and containers, as a deep copy reaches them."""
    seen, waiting = set(), [root]
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            yield value
        if isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, (list, tuple, set, frozenset)):
            waiting += value
        elif not isinstance(value, (type, str, bytes, int, float, torch.dtype, torch.device)):
            waiting.append(getattr(value, "__dict__", {}))
            waiting += [getattr(value, "__self__", None)]  # a bound method
