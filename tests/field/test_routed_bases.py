"""Mixed batches on quantised and sharded bases, experts and packed projections: a row is what it is alone, or refused."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import delora
from delora import ETHER, OFT, DeLoRA, DoRA, LoRA, LoReFT
from delora.models import adapters
from tests.cases import shake
from tests.field.test_sharded import ids, net, shard
from tests.processes import all_hold
from tests.quantised import IN, KINDS
from tests.test_experts import MODELS
from tests.test_routed import alone

MIXES = {"low-rank": ["a", "b", None, "d", "a", None, "b"], "all": ["a", "c", None, "d", "e", "c", "b"]}
METHODS = {"a": DeLoRA(4), "b": LoRA(2), "c": DoRA(2), "d": ETHER(blocks=2), "e": LoReFT(r=2)}


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_quantised_layers(kind, mix):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the libraries say of themselves
        model = KINDS[kind].model()
        for name, method in METHODS.items():
            shake(delora.inject(model, method, ["layer"], name=name))
        model.eval()
        x = torch.randn(7, 5, IN)
        with delora.routed(model, MIXES[mix], strengths := [None, 0.5, 1.0, None, 1.5, 0.0, None]):
            y = model(x)
        rows = torch.cat(alone(model, MIXES[mix], x, strengths))
        with delora.disabled(model):
            assert (model(x) - rows).abs().max() > 0.1
    half = torch.finfo(torch.float16).eps  # bitsandbytes multiplies int8 in float16
    atol = 4 * half * rows.abs().max() if kind == "bitsandbytes int8" else 1e-5
    torch.testing.assert_close(y, rows, atol=float(atol), rtol=1e-5)


def several(model, targets="all-linear", names=("a", "b", "c")):
    """Three adapters: a DeLoRA, a LoRA of one half of the places, a DoRA or OFT of the others."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, method in zip(names, (DeLoRA(4), LoRA(2), OFT(blocks=2)), strict=False):
            torch.manual_seed(ord(name))
            shake(delora.inject(model, method, targets, name=name))
    return model.eval()


NAMES, STRENGTHS = ["b", "a", None, "c", "a"], [None, 0.5, None, 1.5, None]
TOKENS = torch.arange(5 * 3).reshape(5, 3) % 17 + 1


def experts(name):
    torch.manual_seed(0)
    model = MODELS[name]()
    for key, p in model.named_parameters():
        if "norm" not in key:
            nn.init.normal_(p, std=0.2)
    return model


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
@torch.no_grad()
def test_experts(name):
    """Their module gets the tokens of all rows in one dimension; also while tokens are generated one by one, and with beams."""
    model = several(experts(name))
    assert any(".experts." in layer for layer in adapters(model, "a"))
    run = lambda model, x: model(x).logits  # noqa: E731
    with delora.routed(model, NAMES, STRENGTHS) as rows:
        y = run(model, TOKENS)
        rows.use(["a", "b"])
        z = run(model, TOKENS[:2])
    torch.testing.assert_close(y, torch.cat(alone(model, NAMES, TOKENS, STRENGTHS, run)), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(z, torch.cat(alone(model, ["a", "b"], TOKENS, None, run)), atol=1e-4, rtol=1e-4)
    with delora.disabled(model):
        assert (run(model, TOKENS) - y).abs().max() > 0.1
    for beams in (1, 2):
        options = dict(max_new_tokens=3, do_sample=False, num_beams=beams, pad_token_id=0, eos_token_id=None)
        run = lambda model, x: model.generate(x, **options)  # noqa: B023, E731
        with delora.routed(model, NAMES, num_beams=beams):
            y = run(model, TOKENS)
        assert torch.equal(y, torch.cat(alone(model, NAMES, TOKENS, None, run)))


@torch.no_grad()
def test_experts_that_get_their_tokens_in_another_way_are_refused():
    """Llama 4 gives every expert all tokens."""
    model = several(experts("llama4"), ["experts.gate_up_proj", "experts.down_proj"])
    with delora.routed(model, NAMES), pytest.raises(ValueError, match="experts got an input of shape .* names for 5 rows"):
        model(TOKENS)
    with delora.routed(model, [None] * 5):
        y = model(TOKENS).logits
    with delora.disabled(model):
        assert torch.equal(y, model(TOKENS).logits)


class Attends(nn.Module):
    def __init__(self, batch_first=True):
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=batch_first)
        self.batch_first = batch_first

    def forward(self, x, **masks):
        x = x if self.batch_first else x.transpose(0, 1)
        y = self.attn(x, x, x, **masks)[0]
        return y if self.batch_first else y.transpose(0, 1)


def packed(targets="all-linear", **options):
    torch.manual_seed(0)
    return several(Attends(**options).double(), targets)


@pytest.mark.parametrize("targets", [["attn.in_proj_weight"], "all-linear"])
@torch.no_grad()
def test_a_packed_projection(targets):
    """With the layer inside the module, whose weight the module reads itself."""
    model = packed(targets)
    x = torch.randn(5, 3, 8, dtype=torch.float64)
    keys = torch.zeros(5, 3, dtype=torch.bool)
    keys[:, 2] = True
    with delora.routed(model, NAMES, STRENGTHS):
        y, masked = model(x), model(x, key_padding_mask=keys)
        again = model(x)
    rows = torch.cat(alone(model, NAMES, x, STRENGTHS))
    torch.testing.assert_close(y, rows)
    assert torch.equal(again, y)
    run = lambda model, x: model(x, key_padding_mask=keys[:1])  # noqa: E731
    torch.testing.assert_close(masked, torch.cat(alone(model, NAMES, x, STRENGTHS, run)))
    with delora.disabled(model):
        assert (model(x) - rows).abs().max() > 0.1


@torch.no_grad()
def test_a_packed_projection_whose_rows_cannot_be_told_is_refused():
    model, x = packed(batch_first=False), torch.randn(5, 3, 8, dtype=torch.float64)
    with delora.routed(model, NAMES), pytest.raises(ValueError, match="attn got an input of shape .* names for 5 rows"):
        model(x)
    model, pairs = packed(), torch.zeros(3, 3, dtype=torch.bool)
    with delora.routed(model, NAMES), pytest.raises(ValueError, match="attn is changed by .* gets a tensor of shape .3, 3."):
        model(x, attn_mask=pairs)
    square = torch.randn(5, 5, 8, dtype=torch.float64)
    with delora.routed(model, NAMES):
        model(x)  # shows that the first dimension is the batch
        with pytest.raises(ValueError, match=r"of shape \[5, 5\] and has as many rows as tokens"):
            model(square, attn_mask=torch.zeros(5, 5, dtype=torch.bool))


def sharded(rank, method, when):
    """Two processes with parts of the model, and rows of other adapters in each, give what one process gives with the whole."""

    def adapted(model):
        for seed, (name, each) in enumerate((("a", method), ("b", LoRA(r=3)))):
            torch.manual_seed(seed)
            delora.inject(model, each, ["q", "v", "emb"], name=name, also_train=["head"] if name == "a" else [])
        return model

    def filled(model):
        for placed in (*adapters(model, "a").values(), *adapters(model, "b").values()):
            for t in placed.saved().values():
                t.add_(0.2)
        return model.eval()

    with torch.no_grad():
        one = filled(adapted(net()))
        parts = filled(shard(adapted(net())) if when == "before" else adapted(shard(net())))
        x, names = ids()[2 * rank : 2 * rank + 2], [["a", "b"], [None, "a"]][rank]
        with delora.routed(one, names, [None, 0.5]):
            expected = one(x)
        with delora.routed(parts, names, [None, 0.5]):
            torch.testing.assert_close(parts(x), expected)
        with delora.disabled(one):
            assert not torch.allclose(one(x), expected, atol=1e-3)


@pytest.mark.slow
def test_sharded_bases(tmp_path):
    methods = {type(m).__name__: m for m in (DeLoRA(r=2), DoRA(r=2), OFT(blocks=2))}
    laws = {f"{name} {when}": (sharded, (m, when)) for name, m in methods.items() for when in ("before", "after")}
    all_hold(laws, tmp_path)
