"""1c. Who reads the weight of an adapted layer reads the adapted one, differentiably; what never runs is told by name."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BloomConfig, BloomForCausalLM, MambaConfig, MambaForCausalLM, WavLMConfig, WavLMModel

import delora
from delora import IA3, BitFit, DeLoRA, DoRA, EtherPlus
from tests.cases import shake

METHODS = [DeLoRA(r=2), DoRA(r=2), EtherPlus(), BitFit(), IA3()]


class Reads(nn.Module):
    """Calls none of its layers: fused projections, a tied head, a bias that is added by hand, a call through a helper."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.emb = nn.Embedding(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        assert self.q.weight.dtype == x.dtype
        assert self.q.weight.shape == (4, 4)
        both = F.linear(x, torch.cat([self.q.weight, self.k.weight]), torch.cat([self.q.bias, self.k.bias]))
        q, k = both.chunk(2, -1)
        y = helper(q * k, self.out)
        return F.linear(y, self.emb.weight)


def helper(x: Tensor, layer: nn.Module) -> Tensor:
    return x @ layer.weight[:, :].T + layer.bias


def check(model: nn.Module, call, targets, method) -> None:
    """Starts at the base, differs once it moved, has gradients everywhere, and merging changes nothing."""
    before = call(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        delora.inject(model, method, targets)
        torch.testing.assert_close(call(model), before, atol=1e-5, rtol=1e-4)
        shake(model)
        after = call(model)
    assert not torch.allclose(after, before, atol=1e-4)
    after.square().sum().backward()
    silent = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not silent
    with delora.disabled(model):
        torch.testing.assert_close(call(model), before)
    delora.merge(model)
    torch.testing.assert_close(call(model), after, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_a_module_that_calls_none_of_its_layers(method):
    x = torch.randn(3, 4)
    targets = ["q", "k", "out", *([] if isinstance(method, (BitFit, IA3, EtherPlus)) else ["emb"])]
    check(nn.Sequential(Reads()), lambda model: model(x), targets, method)


@pytest.mark.parametrize("method", METHODS[:3], ids=lambda m: type(m).__name__)
def test_a_module_that_is_called_without_the_model_around_it(method):
    """The reading is seen at the reader, not only under the model that `inject` was called on."""
    x = torch.randn(3, 4)
    model = shake(delora.inject(nn.Sequential(Reads()), method, ["q", "k"]))
    expected = model(x)
    torch.testing.assert_close(model[0](x), expected)


@pytest.mark.parametrize("method", METHODS[:3], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("training", [True, False])
def test_multihead_attention_and_the_encoders_fast_path(method, training):
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).train(training)
    x = torch.randn(2, 3, 8)

    def call(model):
        y = model(x)
        with torch.no_grad():  # where the fast path would be taken
            torch.testing.assert_close(model(x), y.detach(), atol=1e-5, rtol=1e-4)
        return y

    check(model, call, ["in_proj_weight", "out_proj", "linear1", "linear2"], method)


@pytest.mark.parametrize("method", METHODS[:3], ids=lambda m: type(m).__name__)
def test_mamba_and_bloom(method):
    torch.manual_seed(0)
    tokens = torch.arange(6)[None]
    mamba = MambaForCausalLM(
        MambaConfig(vocab_size=20, hidden_size=16, state_size=4, num_hidden_layers=2, time_step_rank=4)
    ).eval()
    check(mamba, lambda model: model(tokens).logits, ["dt_proj", "x_proj", "in_proj", "out_proj"], method)
    bloom = BloomForCausalLM(
        BloomConfig(vocab_size=20, hidden_size=16, n_layer=2, n_head=2, slow_but_exact=True, pretraining_tp=2)
    ).eval()
    check(bloom, lambda model: model(tokens).logits, ["query_key_value", "dense", "dense_4h_to_h"], method)


def test_attention_that_hands_its_weights_on():
    torch.manual_seed(0)
    config = WavLMConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        conv_dim=(8,),
        conv_stride=(4,),
        conv_kernel=(8,),
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )
    x = torch.randn(1, 80)
    check(WavLMModel(config).eval(), lambda m: m(x).last_hidden_state, ["q_proj", "v_proj", "out_proj"], DeLoRA(r=2))


def test_writing_to_a_weight_reaches_the_layer():
    model = delora.inject(nn.Sequential(Reads()), DeLoRA(r=2), ["q"])
    with torch.no_grad():
        model[0].q.weight.fill_(1.0)
        model[0].q.weight.data.add_(1.0)
    assert (model[0].q.base.weight == 2).all()
    fresh = nn.Parameter(torch.zeros(4, 4))
    model[0].q.weight = fresh
    assert model[0].q.base.weight is fresh
    assert isinstance(model[0].q.weight, nn.Parameter)  # outside of a forward it is the layer's own


class Sometimes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.use_b = False

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(y) if self.use_b else y


def test_what_never_ran_is_told_once_and_is_not_merged():
    model, x = delora.inject(Sometimes(), DeLoRA(r=2), ["a", "b", "c"]), torch.randn(2, 4)
    with pytest.warns(UserWarning, match="2 of 3 adapted layers did not run in the first forward.*'b', 'c'.*exclude="):
        model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x)
    with pytest.raises(ValueError, match="cannot merge 'b': it did not run in the forwards so far"):
        delora.merge(model)
    model.use_b = True
    model(x)
    with pytest.raises(ValueError, match="cannot merge 'c'"), delora.merged(model):
        pass
    twin = copy.deepcopy(model)
    delora.merge(twin, unused=True)
    assert type(twin.c) is nn.Linear
    delora.activate(model, "default")  # asked anew
    with pytest.warns(UserWarning, match="1 of 3 adapted layers"):
        model(x)


def test_it_is_told_also_if_none_of_the_adapted_layers_ran():
    model = delora.inject(Sometimes(), DeLoRA(r=2), ["b", "c"])
    with pytest.warns(UserWarning, match="2 of 2 adapted layers did not run.*'b', 'c'"):
        model(torch.randn(2, 4))


@pytest.mark.parametrize("method", METHODS[:3], ids=lambda m: type(m).__name__)
def test_an_autograd_function_of_ones_own_gives_the_gradients_of_the_plain_product(method):
    class Times(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, W):
            ctx.save_for_backward(x, W)
            return x @ W.T

        @staticmethod
        def backward(ctx, grad):
            x, W = ctx.saved_tensors
            assert ctx.needs_input_grad[1]
            return grad @ W, grad.T @ x

    class Custom(nn.Module):
        def __init__(self):
            super().__init__()
            self.p, self.q, self.plain = nn.Linear(4, 4), nn.Linear(4, 4, bias=False), False

        def forward(self, x):
            x = self.p(x)
            return self.q(x) if self.plain else Times.apply(x, self.q.weight)

    model = shake(delora.inject(nn.Sequential(Custom()).double(), method, ["p", "q"]))
    x = torch.randn(3, 4, dtype=torch.float64)
    found = []
    for model[0].plain in (True, False):
        model.zero_grad()
        y = model(x)
        y.square().sum().backward()
        found.append([y, *(p.grad for p in model.parameters() if p.requires_grad)])
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(delora.merge(model)(x), y)


class Listed(nn.Module):
    """Calls its layers from a plain list beside the registered ones, as transformers' MaskFormer does."""

    def __init__(self):
        super().__init__()
        self.layers = [nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)]
        for i, layer in enumerate(self.layers):
            self.add_module(str(i), layer)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_layers_that_are_called_from_a_plain_list_are_the_adapted_ones():
    model, x = Listed(), torch.randn(3, 6)
    first, layers = model(x), list(model.layers)
    delora.inject(model, DeLoRA(r=2), ["0", "2"])
    shake(model)
    changed = model(x)
    assert not torch.allclose(changed, first)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(x), changed)
    with delora.merged(model):
        torch.testing.assert_close(model(x), changed)
    torch.testing.assert_close(delora.merge(twin)(x), changed)
    assert all(type(layer) in (nn.Linear, nn.Tanh) for layer in twin.layers)
    delora.eject(model)
    assert model.layers == layers
