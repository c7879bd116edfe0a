"""FSDP2 under transformers' Trainer: on a CPU too, in the blocks of every model, with an optimizer's state as one process's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn

from delora.sharded import is_sharded, like, whole

__all__ = ["blocks", "divided_state", "plugin_of", "shard_on_a_cpu", "whole_state"]


def plugin_of(accelerator: Any) -> Any:
    """What Accelerate was told of FSDP; None if it does not shard.

    >>> from types import SimpleNamespace
    >>> plugin_of(SimpleNamespace(state=SimpleNamespace())) is None
    True
    """
    return getattr(accelerator.state, "fsdp_plugin", None)


def shard_on_a_cpu(accelerator: Any, arguments: Any) -> None:
    """Let Accelerate shard as a TrainingArguments' ``fsdp`` says where it would not: on CPUs it trains as DDP does, and does
    not say so."""
    options = getattr(arguments, "fsdp_plugin_args", None) or {"fsdp_version": 2}
    plugin = FullyShardedDataParallelPlugin(**options)
    if accelerator.state.mixed_precision != "no":
        plugin.set_mixed_precision(accelerator.state.mixed_precision)
    accelerator.state.fsdp_plugin = plugin
    accelerator.state.distributed_type = DistributedType.FSDP


def blocks(model: nn.Module) -> list[str]:
    """The classes of a transformers model's blocks, each of which is sharded and gathered by itself.

    Without a block that holds the input embedding (BERT's): Accelerate shards this embedding by itself, and a parameter cannot
    be in two groups.

    >>> from transformers import BertConfig, BertModel
    >>> sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 9}
    >>> blocks(BertModel(BertConfig(**sizes)))
    ['BertLayer']
    """
    try:
        embedding = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        embedding = None
    names = set(getattr(model, "_no_split_modules", None) or ())
    placed = [module for module in model.modules() if type(module).__name__ in names]
    holding = {type(module).__name__ for module in placed if embedding in module.modules()}
    return sorted({type(module).__name__ for module in placed} - holding)


def whole_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's state dict with whole tensors on the CPU, as one process has it. All processes call it together.

    >>> p = nn.Parameter(torch.ones(2))
    >>> whole_state(torch.optim.SGD([p], lr=0.1).state_dict())["param_groups"][0]["params"]
    [0]
    """

    def each(value: Any) -> Any:
        return whole(value.detach()).cpu() if isinstance(value, Tensor) else value

    states = {key: {name: each(value) for name, value in kept.items()} for key, kept in state["state"].items()}
    return {**state, "state": states}


def divided_state(state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The inverse of `whole_state`: the state dict with each tensor divided among processes as its parameter is.

    Raises:
        ValueError: the optimizer keeps a tensor in another shape than its parameter's, so that it cannot be divided.

    >>> optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)
    >>> divided_state(optimizer.state_dict(), optimizer)["state"]
    {}
    """
    parameters = dict(enumerate(_parameters(optimizer)))

    def each(name: str, value: Any, p: Tensor) -> Any:
        if not isinstance(value, Tensor) or not value.ndim or not is_sharded(p):
            return value
        if value.shape != p.shape:
            raise ValueError(
                f"the optimizer's {name!r} is of shape {tuple(value.shape)} for a parameter of shape {tuple(p.shape)}: it "
                "cannot be divided among processes; go on without FSDP2"
            )
        return like(value.to(p.device), p)

    states = {key: {name: each(name, v, parameters[key]) for name, v in kept.items()} for key, kept in state["state"].items()}
    return {**state, "state": states}


def _parameters(optimizer: Any) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]
