"""What several processes do together with a model that is divided among them: save, load, merge, measure.

All of them call the function. They tell each other through the store by which torch's process group was formed: that they came,
and how it ended. So a process that is missing, or that failed, is an error in words on the others, after the process group's
timeout at the latest.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar, cast

import torch
from torch import nn

from delora.ambient import put_aside
from delora.errors import UserError
from delora.sharded import processes, refuse_flat, settle
from delora.torch_private import process_store

__all__ = ["ProcessError", "collective", "differs", "meet", "writes"]

Function = TypeVar("Function", bound=Callable[..., Any])


class ProcessError(UserError, RuntimeError):
    """Another of the processes that hold parts of a model failed, or did not come.

    >>> issubclass(ProcessError, UserError)
    True
    """


_inside: ContextVar[tuple[int, ...]] = ContextVar("delora_meeting", default=())
_count: dict[tuple[int, ...], Iterator[int]] = {}  # of the meetings so far, by who meets


def writes() -> bool:
    """Whether this process is the one that writes files: the first of those that meet; outside of a meeting, it is.

    >>> writes()
    True
    """
    ranks = _inside.get()
    return not ranks or ranks[0] == torch.distributed.get_rank()


@contextmanager
def meet(model: Any, what: str) -> Iterator[None]:
    """A context in which all processes that hold parts of a model do ``what``; it ends when it has ended on all of them.

    For a model, or a pipeline of several, that each process holds whole it does nothing.

    Raises:
        ProcessError: a process did not come, did something else, or failed.

    >>> with meet(nn.Linear(2, 2), "save"):
    ...     pass
    """
    if _inside.get():
        yield
        return
    modules = _modules(model)
    for module in modules:
        refuse_flat(module, what)
        settle(module)
    ranks = processes(p for module in modules for p in module.parameters())
    if len(ranks) < 2:
        yield
        return
    table = _Table(ranks, what)
    table.tell("came", what)
    for rank, other in table.hear("came").items():
        if other != what:
            raise ProcessError(f"process {rank} called {other} while process {table.rank} called {what}: call both on all")
    token = _inside.set(ranks)
    try:
        yield
    except BaseException as error:
        table.tell("end", f"{type(error).__name__}: {error}")
        others = table.heard("end")
        if isinstance(error, RuntimeError) and (said := _first_error(others)):  # its peer is gone
            raise ProcessError(f"{what}: {said}") from error
        raise
    else:
        table.tell("end", "")
        if said := _first_error(table.hear("end")):
            raise ProcessError(f"{what}: {said}")
    finally:
        _inside.reset(token)


def differs(ranks: tuple[int, ...], what: str, text: str) -> int | None:
    """The first of the other processes whose ``text`` is another than this one's; all call it with one of their own.

    >>> differs((), "compare", "a") is None
    True
    """
    if len(ranks) < 2:
        return None
    table = _Table(ranks, what)
    table.tell("came", text)
    return next((rank for rank, other in table.hear("came").items() if other != text), None)


def _modules(model: Any) -> list[nn.Module]:
    """The model, or the models of a pipeline."""
    parts = model if isinstance(model, Mapping) else getattr(model, "components", {})
    return [model] if isinstance(model, nn.Module) else [part for part in parts.values() if isinstance(part, nn.Module)]


def _first_error(ends: dict[int, str]) -> str | None:
    return next((f"process {rank} failed: {text}" for rank, text in ends.items() if text), None)


class _Table:
    """What the processes of one meeting tell each other."""

    def __init__(self, ranks: tuple[int, ...], what: str) -> None:
        self.store, self.ranks, self.what = process_store(), ranks, what
        self.rank, self.number = torch.distributed.get_rank(), next(_count.setdefault(ranks, itertools.count()))

    def _key(self, moment: str, rank: int) -> str:
        return f"delora/{'-'.join(map(str, self.ranks))}/{self.number}/{moment}/{rank}"

    def tell(self, moment: str, text: str) -> None:
        self.store.set(self._key(moment, self.rank), f"-{text}")

    def hear(self, moment: str) -> dict[int, str]:
        """What each of the other processes told at this moment; waits for them as long as the process group's timeout."""
        said = {}
        for rank in self.ranks:
            if rank == self.rank:
                continue
            try:
                said[rank] = self.store.get(self._key(moment, rank)).decode()[1:]
            except Exception as error:
                seconds = self.store.timeout.total_seconds()
                raise ProcessError(
                    f"{self.what}: the model is divided among the processes {list(self.ranks)}, which call it together; "
                    f"process {rank} did not {'come' if moment == 'came' else 'finish'} within {seconds:g} seconds: {error}"
                ) from error
        return said

    def heard(self, moment: str) -> dict[int, str]:
        """What other processes have told at this moment so far."""
        told = {}
        for rank in self.ranks:
            try:
                if rank != self.rank and self.store.check([self._key(moment, rank)]):
                    told[rank] = self.store.get(self._key(moment, rank)).decode()[1:]
            except Exception:  # the store went with the process that kept it
                continue
        return told


def collective(function: Function) -> Function:
    """A function of a model, which all processes that hold parts of it call together, whatever is set around its call.

    >>> @collective
    ... def measured(model):
    ...     return model.weight.norm().item() > 0
    >>> measured(nn.Linear(2, 2))
    True
    """

    @functools.wraps(function)
    def call(model: Any, *args: Any, **kwargs: Any) -> Any:
        with put_aside(), meet(model, f"delora.{function.__name__}"):
            return function(model, *args, **kwargs)

    return cast(Function, call)
