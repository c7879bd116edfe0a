"""One recipe run by several processes, which torchrun or ``accelerate launch`` started, on one machine or several.

The first one checks the folder, writes and prints; all of them train, and all score.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import PartialState
from accelerate.data_loader import BatchSamplerShard

from delora.errors import UserError
from delora.meeting import ProcessError
from delora.training.config import ConfigError, Experiment

__all__ = ["Slices", "agreed", "anyone", "arguments", "first", "join", "processes", "require", "together", "wait"]


def processes() -> int:
    """How many processes run this recipe.

    >>> processes()
    1
    """
    return int(os.environ.get("WORLD_SIZE", 1))


def first() -> bool:
    """Whether this is the process that writes.

    >>> first()
    True
    """
    return int(os.environ.get("RANK", 0)) == 0


def require(experiment: Experiment, able: bool, n: int) -> None:
    """Refuse what ``n`` processes cannot run together. A recipe for several may be run by one.

    ``able``: whether the task can be run by several processes.

    Raises:
        ConfigError: the recipe, or its task, is not for several processes.

    >>> from delora.training.config import AdapterSettings
    >>> adapter = AdapterSettings.model_validate({"targets": ["query"]})
    >>> mine = Experiment(task="mytasks.tickets", name="mine", out="runs/mine", model="bert", adapter=adapter)
    >>> require(mine, True, 2)
    Traceback (most recent call last):
    delora.training.config.ConfigError: mine: 2 processes were started, but parallel = "none": set parallel=ddp or fsdp2
    """
    if n == 1:
        return
    if experiment.parallel == "none":
        raise ConfigError(f'{experiment.name}: {n} processes were started, but parallel = "none": set parallel=ddp or fsdp2')
    if not able:
        raise ConfigError(f"{experiment.name}: the task {experiment.task} runs in one process only: start it without torchrun")
    for _, run in experiment.runs():
        if run.train.batch_size % n:
            raise ConfigError(
                f"{run.name}: train.batch_size = {run.train.batch_size} cannot be divided among {n} processes: each takes the "
                "same part of every batch"
            )


def join(experiment: Experiment, able: bool) -> None:
    """Meet the other processes, if there are any, before anything is read or written; see `require`."""
    require(experiment, able, processes())
    if processes() > 1:
        PartialState(cpu=not torch.accelerator.is_available())


@contextmanager
def together() -> Iterator[None]:
    """A context in which an error in words says that another process has ended, where torch says that a connection has.

    Raises:
        ProcessError: another of the processes ended, or does not answer any more.

    >>> with together():
    ...     pass
    """
    try:
        yield
    except RuntimeError as error:
        lost = isinstance(error, torch.distributed.DistError) or "gloo" in str(error)
        if processes() == 1 or isinstance(error, UserError) or not lost:
            raise
        raise ProcessError(
            "another process of this run has ended, or does not answer: what it printed says why. Start the command again: the "
            f"run goes on from its last checkpoint ({str(error).splitlines()[0]})"
        ) from error


def wait() -> None:
    """Wait until all processes are here."""
    if processes() > 1:
        PartialState().wait_for_everyone()


def agreed(value: Any) -> Any:
    """The first process's value, on all.

    >>> agreed(3)
    3
    """
    if processes() == 1:
        return value
    values = [value]
    torch.distributed.broadcast_object_list(values)
    return values[0]


def anyone(said: bool) -> bool:
    """Whether one of the processes says so; all ask together.

    >>> anyone(False)
    False
    """
    if processes() == 1:
        return said
    found = torch.tensor(int(said), device=PartialState().device)
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    return bool(found)


def arguments(experiment: Experiment, tokens: bool = False) -> dict[str, Any]:
    """What transformers' TrainingArguments are told of it. ``tokens``: the loss is the mean over tokens, not examples."""
    if processes() == 1:
        return {}
    shards = {"fsdp": True, "fsdp_config": {"version": 2}} if experiment.parallel == "fsdp2" else {}
    return {
        **shards,
        # A batch of the recipe is divided among the processes, whatever their number.
        "accelerator_config": {"split_batches": True},
        # Of examples each process has as many. With True, transformers multiplies a mean over them by the number of processes
        # also where the model does not divide by what it is told (BERT's classifiers).
        "average_tokens_across_devices": tokens,
        "ddp_find_unused_parameters": False,
        "ddp_backend": None if torch.accelerator.is_available() else "gloo",
    }


class Slices(BatchSamplerShard):
    """This process's part of every batch: all of its examples are used once, also of the last, smaller one.

    accelerate's own fills up the last batch with others, which one process would not do. Of a batch that cannot be divided
    equally the last examples are left out, since the mean of the processes' means must be the mean.

    >>> batches = [[1, 2, 3, 4], [5, 6, 7]]
    >>> sampler = torch.utils.data.BatchSampler([1, 2, 3, 4, 5, 6, 7], 4, drop_last=False)
    >>> list(Slices(sampler, 2, 0)), list(Slices(sampler, 2, 1))
    ([[1, 2], [5]], [[3, 4], [6]])
    """

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batch_sampler:
            n = len(batch) // self.num_processes
            if n:
                yield batch[n * self.process_index : n * (self.process_index + 1)]

    def __len__(self) -> int:
        return len(self.batch_sampler)
