"""What a module gets that reads the weight of an adapted layer, in place of calling the layer.

Some attention layers hand the weights of their projections to a fused function, Mamba's mixers multiply by ``dt_proj.weight``,
and a language model's head may be ``F.linear(h, self.wte.weight)``. While a forward runs, such a reader gets a tensor that
knows shape, dtype and device of the weight W and becomes W' as soon as something is computed with it, differentiably: also
within an autograd function of the reader's own, whose gradient for the weight goes on to the adapter. Outside of a forward, and
for whoever writes to it, the attribute is the layer's own parameter.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from functools import cache
from types import CodeType
from typing import Any, cast

import torch
from torch import Tensor, nn

from delora.hosts import Slot
from delora.lowrank import traced
from delora.torch_private import without_subclass, wrapper_tensor

__all__ = ["ReadWeight", "Reading", "readers", "reading"]

_depth: ContextVar[int] = ContextVar("delora_reading", default=0)  # one per thread


def reading() -> bool:
    """Whether a forward is running in which weights may be read.

    >>> reading()
    False
    """
    return _depth.get() > 0 or traced()


class Reading:
    """The hooks around the forward of a module that may read weights.

    >>> hooks = Reading()
    >>> hooks.before(nn.Identity(), ())
    >>> reading()
    True
    >>> hooks.after(nn.Identity(), (), None)
    >>> reading()
    False
    """

    def before(self, module: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling():
            _depth.set(_depth.get() + 1)

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling():
            _depth.set(max(0, _depth.get() - 1))


def readers(model: nn.Module, layers: Mapping[str, Any]) -> list[nn.Module]:
    """The modules in ``model`` around one of the adapted ``layers`` whose code speaks of weights, biases or adapted parameters.

    >>> import delora
    >>> model = delora.inject(nn.Sequential(nn.MultiheadAttention(4, 2)), delora.LoRA(r=2), ["out_proj"])
    >>> [type(module).__name__ for module in readers(model, {"0.out_proj": model[0].out_proj})]
    ['MultiheadAttention']
    """
    wanted = set(layers.values())
    names = {"weight", "bias"}
    for layer in wanted:
        for _, _, slot in (part for adapter in layer.adapters.values() for part in adapter.each("", layer.base)):
            if isinstance(slot, Slot):
                names |= {slot.key, slot.layout.bias or slot.key}
    around: dict[nn.Module, bool] = {}

    def holds(module: nn.Module) -> bool:
        if module not in around:
            around[module] = False
            around[module] = any(child in wanted or holds(child) for child in module._modules.values() if child is not None)
        return around[module]

    return [
        m
        for m in model.modules()
        if m is not model and m not in wanted and _reads(cast(Any, type(m)), frozenset(names)) and holds(m)
    ]


@cache
def _reads(kind: Any, names: frozenset[str]) -> bool:
    classes = kind.__mro__[: kind.__mro__.index(nn.Module)]
    functions = [inspect.unwrap(f) for c in classes for f in vars(c).values() if inspect.isfunction(inspect.unwrap(f))]
    return any(not names.isdisjoint(_names(f.__code__)) for f in functions if f.__name__ != "__init__")


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


class ReadWeight(Tensor):
    """The weight of an adapted layer as its reader sees it: ``compute()`` is the adapted one, ``parameter`` the layer's own."""

    parameter: Tensor
    compute: Callable[[], Tensor]

    @staticmethod
    def of(parameter: Tensor, compute: Callable[[], Tensor], trains: Sequence[Tensor] = ()) -> Tensor:
        """What a reader gets in place of ``parameter``; ``trains`` are the tensors in ``compute()`` that want gradients.

        >>> W = nn.Parameter(torch.ones(2, 3))
        >>> weight = ReadWeight.of(W, lambda: 2 * W, [W])
        >>> weight.shape, (weight @ torch.ones(3)).tolist()
        (torch.Size([2, 3]), [6.0, 6.0])
        """
        weight = None if traced() else wrapper_tensor(ReadWeight, parameter, False)
        if weight is None:
            return compute()
        weight.parameter, weight.compute = parameter, compute
        if not trains or not torch.is_grad_enabled():
            return cast(Tensor, weight)
        graded = cast(ReadWeight, _Gradient.apply(weight, *trains))
        graded.parameter, graded.compute = parameter, compute
        return graded

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in ("__get__", "__set__"):
            attribute = getattr(getattr(func, "__self__", None), "__name__", "")
            writes = name == "__set__" or attribute in ("data", "grad", "grad_fn", "is_leaf")
            name = attribute
        else:
            writes = name == "data_ptr" or (name.endswith("_") and not name.endswith("__"))
        if writes:  # whoever writes to the weight, or asks where it is, means the layer's own
            return func(*_mapped(args, lambda t: t.parameter), **_mapped(kwargs, lambda t: t.parameter))
        if name in _METADATA:
            return without_subclass(func, args, kwargs)
        return func(*_mapped(args, _computed), **_mapped(kwargs, _computed))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return func(*_mapped(args, _computed), **_mapped(kwargs or {}, _computed))


def _mapped(value: Any, fn: Callable[[ReadWeight], Any]) -> Any:
    if isinstance(value, ReadWeight):
        return fn(value)
    if isinstance(value, dict):
        return {key: _mapped(part, fn) for key, part in value.items()}
    if isinstance(value, (list, tuple)) and any(isinstance(part, (ReadWeight, list, tuple)) for part in value):
        return type(value)(_mapped(part, fn) for part in value)
    return value


def _computed(weight: ReadWeight) -> Tensor:
    return weight.compute()


class _Gradient(torch.autograd.Function):
    """Takes the gradient that an autograd function gives for the weight itself on to what the weight is computed from."""

    @staticmethod
    def forward(ctx: Any, weight: ReadWeight, *trains: Tensor) -> Any:
        ctx.compute, ctx.trains = weight.compute, trains
        return wrapper_tensor(ReadWeight, weight.parameter, False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            weight = ctx.compute()
        return (None, *torch.autograd.grad(weight, ctx.trains, grad.to(weight.dtype), allow_unused=True))


# What is known of the weight without computing it.
_METADATA = {"shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_meta", "is_cuda", "is_cpu", "is_xpu", "is_mps"}
_METADATA |= {"is_sparse", "is_quantized", "is_nested", "itemsize", "nbytes", "size", "dim", "ndimension", "numel", "nelement"}
_METADATA |= {"stride", "storage_offset", "is_floating_point", "is_complex", "is_signed", "is_inference", "is_contiguous"}
_METADATA |= {"element_size", "get_device", "__len__", "__hash__", "names", "retains_grad", "output_nr", "type"}
