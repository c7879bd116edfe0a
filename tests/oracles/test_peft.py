"""Hugging Face PEFT as an oracle: the same tensors give the same layer."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import DeloraConfig, HRAConfig, IA3Config, LoraConfig, OFTConfig, get_peft_model
from torch import nn

import delora
from delora import HRA, IA3, OFT, DeLoRA, DoRA, LoRA
from tests.cases import Net, ids, shake


def pair(config, method):
    net = Net().eval()
    theirs = get_peft_model(copy.deepcopy(net), config).eval()
    ours = delora.inject(net, method, ["q", "v"]).eval()
    return theirs, ours


@pytest.mark.parametrize("r", [1, 4])
def test_delora_zero_is_pefts_delora(r):
    theirs, ours = pair(
        DeloraConfig(r=r, delora_lambda=5, target_modules=["q", "v"], init_weights=False),
        DeLoRA(r, 5.0, start="zero", learn_lam=True),
    )
    for name in ("q", "v"):
        layer, adapter = theirs.base_model.model.get_submodule(name), ours.get_submodule(name).adapter
        layer.delora_B["default"].data[:, 0] *= 1e-5  # under the clamp
        adapter.A.data.copy_(layer.delora_A["default"].data)
        adapter.B.data.copy_(layer.delora_B["default"].data)
        adapter.lam.data.copy_(layer.delora_lambda["default"].data)
        torch.testing.assert_close(adapter.c, layer.delora_w_norm["default"])
    x = ids()
    torch.testing.assert_close(ours(x), theirs(x))
    theirs(x).square().sum().backward()
    ours(x).square().sum().backward()
    for name in ("q", "v"):
        layer, adapter = theirs.base_model.model.get_submodule(name), ours.get_submodule(name).adapter
        for own, their in ((adapter.A, layer.delora_A), (adapter.B, layer.delora_B), (adapter.lam, layer.delora_lambda)):
            torch.testing.assert_close(own.grad, their["default"].grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rslora", [False, True])
def test_lora_is_pefts_lora(rslora):
    config = LoraConfig(r=4, lora_alpha=6, use_rslora=rslora, target_modules=["q", "v"], init_lora_weights=False)
    theirs, ours = pair(config, LoRA(4, 6.0, rslora=rslora))
    for name in ("q", "v"):
        layer, adapter = theirs.base_model.model.get_submodule(name), ours.get_submodule(name).adapter
        adapter.A.data.copy_(layer.lora_A["default"].weight.data)
        adapter.B.data.copy_(layer.lora_B["default"].weight.data)
    x = ids()
    torch.testing.assert_close(ours(x), theirs(x))


def test_the_parity_tests_can_tell():
    theirs, ours = pair(LoraConfig(r=4, target_modules=["q", "v"], init_lora_weights=False), LoRA(4))
    x = ids()
    assert not torch.allclose(shake(ours)(x), theirs(x), rtol=1e-3)


@pytest.mark.parametrize("rslora", [False, True])
def test_dora_is_pefts_dora(rslora):
    config = LoraConfig(r=4, lora_alpha=6, use_rslora=rslora, use_dora=True, target_modules=["q", "v"], init_lora_weights=False)
    theirs, ours = pair(config, DoRA(4, 6.0, rslora=rslora))
    parameters = []
    for name in ("q", "v"):
        layer, adapter = theirs.base_model.model.get_submodule(name), ours.get_submodule(name).adapter
        magnitude = layer.lora_magnitude_vector["default"].weight
        magnitude.data.mul_(torch.rand_like(magnitude) + 0.5)
        both = (
            (adapter.A, layer.lora_A["default"].weight),
            (adapter.B, layer.lora_B["default"].weight),
            (adapter.m, magnitude),
        )
        for own, their in both:
            own.data.copy_(their.data)
        parameters += both
    x = ids()
    torch.testing.assert_close(ours(x), theirs(x))
    theirs(x).square().sum().backward()
    ours(x).square().sum().backward()
    for own, their in parameters:
        torch.testing.assert_close(own.grad, their.grad, rtol=1e-4, atol=1e-6)


def test_dora_starts_at_pefts_magnitudes():
    theirs, ours = pair(LoraConfig(r=4, use_dora=True, target_modules=["q", "v"]), DoRA(4))
    for name in ("q", "v"):
        magnitude = theirs.base_model.model.get_submodule(name).lora_magnitude_vector["default"].weight
        torch.testing.assert_close(ours.get_submodule(name).adapter.m, magnitude)


@pytest.mark.parametrize("dora", [False, True])
def test_lora_on_an_embedding_starts_as_pefts(dora):
    """A = 0, B ~ N(0, 1): the first step moves the vectors as far as it does in PEFT."""
    net, x = Net().eval(), ids()
    theirs = get_peft_model(copy.deepcopy(net), LoraConfig(r=4, lora_alpha=16, use_dora=dora, target_modules=["emb"]))
    ours = delora.inject(copy.deepcopy(net), (DoRA if dora else LoRA)(4, 16), ["emb"])
    layer, adapter = theirs.base_model.model.emb, ours.emb.adapter
    assert not layer.lora_embedding_A["default"].any()
    assert not adapter.A.any()
    large = delora.inject(nn.Sequential(nn.Embedding(5, 4000)), LoRA(5), ["0"])[0].adapter.B
    assert abs(large.mean()) < 0.05  # 20,000 numbers: 7 standard errors
    assert abs(large.std() - 1) < 0.05
    torch.testing.assert_close(ours(x), net(x))
    adapter.B.data.copy_(layer.lora_embedding_B["default"].data)
    for model in (ours, theirs):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        model(x).square().sum().backward()
        optimizer.step()
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(ours(x), net(x), rtol=1e-2)


@pytest.mark.parametrize("side", ["output", "input"])
def test_ia3_is_pefts_ia3(side):
    config = IA3Config(target_modules=["q", "v"], feedforward_modules=["q", "v"] if side == "input" else [])
    theirs, ours = pair(config, IA3(side=side))
    for name in ("q", "v"):
        scale = theirs.base_model.model.get_submodule(name).ia3_l["default"]
        scale.data.mul_(torch.rand_like(scale) + 0.5)
        ours.get_submodule(name).adapter.l.data.copy_(scale.data.flatten())
    x = ids()
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_oft_is_pefts_oft_with_the_exact_cayley_transform(blocks):
    config = OFTConfig(r=blocks, oft_block_size=0, use_cayley_neumann=False, target_modules=["q", "v"], init_weights=False)
    theirs, ours = pair(config, OFT(blocks))
    for name in ("q", "v"):
        theirs_q = theirs.base_model.model.get_submodule(name).oft_R["default"].weight
        theirs_q.data.normal_()
        ours.get_submodule(name).adapter.Q.data.copy_(theirs_q.data)
    x = ids()
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("orthogonal", [False, True])
def test_hra_is_pefts_hra(orthogonal):
    theirs, ours = pair(
        HRAConfig(r=4, apply_GS=orthogonal, target_modules=["q", "v"], init_weights=False), HRA(4, orthogonal=orthogonal)
    )
    parameters = []
    for name in ("q", "v"):
        U = theirs.base_model.model.get_submodule(name).hra_u["default"]  # [in, r]
        ours.get_submodule(name).adapter.U.data.copy_(U.data.T)
        parameters.append((ours.get_submodule(name).adapter.U, U))
    x = ids()
    torch.testing.assert_close(ours(x), theirs(x))
    theirs(x).square().sum().backward()
    ours(x).square().sum().backward()
    for own, their in parameters:
        torch.testing.assert_close(own.grad, their.grad.T, rtol=1e-4, atol=1e-6)


def test_hra_starts_as_pefts():
    """Equal in pairs, drawn from the same distribution."""
    wide = nn.Sequential(nn.Linear(3000, 4))
    theirs = get_peft_model(copy.deepcopy(wide), HRAConfig(r=4, target_modules=["0"])).base_model.model[0].hra_u["default"].T
    ours = delora.inject(wide, HRA(4), ["0"])[0].adapter.U
    for U in (ours, theirs):
        assert torch.equal(U[::2], U[1::2])
        assert not torch.equal(U[0], U[2])
        assert U.abs().max().item() == pytest.approx(2**-0.5, rel=5e-3)  # U(-1, 1) / sqrt(r / 2): 6,000 numbers
        assert U.std().item() == pytest.approx(6**-0.5, rel=0.03)
