"""What llama.cpp calls the models and weights of transformers, and in which order it keeps them.

The reference is llama.cpp's converter, ``conversion/*.py``; the names of tensors are those of the ``gguf`` package.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor

__all__ = ["FAMILIES", "Family", "family_of", "is_tied", "names_of", "ordered"]


@dataclass(frozen=True)
class Family:
    """A kind of model: llama.cpp's name of it, and what its converter does to weights beside renaming them.

    ``permutes``: in the order of "llama" the two halves of a head that are rotated together alternate (`LlamaModel.permute`).
    ``adds``: what is added to the weights of norms, which transformers keeps as their distance from 1.
    """

    name: str
    permutes: bool = False
    adds: float = 0.0


# By transformers' class, as the converters register them (conversion/llama.py, qwen.py, gemma.py, phi.py).
FAMILIES = {
    "LlamaForCausalLM": Family("llama", permutes=True),
    "MistralForCausalLM": Family("llama", permutes=True),
    "Qwen2ForCausalLM": Family("qwen2"),
    "Qwen3ForCausalLM": Family("qwen3"),
    "GemmaForCausalLM": Family("gemma", adds=1.0),
    "Gemma2ForCausalLM": Family("gemma2", adds=1.0),
    "Gemma3ForCausalLM": Family("gemma3", adds=1.0),
    "Gemma3ForConditionalGeneration": Family("gemma3", adds=1.0),  # its language model
    "PhiForCausalLM": Family("phi2"),
    "Phi3ForCausalLM": Family("phi3"),
}


def family_of(root: Any) -> Family:
    """The family of a model.

    Raises:
        ValueError: it is not known here.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=20)
    >>> family_of(LlamaForCausalLM(LlamaConfig(**sizes))).name
    'llama'
    """
    family = next((FAMILIES[kind.__name__] for kind in type(root).__mro__ if kind.__name__ in FAMILIES), None)
    if family is None:
        raise ValueError(
            f"how llama.cpp holds a {type(root).__name__} is not known here, only {', '.join(FAMILIES)}: delora.export.peft "
            "writes what llama.cpp's own convert_lora_to_gguf.py reads, or delora.merge writes the change into the weights"
        )
    return family


def _kind(name: str) -> Any:
    import gguf

    return next(kind for kind, known in gguf.MODEL_ARCH_NAMES.items() if known == name)


@cache
def _table(name: str, layers: int) -> Any:
    import gguf

    return gguf.get_tensor_name_map(_kind(name), layers)


def is_tied(root: Any, family: Family) -> bool:
    """Whether embedding and head are one matrix in llama.cpp.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=20)
    >>> model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True))
    >>> is_tied(model, family_of(model))
    True
    """
    import gguf

    embeddings, head = root.get_input_embeddings(), root.get_output_embeddings()
    return (
        head is None
        or head.weight is embeddings.weight
        or gguf.MODEL_TENSOR.OUTPUT not in gguf.MODEL_TENSORS[_kind(family.name)]
    )


def names_of(root: Any, family: Family, tensors: list[str]) -> dict[str, str]:
    """The names of tensors in llama.cpp.

    Raises:
        ValueError: one has none, or one that llama.cpp would apply to something else.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=20)
    >>> model = LlamaForCausalLM(LlamaConfig(**sizes))
    >>> names_of(model, family_of(model), ["lm_head.weight"])
    {'lm_head.weight': 'output.weight'}
    """
    tied, names = is_tied(root, family), {}
    table = _table(family.name, root.config.get_text_config().num_hidden_layers)
    for tensor in tensors:
        layer = tensor.rpartition(".")[0]
        key = table.get_name(tensor.replace("model.language_model.", "model.", 1), try_suffixes=(".weight", ".bias"))
        if key is None:
            raise ValueError(
                f"{layer} has no name in llama.cpp's {family.name!r} models: leave it out of targets, or delora.merge writes "
                "its change into the weights"
            )
        if tied and key in ("token_embd.weight", "output.weight"):
            raise ValueError(
                f"{layer}: embedding and head of this model are one matrix in llama.cpp, which cannot adapt one of them alone: "
                "leave it out of targets, or delora.merge writes its change into the weights"
            )
        names[tensor] = key
    return names


def ordered(root: Any, family: Family, tensor: str, t: Tensor) -> Tensor:
    """A weight or bias, or a factor with as many rows, with its rows in llama.cpp's order.

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = dict(hidden_size=4, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=20)
    >>> model = LlamaForCausalLM(LlamaConfig(**sizes))
    >>> ordered(model, family_of(model), "model.layers.0.self_attn.q_proj.bias", torch.arange(4))
    tensor([0, 2, 1, 3])
    """
    layer = tensor.rpartition(".")[0]
    if family.permutes and layer.endswith(("q_proj", "k_proj")):
        config = root.config.get_text_config()
        heads = config.num_attention_heads if layer.endswith("q_proj") else config.num_key_value_heads
        return t.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
    return t
