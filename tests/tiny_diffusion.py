"""A text-to-image pipeline of diffusers with Stable Diffusion's parts and names, small and random."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

SIZE = 16  # pixels; latents are 8 x 8
SPECIAL = ["<start>", "<end>", "<unk>"]
WORDS = ["a", "photo", "of", "in", "the", "on", "with", "cat", "dog", "backpack", "red", "purple", "qwe", "snow", "beach"]


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


def picture(pipe: Any, prompt: str = "a photo of qwe dog in the snow") -> torch.Tensor:
    """One image [3, SIZE, SIZE] in [0, 1], always from the same noise."""
    noise = torch.Generator().manual_seed(7)
    image = pipe(prompt, num_inference_steps=3, guidance_scale=3.0, generator=noise, output_type="pt").images[0]
    return image


def save(folder: Path) -> str:
    pipeline().save_pretrained(folder)
    return str(folder)
