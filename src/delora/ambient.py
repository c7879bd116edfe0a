"""Puts aside what is set around a call: autocast, inference mode, ``zero.Init``, the caller's default dtype and device."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar, cast

import torch

from delora.zero import outside_init

__all__ = ["apart", "put_aside"]

Function = TypeVar("Function", bound=Callable[..., Any])
DEVICES = ("cpu", "cuda", "xpu", "mps", "hpu")


@contextmanager
def put_aside() -> Iterator[None]:
    """A context without autocast and inference mode, in which new tensors are float32 on the CPU unless something else is said.

    >>> with torch.autocast("cpu", torch.bfloat16), torch.inference_mode(), put_aside():
    ...     torch.is_autocast_enabled("cpu"), torch.is_inference_mode_enabled()
    (False, False)
    """
    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(outside_init())
        for kind in DEVICES:
            if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":  # such a context makes every operation slower
            stack.enter_context(torch.device("cpu"))
        torch.set_default_dtype(torch.float32)
        stack.callback(torch.set_default_dtype, dtype)
        yield


def apart(function: Function) -> Function:
    """The function, which then does the same whatever is set around its call.

    >>> @apart
    ... def product(x):
    ...     return (x @ x).dtype
    >>> with torch.autocast("cpu", torch.bfloat16):
    ...     product(torch.ones(2, 2))
    torch.float32
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with put_aside():
            return function(*args, **kwargs)

    return cast(Function, call)
