"""The promises that every method keeps on matrices which a module keeps as parameters of its own."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from transformers import GptOssConfig, MixtralConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import delora
from delora import BitFit, DeLoRA, DoRA, LoRA, LoReFT
from delora.diagnostics import inspect
from delora.methods.base import starts_at_base
from delora.models import adapters, places
from delora.updates import Affine, wide
from tests.cases import METHODS, shake
from tests.field.test_replicas import replicas


@dataclass(frozen=True)
class Case:
    """A module with matrices of its own, what goes in, and the matrices' names inside."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    names: tuple[str, ...]

    def model(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        torch.manual_seed(0)
        return Around(self.make()).to(dtype)

    def x(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        return tuple(x.to(dtype) if x.is_floating_point() else x for x in self.inputs())

    def targets(self) -> list[str]:
        return [f"inner.{name}" for name in self.names]


class Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *x: Tensor) -> Tensor:
        y = self.inner(*x)
        return y[0] if isinstance(y, tuple) else y


def attention(**other: int) -> nn.Module:
    layer = nn.MultiheadAttention(8, 2, batch_first=True, **other)
    nn.init.normal_(layer.in_proj_bias)
    return layer


def mixture(kind: type, config: object) -> nn.Module:
    layer = kind(config)
    for p in layer.parameters():
        nn.init.normal_(p, std=0.3)
    return layer


def routed() -> tuple[Tensor, Tensor, Tensor]:
    """Six tokens, each for two of three experts, with weights."""
    return torch.randn(6, 8), torch.tensor([[0, 1], [1, 2], [2, 0], [0, 2], [1, 0], [2, 1]]), torch.rand(6, 2)


def numbered(*keys: str) -> tuple[str, ...]:
    return tuple(f"{key}.{i}" for key in keys for i in range(3))


SIZES = {"hidden_size": 8, "intermediate_size": 10, "num_local_experts": 3}
CASES = {
    "packed projection": Case(attention, lambda: (torch.randn(2, 3, 8),) * 3, ("in_proj_weight",)),
    "three projections": Case(
        lambda: attention(kdim=12, vdim=10),
        lambda: (torch.randn(2, 3, 8), torch.randn(2, 5, 12), torch.randn(2, 5, 10)),
        ("q_proj_weight", "k_proj_weight", "v_proj_weight"),
    ),
    "experts": Case(
        lambda: mixture(MixtralExperts, MixtralConfig(**SIZES)),
        routed,
        (*numbered("gate_up_proj"), "down_proj.0", "down_proj.2"),
    ),
    "experts, transposed, with biases": Case(
        lambda: mixture(GptOssExperts, GptOssConfig(**SIZES)), routed, numbered("gate_up_proj", "down_proj")
    ),
    "slices of a packed projection": Case(
        attention, lambda: (torch.randn(2, 3, 8),) * 3, ("in_proj_weight.q", "in_proj_weight.v")
    ),
    "interleaved slices of experts": Case(
        lambda: mixture(GptOssExperts, GptOssConfig(**SIZES)),
        routed,
        ("gate_up_proj.0.up", "gate_up_proj.1", "gate_up_proj.2.gate", "gate_up_proj.2.up", "down_proj.0"),
    ),
}
# One of each kind of update, and of each way in which it reads W.
KINDS = ("LoRA", "DeLoRA subtract", "DeLoRA soft", "DeLoRA rows", "DoRA", "ETHER+", "OFT", "BitFit", "IA3", "RED", "own method")
FITTING = {name: METHODS[name] for name in KINDS}


WITHOUT_BIAS = ("experts",)
PAIRS = [(c, m) for c in CASES for m in FITTING if not (c in WITHOUT_BIAS and m in ("BitFit", "RED"))]


@pytest.fixture(params=PAIRS, ids=", ".join)
def pair(request):
    return request.param


@pytest.fixture
def case(pair):
    return CASES[pair[0]]


@pytest.fixture
def method(pair):
    return FITTING[pair[1]]


@pytest.fixture(params=CASES, ids=str)
def each(request):
    return CASES[request.param]


@pytest.fixture(params=(torch.float32, torch.bfloat16), ids=str)
def dtype(request):
    return request.param


def adapted(case: Case, method: object, dtype: torch.dtype = torch.float32) -> nn.Module:
    return delora.inject(case.model(dtype), method, case.targets())  # type: ignore[arg-type]


def near(y: Tensor, expected: Tensor, terms: int = 12) -> None:
    size = 8 * terms * torch.finfo(expected.dtype).eps * max(1.0, expected.abs().max().item())
    torch.testing.assert_close(y, expected, atol=size, rtol=size)


def by_hand(case: Case, model: nn.Module) -> nn.Module:
    """A plain model with every matrix, and what is added to its product, changed one by one."""
    plain = case.model(torch.float64)
    plain.inner.load_state_dict({k: t.double() for k, t in model.inner.base.state_dict().items()})
    with torch.no_grad():
        for name, placed in adapters(model).items():
            slot = places(plain)[name]
            W, host = slot.part(), placed.adapter.kind(slot)
            update, b = placed.update(), host.bias()
            rows = slice(None) if slot.fused is None else slot.fused.rows(slot.cut)
            own = host.weight().to(next(iter(placed.tensors().values())).dtype)
            host.as_weight(W)[rows] = update.merge(own).double().clone()
            if isinstance(update, Affine) and b is not None:
                key, where = host.bias_at()
                getattr(plain.inner, key)[where][rows] = update.bias(b).to(torch.float64)
    return plain


def test_training_starts_at_the_base(case, method, dtype):
    x, model = case.x(dtype), case.model(dtype)
    before = model(*x)
    delora.inject(model, method, case.targets())
    assert sorted(adapters(model)) == sorted(case.targets())
    after = model(*x)
    assert after.dtype == before.dtype
    if starts_at_base(method):
        near(after, before, 4)


def test_the_module_runs_with_each_matrix_changed(case, method):
    model = shake(adapted(case, method, torch.float64))
    x = case.x(torch.float64)
    with delora.disabled(model):
        base = model(*x)
    near(model(*x), by_hand(case, model)(*x))
    assert not torch.allclose(model(*x), base)


def test_merging_changes_nothing(case, method, dtype):
    model, x = shake(adapted(case, method, dtype)), case.x(dtype)
    before, module = model(*x), model.inner.base
    bits = {key: t.clone() for key, t in module.state_dict().items()}
    with delora.merged(model):
        assert model.inner is module
        assert not any("adapters" in name for name in model.state_dict())
        near(model(*x), before)
    assert torch.equal(model(*x), before)
    assert all(torch.equal(t, bits[key]) for key, t in module.state_dict().items())
    delora.merge(model)
    assert model.inner is module
    assert {t.dtype for t in module.state_dict().values()} == {dtype}
    near(model(*x), before)


def test_strength_disabled_and_eject(case, method):
    model, x = case.model(torch.float64), case.x(torch.float64)
    before, module = model.requires_grad_(False)(*x), model.inner  # what trains may be rounded otherwise
    shake(delora.inject(model.requires_grad_(True), method, case.targets()))
    full = delora.distances(model)
    with delora.disabled(model):
        assert torch.equal(model(*x), before)
    delora.strength(model, 0)
    assert torch.equal(model(*x), before)
    delora.strength(model, 0.5)
    near(model(*x), by_hand(case, model)(*x))
    assert delora.distances(model) == pytest.approx({name: d / 2 for name, d in full.items()}, abs=1e-9)
    delora.eject(model)
    assert model.inner is module
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(model.requires_grad_(False)(*x), before)


def test_gradients_are_those_of_the_changed_matrices(case, method, dtype):
    model = shake(adapted(case, method, dtype))
    (model(*case.x(dtype)).float() ** 2).mean().backward()
    for name, parameter in model.named_parameters():
        if name.startswith("inner.base."):
            assert parameter.grad is None
        else:
            assert parameter.dtype == wide(dtype)
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all()


def test_a_file_brings_the_adapter_back_bit_for_bit(case, method, tmp_path):
    model, x = shake(adapted(case, method)), case.x()
    delora.strength(model, 0.75)
    delora.save(model, tmp_path)
    fresh = case.model()
    fresh.load_state_dict({k.replace("inner.base.", "inner."): t for k, t in model.state_dict().items() if "adapters" not in k})
    delora.load(fresh, tmp_path, methods=[type(method)])
    assert torch.equal(fresh(*x), model(*x))
    assert {n: a.method for n, a in adapters(fresh).items()} == {n: a.method for n, a in adapters(model).items()}
    delora.load(fresh, tmp_path, methods=[type(method)])  # once more, into the tensors that are there
    assert torch.equal(fresh(*x), model(*x))


def test_copies_pickles_casts_and_base_checkpoints(case, method):
    model, x = shake(adapted(case, method)), case.x()
    expected = model(*x)
    assert torch.equal(copy.deepcopy(model)(*x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(*x), expected)
    state = {key: torch.randn_like(t) for key, t in case.model().state_dict().items()}
    model.load_state_dict(state)
    other = case.model()
    other.load_state_dict(state)
    delora.inject(other, method, case.targets())
    for name, placed in adapters(other).items():
        for key, t in adapters(model)[name].saved().items():
            placed.put(key, t)
    assert torch.equal(other(*x), model(*x))
    before = model(*x).double()
    torch.testing.assert_close(
        model.double()(*(x.double() if x.is_floating_point() else x for x in x)), before, atol=1e-4, rtol=1e-4
    )


def test_meta_models(case, method):
    with torch.device("meta"):
        model = delora.inject(case.model(), method, case.targets())
    if isinstance(model.inner.base, nn.MultiheadAttention):  # which experts are used cannot be known there
        assert model(*(x.to("meta") for x in case.x())).is_meta
    model.to_empty(device="cpu")
    real = case.model()
    model.load_state_dict(real.state_dict())
    x = case.x()
    if starts_at_base(method):
        near(model(*x), real(*x), 4)
    assert shake(model)(*x).isfinite().all()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_and_threads_change_nothing(case, method, reentrant):
    model = shake(adapted(case, method, torch.float64))
    x = tuple(x.requires_grad_() if x.is_floating_point() else x for x in case.x(torch.float64))
    parameters = [p for p in model.parameters() if p.requires_grad]

    def gradients(run):
        model.zero_grad()
        run().square().sum().backward()
        return [p.grad.clone() for p in parameters]

    plain = gradients(lambda: model(*x))
    again = gradients(lambda: torch.utils.checkpoint.checkpoint(model, *x, use_reentrant=reentrant))
    torch.testing.assert_close(again, plain)


def test_threads_do_not_take_changed_parameters_for_the_layers_own(each):
    model, x = shake(adapted(each, DeLoRA(r=2))), each.x()
    expected, right = model(*x), []

    def run():
        right.append(all(torch.allclose(model(*x), expected, rtol=1e-5, atol=1e-6) for _ in range(50)))

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 3


@pytest.mark.parametrize("kind", ["packed projection", "three projections"])
@pytest.mark.parametrize("name", ["DeLoRA subtract", "RED"])
def test_compiles_to_one_graph(name, kind):
    model, x = shake(adapted(CASES[kind], METHODS[name])), CASES[kind].x()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*x), model(*x))
    compiled(*x).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_autocast_keeps_the_output_dtype(case, method):
    model, x = case.model(), case.x()
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(*x).dtype
        assert shake(delora.inject(model, method, case.targets()))(*x).dtype == expected


@pytest.mark.parametrize("name", ["LoRA", "DeLoRA subtract"])
def test_reports_summary_and_groups(each, name):
    model = shake(adapted(each, METHODS[name], torch.float64))
    for layer, placed in adapters(model).items():
        W = placed.host.weight()
        dense = placed.update().merge(W) - W
        report = inspect(model)[layer]
        assert report.shape == W.shape
        assert report.distance == pytest.approx(dense.norm().item(), rel=1e-9)
        assert delora.distances(model)[layer] == pytest.approx((dense.norm() / W.norm()).item(), rel=1e-9)
    assert f"{len(each.names)} layers" in str(delora.summary(model))
    grouped = [p for group in delora.param_groups(model, lr=1e-3) for p in group["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in model.parameters() if p.requires_grad}


# ---------------------------------------------------------------- names and words


def test_two_adapters_and_a_blend(each):
    model, x = each.model(torch.float64), each.x(torch.float64)
    base = model.requires_grad_(False)(*x)
    shake(delora.inject(model, DeLoRA(r=2), each.targets(), name="a"))
    shake(delora.inject(model, LoRA(r=2), each.targets()[:1], name="b"))
    b = model(*x)
    delora.blend(model, {"a": 0.0, "b": 1.0}, name="ab")
    near(model(*x), b)
    delora.activate(model, "a")
    assert not torch.allclose(model(*x), b)
    assert all(p.requires_grad == (".adapters.a." in n) for n, p in model.named_parameters() if "lam0" not in n)
    delora.eject(model)
    assert torch.equal(model(*x), base)


def test_dropout_is_said_not_to_apply():
    model = nn.Sequential(nn.MultiheadAttention(8, 2))
    with pytest.warns(UserWarning, match=r"dropout = 0.1 does not apply to '0.in_proj_weight'"):
        delora.inject(model, DeLoRA(r=2), "all-linear", dropout=0.1)
    assert {name: a.dropout for name, a in adapters(model).items()} == {"0.in_proj_weight": 0.0, "0.out_proj": 0.1}


@pytest.mark.parametrize("method", [LoReFT(r=2), BitFit()], ids=str)
def test_what_no_matrix_can_express_is_refused(method):
    model = nn.Sequential(nn.MultiheadAttention(8, 2, bias=False))
    what = "has no bias" if isinstance(method, BitFit) else "is no layer whose output could be edited"
    with pytest.raises(TypeError, match=f"0.in_proj_weight: cannot adapt it by {type(method).__name__}: a parameter {what}"):
        delora.inject(model, method, ["in_proj_weight"])
    assert type(model[0]) is nn.MultiheadAttention


def test_an_attention_layer_is_pointed_to_its_matrices():
    model = nn.Sequential(nn.MultiheadAttention(8, 2))
    with pytest.raises(TypeError, match=r"0: cannot adapt a MultiheadAttention.*can be named: '0.in_proj_weight'"):
        delora.inject(model, DeLoRA(r=2), ["0"])
    delora.inject(model, DeLoRA(r=2), "all-linear", exclude=["in_proj_weight"])
    assert list(delora.distances(model)) == ["0.out_proj"]
    delora.eject(model)
    with pytest.raises(ValueError, match="named twice"):
        delora.inject(model, delora.IA3(), ["0", "in_proj_weight"])
    with pytest.raises(ValueError, match="named twice"):
        delora.inject(model, DeLoRA(r=2), ["in_proj_weight"], also_train=["0"])
    with pytest.raises(ValueError, match="r = 9 is more than a matrix of shape"):
        delora.inject(model, DeLoRA(r=9), ["in_proj_weight"])


class Own(nn.Module):
    """Multiplies by a parameter of its own, which is [in, out]."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w


def test_a_module_of_ones_own_takes_one_line():
    delora.hosts.parameters.register(Own, {"w": delora.hosts.Layout(transposed=True)})
    model, x = nn.Sequential(Own(), nn.Linear(3, 3)), torch.randn(2, 4)
    delora.inject(model, DoRA(r=2), "all-linear")
    assert adapters(model)["0.w"].host.shape == (3, 4)
    y = shake(model)(x)
    torch.testing.assert_close(delora.merge(model)(x), y)
    with pytest.raises(TypeError, match="expected a Layout for each parameter"):
        delora.hosts.parameters.register(Own, {"w": "transposed"})


def test_replicas_of_data_parallel_run_their_own(each, monkeypatch):
    model, x = shake(adapted(each, DeLoRA(r=2))), each.x()
    expected = model(*x)
    first, second = replicas(model, monkeypatch)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    torch.testing.assert_close(first(*x), expected)
    torch.testing.assert_close(second(*x), expected)


class Reads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.attention.in_proj_weight, self.attention.in_proj_bias)


def test_who_reads_such_a_parameter_reads_the_changed_one(method):
    """Also where it is not called under the model that `inject` was called on."""
    model, x = nn.Sequential(Reads()), torch.randn(3, 8)
    shake(delora.inject(model, method, ["in_proj_weight"]))
    y = model[0](x)
    y.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    merged = delora.merge(copy.deepcopy(model))
    torch.testing.assert_close(merged(x), y)
    assert not torch.allclose(delora.eject(model)(x), y)


@pytest.mark.parametrize("before", [True, False])
def test_offloaded_modules_run_with_the_change_and_keep_their_own(each, before, tmp_path):
    """accelerate's hook brings the module's own parameters at every call."""
    from accelerate import cpu_offload

    # accelerate alone does not bring what attention reads
    more = ["out_proj"] if isinstance(each.make(), nn.MultiheadAttention) else []
    model, x = shake(delora.inject(each.model(), DeLoRA(r=2), [*each.targets(), *more])), each.x()
    with torch.no_grad():
        expected = model(*x)
    delora.save(model, tmp_path)
    if before:
        plain = delora.eject(copy.deepcopy(model))
        cpu_offload(plain, execution_device=torch.device("cpu"))
        away = delora.load(plain, tmp_path)
    else:
        away = model
        cpu_offload(away, execution_device=torch.device("cpu"))
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(away(*x), expected)
        assert next(away.inner.base.parameters()).is_meta
    with pytest.raises(ValueError, match="is kept elsewhere by a hook"):
        delora.merge(away)


def test_rows_of_a_mixed_batch_run_with_an_adapter_or_none(each):
    model, x = shake(adapted(each, DeLoRA(r=2))).eval(), each.x()
    expected = model(*x)
    with delora.disabled(model):
        base = model(*x)
    with delora.routed(model, ["default", None]):
        y = model(*x)
    half = len(y) // 2
    torch.testing.assert_close(y, torch.cat([expected[:half], base[half:]]))
