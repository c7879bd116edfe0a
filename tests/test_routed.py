"""A mixed batch is its rows, each run alone with its adapter."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

import delora
from delora import OFT, Bottleneck, DeLoRA, DoRA, LoRA, LoReFT
from delora.models import adapters
from tests.cases import LAYERS, METHODS, Holder, Net, shake

ROWS = 7  # not the number of tokens of any case


def alone(model, names, x, strengths=None, run=lambda model, x: model(x)):
    """Each row run alone: with its adapter, or without any."""
    rows = []
    for i, name in enumerate(names):
        if name is None:
            with delora.disabled(model):
                rows.append(run(model, x[i : i + 1]))
            continue
        delora.activate(model, name)
        own = {layer: placed.strength for layer, placed in adapters(model).items()}
        if strengths is not None and strengths[i] is not None:
            delora.strength(model, strengths[i])
        rows.append(run(model, x[i : i + 1]))
        for layer, placed in adapters(model).items():
            placed.adapter.strength = own[layer]
    return rows


def batch(layer, rows, dtype=torch.float64):
    torch.manual_seed(1)
    xs = [layer.x(dtype) for _ in range(rows)]
    return torch.stack(xs) if xs[0].dim() == 1 else torch.cat([x[:1] for x in xs])


def filled(layer, methods, dtype=torch.float64):
    """A layer with an adapter of every method that it can have, each somewhere else than where it starts."""
    torch.manual_seed(0)
    model, names = layer.model(dtype), []
    for i, method in enumerate(methods.values()):
        try:
            delora.inject(model, method, ["layer"], name=f"m{i}")
        except ValueError:  # blocks that do not divide this layer
            continue
        shake(model)
        names.append(f"m{i}")
    return model.eval(), names


LOW_RANK = {
    name: method for name, method in METHODS.items() if isinstance(method, (LoRA, DeLoRA, delora.ETHER, delora.EtherPlus))
}
MIXES = {
    "low-rank": {"LoRA r=1": LoRA(r=1), "LoRA r=8": LoRA(r=8), **LOW_RANK},
    "all": {"whole": delora.Full(), **METHODS},
}


@pytest.mark.parametrize("layer", LAYERS.values(), ids=list(LAYERS))
@pytest.mark.parametrize("mix", MIXES)
def test_every_mix_of_methods_is_each_row_alone(layer, mix):
    """All in one batch, so that every pair of methods, and of ranks, is in it; twice in another order."""
    model, names = filled(layer, MIXES[mix])
    names = [None, *names, *reversed(names)]
    strengths = [None if i % 3 else 0.5 * (i % 4) for i in range(len(names))]
    x = batch(layer, len(names))
    calls = []
    handle = model.layer.base.register_forward_hook(lambda *_: calls.append(1))
    with delora.routed(model, names, strengths):
        y = model(x)
    handle.remove()
    assert (len(calls) == 1) == (mix == "low-rank")
    torch.testing.assert_close(y, torch.cat(alone(model, names, x, strengths)))


class Two(nn.Module):
    """What the adapters below have in different layers: an embedding, a convolution, linear layers and a head."""

    def __init__(self):
        super().__init__()
        self.net = Net()
        self.conv = nn.Conv1d(8, 8, 3, padding=1)

    def forward(self, ids):
        h = self.net.emb(ids)
        h = torch.tanh(self.conv(h.mT).mT)
        return self.net.classifier(torch.tanh(self.net.v(torch.tanh(self.net.q(input=h)))).mean(1))


def several(dtype=torch.float64):
    torch.manual_seed(0)
    model = Two().to(dtype)
    shake(delora.inject(model, DeLoRA(r=4), ["q", "v"], name="a", also_train=["classifier"]))
    shake(delora.inject(model, LoRA(r=2), ["emb", "conv", "v"], name="b"))
    shake(delora.inject(model, DoRA(r=3), ["q", "conv"], name="c", also_train=["classifier"]))
    shake(delora.inject(model, Bottleneck(size=2), ["v"], name="d"))
    delora.strength(model, 0.7, "b")
    return model.eval()


IDS = torch.arange(ROWS * 9).reshape(ROWS, 9) % 20


def test_adapters_in_different_layers():
    model = several()
    names = ["a", "b", None, "c", "d", "a", "c"]
    strengths = [None, None, 1.0, 0.5, 1.5, 0.0, None]
    with delora.routed(model, names, strengths) as rows:
        y = model(IDS)
        rows.use(["b"] * 5)
        z = model(IDS[:5])
    torch.testing.assert_close(y, torch.cat(alone(model, names, IDS, strengths)))
    torch.testing.assert_close(z, torch.cat(alone(model, ["b"] * 5, IDS)))


def test_rows_without_an_adapter_are_the_base_bit_for_bit_and_nothing_stays():
    model = several(torch.float32)
    delora.activate(model, "a")
    for name in ("c", "d"):
        delora.eject(model, name)
    before, state = model(IDS), copy.deepcopy(model.state_dict())
    with delora.disabled(model):
        base = model(IDS)
    with delora.routed(model, ["b", *[None] * 6]):
        y = model(IDS)
    assert torch.equal(y[1:], base[1:])
    assert not torch.equal(y[:1], base[:1])
    assert torch.equal(model(IDS), before)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_in_half_precision(dtype, autocast):
    layer = LAYERS["Linear"]
    model, names = filled(layer, MIXES["low-rank"], torch.float32 if autocast else dtype)
    x = batch(layer, len(names), torch.float32 if autocast else dtype)
    with torch.autocast("cpu", dtype, enabled=autocast):
        with delora.routed(model, names):
            y = model(x)
        expected = torch.cat(alone(model, names, x))
    assert y.dtype == expected.dtype
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(y, expected, rtol=4 * step, atol=4 * step * expected.abs().max().item())


def test_the_input_gets_its_gradient():
    model, names = filled(LAYERS["Linear"], MIXES["low-rank"])
    x = batch(LAYERS["Linear"], len(names)).requires_grad_()
    with delora.routed(model, names):
        model(x).square().sum().backward()
    grad, x.grad = x.grad, None
    torch.cat(alone(model, names, x)).square().sum().backward()
    torch.testing.assert_close(grad, x.grad)


# ---------------------------------------------------------------- generation


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    model = LlamaForCausalLM(config).double()
    model.generation_config.pad_token_id = 0
    shake(delora.inject(model, DeLoRA(r=4), "all-linear", name="a"))
    shake(delora.inject(model, LoRA(r=8), ["q_proj", "down_proj"], name="b"))
    shake(delora.inject(model, OFT(blocks=4), ["v_proj"], name="c"))
    return shake(delora.inject(model, LoRA(r=2), ["lm_head", "embed_tokens"], name="d")).eval()


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("names", [["a", None, "b", "d", "a"], ["c", "a", "b", "c", None]], ids=["low-rank", "with OFT"])
def test_generation_with_a_cache(names, num_beams):
    model, x = llama(), torch.arange(40).reshape(5, 8) + 1
    options = dict(max_new_tokens=6, do_sample=False, num_beams=num_beams, eos_token_id=None)
    mask = torch.ones_like(x)
    x[0, :3] = mask[0, :3] = 0  # padded on the left
    with delora.routed(model, names, num_beams=num_beams):
        y = model.generate(x, attention_mask=mask, **options)
    x[0] = torch.cat([torch.zeros(3, dtype=x.dtype), x[0, 3:]])
    expected = alone(model, names, x, run=lambda model, row: model.generate(row, attention_mask=(row > 0).long(), **options))
    assert torch.equal(y, torch.cat(expected))


def test_generation_with_an_encoder_and_beams():
    """The encoder gets the batch's rows, the decoder each of them for every beam."""
    torch.manual_seed(0)
    config = T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config).double()
    for name in ("a", "b"):
        shake(delora.inject(model, LoRA(r=4), ["q", "v", "wo"], name=name))
    model.eval()
    names, x = ["a", "b", None], torch.arange(24).reshape(3, 8) + 2
    options = dict(max_new_tokens=5, num_beams=4, do_sample=False, eos_token_id=None)
    with delora.routed(model, names, num_beams=4):
        y = model.generate(x, **options)
    assert torch.equal(y, torch.cat(alone(model, names, x, run=lambda model, row: model.generate(row, **options))))


def test_beams_that_were_not_told_are_refused_with_what_to_say():
    model = llama()
    x = torch.arange(16).reshape(2, 8)
    with delora.routed(model, ["a", "b"]), pytest.raises(ValueError, match=r"routed\(model, names, num_beams=3\)"):
        model.generate(x, max_new_tokens=2, num_beams=3, do_sample=False)


# ---------------------------------------------------------------- compiled


def test_switching_compiles_nothing_again():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    shake(delora.inject(model, DeLoRA(r=2), ["1", "3"], name="a"))
    shake(delora.inject(model, LoRA(r=4), ["0", "3"], name="b")).eval()
    x, compiled = torch.arange(24).reshape(3, 8) % 20, []

    def count(graph, inputs):
        compiled.append(1)
        return graph

    torch.compiler.reset()
    fast = torch.compile(model, backend=count)
    with delora.routed(model, ["a", None, "b"]) as rows, torch.no_grad():
        outputs = [fast(x)]
        for names in (["b", "b", "a"], [None, None, None], ["a", "a", "a"]):
            rows.use(names, [0.5, None, 1.5])
            outputs.append(fast(x))
            torch.testing.assert_close(outputs[-1], model(x))
            assert not torch.equal(outputs[-1], outputs[-2])
    torch.compiler.reset()
    assert len(compiled) == 1


# ---------------------------------------------------------------- refused


def test_what_is_no_list_of_known_names_is_refused():
    model = several()
    for names, error, words in (
        (["a", "x"], ValueError, r"no adapter is named 'x': this model has \['a', 'b', 'c', 'd'\]"),
        ("a", TypeError, "expected a list with the name of an adapter, or None, for each row"),
        (None, TypeError, "expected a list"),
        ([], ValueError, "expected the name of an adapter, or None, for each row"),
        ([1], ValueError, "no adapter is named 1"),
    ):
        with pytest.raises(error, match=words), delora.routed(model, names):
            pass
        with delora.routed(model, ["a"] * ROWS) as rows:
            y = model(IDS)
            with pytest.raises(error, match=words):
                rows.use(names)
            assert torch.equal(model(IDS), y)
    with pytest.raises(ValueError, match="2 strengths for 1 rows"), delora.routed(model, ["a"], [1.0, 1.0]):
        pass
    for bad in (-1, float("nan"), "1", True):
        with pytest.raises(ValueError, match="must be a finite number, at least 0"), delora.routed(model, ["a"], [bad]):
            pass
    for bad in (0, 1.5, True):
        with pytest.raises(ValueError, match="num_beams"), delora.routed(model, ["a"], num_beams=bad):
            pass
    with pytest.raises(ValueError, match="this model has none"), delora.routed(Net(), ["a"]):
        pass


@pytest.mark.parametrize("names", [["a", "b"], ["c", None], ["d", "d"]])
def test_another_number_of_rows_is_refused(names):
    model = several()
    with delora.routed(model, names), pytest.raises(ValueError, match="was given names for 2 rows"):
        model(IDS)


def test_training_is_refused():
    model = several().train()
    with delora.routed(model, ["a", *[None] * 6]), pytest.raises(ValueError, match=r"call model.eval\(\) first"):
        model(IDS)


def test_a_weight_that_is_read_by_others_is_refused():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            assert self.layer.weight.dtype == x.dtype  # a look at it is no use of it
            return x @ self.layer.weight

    model = shake(delora.inject(Holder(Reader()), LoRA(r=2), ["layer.layer"], name="a")).eval()
    x = torch.ones(2, 3, 4)
    with delora.routed(model, ["a", None]) as rows:
        with pytest.raises(ValueError, match="layer.layer: the module around this layer reads its weight"):
            model(x)
        rows.use([None, None])
        y = model(x)
    with delora.disabled(model):
        assert torch.equal(y, model(x))


def test_what_cannot_be_split_into_rows_is_refused():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x, cache):
            return self.layer(x)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Block()

        def forward(self, x):
            return self.block(x, cache=object())

    model = shake(delora.inject(Outer(), delora.Full(), ["block"], name="a"))
    model = shake(delora.inject(model, LoReFT(r=2), ["block"], name="b")).eval()
    x = torch.randn(2, 3, 4)
    with (
        delora.routed(model, ["a", None]),
        pytest.raises(ValueError, match="block is changed by an adapter whose change is not"),
    ):
        model(x)
    with delora.routed(model, ["b", None]):  # an edit of the output needs no splitting of what goes in
        y = model(x)
    torch.testing.assert_close(y, torch.cat(alone(model, ["b", None], x)))


class TokensFirst(nn.Module):
    """A model that computes with [tokens, rows, features] inside."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(x.transpose(0, 1)).transpose(0, 1)


def test_tokens_in_the_first_dimension_are_refused_also_if_they_are_as_many():
    model = shake(delora.inject(TokensFirst(), LoRA(r=2), ["layer"], name="a")).eval()
    with delora.routed(model, ["a", None, None]):
        for tokens in (5, 3):
            with pytest.raises(ValueError, match="input of shape"):
                model(torch.randn(3, tokens, 4))


def test_as_many_rows_as_tokens():
    """Which dimension is the batch is known from a batch where the two differ."""
    model, x = llama(), torch.arange(9).reshape(3, 3)
    names = ["a", None, "b"]
    with delora.routed(model, names):
        with pytest.raises(ValueError, match="as many rows as tokens"):
            model(x)
        model(torch.arange(12).reshape(3, 4))
        y = model(x).logits
    torch.testing.assert_close(y, torch.cat(alone(model, names, x, run=lambda model, row: model(row).logits)))
