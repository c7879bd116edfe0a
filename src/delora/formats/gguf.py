"""LoRA adapters for llama.cpp and the programs that are built on it, as one GGUF file.

The reference is llama.cpp itself (github.com/ggml-org/llama.cpp): ``convert_lora_to_gguf.py`` and ``conversion/*.py`` say what
a file holds, ``src/llama-adapter.cpp`` reads it. The names of tensors are those of the ``gguf`` package.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from delora.formats import gguf_merged
from delora.formats.files import write_atomically
from delora.formats.gguf_names import Family, family_of, names_of, ordered
from delora.formats.nearest import Approximation
from delora.formats.peft import as_lora
from delora.meeting import collective, writes
from delora.models import by_layer, unwrapped

__all__ = ["write"]

FILE = "adapter.gguf"


@collective
@torch.no_grad()
def write(
    model: nn.Module,
    folder: str | os.PathLike[str],
    name: str | None = None,
    rank: int | None = None,
    dtype: torch.dtype | None = None,
    base: str | os.PathLike[str] | None = None,
) -> Path:
    """Write an adapter, at its current strength, as a LoRA for llama.cpp, and return the path of the file.

    ``llama-server -m MODEL.gguf --lora adapter.gguf`` reads it, for a model of any quantisation. A request says its strength:
    ``"lora": [{"id": 0, "scale": 0.5}]``.

    With ``base`` the change is merged instead: ``model.gguf`` is a copy of that file with the adapted layers' weights, also of
    changes that are not low-rank and of modules that are trained whole, and a ``Modelfile`` is beside it:
    ``ollama create mine -f Modelfile``.

    Needs the ``gguf`` package: ``pip install "delora[gguf]"``.

    Args:
        model: a language model of transformers with an adapter: Llama, Mistral, Qwen2, Qwen3, Gemma, Gemma 2, Gemma 3, Phi or
            Phi 3 (also 3.5 and 4).
        folder: where to write ``adapter.gguf``, or ``model.gguf``; it is created if it does not exist.
        name: the adapter's name; the active one if None.
        rank: the highest rank to write; a change of a higher one is written as the nearest of this rank, which is told. None
            writes each exactly.
        dtype: the dtype of the factors, float32, float16 or bfloat16; None for float32. With ``base``, of the merged matrices;
            None for that file's own, and float16 where they are quantised.
        base: the model's own GGUF file, of any quantisation, to merge into. It is left as it is.

    Raises:
        ValueError: the model is of another kind, ``base`` is the file of another model, or a file cannot hold the change of a
            layer so that llama.cpp reads it right. Nothing is written then.

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
    family = family_of(root)
    chosen = by_layer(model, name)
    if base is not None:
        if rank is not None:
            raise ValueError(f"rank = {rank}: with base, weights are written, which have no rank; leave one of them out")
        return gguf_merged.write(root, chosen, family, Path(base), Path(folder), dtype)
    whole = next((layer for layer, placed in chosen.items() if placed.whole), None)
    if whole is not None:
        raise ValueError(
            f"{whole} is trained whole, which llama.cpp's adapters cannot hold: give base=, the model's own GGUF file, into a "
            "copy of which all is then merged"
        )
    names = names_of(root, family, [f"{layer}.weight" for layer in chosen])
    _, tensors = as_lora(chosen, form=form)
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for weight, key in names.items():
        layer = weight.removesuffix(".weight")
        if (down := tensors.get(f"{layer}.lora_embedding_A")) is not None:
            factors[key] = (down.T, tensors[f"{layer}.lora_embedding_B"])  # read by rows, as the embedding itself
            continue
        down, up = tensors[f"{layer}.lora_A.weight"], tensors[f"{layer}.lora_B.weight"]
        factors[key] = (down, ordered(root, family, weight, up))
    data = _file(family, factors, form)
    form.tell(stacklevel=4)
    folder = Path(folder)
    if not writes():
        return folder / FILE
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / FILE, data)
    return folder / FILE


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
