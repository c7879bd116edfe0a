"""A model's own GGUF file with an adapter's change in its weights: for llama.cpp and programs built on it, such as Ollama.

Tokenizer, chat template and settings are the file's, and so is every tensor that the adapter leaves alone, bit for bit.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from delora import sharded
from delora.formats.files import write_atomically
from delora.formats.gguf_names import Family, names_of, ordered
from delora.hosts import Quantised, Slot
from delora.layer import Placed
from delora.meeting import writes

__all__ = ["FILE", "MODELFILE", "write"]

FILE, MODELFILE = "model.gguf", "Modelfile"
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def write(
    root: Any, chosen: dict[str, Placed], family: Family, base: Path, folder: Path, dtype: torch.dtype | None = None
) -> Path:
    """Write ``model.gguf``, a copy of the file ``base`` with the adapted layers' weights merged, and a Modelfile for Ollama.

    Args:
        root: the model.
        chosen: its adapted layers.
        family: how llama.cpp holds it.
        base: the GGUF file of the same model without the adapter, of any quantisation.
        folder: where to write.
        dtype: of the merged matrices; None for those of ``base``, and float16 where these are quantised.

    Raises:
        ValueError: a change cannot be written into the weights, or ``base`` is no file of this model. Nothing is written then.
    """
    reader = _read(base, family)
    there = {tensor.name: tensor for tensor in reader.tensors}
    new: dict[str, tuple[str, str, Any]] = {}  # the layer, the name in it and the type, by the name in the file
    for layer, placed in chosen.items():
        changed = _changed(root, family, layer, placed)
        for tensor, key in names_of(root, family, [f"{layer}.{name}" for name in changed]).items():
            if key not in there:
                raise ValueError(f"{base} has no {key}, which {tensor} is in llama.cpp: nothing was written")
            name = tensor[len(layer) + 1 :]
            _require_same(base, there[key], key, _ordered(root, family, tensor, _before(placed, name)), placed)
            new[key] = (layer, name, _kind(there[key], dtype))
            _numbers(key, changed[name], new[key][2])
    if not writes():
        return folder / FILE
    folder.mkdir(parents=True, exist_ok=True)
    with _writing(folder / FILE) as temporary:
        writer = _header(reader, family, temporary)
        for key, t in there.items():
            if key in new:
                shape = tuple(int(n) for n in reversed(t.shape))
                width = {"F32": 4, "F16": 2, "BF16": 2}[new[key][2].name]
                as_type = {"F32": "float32", "F16": "float16", "BF16": "float16"}[new[key][2].name]
                writer.add_tensor_info(key, shape, _numpy(as_type), width * int(t.n_elements), new[key][2])
            else:
                writer.add_tensor_info(key, t.data.shape, t.data.dtype, t.data.nbytes, t.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for key, t in there.items():
            if key in new:
                layer, name, kind = new[key]
                data = _numbers(key, _changed(root, family, layer, chosen[layer])[name], kind)
                writer.write_tensor_data(data)
            else:
                writer.write_tensor_data(t.data)
        writer.close()
    write_atomically(folder / MODELFILE, f"FROM ./{FILE}\n".encode())
    return folder / FILE


def _read(base: Path, family: Family) -> Any:
    import gguf

    try:
        reader = gguf.GGUFReader(base)
        held = reader.get_field(gguf.Keys.General.ARCHITECTURE)
        architecture = None if held is None else held.contents()
        parts = reader.get_field(gguf.Keys.Split.LLM_KV_SPLIT_COUNT)
        count = 0 if parts is None else parts.contents()
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise ValueError(f"{base} is no GGUF file that can be read: {error}") from error
    if architecture != family.name:
        raise ValueError(f"{base} holds a model that llama.cpp calls {architecture!r}, and this one is {family.name!r}")
    if count > 1:
        raise ValueError(f"{base} is one of {count} parts of a model: join them first (llama-gguf-split --merge)")
    if reader.byte_order != "I":
        raise ValueError(f"{base} is of another byte order than this machine")
    return reader


def _changed(root: Any, family: Family, layer: str, placed: Placed) -> dict[str, Tensor]:
    """The layer's tensors with the change in them, as llama.cpp keeps them."""
    if isinstance(placed.base, Slot):
        raise ValueError(f"{layer} is a matrix in a parameter, which is not written into GGUF files; use delora.merge")
    if not placed.mergeable():
        raise ValueError(f"{layer}: {placed.adapter.method} is no change of weights, which alone a file can hold")
    changed = placed.changed()
    return {name: _ordered(root, family, f"{layer}.{name}", sharded.whole(t.detach())) for name, t in changed.items()}


def _before(placed: Placed, name: str) -> Tensor:
    if isinstance(placed.host, Quantised) and name == "weight":
        return placed.frozen.dense()
    return sharded.whole(dict(placed.base.named_parameters())[name].detach())


def _ordered(root: Any, family: Family, tensor: str, t: Tensor) -> Tensor:
    t = ordered(root, family, tensor, t)
    return t + family.adds if tensor.endswith("norm.weight") else t


def _kind(t: Any, dtype: torch.dtype | None) -> Any:
    """The type in which a tensor is written in place of ``t``."""
    import gguf

    kinds = gguf.GGMLQuantizationType
    if len(t.shape) == 1:  # llama.cpp takes norms and biases in float32 alone
        return kinds.F32
    if dtype is not None:
        return kinds[next(name for name, known in FLOATS.items() if known == dtype)]
    return t.tensor_type if t.tensor_type.name in FLOATS else kinds.F16


def _require_same(base: Path, t: Any, key: str, W: Tensor, placed: Placed) -> None:
    """Refuse a file whose tensor is not W to the precision of both; between unlike models |difference| / |weight| is 1.4."""
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[t.tensor_type]
    steps = 0.0 if t.tensor_type.name in FLOATS else 4 * 2.0 ** -(size * 8 // block)  # of numbers of so many bits
    allowed = max(min(0.7, steps), 0.3 if isinstance(placed.host, Quantised) else 2 * torch.finfo(torch.bfloat16).eps)
    shape = [int(n) for n in reversed(t.shape)]
    error = float("inf")
    if shape == list(W.shape):
        W = W.cpu().float()
        held = torch.from_numpy(gguf.dequantize(t.data, t.tensor_type).copy()).view(W.shape)
        error = float((held - W).norm() / W.norm().clamp_min(torch.finfo(W.dtype).tiny))
    if not error <= allowed:
        raise ValueError(
            f"{base} is not the file of this model: its {key} of shape {shape} is not this model's of shape {list(W.shape)} "
            f"(|difference| / |weight| {error:.2g}); nothing was written"
        )


def _numbers(key: str, t: Tensor, kind: Any) -> Any:
    """The numbers of a tensor in a type, as numpy holds them."""
    import gguf

    t = t.cpu().float()
    if not torch.isfinite(t.to(FLOATS[kind.name])).all():
        raise ValueError(f"{key} holds NaN or infinity, or numbers beyond {kind.name}: nothing was written")
    return gguf.quantize(t.contiguous().numpy(), kind)


def _numpy(name: str) -> Any:
    import numpy

    return numpy.dtype(name)


def _header(reader: Any, family: Family, path: Path) -> Any:
    """A writer that has all that the file says of its model."""
    import gguf

    writer = gguf.GGUFWriter(path, family.name)
    for field in reader.fields.values():
        if field.name == gguf.Keys.General.ALIGNMENT:
            writer.add_custom_alignment(field.contents())
        elif field.name != gguf.Keys.General.ARCHITECTURE and not field.name.startswith("GGUF."):
            kind = field.types[0]
            inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), kind, sub_type=inner)
    return writer


@contextmanager
def _writing(file: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of the file when all is well, and is gone otherwise."""
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(8)}.tmp")
    try:
        yield temporary
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
