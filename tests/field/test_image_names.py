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
    FluxPipeline,
    FluxTransformer2DModel,
)
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel

import delora
from delora import DeLoRA, LoRA
from delora.models import adapted_layers, adapters
from tests import tiny_diffusion
from tests.cases import shake

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # diffusers calls names of peft that are to go
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning"),
]

PIPELINES: dict[str, Callable[[], Any]] = {
    "sd": tiny_diffusion.pipeline,
    "sdxl": tiny_diffusion.sdxl,
    "refiner": functools.partial(tiny_diffusion.sdxl, deep=True),
    "sd3": tiny_diffusion.sd3,
    "flux": tiny_diffusion.flux,
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
    assert (expected - base).abs().max() > 1e-3, "the adapters do nothing: the test has nothing to tell"
    delora.export.diffusers(pipe, tmp_path, kohya=kohya)
    fresh, messages = loaded(kind, tmp_path)
    assert messages == []
    for part in PARTS:
        module = getattr(pipe, part, None)
        if module is not None:
            tuned = [name for name, layer in getattr(fresh, part).named_modules() if isinstance(layer, BaseTunerLayer)]
            assert sorted(tuned) == sorted(adapted_layers(module))
    torch.testing.assert_close(picture(fresh), expected, rtol=1e-4, atol=1e-4)  # a few steps, sums in another order


@pytest.mark.slow
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["fc1", "fc2"], ["q_proj", "fc2"], ["out_proj"]], ids="+".join)
@pytest.mark.parametrize(
    ("kind", "kohya"),
    [("sd", False), ("sd", True), ("sdxl", False), ("sdxl", True), ("sd3", False), ("flux", False), ("flux", True)],
)
def test_some_layers_of_text_encoders(kind, kohya, targets, tmp_path):
    """diffusers stops, or drops layers, if no output projection is in a file; then the file has one, of a change of zero."""
    pipe = PIPELINES[kind]()
    base = picture(pipe)
    torch.manual_seed(1)
    for part in ("text_encoder", "text_encoder_2"):
        module = getattr(pipe, part, None)
        if module is not None and not isinstance(module, T5EncoderModel):
            delora.inject(module, DeLoRA(r=2, lam=16.0), targets)
            with torch.no_grad():
                shake(module)
    expected = picture(pipe)
    assert (expected - base).abs().max() > 0.003
    delora.export.diffusers(pipe, tmp_path, kohya=kohya)
    fresh, messages = loaded(kind, tmp_path)
    assert [message for message in messages if "No LoRA keys associated to" not in message] == []  # it has none but these
    torch.testing.assert_close(picture(fresh), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kohya", [False, True])
def test_text_encoders_of_old_and_new_transformers_are_one_in_files(kohya, tmp_path):
    """CLIPTextModel had ``text_model.`` in its names until transformers 5.6, as CLIPTextModelWithProjection still has."""
    pipe = tiny_diffusion.pipeline()
    names, keys = [], []
    for kind in (CLIPTextModel, CLIPTextModelWithProjection):
        encoder = delora.inject(tiny_diffusion.clip(kind), LoRA(r=2), ["q_proj", "out_proj"])
        names.append(list(adapted_layers(encoder)))
        file = delora.export.diffusers({"unet": pipe.unet, "text_encoder": encoder}, tmp_path / kind.__name__, kohya=kohya)
        keys.append(set(load_file(file)))
    assert names[1] == [f"text_model.{name}" for name in names[0]], "the two are named alike: the test has nothing to tell"
    assert keys[0] == keys[1]
    start = "lora_te_text_model_encoder_layers_" if kohya else "text_encoder.text_model.encoder.layers."
    assert all(key.startswith(start) for key in keys[0])


# ---------------------------------------------------------------- against the published tables

# What a LoRA's names may be, from the tables of the programs that read them:
#   unet_to_diffusers, mmdit_to_diffusers and flux_to_diffusers in comfy/utils.py, LORA_CLIP_MAP and model_lora_keys_clip in
#   comfy/lora.py (github.com/comfyanonymous/ComfyUI);
#   networks/lora.py, lora_sd3.py, lora_flux.py, convert_flux_lora.py, library/sdxl_model_util.py
#   (github.com/kohya-ss/sd-scripts): the prefixes, and the names of Stable Diffusion XL's first code.
ENCODER = r"_text_model_encoder_layers_\d+_(self_attn_[qkv]_proj|self_attn_out_proj|mlp_fc1|mlp_fc2)"
INNER = r"(proj_in|proj_out|transformer_blocks_\d+_(attn[12]_to_(q|k|v|out_0)|ff_net_(0_proj|2)))"
RESNET, FIRST_RESNET = r"(conv1|conv2|time_emb_proj|conv_shortcut)", r"(in_layers_2|out_layers_3|emb_layers_1|skip_connection)"
TABLES = {
    "sd": rf"lora_te{ENCODER}|lora_unet_(conv_in|conv_out|time_embedding_linear_[12]|((down|up)_blocks_\d|mid_block)_"
    rf"(attentions_\d_{INNER}|resnets_\d_{RESNET}|(down|up)samplers_0_conv))",
    "sdxl": rf"lora_te[12]{ENCODER}|lora_unet_(input_blocks_0_0|out_2|time_embed_[02]|label_emb_0_[02]|"
    rf"((in|out)put_blocks_\d|middle_block)_(1_{INNER}|[02]_{FIRST_RESNET})|input_blocks_[36]_0_op|output_blocks_[25]_2_conv)",
    "sd3": rf"lora_te[12]{ENCODER}|lora_te3_encoder_block_\d+_layer_[01]_(SelfAttention_[qkvo]|DenseReluDense_(wi_0|wi_1|wo))|"
    r"lora_unet_(joint_blocks_\d+_(x|context)_block_(adaLN_modulation_1|attn2?_(qkv|proj)|mlp_fc[12])|context_embedder|"
    r"x_embedder_proj|[ty]_embedder_mlp_[02]|final_layer_(adaLN_modulation_1|linear))",
    "flux": rf"lora_te1{ENCODER}|lora_unet_(double_blocks_\d+_(img|txt)_(mod_lin|attn_(qkv|proj)|mlp_[02])|"
    r"single_blocks_\d+_(modulation_lin|linear1|linear2))",
}


@pytest.mark.parametrize("kind", TABLES)
def test_kohyas_names_are_in_the_published_tables(kind, tmp_path):
    pipe = PIPELINES[kind]()
    for part in (*PARTS, "text_encoder_3"):
        module = getattr(pipe, part, None)
        targets = [] if module is None else layers(kind, part, module, kohya=kind != "flux")
        if kind == "flux":
            targets = [name for name in targets if "blocks." in name or "layers." in name]
        if part == "text_encoder_3" and module is not None:
            targets = ["q", "o", "wi_0", "wo"]
        if targets:
            delora.inject(module, LoRA(r=2), targets)
    tensors = load_file(delora.export.diffusers(pipe, tmp_path, kohya=True))
    stems = {key.partition(".")[0] for key in tensors}
    assert [stem for stem in stems if not re.fullmatch(TABLES[kind], stem)] == []
    assert set(tensors) == {f"{stem}.{end}" for stem in stems for end in ("lora_down.weight", "lora_up.weight", "alpha")}
    assert len({float(t) for key, t in tensors.items() if key.endswith(".alpha")}) == 1
    examples = {
        "sd": ["lora_te_text_model_encoder_layers_0_mlp_fc1", "lora_unet_mid_block_attentions_0_proj_in"],
        "sdxl": [
            "lora_te1_text_model_encoder_layers_0_mlp_fc1",
            "lora_te2_text_model_encoder_layers_1_self_attn_q_proj",
            "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
            "lora_unet_output_blocks_2_2_conv",
            "lora_unet_input_blocks_3_0_op",
            "lora_unet_middle_block_2_in_layers_2",
            "lora_unet_label_emb_0_2",
        ],
        "sd3": [
            "lora_unet_joint_blocks_0_context_block_attn_qkv",
            "lora_unet_joint_blocks_1_x_block_mlp_fc2",
            "lora_te3_encoder_block_0_layer_0_SelfAttention_q",
        ],
        "flux": [
            "lora_unet_double_blocks_0_img_mlp_0",
            "lora_unet_double_blocks_0_txt_attn_qkv",
            "lora_unet_single_blocks_1_linear1",
            "lora_te1_text_model_encoder_layers_0_mlp_fc1",
        ],
    }[kind]
    assert set(examples) <= stems


class FirstCode(dict):
    """A checkpoint of SD3's first code that holds the changes of a file of kohya's, and zeros for all else."""

    def __init__(self, changes: dict[str, torch.Tensor]) -> None:
        blocks = {f"joint_blocks.{i}.x_block.attn2.qkv.weight" if i == 0 else f"joint_blocks.{i}.x" for i in range(2)}
        super().__init__(dict.fromkeys(blocks))
        self.changes = changes

    def __missing__(self, key: str) -> torch.Tensor:
        return torch.zeros(6, 1)

    def pop(self, key: str) -> torch.Tensor:  # type: ignore[override]
        name = f"lora_unet_{key.removesuffix('.weight').replace('.', '_')}"
        return self.changes.pop(name) if key.endswith(".weight") and name in self.changes else torch.zeros(6, 1)


@pytest.mark.parametrize("variant", ["plain", "ranks", "blend", "0.5", "1.5"])
def test_kohyas_names_of_sd3_are_those_of_its_first_code(variant, tmp_path):
    """As diffusers converts SD3's published checkpoints, whose names kohya's scripts and ComfyUI use."""
    pipe, fresh = tiny_diffusion.sd3(), tiny_diffusion.sd3()
    adapt("sd3", pipe, True, variant)
    tensors = load_file(delora.export.diffusers({"transformer": pipe.transformer}, tmp_path, kohya=True))
    changes = {}
    for name in {key.partition(".")[0] for key in tensors}:
        down, up = tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"]
        scale = tensors[f"{name}.alpha"] / len(down)
        changes[name] = (scale * up.flatten(1) @ down.flatten(1)).reshape(len(up), *down.shape[1:])
    checkpoint = FirstCode(changes)
    converted = convert_sd3_transformer_checkpoint_to_diffusers(checkpoint)
    assert checkpoint.changes == {}, "names that SD3's first code does not have"
    for layer, placed in adapters(pipe.transformer).items():
        W = placed.host.weight()
        expected = placed.update().merge(W) - W
        torch.testing.assert_close(converted[f"{layer}.weight"].flatten(1), expected.flatten(1), rtol=1e-5, atol=1e-6)
        fresh.transformer.get_submodule(layer).weight.data += converted[f"{layer}.weight"]
    for part in ("text_encoder", "text_encoder_2"):
        setattr(fresh, part, getattr(pipe, part))
    torch.testing.assert_close(picture(fresh), picture(pipe), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("missing", ["nothing", "to_k"])
@pytest.mark.parametrize("ranks", [(3, 3, 3, 3), (1, 2, 3, 6), (2, 1, 4, 1)])
def test_flux_of_the_real_width(ranks, missing, tmp_path):
    """diffusers cuts the first layer of a single block, which is q, k, v and the feed-forward, for a width of 3072 alone."""
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(num_layers=1, num_single_layers=1)
    transformer = transformer.to_empty(device="cpu")  # memory that nothing reads or writes: LoRA does not look at W
    targets = [name for name in layers("flux", "transformer", transformer, kohya=False) if "blocks." in name]
    q, k, v, others = ranks
    overrides = {r".*(to_q|add_q_proj)": {"r": q}, r".*(to_k|add_k_proj)": {"r": k}, r".*(to_v|add_v_proj)": {"r": v}}
    delora.inject(transformer, LoRA(r=others), [t for t in targets if missing not in t], overrides=overrides)
    with torch.no_grad():
        shake(transformer)
    file = delora.export.diffusers(transformer, tmp_path, kohya=True)
    read = FluxPipeline.lora_state_dict(file)
    chosen = adapters(transformer)
    for key in [key for key in read if key.endswith(".lora_A.weight")]:
        layer = key.removeprefix("transformer.").removesuffix(".lora_A.weight")
        x = torch.randn(read[key].shape[1], dtype=torch.float64)
        y = read[f"transformer.{layer}.lora_B.weight"].double() @ (read[key].double() @ x)
        if layer in chosen:
            factors = chosen.pop(layer).low_rank()
            torch.testing.assert_close(y, factors.up.double() @ (factors.down.double() @ x), rtol=1e-5, atol=1e-5)
        else:
            assert missing in layer
            assert not y.any()
    assert not chosen, "layers that diffusers dropped"


# ---------------------------------------------------------------- refused in words


@pytest.mark.parametrize(
    ("kind", "part", "target", "kohya", "words"),
    [
        ("sd", "vae", "conv_in", False, "loads no LoRA into 'vae' here, only into unet, text_encoder: "),
        ("sd", "vae", "conv_in", True, "know unet, text_encoder, not 'vae'"),
        ("sd3", "text_encoder_3", "wo", False, "loads no LoRA into 'text_encoder_3' here"),
        ("flux", "text_encoder_2", "wo", False, "loads no LoRA into 'text_encoder_2' here"),
        ("flux", "text_encoder_2", "wo", True, "names of FLUX know transformer, text_encoder, not 'text_encoder_2'"),
        ("flux", "transformer", "x_embedder", True, "transformer.x_embedder has no name in kohya's files of FLUX"),
        ("flux", "transformer", "norm_out.linear", True, "kohya=False writes it with the name that diffusers reads"),
        ("sdxl", "text_encoder_2", "text_projection", True, "text_encoder_2.text_projection has no name in LoRA files"),
        ("sdxl", "text_encoder_2", "text_projection", False, "text_encoder_2.text_projection has no name in LoRA files"),
        ("refiner", "unet", "add_embedding.linear_1", True, "unet.add_embedding.linear_1 has no name in kohya's files"),
    ],
)
def test_what_the_programs_would_drop(kind, part, target, kohya, words, tmp_path):
    pipe = PIPELINES[kind]()
    delora.inject(getattr(pipe, part), LoRA(r=2), [target])
    with pytest.raises(ValueError, match=re.escape(words)):
        delora.export.diffusers(pipe, tmp_path / "out", kohya=kohya)
    assert not (tmp_path / "out").exists()


def test_parts_alone(tmp_path):
    transformer = delora.inject(tiny_diffusion.flux().transformer, LoRA(r=2), ["to_q"])
    assert all(key.startswith("transformer.") for key in load_file(delora.export.diffusers(transformer, tmp_path)))
    encoder = delora.inject(tiny_diffusion.clip(CLIPTextModel), LoRA(r=2), ["q_proj"])
    with pytest.raises(ValueError, match="can be any of a pipeline's text encoders: pass the pipeline, or the parts by name"):
        delora.export.diffusers(encoder, tmp_path / "out")
    with pytest.raises(ValueError, match="none of these is among text_encoder: pass the whole pipeline"):
        delora.export.diffusers({"text_encoder": encoder}, tmp_path / "out", kohya=True)
    with pytest.raises(ValueError, match="no part has an adapter named 'other', only: {'text_encoder': \\['default'\\]}"):
        delora.export.diffusers({"text_encoder": encoder}, tmp_path / "out", name="other")
    assert not (tmp_path / "out").exists()
