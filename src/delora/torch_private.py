"""Every call into a private part of torch, each with a fallback for a torch that has it no more or not yet.

A fallback is right in every case and may be slower. The dictionaries of an ``nn.Module`` (``_parameters``, ``_buffers``,
``_modules``, its hooks) are used elsewhere as well: they are in every pickled module, so that torch cannot rename them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["conv", "is_view", "saved_tensors_hooks", "transforms_active", "unhook", "versions"]


def transforms_active() -> bool:
    """Whether a transform of `torch.func` (vmap, grad, ...) is running. Fallback: True, which has the plain operations run."""
    ask = getattr(torch._C, "_are_functorch_transforms_active", None)
    return True if ask is None else bool(ask())


def saved_tensors_hooks() -> object:
    """The innermost hooks on tensors that are saved for backward; equal as long as they are the same.

    Activation checkpointing and offloading set them. Fallback: an object that equals no other, as if they changed all the time.
    """
    ask = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)  # since torch 2.8
    return object() if ask is None else ask(False)


def versions(tensors: Any) -> list[Any]:
    """Changes when one of the tensors is written to or replaced. Fallback: differs at every call."""
    return [n for t in tensors for n in (getattr(t, "_version", object()), t.data_ptr())]


def is_view(t: Tensor) -> bool:
    """Whether a tensor may share its memory with another. Fallback: True."""
    return getattr(t, "_base", t) is not None


def conv(layer: Any, x: Tensor, weight: Tensor) -> Tensor:
    """A convolution's output with another weight [any, in, *kernel] and no bias; stride and padding are the layer's.

    Fallback: the layer is run with that weight and a bias of zeros.
    """
    direct = getattr(layer, "_conv_forward", None)
    if direct is not None:
        y: Tensor = direct(x, weight, None)
        return y
    changed = {"weight": weight}
    if layer.bias is not None:
        changed["bias"] = weight.new_zeros(len(weight))
    result: Tensor = torch.func.functional_call(layer, changed, (x,))
    return result


def unhook(module: nn.Module, owner: type) -> None:
    """Remove the forward hooks that are bound methods of an ``owner``.

    Fallback for the list of those that are always called: what is left in it names a hook that is no more, which torch skips.
    """
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key, hook in list(hooks.items()):
            if isinstance(getattr(hook, "__self__", None), owner):
                del hooks[key]
                getattr(module, "_forward_hooks_always_called", {}).pop(key, None)
