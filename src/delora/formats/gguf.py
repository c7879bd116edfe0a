"""LoRA adapters for llama.cpp and the programs that are built on it, as one GGUF file.

The reference is llama.cpp itself (github.com/ggml-org/llama.cpp): ``convert_lora_to_gguf.py`` and ``conversion/*.py`` say what
a file holds, ``src/llama-adapter.cpp`` reads it. The names of tensors are those of the ``gguf`` package.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from delora.formats.files import write_atomically
from delora.formats.nearest import Approximation
from delora.formats.peft import as_lora
from delora.meeting import collective, writes
from delora.models import adapters, unwrapped

__all__ = ["write"]

FILE = "adapter.gguf"


@dataclass(frozen=True)
class Family:
    """A kind of model: llama.cpp's name of it, and whether it keeps the rows of q and k in an order of its own.

    In the order of "llama" the two halves of a head that are rotated together alternate (`LlamaModel.permute`).
    """

    name: str
    permutes: bool = False


# By transformers' class, as the converters register them (conversion/llama.py, qwen.py, gemma.py, phi.py).
FAMILIES = {
    "LlamaForCausalLM": Family("llama", permutes=True),
    "MistralForCausalLM": Family("llama", permutes=True),
    "Qwen2ForCausalLM": Family("qwen2"),
    "Qwen3ForCausalLM": Family("qwen3"),
    "GemmaForCausalLM": Family("gemma"),
    "Gemma2ForCausalLM": Family("gemma2"),
    "Gemma3ForCausalLM": Family("gemma3"),
    "Gemma3ForConditionalGeneration": Family("gemma3"),  # its language model
    "PhiForCausalLM": Family("phi2"),
    "Phi3ForCausalLM": Family("phi3"),
}


@collective
@torch.no_grad()
def write(
    model: nn.Module,
    folder: str | os.PathLike[str],
    name: str | None = None,
    rank: int | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write an adapter, at its current strength, as a LoRA for llama.cpp, and return the path of the file.

    ``llama-server -m MODEL.gguf --lora adapter.gguf`` reads it, for a model of any quantisation. A request says its strength:
    ``"lora": [{"id": 0, "scale": 0.5}]``.

    Needs the ``gguf`` package: ``pip install "delora[gguf]"``.

    Args:
        model: a language model of transformers with an adapter: Llama, Mistral, Qwen2, Qwen3, Gemma, Gemma 2, Gemma 3, Phi or
            Phi 3 (also 3.5 and 4).
        folder: where to write ``adapter.gguf``; it is created if it does not exist.
        name: the adapter's name; the active one if None.
        rank: the highest rank to write; a change of a higher one is written as the nearest of this rank, which is told. None
            writes each exactly.
        dtype: the dtype of the factors, float32, float16 or bfloat16; None for float32.

    Raises:
        ValueError: the model is of another kind, or the file cannot hold the change of a layer so that llama.cpp reads it
            right. Nothing is written then.

    Warns:
        UserWarning: layers are not exact beyond rounding; the file's field ``delora.approximation`` has their errors.

    Example:
        >>> import delora
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=20)
        >>> model = delora.inject(LlamaForCausalLM(LlamaConfig(**sizes)), delora.DeLoRA(r=2), ["q_proj"])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     delora.export.gguf(model, folder).name
        'adapter.gguf'
    """
    form = Approximation(rank, torch.float32 if dtype is None else dtype)
    root: Any = unwrapped(model)
    family = next((FAMILIES[kind.__name__] for kind in type(root).__mro__ if kind.__name__ in FAMILIES), None)
    if family is None:
        raise ValueError(
            f"how llama.cpp holds a {type(root).__name__} is not known here, only {', '.join(FAMILIES)}: delora.export.peft "
            "writes what llama.cpp's own convert_lora_to_gguf.py reads, or delora.merge writes the change into the weights"
        )
    chosen = adapters(model, name)
    whole = next((layer for layer, placed in chosen.items() if placed.whole), None)
    if whole is not None:
        raise ValueError(
            f"{whole} is trained whole, which llama.cpp's adapters cannot hold; delora.merge writes it into the weights"
        )
    names = _names(root, family, list(chosen))
    _, tensors = as_lora(chosen, form=form)
    config = root.config.get_text_config()
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for layer, key in names.items():
        if (down := tensors.get(f"{layer}.lora_embedding_A")) is not None:
            factors[key] = (down.T, tensors[f"{layer}.lora_embedding_B"])  # read by rows, as the embedding itself
            continue
        down, up = tensors[f"{layer}.lora_A.weight"], tensors[f"{layer}.lora_B.weight"]
        if family.permutes and layer.endswith(("q_proj", "k_proj")):
            heads = config.num_attention_heads if layer.endswith("q_proj") else config.num_key_value_heads
            up = up.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        factors[key] = (down, up)
    data = _file(family, factors, form)
    form.tell(stacklevel=4)
    folder = Path(folder)
    if not writes():
        return folder / FILE
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / FILE, data)
    return folder / FILE


def _names(root: Any, family: Family, layers: list[str]) -> dict[str, str]:
    """The names of layers in llama.cpp.

    Raises:
        ValueError: one has none, or one that llama.cpp would apply to something else.
    """
    import gguf

    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == family.name)
    table = gguf.get_tensor_name_map(kind, root.config.get_text_config().num_hidden_layers)
    embeddings, head = root.get_input_embeddings(), root.get_output_embeddings()
    tied = head is None or head.weight is embeddings.weight or gguf.MODEL_TENSOR.OUTPUT not in gguf.MODEL_TENSORS[kind]
    names = {}
    for layer in layers:
        plain = layer.replace("model.language_model.", "model.", 1)
        key = table.get_name(f"{plain}.weight", try_suffixes=(".weight",))
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
        names[layer] = key
    return names


def _file(family: Family, factors: Mapping[str, tuple[Tensor, Tensor]], form: Approximation) -> bytes:
    """The bytes of a file. It has one alpha, by which llama.cpp scales each product by alpha / rank."""
    import gguf

    alpha = Counter(up.shape[1] for _, up in factors.values()).most_common(1)[0][0]
    kinds = {torch.float16: gguf.GGMLQuantizationType.F16, torch.bfloat16: gguf.GGMLQuantizationType.BF16}
    with tempfile.TemporaryDirectory() as folder:
        writer = gguf.GGUFWriter(Path(folder) / FILE, family.name)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(alpha))
        for key, text in form.header().items():
            writer.add_string(key, text)
        for key, (down, up) in factors.items():
            rank = up.shape[1]
            for end, t in (("lora_a", down), ("lora_b", up if rank == alpha else up * (rank / alpha))):
                t = form.cast(t)
                if not torch.isfinite(t).all():
                    raise ValueError(f"{key}.{end} holds NaN or infinity: nothing was written")
                kind = kinds.get(t.dtype, gguf.GGMLQuantizationType.F32)
                numbers = gguf.quantize(t.detach().cpu().float().contiguous().numpy(), kind)
                writer.add_tensor(f"{key}.{end}", numbers, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return (Path(folder) / FILE).read_bytes()
