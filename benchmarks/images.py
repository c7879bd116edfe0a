"""What a step of subject-driven generation with Stable Diffusion 1.5 keeps in memory, counted on the real shapes.

    python -m benchmarks.images

One instance and one class picture of 512 x 512, rank 16 on the 128 attention matrices. Tensors are torch's fake ones, without
weights: nothing is computed, every tensor that autograd keeps for the backward pass is counted once. Not counted: the largest
single operation, the autoencoder and the text encoder (0.8 GiB in float32), what the device itself takes.
"""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

import delora
from delora import DeLoRA, DoRA, LoRA

SIZES = {"sample_size": 64, "block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768, "attention_head_dim": 8}
TARGETS = r".*attn[12]\.(to_q|to_k|to_v|to_out\.0)"
METHODS = {"LoRA": LoRA(r=16, alpha=32.0), "DeLoRA": DeLoRA(r=16, start="copy"), "DoRA": DoRA(r=16, alpha=32.0)}
GIB = 2**30


def unet(method: object, dtype: torch.dtype, checkpointing: bool) -> UNet2DConditionModel:
    torch.set_default_dtype(dtype)
    try:
        model = UNet2DConditionModel(**SIZES).requires_grad_(False).train()
    finally:
        torch.set_default_dtype(torch.float32)
    if checkpointing:
        model.enable_gradient_checkpointing()
    return delora.inject(model, method, TARGETS)


def counted(model: UNet2DConditionModel, dtype: torch.dtype) -> tuple[float, float, float]:
    """GiB of the weights, of what is kept for the backward pass, and of the gradients and AdamW's two moments."""
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.Tensor] = {}  # holds them, so that no storage is taken twice

    def pack(t: torch.Tensor) -> torch.Tensor:
        if t.untyped_storage()._cdata not in own:
            kept[t.untyped_storage()._cdata] = t
        return t

    noisy, text = torch.zeros(2, 4, 64, 64, dtype=dtype), torch.zeros(2, 77, 768, dtype=dtype)
    with saved_tensors_hooks(pack, lambda t: t):
        model(noisy, torch.zeros(2, dtype=torch.long), encoder_hidden_states=text)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    training = sum(12 * p.numel() for p in model.parameters() if p.requires_grad)
    return weights / GIB, sum(t.untyped_storage().nbytes() for t in kept.values()) / GIB, training / GIB


def main() -> None:
    print("| | weights | kept for backward | gradients, moments | sum [GiB] |\n|---|---|---|---|---|")
    for dtype in (torch.float32, torch.bfloat16):
        for name, method in METHODS.items():
            for checkpointing in (False, True):
                with FakeTensorMode():
                    parts = counted(unet(method, dtype, checkpointing), dtype)
                kind = f"{name}, {str(dtype).removeprefix('torch.')}{', checkpointing' if checkpointing else ''}"
                print(f"| {kind} | " + " | ".join(f"{x:.2f}" for x in (*parts, sum(parts))) + " |", flush=True)


if __name__ == "__main__":
    main()
