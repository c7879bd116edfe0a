"""How many parameters train, on the real shapes: models on the meta device, from configuration classes alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, RobertaConfig, RobertaModel

import delora
from delora import (
    ETHER,
    HRA,
    IA3,
    OFT,
    RED,
    BitFit,
    Bottleneck,
    DeLoRA,
    DoRA,
    EtherPlus,
    Full,
    LoRA,
    LoReFT,
    NBLoRA,
)

DOCS = Path(__file__).parents[1] / "docs" / "methods.md"


def roberta() -> nn.Module:
    config = RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)
    return RobertaModel(config, add_pooling_layer=False)


def unet() -> nn.Module:
    """Stable Diffusion v1.5's, as its configuration file describes it."""
    return UNet2DConditionModel(
        sample_size=64, block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768, attention_head_dim=8
    )


def llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig())  # whose defaults are LLaMA-2-7B's sizes


MODELS = {"RoBERTa-base": roberta, "Stable Diffusion v1.5": unet, "LLaMA-2-7B": llama}

LINEARS_AND_NORMS = r"encoder\.layer\..*(query|key|value|dense|LayerNorm)"
FFN_OUT = r"encoder\.layer\.\d+\.output\.dense"
BOTH_OUT = r"encoder\.layer\.\d+\.(attention\.)?output\.dense"
ATTENTION = r".*attn[12]\.(to_q|to_k|to_v|to_out\.0)"


@dataclass(frozen=True)
class Row:
    """One figure: ``name`` is the docs' row, ``paper`` what the paper prints (None: it prints nothing)."""

    model: str
    name: str
    method: Any
    targets: Any
    count: int
    paper: str | None
    layers: int | None = None
    options: dict[str, Any] = field(default_factory=dict, hash=False)


def roberta_row(name, method, targets, count, paper, **options):
    return Row("RoBERTa-base", name, method, targets, count, paper, options=options)


def unet_row(name, method, count, paper):
    return Row("Stable Diffusion v1.5", name, method, ATTENTION, count, paper, layers=128)


def llama_row(name, method, count, paper):
    return Row("LLaMA-2-7B", name, method, ["q_proj", "v_proj"], count, paper, layers=64)


QV = ["query", "value"]
IA3_PLACES = r"encoder\.layer\.\d+\.(attention\.self\.(key|value)|output\.dense)"
ROWS = [
    roberta_row("full finetuning", Full(), ["encoder", "embeddings"], 124_055_040, "125M"),
    roberta_row("BitFit", BitFit(), LINEARS_AND_NORMS, 101_376, "0.1M"),
    roberta_row("BitFit, embedding norm too", BitFit(), LINEARS_AND_NORMS + "|embeddings.LayerNorm", 102_144, "0.1M"),
    roberta_row("(IA)^3", IA3(), IA3_PLACES, 55_296, "0.06M", overrides={r"output\.dense": {"side": "input"}}),
    roberta_row("LoReFT, r = 1", LoReFT(r=1), r"encoder\.layer\.\d+\.output", 18_444, "0.02M"),
    roberta_row("RED", RED(), FFN_OUT, 18_432, "0.02M"),
    roberta_row("LoRA, r = 8", LoRA(r=8), QV, 294_912, "0.3M"),
    roberta_row("adapter (Pfeiffer), size 16", Bottleneck(16), FFN_OUT, 304_320, "0.3M"),
    roberta_row("adapter (Houlsby), size 10", Bottleneck(10), BOTH_OUT, 387_312, "0.4M"),
    roberta_row("adapter (Houlsby), size 8", Bottleneck(8), BOTH_OUT, 313_536, None),
    roberta_row("adapter (Houlsby), size 16", Bottleneck(16), BOTH_OUT, 608_640, None),
    roberta_row("DeLoRA, r = 8", DeLoRA(r=8, learn_lam=True), QV, 294_936, "0.3M"),
    roberta_row("NB-LoRA, r = 8", NBLoRA(r=8), QV, 294_912, None),
    roberta_row("HRA, r = 8", HRA(r=8), QV, 147_456, None),
    Row("Stable Diffusion v1.5", "full finetuning (DreamBooth)", Full(), r"[^.]*", 859_520_964, "859.5M"),
    unet_row("OFT, n = 4", OFT(blocks=4), 11_602_368, "11.6M"),
    unet_row("ETHER+, two-sided, any n", EtherPlus(blocks=4), 398_592, "0.4M"),
    unet_row("LoRA, r = 4", LoRA(r=4), 797_184, "0.8M"),
    unet_row("LoRA, r = 16", LoRA(r=16), 3_188_736, "3.2M"),
    unet_row("DoRA, r = 16", DoRA(r=16), 3_288_576, "3.2M"),
    unet_row("DeLoRA, r = 16", DeLoRA(r=16, learn_lam=True), 3_188_864, "3.2M"),
    llama_row("LoRA, r = 8", LoRA(r=8), 4_194_304, "4.19M"),
    llama_row("DoRA, r = 8", DoRA(r=8), 4_456_448, "4.19M"),
    llama_row("NB-LoRA, r = 8", NBLoRA(r=8), 4_194_304, None),
    llama_row("HRA, r = 8", HRA(r=8), 2_097_152, None),
    llama_row("ETHER, n = 32", ETHER(blocks=32), 262_144, "0.26M"),
    llama_row("ETHER+, two-sided, n = 32", EtherPlus(blocks=32), 1_048_576, "1.04M"),
    llama_row("DeLoRA, r = 8", DeLoRA(r=8, learn_lam=True), 4_194_304 + 64, "4.19M"),
]


@cache
def on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return MODELS[name]()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.model}, {row.name}")
def test_the_number_of_trained_parameters(row):
    model = on_meta(row.model)
    try:
        delora.inject(model, row.method, row.targets, **row.options)
        summary = delora.summary(model)
        assert summary.trainable == row.count
        if row.layers is not None:
            assert sum(layers for _, layers, _ in summary.rows) == row.layers
    finally:
        delora.eject(model)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.model}, {row.name}")
def test_the_docs_print_it(row):
    """Each row of the table of docs/methods.md: model, method, the paper's figure, ours."""
    assert f"| {row.model} | {row.name} | {row.paper or '–'} | {row.count:,} |" in DOCS.read_text("utf-8")


@pytest.mark.parametrize("model", MODELS)
def test_one_of_the_counts_from_the_shapes(model):
    """LoRA's count by its formula, r (in + out) for each matrix, without the library."""
    row = next(row for row in ROWS if row.model == model and isinstance(row.method, LoRA))
    ends = ("to_q", "to_k", "to_v", "to_out.0") if "Stable" in model else ("query", "value", "q_proj", "v_proj")
    shapes = [m.weight.shape for n, m in on_meta(model).named_modules() if n.endswith(ends) and isinstance(m, nn.Linear)]
    assert row.method.r * sum(map(sum, shapes)) == row.count
