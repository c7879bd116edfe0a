"""LoRA files for image models: diffusers' own loader gives the images of the adapted pipeline."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import delora
from delora import DeLoRA, DoRA, EtherPlus, Full, LoRA
from tests import tiny_diffusion

ATTENTION = r".*attn[12]\.(to_q|to_k|to_v|to_out\.0)"


def adapted(pipe, method, targets=ATTENTION):
    """An adapter that has moved: every tensor of it is random."""
    delora.inject(pipe.unet, method, targets)
    torch.manual_seed(1)
    for parameter in pipe.unet.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return pipe


@pytest.mark.filterwarnings("ignore::FutureWarning")  # diffusers calls names of peft that are to go
@pytest.mark.parametrize("kohya", [False, True])
@pytest.mark.parametrize("start", ["subtract", "soft"])
def test_diffusers_gives_the_same_image(tmp_path, kohya, start):
    pipe = adapted(tiny_diffusion.pipeline(), DeLoRA(r=2, lam=4.0, start=start))
    with torch.no_grad():
        expected = tiny_diffusion.picture(pipe)
        delora.export.diffusers(pipe, tmp_path, kohya=kohya)
        fresh = tiny_diffusion.pipeline()
        base = tiny_diffusion.picture(fresh)
        fresh.load_lora_weights(tmp_path)
        seen = tiny_diffusion.picture(fresh)
    assert (expected - base).abs().max() > 0.01, "the adapter does nothing: the test has nothing to tell"
    torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-4)  # three steps of a network, in another order of sums


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_text_encoder_convolutions_and_strength(tmp_path):
    pipe = adapted(tiny_diffusion.pipeline(), EtherPlus(blocks=1), r".*(attn1\.to_q|resnets\.0\.conv1)")
    delora.inject(pipe.text_encoder, LoRA(r=2), ["q_proj"])
    for parameter in pipe.text_encoder.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter)
    delora.strength(pipe.unet, 0.5)
    with torch.no_grad():
        expected = tiny_diffusion.picture(pipe)
        delora.export.diffusers(pipe, tmp_path)
        fresh = tiny_diffusion.pipeline()
        fresh.load_lora_weights(tmp_path)
        torch.testing.assert_close(tiny_diffusion.picture(fresh), expected, rtol=1e-4, atol=1e-4)


def test_kohyas_names(tmp_path):
    pipe = adapted(tiny_diffusion.pipeline(), DeLoRA(r=2, start="soft"), ["to_q"])
    tensors = load_file(delora.export.diffusers(pipe, tmp_path, kohya=True))
    stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    assert tensors[f"{stem}.lora_down.weight"].shape == (2, 16)
    assert tensors[f"{stem}.lora_up.weight"].shape == (16, 2)
    assert tensors[f"{stem}.alpha"] == 2.0
    assert set(delora.export.diffusers({"unet": pipe.unet}, tmp_path / "parts", kohya=True).parent.iterdir())
    assert load_file(delora.export.diffusers(pipe.unet, tmp_path / "unet", kohya=True)).keys() == tensors.keys()


@pytest.mark.parametrize(
    ("method", "targets", "words"),
    [
        (DoRA(r=2), ["to_q"], "is not a low-rank change; delora.merge"),
        (Full(), ["to_q"], "is trained whole, which a LoRA file cannot hold"),
    ],
)
def test_what_no_lora_file_can_hold(tmp_path, method, targets, words):
    pipe = tiny_diffusion.pipeline()
    delora.inject(pipe.unet, method, targets)
    with pytest.raises(ValueError, match=words):
        delora.export.diffusers(pipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_to_write(tmp_path):
    pipe = tiny_diffusion.pipeline()
    with pytest.raises(ValueError, match="no part has an adapter: .*unet"):
        delora.export.diffusers(pipe, tmp_path / "out")
    delora.inject(pipe.unet, DeLoRA(r=2), ["to_q"])
    with pytest.raises(ValueError, match="kohya's names of Stable Diffusion 1 and 2 know unet, text_encoder, not 'prior'"):
        delora.export.diffusers({"prior": pipe.unet}, tmp_path / "out", kohya=True)
    next(p for p in pipe.unet.parameters() if p.requires_grad).data.fill_(float("nan"))
    with pytest.raises(ValueError, match="holds NaN or infinity: nothing was written"):
        delora.export.diffusers(pipe, tmp_path / "out")
    table = nn.Sequential(nn.Embedding(4, 4))
    delora.inject(table, LoRA(r=2), ["0"])
    with pytest.raises(ValueError, match="is an embedding"):
        delora.export.diffusers(table, tmp_path / "out")
    assert not (tmp_path / "out").exists()
