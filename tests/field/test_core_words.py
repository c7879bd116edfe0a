"""Section 2, of the core: what ended in a cryptic error works, or is refused in words."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils import parametrizations, prune
from transformers import BertConfig, BertForSequenceClassification, FalconConfig, FalconForCausalLM

import delora
from delora import DeLoRA, DoRA, LoRA
from tests.cases import Net, ids, shake


@pytest.mark.parametrize("activation", [nn.ReLU(inplace=True), nn.SiLU(inplace=True), nn.Hardtanh(inplace=True)])
@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4)])
@pytest.mark.parametrize("hook", [False, True])
@pytest.mark.parametrize("method", [DeLoRA(r=2), LoRA(r=2), DoRA(r=2)], ids=lambda m: type(m).__name__)
def test_what_follows_an_adapted_layer_may_write_to_its_output(activation, shape, hook, method):
    model, plain = nn.Sequential(nn.Linear(4, 4), activation, nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4))
    plain[0].load_state_dict(model[0].state_dict())
    if hook:
        model[0].register_forward_hook(lambda *_: None)
    shake(delora.inject(model, method, ["0", "2"]))
    x = torch.randn(*shape, requires_grad=True)
    before = x.clone()
    model(x).sum().backward()
    assert torch.equal(x, before)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    y = model(x)
    y[..., 0] = 0  # and in place by hand
    y.sum().backward()


def test_a_layer_is_called_by_keyword():
    model = shake(delora.inject(Net(), DeLoRA(r=2), ["q", "emb"]))
    x = torch.randn(3, 8)
    assert torch.equal(model.q(input=x), model.q(x))
    assert torch.equal(model.emb(input=ids()[:1] * 0), model.emb(ids()[:1] * 0))


def test_a_second_derivative_is_refused_in_words():
    model, x = shake(delora.inject(nn.Sequential(nn.Linear(4, 4)), LoRA(r=2), ["0"])), torch.randn(3, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_traced_model_is_saved_and_computes_the_same(tmp_path):
    model, x = (
        shake(delora.inject(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), DeLoRA(r=2), ["0", "2"])),
        torch.randn(3, 4),
    )
    traced = torch.jit.trace(model, x)
    traced.save(str(tmp_path / "model.pt"))
    again = torch.jit.load(str(tmp_path / "model.pt"))
    torch.testing.assert_close(again(2 * x), model(2 * x))


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        (
            dict(targets=None),
            TypeError,
            "targets=None: must be a list of names, a regular expression, 'all-linear', or a dictionary of names",
        ),
        (dict(targets=3), TypeError, "targets=3: must be a list"),
        (
            dict(targets=["q"], also_train=["weights"]),
            ValueError,
            "also_train: 'weights' is a ParameterList, which is never called",
        ),
        (dict(targets=["narrow"]), ValueError, r"narrow: r = 2 is more than .*exclude=\['narrow'\].*overrides="),
        (dict(targets=["broken"]), ValueError, "broken: its weight holds NaN or infinity"),
    ],
)
def test_what_is_refused_says_what_to_do_and_changes_nothing(arguments, kind, words):
    model = Net()
    model.weights, model.narrow, model.broken = (
        nn.ParameterList([nn.Parameter(torch.ones(2))]),
        nn.Linear(8, 1),
        nn.Linear(4, 4),
    )
    with torch.no_grad():
        model.broken.weight[0, 0] = torch.nan
    before = list(model.state_dict())
    with pytest.raises(kind, match=words):
        delora.inject(model, DeLoRA(r=2), **arguments)
    assert list(model.state_dict()) == before
    assert all(p.requires_grad for p in model.parameters())


def test_a_model_with_pefts_adapters_is_refused_in_words():
    model = get_peft_model(Net(), LoraConfig(target_modules=["q"]))
    with pytest.raises(TypeError, match=r"a PeftModel has PEFT's adapters in it: .*model.unload\(\)"):
        delora.inject(model, DeLoRA(r=2), ["v"])


@pytest.mark.parametrize("reparametrise", [parametrizations.weight_norm, parametrizations.spectral_norm, prune.identity])
def test_a_reparametrised_layer_is_refused_or_right(reparametrise):
    layer = nn.Linear(4, 4)
    reparametrise(layer, *(["weight"] if reparametrise is prune.identity else []))
    model, x = nn.Sequential(layer).eval(), torch.randn(3, 4)
    before = model(x)
    shake(delora.inject(model, DeLoRA(r=2), ["0"]))
    changed = model(x)
    assert not torch.allclose(changed, before)
    with pytest.raises(ValueError, match="cannot merge '0': its weight is computed from other parameters"):
        delora.merge(model)
    torch.testing.assert_close(model(x), changed)


class Wide(nn.Linear):
    """A forward of its own that is the plain product, as Falcon's."""

    def forward(self, x):
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class Noisy(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 0.1


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.noisy, self.gate, self.attention = Wide(8, 8), Noisy(8, 8), nn.Linear(8, 1), nn.MultiheadAttention(8, 2)
        self.experts = nn.ParameterDict({"up": nn.Parameter(torch.randn(3, 8, 8))})
        self.conv = nn.Conv1d(8, 8, 3, padding=1)

    def forward(self, x):
        y, _ = self.attention(self.a(x), x, x)
        y = self.conv(self.noisy(y).mT).mT
        return y * self.gate(y).sigmoid() + torch.einsum("bij,ejk->bik", y, self.experts["up"])


def test_all_linear_takes_what_it_can_and_names_what_it_leaves():
    model, x = Model().eval(), torch.randn(2, 3, 8)
    before = model(x)
    with pytest.warns(UserWarning, match="all-linear") as told:
        delora.inject(model, DeLoRA(r=2), "all-linear")
    assert list(delora.distances(model)) == ["a", "attention.in_proj_weight", "attention.out_proj"]
    (message,) = (str(w.message) for w in told)
    for part in (
        "1 Noisy",
        "it has a forward of its own",
        "1 Linear",
        "r = 2 is more than a matrix of shape [1, 8]",
        "'gate'",
        "1 ParameterDict",
        "% of the weights",
        "1 Conv1d",
        "a Conv1d is no linear layer",
    ):
        assert part in message
    assert message in str(delora.summary(model))
    torch.testing.assert_close(model(x), before)
    shake(model)
    changed = model(x)
    torch.testing.assert_close(delora.merge(model)(x), changed)


def test_an_explicit_target_is_an_error_with_the_way_out():
    with pytest.raises(TypeError, match=r"noisy: cannot adapt a Noisy: it has a forward of its own.*exclude=\['noisy'\]"):
        delora.inject(Model(), DeLoRA(r=2), ["a", "noisy"])


def test_falcons_layers_are_plain_products():
    config = FalconConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, bos_token_id=1, eos_token_id=2
    )
    model, x = FalconForCausalLM(config).eval(), torch.arange(6)[None]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shake(delora.inject(model, DeLoRA(r=2), "all-linear"), 0.05)
    assert len(delora.distances(model)) == 4
    y = model(x).logits
    torch.testing.assert_close(delora.merge(model)(x).logits, y, atol=1e-5, rtol=1e-4)


def test_a_fresh_head_that_does_not_train_is_told():
    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=20)

    def pretrained():
        model = BertForSequenceClassification(config)
        for layer in model.bert.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.bias)
        return model

    with pytest.warns(
        UserWarning, match=r"'classifier' looks newly initialised and would stay so: .*also_train=\['classifier'\]"
    ):
        delora.inject(pretrained(), DeLoRA(r=2), ["query"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        delora.inject(pretrained(), DeLoRA(r=2), ["query"], also_train=["classifier"])
        delora.inject(BertForSequenceClassification(config), DeLoRA(r=2), ["query"])  # all of it is random
        trained = pretrained()
        nn.init.ones_(trained.classifier.bias)
        delora.inject(trained, DeLoRA(r=2), ["query"])


class Patches(nn.Module):
    """A model whose input embedding is a linear layer of patches, and that owns a matrix itself."""

    def __init__(self):
        super().__init__()
        self.patches, self.positions = nn.Linear(8, 8), nn.Parameter(torch.randn(8, 8))
        self.stack = nn.Sequential(nn.Conv1d(8, 8, 1))

    def get_input_embeddings(self):
        return self.patches

    def forward(self, x):
        return self.stack((self.patches(x) @ self.positions).mT)


def test_all_linear_takes_a_linear_patch_embedding_and_names_what_the_model_owns_itself():
    model = nn.ModuleDict({"vision": Patches()})
    with pytest.warns(UserWarning, match="1 Parameter .*the model itself owns it.*'positions'") as told:
        delora.inject(model["vision"], DeLoRA(r=2), "all-linear")
    assert list(delora.distances(model)) == ["vision.patches"]
    assert str(told[0].message) in str(delora.summary(model))
