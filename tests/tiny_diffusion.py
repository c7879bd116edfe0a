"""Text-to-image pipelines of diffusers with the parts and names of known models, small and random."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

SIZE = 16  # pixels; latents are 8 x 8
SPECIAL = ["<start>", "<end>", "<unk>"]
WORDS = ["a", "photo", "of", "in", "the", "on", "with", "cat", "dog", "backpack", "red", "purple", "qwe", "snow", "beach"]


VOCABULARY = len(SPECIAL) + len(WORDS)
BLOCKS: dict[str, Any] = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8}


def tokenizer() -> PreTrainedTokenizerFast:
    words = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    tokens = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokens.pre_tokenizer = Whitespace()
    tokens.post_processor = TemplateProcessing(single="<start> $A <end>", special_tokens=[("<start>", 0), ("<end>", 1)])
    names = {"bos_token": "<start>", "eos_token": "<end>", "unk_token": "<unk>", "pad_token": "<end>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokens, model_max_length=16, **names)


def pipeline() -> Any:
    torch.manual_seed(0)
    blocks: dict[str, Any] = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8}
    unet = UNet2DConditionModel(
        sample_size=SIZE // 2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        **blocks,
    )
    vae = AutoencoderKL(
        sample_size=SIZE,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        **blocks,
    )
    width = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPTextConfig(vocab_size=len(SPECIAL) + len(WORDS), max_position_embeddings=16, eos_token_id=1, **width)
    scheduler = DDIMScheduler(
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
    )
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(config),
        tokenizer=tokenizer(),
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


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
        sample_size=16, down_block_types=down, up_block_types=up, latent_channels=channels, shift_factor=0.1, **BLOCKS
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
        tokenizer(),
        tokenizer(),
        unet,
        pipeline().scheduler,
    )


def sd3() -> Any:
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        pos_embed_max_size=16,
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
        tokenizer(),
        clip(CLIPTextModelWithProjection),
        tokenizer(),
        t5(32),
        tokenizer(),
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
        tokenizer(),
        t5(32),
        tokenizer(),
        transformer,
    )


def picture(pipe: Any, prompt: str = "a photo of qwe dog in the snow") -> torch.Tensor:
    """One image [3, SIZE, SIZE] in [0, 1], always from the same noise."""
    noise = torch.Generator().manual_seed(7)
    image = pipe(prompt, num_inference_steps=3, guidance_scale=3.0, generator=noise, output_type="pt").images[0]
    return image


def save(folder: Path) -> str:
    pipeline().save_pretrained(folder)
    return str(folder)
