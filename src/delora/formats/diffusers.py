"""A LoRA file for image models, as diffusers' ``pipe.load_lora_weights`` reads it, or with kohya's names for other programs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from delora.ambient import apart
from delora.formats.files import write_atomically
from delora.formats.peft import as_lora
from delora.models import adapted_layers, adapters

__all__ = ["write"]

FILE = "pytorch_lora_weights.safetensors"
KOHYA = {"unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2", "transformer": "lora_transformer"}


@apart
@torch.no_grad()
def write(model: Any, folder: str | os.PathLike[str], name: str | None = None, kohya: bool = False) -> Path:
    """Write the adapters of an image model, at their current strength, as one exact LoRA file, and return its path.

    ``pipe.load_lora_weights(folder)`` reads it.

    Args:
        model: a diffusers pipeline; or its parts by name, ``{"unet": unet, "text_encoder": ...}``; or a U-Net alone.
        folder: where to write; it is created if it does not exist.
        name: the adapter's name; the active one if None.
        kohya: use the names of kohya's scripts (``lora_unet_down_blocks_0_....lora_down.weight`` and ``.alpha``), which
            graphical programs read and diffusers reads as well.

    Raises:
        ValueError: no part has an adapter, or one is not low-rank or not finite. Nothing is written then.

    >>> import delora, tempfile
    >>> unet = delora.inject(nn.Sequential(nn.Linear(4, 4)), delora.DeLoRA(r=2, start="soft"), ["0"])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     delora.export.diffusers(unet, folder).name
    'pytorch_lora_weights.safetensors'
    """
    if isinstance(model, nn.Module):
        parts: Mapping[str, Any] = {"unet": model}
    else:
        parts = model if isinstance(model, Mapping) else getattr(model, "components", {})
    tensors: dict[str, Tensor] = {}
    for part, module in parts.items():
        if isinstance(module, nn.Module) and adapted_layers(module):
            tensors |= _named(part, module, name, kohya)
    if not tensors:
        raise ValueError(f"no part has an adapter: {', '.join(parts) or type(model).__name__}; delora.inject one first")
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{key} holds NaN or infinity: nothing was written to {folder}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    data = {key: tensor.detach().cpu().clone().contiguous() for key, tensor in tensors.items()}
    write_atomically(folder / FILE, to_bytes(data, {"format": "pt"}))
    return folder / FILE


def _named(part: str, module: nn.Module, name: str | None, kohya: bool) -> dict[str, Tensor]:
    chosen = adapters(module, name)
    whole = [layer for layer, a in chosen.items() if a.whole]
    if whole:
        raise ValueError(
            f"{part}.{whole[0]} is trained whole, which a LoRA file cannot hold; delora.merge writes it into the weights"
        )
    if kohya and part not in KOHYA:
        raise ValueError(f"kohya's names know {', '.join(KOHYA)}, not {part!r}")
    _, tensors = as_lora({layer: a for layer, a in chosen.items() if not a.whole})
    named: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        layer, _, end = key.partition(".lora_")
        if end not in ("A.weight", "B.weight"):
            raise ValueError(f"{part}.{layer} is an embedding, which these files cannot hold")
        if kohya:
            stem = f"{KOHYA[part]}_{layer.replace('.', '_')}"
            named[f"{stem}.lora_{'down' if end[0] == 'A' else 'up'}.weight"] = tensor
            if end[0] == "A":
                named[f"{stem}.alpha"] = torch.tensor(float(len(tensor)))  # alpha / rank = 1: the scale is in the factors
        else:
            named[f"{part}.{key}"] = tensor
    return named
