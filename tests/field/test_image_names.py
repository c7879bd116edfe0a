"""1l. The LoRA files of image models: every name is one that the programs read, and the pictures are the same."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

import delora
from delora import DeLoRA, LoRA
from delora.models import adapted_layers
from tests import tiny_diffusion
from tests.cases import shake

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # diffusers calls names of peft that are to go
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning"),
]

VOCABULARY = len(tiny_diffusion.SPECIAL) + len(tiny_diffusion.WORDS)
BLOCKS: dict[str, Any] = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8}


def clip(kind: type, width: int = 16) -> Any:
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    return kind(CLIPTextConfig(vocab_size=VOCABULARY, max_position_embeddings=16, projection_dim=width, **sizes, **ids))


def t5(width: int) -> T5EncoderModel:
    sizes = {"d_model": width, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    return T5EncoderModel(T5Config(vocab_size=VOCABULARY, feed_forward_proj="gated-gelu", **sizes)).eval()


def vae(channels: int) -> AutoencoderKL:
    down, up = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2
    return AutoencoderKL(
        sample_size=16, down_block_types=down, up_block_types=up, latent_channels=channels, shift_factor=0.0, **BLOCKS
    )


def sdxl(deep: bool = False) -> Any:
    """Stable Diffusion XL's blocks; or, deep, one more of them, as its refiner has."""
    torch.manual_seed(0)
    more = ("DownBlock2D",) * deep
    unet = UNet2DConditionModel(
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", *more),
        up_block_types=(*("UpBlock2D",) * deep, "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 8, 16, *(16,) * deep),
        transformer_layers_per_block=(1, 1, 2, *(1,) * deep),
        norm_num_groups=4,
        cross_attention_dim=32,
        attention_head_dim=4,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
    )
    return StableDiffusionXLPipeline(
        vae(4),
        clip(CLIPTextModel),
        clip(CLIPTextModelWithProjection),
        tiny_diffusion.tokenizer(),
        tiny_diffusion.tokenizer(),
        unet,
        tiny_diffusion.pipeline().scheduler,
    )


def sd3() -> Any:
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        transformer,
        FlowMatchEulerDiscreteScheduler(),
        vae(4),
        clip(CLIPTextModelWithProjection),
        tiny_diffusion.tokenizer(),
        clip(CLIPTextModelWithProjection),
        tiny_diffusion.tokenizer(),
        t5(32),
        tiny_diffusion.tokenizer(),
    )


def flux() -> Any:
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
    )
    return FluxPipeline(
        FlowMatchEulerDiscreteScheduler(),
        vae(1),
        clip(CLIPTextModel),
        tiny_diffusion.tokenizer(),
        t5(32),
        tiny_diffusion.tokenizer(),
        transformer,
    )


PIPELINES: dict[str, Callable[[], Any]] = {
    "sd": tiny_diffusion.pipeline,
    "sdxl": sdxl,
    "refiner": functools.partial(sdxl, deep=True),
    "sd3": sd3,
    "flux": flux,
}


def picture(pipe: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(7)
    size = {} if type(pipe).__name__ == "StableDiffusionPipeline" else {"height": 16, "width": 16}
    if type(pipe).__name__ in ("FluxPipeline", "StableDiffusion3Pipeline"):
        size["max_sequence_length"] = 16
    prompt, steps = "a photo of qwe dog in the snow", 2
    with torch.no_grad():
        return pipe(prompt, num_inference_steps=steps, guidance_scale=3.0, generator=noise, output_type="pt", **size).images[0]


PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2")
FLUX_FIRST = re.compile(r"single_transformer_blocks\.\d+\.(attn\.to_[qkv]|proj_mlp)")


def layers(kind: str, part: str, module: nn.Module, kohya: bool) -> list[str]:
    """All layers that the programs read."""
    names = [name for name, layer in module.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
    if part.startswith("text_encoder"):
        return [] if isinstance(module, T5EncoderModel) else [name for name in names if name != "text_projection"]
    if kind == "refiner" and kohya:  # diffusers reads no add_embedding by its own name
        return [name for name in names if not name.startswith("add_")]
    if kind == "flux" and kohya:  # of other layers diffusers drops the names; the first of a single block is cut for real sizes
        return [name for name in names if "blocks." in name and not FLUX_FIRST.fullmatch(name)]
    return names


def adapt(kind: str, pipe: Any, kohya: bool, variant: str) -> None:
    """Adapters in every layer that the programs read, away from where they start."""
    torch.manual_seed(1)
    for part in PARTS:
        module = getattr(pipe, part, None)
        targets = [] if module is None else layers(kind, part, module, kohya)
        if not targets:
            continue
        overrides = {} if variant == "plain" else {r".*(to_k|add_v_proj|fc1|k_proj)": {"r": 1}, r".*(net\.2|proj)": {"r": 4}}
        delora.inject(module, DeLoRA(r=2, lam=4.0), targets, overrides=overrides)
        with torch.no_grad():
            shake(module)
        if variant == "blend":
            delora.inject(module, LoRA(r=3, alpha=3.0), targets[::2], name="second")
            with torch.no_grad():
                shake(module, 0.1)
            delora.blend(module, {"default": 0.7, "second": 0.5}, "mixed")
            delora.activate(module, "mixed")
        elif variant in ("0.5", "1.5"):
            delora.strength(module, float(variant))


def loaded(kind: str, folder: Any) -> tuple[Any, list[str]]:
    """A fresh pipeline with a file loaded by diffusers, and what diffusers complained of."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    fresh = PIPELINES[kind]()
    logging.getLogger("diffusers").addHandler(handler)
    try:
        fresh.load_lora_weights(folder)
    finally:
        logging.getLogger("diffusers").removeHandler(handler)
    return fresh, messages


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["plain", "ranks", "blend", "0.5", "1.5"])
@pytest.mark.parametrize(
    ("kind", "kohya"),
    [
        ("sd", False),
        ("sd", True),
        ("sdxl", False),
        ("sdxl", True),
        ("sd3", False),
        ("flux", False),
        ("flux", True),
        ("refiner", True),
    ],
)
def test_diffusers_gives_the_same_picture(kind, kohya, variant, tmp_path):
    """And loads every layer: none is dropped, none is added."""
    pipe = PIPELINES[kind]()
    base = picture(pipe)
    adapt(kind, pipe, kohya, variant)
    expected = picture(pipe)
    assert (expected - base).abs().max() > 0.01, "the adapters do nothing: the test has nothing to tell"
    delora.export.diffusers(pipe, tmp_path, kohya=kohya)
    fresh, messages = loaded(kind, tmp_path)
    assert messages == []
    for part in PARTS:
        module = getattr(pipe, part, None)
        if module is not None:
            tuned = [name for name, layer in getattr(fresh, part).named_modules() if isinstance(layer, BaseTunerLayer)]
            assert sorted(tuned) == sorted(adapted_layers(module))
    torch.testing.assert_close(picture(fresh), expected, rtol=1e-4, atol=1e-4)  # a few steps, sums in another order
