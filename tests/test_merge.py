"""Merging for good, for a while, and several into one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import delora
from delora import DeLoRA, LoRA
from tests.cases import Net, ids, shake


def test_merged_restores_after_an_exception():
    model, x = shake(delora.inject(Net(), DeLoRA(r=2), ["q", "v"], also_train=["classifier"])).bfloat16(), ids()
    before, layer = model(x), model.q
    with pytest.raises(KeyError), delora.merged(model):
        assert type(model.q) is nn.Linear
        raise KeyError
    assert model.q is layer
    assert torch.equal(model(x), before)


def test_merged_is_a_plain_model_that_can_be_saved():
    model, x = shake(delora.inject(Net(), DeLoRA(r=2), ["q", "v"], also_train=["classifier"])), ids()
    with delora.merged(model) as plain:
        state = copy.deepcopy(plain.state_dict())
    other = Net()
    other.load_state_dict(state)
    torch.testing.assert_close(other(x), model(x))


def test_merging_refuses_what_is_not_finite_and_changes_nothing():
    model = delora.inject(Net(), LoRA(2), ["q", "v"])
    model.v.adapter.B.data[0, 0] = float("nan")
    bits = model.q.base.weight.clone()
    with pytest.raises(ValueError, match="cannot merge 'v': its new weight would hold NaN"):
        delora.merge(model)
    assert type(model.q) is delora.Adapted
    assert torch.equal(model.q.base.weight, bits)


def test_merging_computes_in_float32_or_wider():
    """In bf16 arithmetic the sum of 64 terms would be off by far more than one rounding of W'."""
    model = shake(delora.inject(nn.Sequential(nn.Linear(64, 64).bfloat16()), LoRA(r=64, alpha=64.0), ["0"]))
    p = model[0].adapter
    exact = model[0].base.weight.double() + p.B.double() @ p.A.double()
    delora.merge(model)
    assert ((model[0].weight.double() - exact).abs() <= exact.abs() * torch.finfo(torch.bfloat16).eps).all()


def test_merging_keeps_the_memory_format():
    model = delora.inject(nn.Sequential(nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)), LoRA(r=2), ["0"])
    delora.merge(shake(model))
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)


def gpt2() -> GPT2LMHeadModel:
    config = GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=40, n_positions=16, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize("target", ["wte", "lm_head"])
def test_merging_never_changes_a_layer_that_was_tied_to_a_target(target, tmp_path):
    """Embedding and output head share one weight: after merging one of them they are two, also in a saved checkpoint."""
    model, x = gpt2(), torch.randint(0, 40, (2, 7))
    assert model.lm_head.weight is model.transformer.wte.weight
    bits = model.lm_head.weight.detach().clone()
    shake(delora.inject(model, LoRA(r=2), [target]))
    before = model(x).logits
    with delora.merged(model):
        torch.testing.assert_close(model(x).logits, before)
        assert model.config.tie_word_embeddings is False
        model.save_pretrained(tmp_path / "while")
    assert model.config.tie_word_embeddings is True
    delora.merge(model)
    assert model.config.tie_word_embeddings is False  # what a reader of the checkpoint goes by
    torch.testing.assert_close(model(x).logits, before)
    other = model.lm_head if target == "wte" else model.transformer.wte
    assert torch.equal(other.weight, bits)
    model.save_pretrained(tmp_path / "after")
    for folder in ("while", "after"):
        torch.testing.assert_close(GPT2LMHeadModel.from_pretrained(tmp_path / folder)(x).logits, before)


def test_merging_other_layers_leaves_a_tie_alone():
    model = gpt2()
    delora.merge(shake(delora.inject(model, LoRA(r=2), ["c_attn"])))
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.config.tie_word_embeddings is True


# ---------------------------------------------------------------- blend


def two(method_a, method_b):
    model = Net().double().eval()
    shake(delora.inject(model, method_a, ["q", "v"], also_train=["classifier.0"], name="a"))
    shake(delora.inject(model, method_b, ["q", "emb"], also_train=["classifier.0"], name="b"))
    return model


def weights(model):
    with delora.merged(model):
        return {k: t.clone() for k, t in model.state_dict().items()}


def test_a_blend_is_the_weighted_sum_of_the_changes():
    model = two(DeLoRA(r=2), LoRA(r=3))
    with delora.disabled(model):
        pass
    delora.activate(model, "a")
    delora.strength(model, 0.5)
    parts = {}
    for name in ("a", "b"):
        delora.activate(model, name)
        parts[name] = weights(model)
    delora.blend(model, {"a": 0.7, "b": -0.3}, name="ab")
    blended = weights(model)
    delora.eject(model)
    for key, base in model.state_dict().items():
        expected = base + 0.7 * (parts["a"][key] - base) - 0.3 * (parts["b"][key] - base)
        torch.testing.assert_close(blended[key], expected, rtol=1e-12, atol=1e-12, msg=key)


def test_ranks_add_up():
    model = two(DeLoRA(r=2), LoRA(r=3))
    delora.blend(model, {"a": 0.7, "b": 0.3}, name="ab")
    assert model.q.adapter.method == LoRA(r=7, alpha=7)  # a DeLoRA with a frozen copy has rank 2r
    assert model.v.adapter.method == LoRA(r=4, alpha=4)


def test_a_blend_saves_and_loads_like_any_other(tmp_path):
    model = two(DeLoRA(r=2), LoRA(r=3))
    base = copy.deepcopy(model)
    delora.eject(base)
    delora.blend(model, {"a": 0.7, "b": 0.3}, name="ab")
    delora.save(model, tmp_path)
    x = ids()
    torch.testing.assert_close(delora.load(base, tmp_path)(x), model(x))


@pytest.mark.parametrize(
    ("parts", "name", "words"),
    [
        ({"a": 1.0, "c": 1.0}, "ab", "no adapter is named 'c'"),
        ({"a": float("nan")}, "ab", "the weight of 'a' is nan"),
        ({}, "ab", "blend needs at least one adapter"),
        ({"a": 1.0}, "b", "already has an adapter named 'b'"),
    ],
)
def test_a_bad_blend_is_refused(parts, name, words):
    model = two(DeLoRA(r=2), LoRA(r=3))
    with pytest.raises(ValueError, match=words):
        delora.blend(model, parts, name=name)
    assert model.q.active == "b"
