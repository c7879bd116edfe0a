"""Quantised models as people load, train, save and merge them; and what their libraries do to a weight meanwhile."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import delora
from delora import AdapterError, DeLoRA, LoRA
from delora.hosts import host, quantised_host
from tests.cases import shake
from tests.quantised import IN, KINDS, OUT, x

bnb = pytest.importorskip("bitsandbytes")
pytest.importorskip("torchao")
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, TorchAoConfig  # noqa: E402

Q, K = ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj")


def nf4(**options):
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16, **options)


def int8_torchao():
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


CONFIGS = {
    "nf4": nf4,
    "nf4, scales quantised": lambda: nf4(bnb_4bit_use_double_quant=True),
    "int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "torchao int8": int8_torchao,
}


def llama(key_value_heads: int) -> LlamaConfig:
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaConfig(**sizes, num_key_value_heads=key_value_heads, tie_word_embeddings=False)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A small model's folder, as `save_pretrained` writes it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(llama(2)).to(torch.bfloat16).save_pretrained(folder)
    return folder


def load(folder, config=None, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the libraries say of themselves
        return AutoModelForCausalLM.from_pretrained(folder, **options, **({"quantization_config": config} if config else {}))


def tokens() -> torch.Tensor:
    return torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(1))


def train(model: nn.Module, steps: int = 5) -> list[float]:
    model.train()
    optimizer = torch.optim.AdamW(delora.param_groups(model, lr=1e-2))
    losses = []
    for _ in range(steps):
        loss = model(tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    """Two bfloat16 models of a few layers that differ by rounding alone."""
    assert (a - b).abs().max() <= 8 * torch.finfo(torch.bfloat16).eps * b.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_the_users_way_from_loading_to_merging(saved, tmp_path, name):
    model = load(saved, CONFIGS[name]())
    with torch.no_grad():
        base = model.train()(tokens()).logits  # training mode: int8's evaluation also quantises what goes in
    delora.inject(model, DeLoRA(r=4), "all-linear")
    with torch.no_grad():
        close(model(tokens()).logits, base)  # exactly so in exact numbers
    found = delora.summary(model)
    assert found.base == sum(p.numel() for p in load(saved).parameters())
    assert sum(layers for _, layers, _, _ in found.quantised) == 14
    losses = train(model)
    assert losses[-1] < losses[0]
    with torch.no_grad():
        adapted = model(tokens()).logits

        delora.save(model, tmp_path / "adapter")
        again = delora.load(load(saved, CONFIGS[name]()), tmp_path / "adapter").train()
        assert torch.equal(again(tokens()).logits, adapted)

        module = model.get_submodule(Q).base
        with delora.merged(model):
            assert type(model.get_submodule(Q)) is nn.Linear
            assert not model.is_quantized
            close(model(tokens()).logits, adapted)
            model.save_pretrained(tmp_path / "dense")
        assert model.get_submodule(Q).base is module
        assert model.is_quantized
        plain = load(tmp_path / "dense")
        assert (plain.dtype, plain.get_submodule(Q).weight.dtype) == (torch.bfloat16, torch.bfloat16)
        close(plain(tokens()).logits, adapted)

        with delora.merged(model, requantise=True):
            anew = model(tokens()).logits
            assert type(model.get_submodule(Q)) is type(module)
            model.save_pretrained(tmp_path / "anew")
        assert (anew - adapted).abs().max() < (base - adapted).abs().max() / 4  # it learnt something that is still there
        again = load(tmp_path / "anew").train()
        assert quantised_host(again.get_submodule(Q)) is not None
        close(again(tokens()).logits, anew)

        delora.merge(model)
        assert "quantization_config" not in model.config.to_dict()
        close(model(tokens()).logits, adapted)
        model.to(torch.float16)  # which a quantised model of transformers refuses


def test_a_model_of_which_some_layers_became_dense_loads_as_it_was_saved(saved, tmp_path):
    model = load(saved, nf4())
    delora.inject(model, DeLoRA(r=4), ["q_proj", "lm_head"])
    train(model, 2)
    delora.merge(model)
    assert model.is_quantized
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert type(again.get_submodule(Q)) is nn.Linear
    assert quantised_host(again.get_submodule(K)) is not None
    assert {type(m) for n, m in again.named_modules() if n.endswith(("q_proj", "lm_head"))} == {nn.Linear}
    with torch.no_grad():
        close(again.train()(tokens()).logits, model.train()(tokens()).logits)


def test_an_adapter_of_the_dense_base_loads_on_its_nf4_version_only_when_told_so(saved, tmp_path):
    dense = load(saved, dtype=torch.bfloat16)
    delora.inject(dense, DeLoRA(r=4), "all-linear")
    train(dense, 20)
    delora.save(dense, tmp_path / "dense")
    quantised = load(saved, nf4())
    before = quantised.state_dict().keys()
    words = "bfloat16.* there, {} here: .*not those the adapter was trained on.*allow_other_base=True"
    with pytest.raises(AdapterError, match=words.format("bitsandbytes nf4")):
        delora.load(quantised, tmp_path / "dense")
    with pytest.raises(AdapterError, match=words.format("bitsandbytes int8")):  # though int8 rounds no more than bfloat16
        delora.load(load(saved, CONFIGS["int8"]()), tmp_path / "dense")
    assert quantised.state_dict().keys() == before
    delora.load(quantised, tmp_path / "dense", allow_other_base=True)
    with torch.no_grad(), delora.disabled(quantised):
        untrained = quantised(tokens(), labels=tokens()).loss
    with torch.no_grad():
        assert quantised(tokens(), labels=tokens()).loss < untrained - 0.5  # what it learnt holds here, too
    # Now it is the quantised base's, and the file says so.
    delora.save(quantised, tmp_path / "nf4")
    delora.load(load(saved, nf4()), tmp_path / "nf4")
    with pytest.raises(AdapterError, match="bitsandbytes nf4.* there, bfloat16 here: .*not those the adapter was trained on"):
        delora.load(load(saved, dtype=torch.bfloat16), tmp_path / "nf4")


# ---------------------------------------------------------------- what bitsandbytes does in place


repacks = pytest.mark.skipif(
    not bnb.functional.has_avx512bf16(), reason="this CPU has no AVX512-BF16, on which alone bitsandbytes repacks"
)


def chain() -> nn.Module:
    """Two quantised layers, of which the first is adapted: its gradient passes through the other."""
    torch.manual_seed(0)
    layers = []
    for kind in ("bitsandbytes nf4", "bitsandbytes nf4, scales quantised"):
        dense = nn.Linear(IN, IN)
        layer = KINDS[kind].make(nn.Linear(IN, OUT))
        fresh = bnb.nn.Params4bit(dense.weight.detach(), compress_statistics=layer.weight.compress_statistics, quant_type="nf4")
        layer.weight, layer.bias, layer.out_features = fresh.to("cpu"), nn.Parameter(dense.bias.detach()), IN
        layer.quant_state = layer.weight.quant_state
        layers.append(layer)
    return nn.Sequential(*layers)


def step(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    model.train()(inputs).square().sum().backward()
    return model[0].adapter.B.grad.clone()


@repacks
def test_a_model_that_is_evaluated_between_trains_and_merges_as_one_that_is_not():
    inputs = x()
    models = [delora.inject(chain(), DeLoRA(r=4, start="soft"), ["0"]) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict(), strict=False)
    for model in models:
        model[0].adapter.adapter.load_state_dict(models[0][0].adapter.adapter.state_dict())
    expected = step(models[0], inputs)
    with torch.no_grad():
        models[1].eval()(inputs)
    assert torch.equal(step(models[1], inputs), expected)
    kept = models[1][0].base.state_dict()
    assert all(torch.equal(t, kept[key]) for key, t in models[0][0].base.state_dict().items() if isinstance(t, torch.Tensor))
    with torch.no_grad():
        models[1].eval()(inputs)
        y = models[1](inputs)
        torch.testing.assert_close(delora.merge(models[1])(inputs), y, rtol=1e-4, atol=1e-4)
        models[0].eval()
        torch.testing.assert_close(models[1](inputs), models[0](inputs), rtol=1e-4, atol=1e-4)


@repacks
def test_a_model_that_was_evaluated_before_injection_is_unpacked_and_told_of():
    inputs = x()
    never = delora.inject(chain(), LoRA(r=4), ["0"])
    model = chain()
    with torch.no_grad():
        model.eval()(inputs)
    assert model[0].weight.quant_state.packing_format_for_cpu
    exact = host(never[0].base).weight()
    with pytest.warns(UserWarning, match="bitsandbytes repacked the 4-bit weights for inference"):
        delora.inject(model, LoRA(r=4), ["0"])
    W = host(model[0].base).weight()
    eps = torch.finfo(torch.bfloat16).eps
    assert (W - exact).abs().max() <= eps * exact.abs().max()
    assert not torch.equal(W, exact)  # the scales were rounded, which the warning says
    model[0].adapter.adapter.load_state_dict(never[0].adapter.adapter.state_dict())
    for each in (never, model):
        nn.init.ones_(each[0].adapter.adapter.B)
    expected, found = step(never, inputs), step(model, inputs)
    assert (found - expected).norm() <= 8 * eps * expected.norm()
    torch.testing.assert_close(model(inputs), nn.Sequential(*[copy.deepcopy(m) for m in model])(inputs))


def test_int8s_scales_may_be_where_they_like():
    model = KINDS["bitsandbytes int8"].model()
    W = host(model.layer).weight()
    assert model.layer.weight.SCB is not None
    model(x())
    assert model.layer.weight.SCB is None
    assert torch.equal(host(model.layer).weight(), W)


# ---------------------------------------------------------------- refusals


class Unknown(nn.Module):
    """A layer of codes that nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.zeros(4, 2, dtype=torch.uint8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class UnknownLinear(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 4)
        self.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)


WAY_OUT = r"a host of your own needs two functions, rows\(start, stop\) and requantised\(W, b\).*examples/own_quantised.py"


@pytest.mark.parametrize("layer", [Unknown, UnknownLinear])
def test_a_kind_that_is_not_known_is_refused_with_what_to_do(layer):
    model = nn.Sequential(layer(), nn.Linear(4, 4))
    with pytest.raises(TypeError, match=f"cannot adapt a {layer.__name__}: .*{WAY_OUT}"):
        delora.inject(model, LoRA(r=2), ["0"])
    with pytest.warns(UserWarning, match=rf'"all-linear" left out: 1 {layer.__name__} .*quantised in a way that is not known'):
        delora.inject(model, LoRA(r=2), "all-linear")


def test_a_float_is_never_written_into_a_weight_of_codes():
    """A host that dequantises but is not told to be of a quantised kind cannot destroy the layer by merging."""

    class Codes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
            self.bias = None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight.to(x.dtype).T

    class Naive(delora.hosts.Linear):
        def matrix(self) -> torch.Tensor:
            return self.layer.weight.float()

    delora.host.register(Codes, Naive)
    model = shake(delora.inject(nn.Sequential(Codes()), LoRA(r=2), ["0"]))
    with pytest.raises(ValueError, match=r"cannot merge '0': its weight is torch.int8, which cannot hold the new values"):
        delora.merge(model)
    assert model[0].base.weight.eq(1).all()


def test_what_passes_no_gradient_is_refused():
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = nn.Sequential(nn.Linear(IN, OUT))
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    with pytest.raises(ValueError, match="quantises its input, too: no gradient passes through it"):
        delora.inject(model, LoRA(r=2), ["0"])


def test_a_layer_that_is_not_quantised_yet_is_refused():
    with pytest.raises(ValueError, match=r"a Linear4bit that is not quantised yet: .*\.to\(device\)"):
        delora.inject(nn.Sequential(bnb.nn.Linear4bit(IN, OUT)), LoRA(r=2), ["0"])


# ---------------------------------------------------------------- kernels that need a GPU


@pytest.mark.parametrize("block", [None, (16, 32), (24, 40)])
def test_transformers_float8_layers_are_read_and_quantised_anew_as_transformers_does(block):
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    W, b = torch.randn(OUT, IN), torch.randn(OUT)
    layer = fp8.FP8Linear(IN, OUT, block_size=block, has_bias=True)
    layer.requires_grad_(False)
    layer.bias.copy_(b)
    look = quantised_host(layer)
    layer.weight_scale_inv.fill_(1.0)
    layer = look.requantised(W, b)
    look = host(layer)
    expected = fp8._dequantize_fp8_weight(layer.weight, layer.weight_scale_inv, block, torch.float32)
    assert torch.equal(look.weight(), expected)
    assert torch.equal(look.rows(3, 20), expected[3:20])
    assert (expected - W).abs().max() <= W.abs().max() / 16
    again = look.requantised(expected, b)
    torch.testing.assert_close(host(again).weight(), expected)
    model = shake(delora.inject(nn.Sequential(layer), DeLoRA(r=4), ["0"]))
    new = model[0].adapter.update().merge(expected)
    delora.merge(model)
    assert torch.equal(model[0].weight, new)
    assert torch.equal(model[0].bias, b)


def test_layers_of_gptqmodel_are_read_by_their_own_dequantising_method():
    """Its wheels want another torch: this layer has what its torch kernel has, by the same names."""

    class BaseQuantLinear(nn.Module):
        pass

    BaseQuantLinear.__module__ = "gptqmodel.nn_modules.qlinear"
    BaseQuantLinear.__qualname__ = "BaseQuantLinear"

    class TorchLinear(BaseQuantLinear):
        def __init__(self) -> None:
            super().__init__()
            self.in_features, self.out_features, self.bits = IN, OUT, 4
            self.register_buffer("qweight", torch.randint(0, 2**31 - 1, (IN // 8, OUT), dtype=torch.int32))
            self.register_buffer("scales", torch.rand(1, OUT) / 16)
            self.register_buffer("bias", torch.randn(OUT))

        def dequantize_weight(self, num_itr: int = 1) -> torch.Tensor:
            codes = (self.qweight[:, None] >> torch.arange(0, 32, 4, dtype=torch.int32)[:, None]) & 15
            return self.scales * (codes.reshape(IN, OUT) - 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.dequantize_weight() + self.bias

    model, inputs = nn.Sequential(TorchLinear()), x()
    y = model(inputs)
    delora.inject(model, DeLoRA(r=4, start="soft"), "all-linear")
    assert torch.equal(model(inputs), y)
    assert delora.summary(model).base == IN * OUT + OUT
    assert delora.summary(model).quantised[0][0] == "gptq 4 bit"
    y = shake(model)(inputs)
    with pytest.raises(ValueError, match="a gptq 4 bit layer cannot be quantised anew"):
        delora.merge(model, requantise=True)
    delora.merge(model)
    torch.testing.assert_close(model(inputs), y, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- QLoRA's promise


def talk(n: int, shift: int, seed: int) -> torch.Tensor:
    """Made-up turns: a beginning, and an answer in which every token is the one before it plus a step that the turn tells."""
    draw = torch.Generator().manual_seed(seed)
    start, stride = torch.randint(0, 56, (n, 1), generator=draw), torch.randint(1, 5, (n, 1), generator=draw)
    body = (start + (stride + shift) * torch.arange(14)) % 56
    return torch.cat([torch.full((n, 1), 63), 56 + stride, body], dim=1)


def fit(model: nn.Module, steps: int, shift: int, seed: int, lr: float) -> float:
    """The mean loss of the last ten steps."""
    torch.manual_seed(seed)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for n in range(steps):
        turns = talk(16, shift, 1000 * seed + n)
        loss = model(turns, labels=turns).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return sum(losses[-10:]) / 10


@pytest.mark.slow
def test_qlora_keeps_its_promise(tmp_path):
    """On an nf4 base, 60 steps reach the dense base's loss, within the noise of seeds; merged, it is the same model."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(llama(4))
    before = fit(base, 160, 0, 0, 3e-3)
    base.save_pretrained(tmp_path)
    compute = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    losses: dict[str, list[float]] = {"dense": [], "nf4": []}
    for seed in range(1, 4):
        for kind, found in losses.items():
            model = load(tmp_path, compute if kind == "nf4" else None, dtype=torch.float32)
            torch.manual_seed(seed)  # the same start of A and B
            delora.inject(model, DeLoRA(r=8), "all-linear")
            if seed == 1 and kind == "dense":
                turns = talk(64, 1, 0)
                with torch.no_grad():
                    untrained = model(turns, labels=turns).loss.item()
            found.append(fit(model, 60, 1, seed, 1e-2))
    dense, nf4 = (torch.tensor(losses[kind]) for kind in ("dense", "nf4"))
    assert before < 1.5  # the base had learnt its own turns,
    assert dense.mean() < untrained - 0.5  # and the adapters learn the others
    assert (nf4.mean() - dense.mean()).abs() < 2 * torch.cat([dense - dense.mean(), nf4 - nf4.mean()]).std()
    with torch.no_grad():
        turns = talk(8, 1, 99)
        y = model(turns).logits
        torch.testing.assert_close(delora.merge(model)(turns).logits, y, rtol=1e-3, atol=1e-3 * y.abs().max().item())
