"""All uses of private parts of torch, each with a fallback for versions of torch that lack it.

A fallback is always correct but may be slower. The dictionaries of an ``nn.Module`` (``_parameters``, ``_buffers``,
``_modules``, its hooks) are also used elsewhere: every pickled module holds them, so torch cannot rename them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "checkpoint_part",
    "conv",
    "is_compiled",
    "is_view",
    "only_here",
    "process_store",
    "saved_tensors_hooks",
    "transforms_active",
    "unhook",
    "versions",
    "without_memory",
    "without_subclass",
    "wrapper_tensor",
]


def transforms_active() -> bool:
    """Whether a transform of `torch.func` (vmap, grad, ...) is running. Fallback: True, so that plain operations run.

    >>> transforms_active()
    False
    """
    ask = getattr(torch._C, "_are_functorch_transforms_active", None)
    return True if ask is None else bool(ask())


def saved_tensors_hooks() -> object:
    """The innermost hooks on tensors saved for backward, to compare: equal results mean the same hooks.

    Activation checkpointing and offloading set such hooks. Fallback: a new object, which equals no other.

    >>> outside = saved_tensors_hooks()
    >>> with torch.autograd.graph.save_on_cpu():
    ...     saved_tensors_hooks() == outside
    False
    """
    ask = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)  # since torch 2.8
    return object() if ask is None else ask(False)


def checkpoint_part() -> str | None:
    """Within non-reentrant activation checkpointing "forward" or "recomputation", by the names of torch's hooks; else None.

    None also where a dispatch mode is active, as selective checkpointing sets one, and as fallback.

    >>> from torch.utils.checkpoint import checkpoint
    >>> x = torch.ones(2, requires_grad=True)
    >>> y = checkpoint(lambda x: print(checkpoint_part()) or x.square(), x, use_reentrant=False)
    forward
    >>> y.sum().backward()
    recomputation
    """
    hooks, modes = saved_tensors_hooks(), getattr(torch._C, "_len_torch_dispatch_stack", None)
    pack = hooks[0] if isinstance(hooks, tuple) else None
    if pack is None or modes is None or modes() or getattr(pack, "__module__", "") != "torch.utils.checkpoint":
        return None
    parts = {"_checkpoint_hook": "forward", "_recomputation_hook": "recomputation"}
    return parts.get(pack.__qualname__.partition(".")[0])


def versions(tensors: Any) -> list[Any]:
    """A value that changes when one of the tensors is written to or replaced. Fallback: differs at every call.

    >>> t = torch.zeros(2)
    >>> before = versions([t])
    >>> _ = t.add_(1)
    >>> versions([t]) == before
    False
    """
    return [n for t in tensors for n in (getattr(t, "_version", object()), t.data_ptr())]


def only_here(registry: dict[str, Any], key: str) -> bool:
    """Whether nobody but ``registry`` holds the tensor ``registry[key]`` or another view of its memory. Fallback: False.

    >>> held = {"kept": nn.Parameter(torch.zeros(2)), "shared": nn.Parameter(torch.zeros(2))}
    >>> view = held["shared"].detach()
    >>> only_here(held, "kept"), only_here(held, "shared")
    (True, False)
    """
    if type(registry[key]) is not nn.Parameter or getattr(torch._C, "_storage_Use_Count", None) is None:
        return False
    memory = registry[key].untyped_storage()
    # Memory of other processes, of files, of NumPy is seen from there.
    if not memory.resizable() or (memory.device.type == "cpu" and memory.is_shared()):
        return False
    del memory
    return _holders(registry, key) == _holders({key: nn.Parameter(torch.zeros(1, device=registry[key].device))}, key)


def _holders(registry: dict[str, Any], key: str) -> tuple[int, ...]:
    references = sys.getrefcount(registry[key])
    inside = getattr(registry[key], "_use_count", int)()  # also a graph that waits for its backward
    memory: Any = registry[key].untyped_storage()
    return references, inside, torch._C._storage_Use_Count(memory._cdata)


def is_view(t: Tensor) -> bool:
    """Whether a tensor may share its memory with another. Fallback: True.

    >>> t = torch.zeros(2, 3)
    >>> is_view(t), is_view(t.T)
    (False, True)
    """
    return getattr(t, "_base", t) is not None


def process_store() -> Any:
    """The store by which the processes of torch's process group found each other. Fallback: a new client of it, by the address
    in the environment, which torchrun and all its like set.

    >>> from torch.distributed import HashStore, destroy_process_group, init_process_group
    >>> init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    >>> process_store().set("said", "yes")
    >>> process_store().get("said"), destroy_process_group()
    (b'yes', None)
    """
    dist: Any = torch.distributed
    ask = getattr(dist.distributed_c10d, "_get_default_store", None)
    if ask is not None:
        return ask()
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    return dist.PrefixStore(f"delora-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def is_compiled(module: nn.Module) -> bool:
    """Whether a module is run by a compiler, as ``torch.compile(module)`` or ``module.compile()`` gives it. Fallback: by its
    name alone.

    >>> is_compiled(nn.Linear(2, 2)), is_compiled(torch.compile(nn.Linear(2, 2)))
    (False, True)
    """
    return type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None


def conv(layer: Any, x: Tensor, weight: Tensor) -> Tensor:
    """The output of a convolution with another weight [any, in, *kernel] and no bias; stride and padding are the layer's.

    Fallback: run the layer with that weight and a bias of zeros.

    >>> conv(nn.Conv1d(1, 4, kernel_size=2), torch.ones(1, 1, 3), torch.ones(1, 1, 2))
    tensor([[[2., 2.]]])
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


def unhook(module: nn.Module, owner: type | tuple[type, ...]) -> None:
    """Remove the forward hooks that are methods of an instance of ``owner``.

    Fallback for the list of hooks that are always called: its entry stays, and torch skips it, since the hook is gone.

    >>> class Counter:
    ...     def count(self, module, args):
    ...         pass
    >>> layer = nn.Linear(2, 2)
    >>> _ = layer.register_forward_pre_hook(Counter().count)
    >>> unhook(layer, Counter)
    >>> len(layer._forward_pre_hooks)
    0
    """
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key, hook in list(hooks.items()):
            if isinstance(getattr(hook, "__self__", None), owner):
                del hooks[key]
                getattr(module, "_forward_hooks_always_called", {}).pop(key, None)


def wrapper_tensor(kind: Any, like: Tensor, requires_grad: bool) -> Any:
    """A tensor of a subclass with the shape, dtype and device of another and no memory. Fallback: None.

    >>> class Wrapper(Tensor):
    ...     @classmethod
    ...     def __torch_dispatch__(cls, *args, **kwargs):
    ...         raise TypeError("it holds nothing")
    >>> wrapper_tensor(Wrapper, torch.ones(2, 3), False).shape
    torch.Size([2, 3])
    """
    make = getattr(Tensor, "_make_wrapper_subclass", None)
    if make is None or like.layout != torch.strided:
        return None
    options = {"strides": like.stride(), "storage_offset": like.storage_offset(), "dtype": like.dtype}
    return make(kind, like.shape, device=like.device, requires_grad=requires_grad, **options)


def without_subclass(func: Any, args: Any, kwargs: Any) -> Any:
    """``func`` as for plain tensors, whatever ``__torch_function__`` their class has. It is as old as that: no fallback.

    >>> without_subclass(Tensor.dim, (torch.ones(2, 3),), {})
    2
    """
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


def without_memory(see: Callable[[Tensor], None]) -> AbstractContextManager[Any]:
    """A context in which new tensors have a shape, a dtype, a device and no memory; ``see`` gets each that an operation makes,
    below autograd, also in the backward pass. Where torch lacks it: an ImportError.

    >>> with without_memory(lambda t: print(tuple(t.shape))):
    ...     y = torch.empty(10**9, 1).expand(-1, 10**6)
    (1000000000, 1)
    (1000000000, 1000000)
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    class Watched(FakeTensorMode):
        inside = False  # an operation that is taken apart to find its result's shape; in truth its parts are never made

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            within, self.inside = self.inside, True
            try:
                made = super().__torch_dispatch__(func, types, args, kwargs)
            finally:
                self.inside = within
            if not within:
                for t in made if isinstance(made, tuple | list) else (made,):
                    if isinstance(t, Tensor):
                        see(t)
            return made

    return Watched()
