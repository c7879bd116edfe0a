"""LoRA adapters for vLLM: PEFT's format, of what vLLM reads right, within the ranks that it is started for.

The reference is vLLM 0.32: ``vllm/lora/peft_helper.py`` and ``vllm/config/lora.py`` say what it refuses, and
``vllm/lora/model_manager.py`` what it leaves out without a word, and how it reads experts.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from delora.formats.nearest import Approximation
from delora.formats.peft import write as write_peft
from delora.formats.peft_experts import by_wrapper, one_by_one
from delora.hosts import Conv1D, Embedding, Linear, Quantised, Slot
from delora.layer import Placed
from delora.meeting import collective
from delora.models import by_layer, unwrapped, walk

__all__ = ["RANKS", "write"]

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank can be
HEADS = ("score", "classifier")  # the modules that an adapter of vLLM can hold whole
# Whose experts vLLM holds, and reads, together (``is_3d_moe_weight``); those of all others by the names in their checkpoints.
TOGETHER = ("GptOssForCausalLM", "Qwen3VLMoeForConditionalGeneration", "Qwen3_5MoeForConditionalGeneration")
ABSORBED = "kv_b_proj"  # of multi-head latent attention: vLLM takes its weight apart when the model is loaded


@collective
@torch.no_grad()
def write(
    model: nn.Module,
    folder: str | os.PathLike[str],
    name: str | None = None,
    rank: int | None = None,
    dtype: torch.dtype | None = None,
    max_lora_rank: int = 16,
) -> Path:
    """Write an adapter, at its current strength, as a LoRA that vLLM reads, and return the folder.

    It is `delora.export.peft`, after a look at what vLLM refuses or leaves out::

        vllm serve MODEL --enable-lora --max-lora-rank 16 --lora-modules mine=FOLDER

    Args:
        model: a model of transformers with an adapter.
        folder: where to write; it is created if it does not exist.
        name: the adapter's name; the active one if None.
        rank: the highest rank to write; a change of a higher one is written as the nearest of this rank, which is told. None
            writes each exactly. A DeLoRA that starts by "subtract" or "copy" has rank 2r.
        dtype: the dtype of the file; vLLM computes in that of the model.
        max_lora_rank: what vLLM is started with as ``--max-lora-rank``: 1, 8, 16, 32, 64, 128, 256, 320 or 512.

    Raises:
        ValueError: vLLM would refuse the adapter, or serve another model than this one. Nothing is written then.

    Warns:
        UserWarning: layers are not exact beyond rounding; ``delora.approximation`` in the header of the file has their errors.

    Example:
        >>> import delora, tempfile
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=20)
        >>> model = delora.inject(LlamaForCausalLM(LlamaConfig(**sizes)), delora.DeLoRA(r=16), ["q_proj"])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sorted(file.name for file in delora.export.vllm(model, folder, max_lora_rank=32).iterdir())
        ['adapter_config.json', 'adapter_model.safetensors']
    """
    if max_lora_rank not in RANKS:
        raise ValueError(f"max_lora_rank = {max_lora_rank!r}: vLLM can be started with one of {', '.join(map(str, RANKS))}")
    root: Any = unwrapped(model)
    if not hasattr(getattr(root, "config", None), "get_text_config"):
        raise ValueError(f"vLLM serves models of transformers, which a {type(root).__name__} is not")
    chosen = by_layer(model, name)
    language = _language_model(root)
    for layer, placed in chosen.items():
        if why := _refused(layer, placed, root, language):
            raise ValueError(f"{layer} {why}; leave it out, or delora.merge writes it into the weights")
    in_mixtures = {layer: placed for layer, placed in chosen.items() if isinstance(placed.base, Slot)}
    together = type(root).__name__ in TOGETHER
    factors = {layer: a.low_rank() for layer, a in chosen.items() if not a.whole and layer not in in_mixtures}
    ranks = {layer: len(change.down) for layer, change in factors.items() if change is not None}
    if together:
        _require_both(in_mixtures)
        ranks |= {each.parameter: each.rank for each in by_wrapper(in_mixtures, Approximation()).values()}
    else:
        ranks |= {layer: each.rank for layer, each in one_by_one(root, in_mixtures, Approximation()).items()}
    _require_ranks(ranks, rank, max_lora_rank)
    return write_peft(model, folder, name, rank=rank, dtype=dtype, experts="together" if together else "each")


def _language_model(root: Any) -> tuple[str, ...]:
    """The beginnings of the names in the language model of a model that sees or hears, too; ("",) of another."""
    if root.config.get_text_config() is root.config:
        return ("",)
    ends = {id(root.get_decoder()): ".", id(root.get_output_embeddings()): ""}
    return tuple(name + ends[id(module)] for name, module in walk(root) if id(module) in ends)


def _refused(layer: str, placed: Placed, root: Any, language: tuple[str, ...]) -> str:
    """Why vLLM cannot adapt a layer, or would do so wrongly; "" if it can."""
    if placed.whole:
        heads = HEADS if type(root).__name__.endswith("ForSequenceClassification") else ()
        return "" if layer in heads else "is trained whole, which vLLM takes of the head of a sequence classifier alone"
    if isinstance(slot := placed.base, Slot):
        if slot.layout.experts is not True:
            return f"is a matrix in a parameter of a {type(slot.owner).__name__}, which vLLM does not adapt"
        return "" if placed.low_rank() is not None else f"has a {placed.method}, which is not a low-rank change"
    if not isinstance(placed.host, (Linear, Quantised, Embedding)) or isinstance(placed.host, Conv1D):
        return f"is a {type(placed.base).__name__}, and vLLM adapts linear layers and embeddings"
    if layer.rpartition(".")[2] == ABSORBED:
        return "is read once by vLLM's attention itself, which then computes without its adapter"
    if not layer.startswith(language):
        return f"is outside of the language model ({language[0]}*), where vLLM leaves adapters out without a word"
    return ""


def _require_both(experts: dict[str, Placed]) -> None:
    """Refuse experts with adapters of one parameter alone, where vLLM takes both together (``_stack_moe_lora_weights``)."""
    keys: dict[str, set[str]] = {}
    for name, placed in experts.items():
        keys.setdefault(name.removesuffix(f".{placed.base.name}"), set()).add(placed.base.key)
    for module, there in keys.items():
        if missing := {"gate_up_proj", "down_proj"} - there:
            raise ValueError(
                f"vLLM takes the adapters of gate_up_proj and down_proj of {module} together, and {missing.pop()} has none: "
                "adapt both, or delora.merge writes the change into the weights"
            )


def _require_ranks(ranks: dict[str, int], rank: int | None, most: int) -> None:
    """Refuse a rank that is higher than vLLM is started for."""
    layer = max(ranks, key=ranks.__getitem__, default=None)
    if layer is None or min(ranks[layer], rank or ranks[layer]) <= most:
        return
    needed = next((r for r in RANKS if r >= min(ranks[layer], rank or ranks[layer])), None)
    start = f"start it with --max-lora-rank {needed} and give max_lora_rank={needed} here, or " if needed else ""
    raise ValueError(
        f"the change of {layer} has rank {ranks[layer]}, and vLLM is started for {most} at most (--max-lora-rank): {start}give "
        f"rank={most}, which writes the nearest change of that rank"
    )
