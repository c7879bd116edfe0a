"""The promises that every method keeps on slices of a fused layer: each is a matrix of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import delora
from delora import DeLoRA, DoRA, LoRA
from delora.diagnostics import inspect
from delora.hosts import Fused, fused
from delora.methods.base import has_dropout, starts_at_base
from delora.models import adapters
from delora.updates import wide
from tests.cases import METHODS, gradients, shake
from tests.contract.test_contract import rounding

SIZES = {"q": 8, "k": 4, "v": 4}


@dataclass(frozen=True)
class Case:
    """A fused layer, one with so many outputs alone, how the rows lie, what goes in, and the dimension of the channels."""

    fused: Callable[[], nn.Module]
    alone: Callable[[int], nn.Module]
    how: Fused
    inputs: Callable[[], Tensor]
    dim: int = -1


class Together(nn.Module):
    """q, k and v from one layer, divided."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case, self.qkv = case, case.fused()

    def forward(self, x: Tensor) -> Tensor:
        y = self.qkv(x)
        parts = {name: y.index_select(self.case.dim, self.case.how.rows(name)) for name in "qkv"}
        return torch.cat([parts["q"] * 0.5, parts["k"].sin(), parts["v"]], self.case.dim)


class Apart(nn.Module):
    """The same from three layers."""

    def __init__(self, case: Case, whole: nn.Module) -> None:
        super().__init__()
        self.case, out = case, {name: case.how.count(name) for name in "qkv"}
        self.qkv = nn.ModuleDict({name: case.alone(out[name]) for name in "qkv"})
        for name, layer in self.qkv.items():
            rows = case.how.rows(name)
            W = whole.weight.T[rows].T if isinstance(whole, Conv1D) else whole.weight[rows]
            layer.weight = nn.Parameter(W.detach().clone())
            layer.bias = None if whole.bias is None else nn.Parameter(whole.bias.detach()[rows].clone())

    def forward(self, x: Tensor) -> Tensor:
        parts = {name: self.qkv[name](x) for name in "qkv"}
        return torch.cat([parts["q"] * 0.5, parts["k"].sin(), parts["v"]], self.case.dim)


fused.register(Together, {"qkv": lambda module, rows: module.case.how})
PER_HEAD = Fused({"q": 4, "k": 2, "v": 2}, repeats=2)
CASES = {
    "Linear, one after another": Case(
        lambda: nn.Linear(12, 16), lambda out: nn.Linear(12, out), Fused(SIZES), lambda: torch.randn(3, 5, 12)
    ),
    "Linear, by heads, no bias": Case(
        lambda: nn.Linear(12, 16, bias=False), lambda out: nn.Linear(12, out), PER_HEAD, lambda: torch.randn(3, 12)
    ),
    "Conv1D": Case(lambda: Conv1D(16, 12), lambda out: Conv1D(out, 12), Fused(SIZES), lambda: torch.randn(3, 5, 12)),
    "Conv2d, by heads": Case(
        lambda: nn.Conv2d(4, 16, 2), lambda out: nn.Conv2d(4, out, 2), PER_HEAD, lambda: torch.randn(2, 4, 4, 4), 1
    ),
}
EDITS = ("LoReFT", "Bottleneck", "Bottleneck zero")
# One of each kind of update, and of each way in which it reads W.
KINDS = ("LoRA", "DeLoRA subtract", "DeLoRA soft", "DeLoRA rows", "DoRA", "ETHER+", "OFT", "BitFit", "IA3", "RED", "own method")
FITTING = {name: METHODS[name] for name in KINDS}
NAMES = ["qkv.q", "qkv.v"]


@pytest.fixture(params=CASES, ids=str)
def case(request):
    return CASES[request.param]


@pytest.fixture(params=FITTING, ids=str)
def method(request):
    return FITTING[request.param]


@pytest.fixture(params=(torch.float32, torch.bfloat16), ids=str)
def dtype(request):
    return request.param


def model_of(case: Case, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return Together(case).to(dtype)


def adapted(case: Case, method: object, dtype: torch.dtype = torch.float32, **more: float) -> nn.Module:
    return delora.inject(model_of(case, dtype), method, {"qkv": ["q", "v"]}, **more)  # type: ignore[arg-type]


def both(case: Case, method: object) -> tuple[nn.Module, nn.Module]:
    """One layer with adapters of its slices, and three layers with the same adapters."""
    model = model_of(case, torch.float64)
    apart = delora.inject(Apart(case, model.qkv), method, ["qkv.q", "qkv.v"])  # type: ignore[arg-type]
    delora.inject(model, method, NAMES)  # type: ignore[arg-type]
    shake(model)
    for name, placed in adapters(model).items():
        twin = adapters(apart)[name]
        assert set(twin.tensors()) == set(placed.tensors())
        for key, t in placed.saved().items():
            twin.put(key, t.detach().clone())
        for key in placed.tensors().keys() - placed.saved().keys():  # measured of W
            torch.testing.assert_close(twin.tensors()[key], placed.tensors()[key])
    return model, apart


def near(y: Tensor, expected: Tensor) -> None:
    size = rounding(expected, 12)
    torch.testing.assert_close(y, expected, atol=size, rtol=size)


def test_each_slice_is_a_matrix_of_its_own(case, method):
    """Outputs, gradients, distances, reports and merged weights are those of three layers."""
    model, apart = both(case, method)
    x = case.inputs().double()
    near(model(x), apart(x))
    for each in (model, apart):
        each(x).square().sum().backward()
    for name, placed in adapters(model).items():
        twin = adapters(apart)[name]
        for key, p in placed.adapter.named_parameters():
            near(p.grad, twin.adapter.get_parameter(key).grad)
    assert delora.distances(model) == pytest.approx(delora.distances(apart), rel=1e-9)
    for name, report in inspect(model).items():
        twin_report = inspect(apart)[name]
        assert (report.shape, report.parameters) == (twin_report.shape, twin_report.parameters)
        for field in ("distance", "bound", "spectral"):
            assert [getattr(report, field) or 0] == pytest.approx([getattr(twin_report, field) or 0], rel=1e-9)
    near(delora.merge(model)(x), delora.merge(apart)(x))


def test_training_starts_at_the_base_and_other_slices_stay(case, method, dtype):
    x, model = case.inputs().to(dtype), model_of(case, dtype)
    before = model(x)
    delora.inject(model, method, NAMES)
    assert list(adapters(model)) == NAMES
    after = model(x)
    assert after.dtype == before.dtype
    if starts_at_base(method):
        assert (after - before).abs().max().item() <= rounding(before, 3)
    k = torch.arange(8, 12) if case.how.repeats == 1 else case.how.rows("k")
    y = shake(model).qkv(x)
    with delora.disabled(model):
        base = model.qkv(x)
    assert torch.equal(y.index_select(case.dim, k), base.index_select(case.dim, k))
    rest = [i for i in range(16) if i not in k.tolist()]
    assert not torch.allclose(y.index_select(case.dim, torch.tensor(rest)), base.index_select(case.dim, torch.tensor(rest)))


def test_merging_changes_nothing_and_is_undone_bit_for_bit(case, method, dtype):
    model, x = shake(adapted(case, method, dtype)).eval(), case.inputs().to(dtype)
    before, layer = model(x), model.qkv.base
    bits = {key: t.clone() for key, t in layer.state_dict().items()}
    with delora.merged(model):
        assert type(model.qkv) is type(case.fused())
        near(model(x), before)
    assert torch.equal(model(x), before)
    assert all(torch.equal(t, bits[key]) for key, t in layer.state_dict().items())
    delora.merge(model)
    assert model.qkv.weight.dtype == dtype
    near(model(x), before)


def test_strength_disabled_and_eject(case, method):
    model, x = model_of(case, torch.float64).requires_grad_(False), case.inputs().double()
    before, layer = model.qkv(x), model.qkv
    shake(delora.inject(model.requires_grad_(True), method, NAMES))
    full, far = model.qkv(x), delora.distances(model)
    delora.strength(model, 0.5)
    near(model.qkv(x), (before + full) / 2)
    assert delora.distances(model) == pytest.approx({name: d / 2 for name, d in far.items()}, abs=1e-9)
    delora.strength(model, 0)
    assert torch.equal(model.qkv(x), before)
    with delora.disabled(model):
        assert torch.equal(model.qkv(x), before)
    delora.eject(model)
    assert model.qkv is layer
    assert all(p.requires_grad for p in model.parameters())


def test_a_file_brings_the_adapter_back_bit_for_bit(case, method, tmp_path):
    dropout = 0.25 if has_dropout(method) else 0.0
    model, x = shake(adapted(case, method, dropout=dropout)).eval(), case.inputs()
    delora.strength(model, 0.75)
    delora.save(model, tmp_path)
    fresh = model_of(case).eval()
    delora.load(fresh, tmp_path, methods=[type(method)])
    assert torch.equal(fresh(x), model(x))
    assert {n: (a.method, a.dropout) for n, a in adapters(fresh).items()} == dict.fromkeys(NAMES, (method, dropout))
    delora.load(fresh, tmp_path, methods=[type(method)])  # once more, into the tensors that are there
    assert torch.equal(fresh(x), model(x))
    other = model_of(case)
    with torch.no_grad():
        W = other.qkv.weight.T if isinstance(other.qkv, Conv1D) else other.qkv.weight
        W[case.how.rows("k")] *= 2  # not adapted: nobody measured it
        delora.load(copy.deepcopy(other), tmp_path, methods=[type(method)])
        W[case.how.rows("v")] *= 2
    with pytest.raises(delora.AdapterError, match=r"the weights of qkv\.v are not those"):
        delora.load(other, tmp_path, methods=[type(method)])


def test_gradients_checkpoints_copies_and_autocast(case, method):
    model, x = shake(adapted(case, method, torch.float64, dropout=0.5 if has_dropout(method) else 0.0)).train(), case.inputs()
    x = x.double().requires_grad_()
    plain = gradients(model, x)
    assert all(g.isfinite().all() and g.any() for g in plain)
    for reentrant in (False, True):
        again = gradients(model, x, lambda x, r=reentrant: torch.utils.checkpoint.checkpoint(model, x, use_reentrant=r))
        torch.testing.assert_close(again, plain)
    model.eval()
    expected = model(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    model.float()
    with torch.autocast("cpu", torch.bfloat16), delora.disabled(model):
        kind = model(x.float()).dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x.float()).dtype == kind


def test_meta_models(case, method):
    with torch.device("meta"):
        model = delora.inject(model_of(case), method, NAMES)
    assert model(case.inputs().to("meta")).is_meta
    model.to_empty(device="cpu")
    real = model_of(case)
    model.load_state_dict(real.state_dict())
    x = case.inputs()
    if starts_at_base(method):
        near(model(x), real(x))
    twin = delora.inject(real, method, NAMES)
    for name, placed in adapters(model).items():
        for key in placed.tensors().keys() - placed.saved().keys():
            torch.testing.assert_close(placed.tensors()[key], adapters(twin)[name].tensors()[key])


@pytest.mark.parametrize("name", ["DeLoRA subtract", "DoRA", "RED"])
def test_compiles_to_one_graph(case, name):
    model, x = shake(adapted(case, METHODS[name])), case.inputs()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    compiled(x).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["LoRA", "DeLoRA subtract", "DoRA", "OFT"])
def test_served_mixed_blended_and_switched(case, name):
    model, x = model_of(case, torch.float64).eval(), case.inputs().double()[:2]
    shake(delora.inject(model, METHODS[name], {"qkv": ["q", "v"]}, name="a"))
    shake(delora.inject(model, LoRA(r=2), ["qkv"], name="b"))
    expected = {}
    for key in "ab":
        delora.activate(model, key)
        expected[key] = model(x)
        with delora.serving(model):
            near(model(x), expected[key])
    with delora.routed(model, ["a", "b"]):
        near(model(x), torch.cat([expected["a"][:1], expected["b"][1:]]))
    delora.activate(model, "a")
    delora.strength(model, 0.5)
    half = model(x)
    delora.strength(model, 1)
    with delora.routed(model, ["b", "a"], strengths=[None, 0.5]):
        near(model(x), torch.cat([expected["b"][:1], half[1:]]))
    if name in ("LoRA", "DeLoRA subtract"):
        delora.blend(model, {"a": 1.0}, name="c")
        near(model(x), expected["a"])


def test_an_export_is_one_exact_lora_of_the_layer(tmp_path):
    import peft

    for case in CASES.values():
        model, x = model_of(case).eval(), case.inputs()
        base = copy.deepcopy(model)
        shake(delora.inject(model, DeLoRA(r=2), {"qkv": ["q", "v"]}, overrides={r"\.v$": {"r": 3}}))
        delora.export.peft(model, tmp_path)
        read = peft.PeftModel.from_pretrained(base, tmp_path).eval()
        assert read.peft_config["default"].r == 10  # each starts by subtracting, so of rank 2 r
        torch.testing.assert_close(read(x), model(x))
        with pytest.raises(ValueError, match="adapters of single slices, of which PEFT's own adapters know nothing"):
            delora.export.peft(shake(adapted(case, LoRA(r=2))), tmp_path, kind="own")
        with pytest.raises(ValueError, match="is not a low-rank change"):
            delora.export.peft(shake(adapted(case, DoRA(r=2))), tmp_path)


# ---------------------------------------------------------------- names and words


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(4, 12), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out(q * k + v)


def test_what_is_not_known_is_refused_with_the_line_that_says_it():
    model = nn.Sequential(Own())
    words = r"of the 12 rows of the qkv of a Own, it is not known whose they are; say it by .*register\(Own, {'qkv': "
    with pytest.raises(ValueError, match=words):
        delora.inject(model, LoRA(r=2), {"qkv": ["q"]})
    with pytest.raises(ValueError, match=words):
        delora.inject(model, LoRA(r=2), ["qkv.q"])
    fused.register(Own, {"qkv": Fused({"q": 4, "k": 4})})
    with pytest.raises(ValueError, match="of the 12 rows of the qkv of a Own, what is known does not fit"):
        delora.inject(model, LoRA(r=2), {"qkv": ["q"]})
    fused.register(Own, {"qkv": Fused(dict.fromkeys("qkv", 4))})
    assert list(adapters(delora.inject(model, LoRA(r=2), {"qkv": ["q"], "out": None}))) == ["0.qkv.q", "0.out"]
    del fused.registry[Own]
    with pytest.raises(TypeError, match="expected for each layer or parameter a Fused"):
        fused.register(Own, {"qkv": {"q": 4}})
    with pytest.raises(ValueError, match="two or more sizes, integers above 0"):
        Fused({"q": 4, "k": 0})


def test_names_choose_leave_out_and_override_slices():
    case = CASES["Linear, one after another"]
    model = delora.inject(model_of(case), LoRA(r=2), r".*qkv\.[qv]", overrides={r"\.q$": {"r": 3}})
    assert {name: a.method.r for name, a in adapters(model).items()} == {"qkv.q": 3, "qkv.v": 2}
    assert list(adapters(delora.inject(model_of(case), LoRA(r=2), ".*qkv.*"))) == ["qkv"]  # the layer, not its slices too
    assert list(adapters(delora.inject(model_of(case), LoRA(r=2), {"qkv": ["q", "v"]}, exclude=["v"]))) == ["qkv.q"]
    with pytest.raises(ValueError, match=r"'qkv.k' away, but 'qkv' is adapted as one matrix: name the slices"):
        delora.inject(model_of(case), LoRA(r=2), "all-linear", exclude=["k"])
    with pytest.raises(ValueError, match="'qkv.q' is named twice"):
        delora.inject(model_of(case), LoRA(r=2), ["qkv", "qkv.q"])
    with pytest.raises(ValueError, match=r"'qkv' has no slice 'w' .*its slices are q, k, v"):
        delora.inject(model_of(case), LoRA(r=2), {"qkv": ["w"]})
    with pytest.raises(ValueError, match=r"no module ends with 'qkv.w'.*did you mean 'qkv.v'"):
        delora.inject(model_of(case), LoRA(r=2), ["qkv.w"])
    with pytest.raises(TypeError, match=r"must be a list of slices, such as \['q', 'v'\], or None"):
        delora.inject(model_of(case), LoRA(r=2), {"qkv": "q"})
    with pytest.raises(ValueError, match=r"qkv.k: r = 9 is more than a matrix of shape \[4, 12\]"):
        delora.inject(model_of(case), LoRA(r=9), ["qkv.k"])
    with pytest.raises(TypeError, match="cannot be trained whole"):
        delora.inject(model_of(case), delora.Full(), ["qkv.k"])
    for edit in EDITS:
        with pytest.raises(TypeError, match="a slice of a layer is no layer whose output could be edited"):
            delora.inject(model_of(case), METHODS[edit], ["qkv.q"])


def test_the_slices_of_one_layer_have_one_dropout(tmp_path):
    case = CASES["Linear, one after another"]
    model = adapted(case, LoRA(r=2), dropout=0.5)
    adapters(model)["qkv.v"].adapter.drop.p = 0.25
    delora.save(model, tmp_path)
    with pytest.raises(ValueError, match=r"but have dropout {'q': 0.5, 'v': 0.25}"):
        delora.load(model_of(case), tmp_path)
    adapters(model)["qkv.v"].adapter.strength = 0.5
    with pytest.raises(ValueError, match="the slices of qkv have different strengths"):  # noqa: SIM117
        with delora.routed(model.eval(), ["default", None]):
            pass


def test_dropout_drops_the_input_of_the_changed_slices():
    case = CASES["Linear, by heads, no bias"]
    model = shake(adapted(case, LoRA(r=2), torch.float64, dropout=0.5)).train()
    x = torch.randn(1, 12, dtype=torch.float64)
    runs = torch.cat([model.qkv(x) for _ in range(4000)])
    expected = model.eval().qkv(x)
    deviation = runs.std(0) / 4000**0.5
    assert (deviation[case.how.rows("q")] > 0).all()
    assert (deviation[case.how.rows("k")] == 0).all()
    assert ((runs.mean(0) - expected).abs() <= 6 * deviation + 1e-12).all()


def test_adapters_of_half_precision_layers_train_in_float32(case):
    model = shake(adapted(case, DeLoRA(r=2), torch.bfloat16))
    model(case.inputs().bfloat16()).float().square().mean().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {wide(torch.bfloat16)}
    assert all(p.grad.isfinite().all() for p in trained)
