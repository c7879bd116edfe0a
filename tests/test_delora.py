"""What DeLoRA promises: the start, the first step, the bound, the directions."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import delora
from delora import DeLoRA, LoRA
from delora.diagnostics import inspect
from delora.methods.base import measure
from tests.cases import LAYERS, NORMS, STARTS, Net, adapted, change, ids, shake


def first_step(start: str, lr: float, r: int = 8) -> float:
    """|dW| after one AdamW step from the start, on CPU."""
    torch.manual_seed(1)
    model = delora.inject(torch.nn.Sequential(torch.nn.Linear(64, 48)), DeLoRA(r=r, lam=4.0, start=start), ["0"])
    x, y = torch.randn(32, 64), torch.randn(32, 48)
    optimizer = torch.optim.AdamW(delora.param_groups(model, lr=lr))
    (model(x) - y).square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        return change(model, "0").norm().item()


@pytest.mark.parametrize("start", ["subtract", "copy", "paired", "soft"])
def test_the_first_step_is_proportional_to_the_learning_rate(start):
    assert 9 < first_step(start, 1e-3) / first_step(start, 1e-4) < 11


def test_zero_jumps_to_the_cap_at_any_learning_rate():
    # Every b_i points where its gradient does, at full length: so do these sizes not depend on the rate.
    assert first_step("zero", 1e-3) / first_step("zero", 1e-4) == pytest.approx(1, rel=0.02)
    assert first_step("zero", 1e-4) > 100 * first_step("subtract", 1e-4)


@pytest.mark.parametrize("start", ["subtract", "copy"])
def test_one_step_moves_the_change_and_leaves_the_frozen_pair_as_it_was(start):
    """The authors' code shares the storage of both pairs on CPU, and never learns anything there."""
    model = delora.inject(torch.nn.Sequential(torch.nn.Linear(16, 16)), DeLoRA(r=4, start=start), ["0"])
    adapter = model[0].adapter
    frozen = {key: adapter.tensors()[key].clone() for key in ("A0", "B0")}
    optimizer = torch.optim.AdamW(delora.param_groups(model, lr=1e-2))
    model(torch.randn(8, 16)).square().mean().backward()
    optimizer.step()
    assert change(model, "0").norm() > 0
    for key, tensor in frozen.items():
        assert torch.equal(adapter.tensors()[key], tensor)
        assert adapter.tensors()[key].untyped_storage().data_ptr() != adapter.tensors()[key[0]].untyped_storage().data_ptr()


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("norm", NORMS)
def test_the_layers_gradient_is_that_of_the_changed_weight(start, norm):
    """The layer leaves out the gradient of terms that are constant: it must be none of a term that lam scales."""
    model = shake(adapted(LAYERS["Linear"], DeLoRA(r=4, start=start, norm=norm), torch.float64))
    adapter, layer = model.layer.adapter, model.layer.base
    x = torch.randn(7, layer.in_features, dtype=torch.float64)
    trained = [p for p in model.parameters() if p.requires_grad]
    through_the_weight = F.linear(x, adapter.update().merge(layer.weight), layer.bias).square().sum()
    expected = torch.autograd.grad(through_the_weight, trained)
    for own, other in zip(torch.autograd.grad(model.layer(x).square().sum(), trained), expected, strict=True):
        torch.testing.assert_close(own, other)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("norm", NORMS)
def test_gradients_are_orthogonal_to_the_vectors_they_turn(start, norm):
    model = shake(adapted(LAYERS["Linear"], DeLoRA(r=4, start=start, norm=norm), torch.float64))
    model(LAYERS["Linear"].x(torch.float64)).square().sum().backward()
    p = model.layer.adapter
    cosine = torch.nn.functional.cosine_similarity
    assert cosine(p.A.grad, p.A.data, dim=1).abs().max() < 1e-12
    along_b = cosine(p.B.grad, p.B.data, dim=0).abs().max()
    # Near zero a soft term grows with |b|, as LoRA's do: there the gradient does point along b.
    assert along_b > 1e-6 if start == "soft" else along_b < 1e-12


@pytest.mark.parametrize("start", STARTS)
def test_lengths_do_not_matter(start):
    layer = LAYERS["Linear"]
    model = shake(adapted(layer, DeLoRA(r=4, start=start), torch.float64))
    x, p = layer.x(torch.float64), model.layer.adapter
    before = model(x)
    with torch.no_grad():
        p.A.mul_(torch.tensor([[0.1], [3.0], [70.0], [1.0]]))
        if start != "soft":
            p.B.mul_(torch.tensor([5.0, 0.2, 1.0, 1e4]))
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)


@settings(max_examples=200, deadline=None)
@given(
    start=st.sampled_from(STARTS),
    norm=st.sampled_from(NORMS),
    exponents=st.tuples(st.integers(-30, 37), st.integers(-30, 37), st.integers(-3, 6)),
    aligned=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_the_bound_holds_for_any_parameters(start, norm, exponents, aligned, seed):
    """Tiny, huge, zero, and all terms drawn the same way: never beyond the bound, never NaN."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(9, 6, generator=generator)
    method = DeLoRA(r=4, lam=3.0, norm=norm, start=start)
    p = method.init(W) | measure(method, W)
    size_a, size_b, size_lam = (10.0**e for e in exponents)
    with torch.no_grad():
        p["A"].copy_(size_a * torch.randn(1 if aligned else 4, 6, generator=generator))
        p["B"].copy_(size_b * torch.randn(9, 1 if aligned else 4, generator=generator))
        p["A"][0] = 0
        p["lam"].copy_(size_lam * torch.randn(1, generator=generator))
        dW = method.update(None, p).scaled(1.0)
        dW = dW.up.double() @ dW.down.double()
    lam, lam0 = abs(p["lam"].item()), 3.0
    limit = {"subtract": lam + lam0, "copy": 2 * lam}.get(start, lam)
    assert dW.isfinite().all()
    slack = 1 + 1e-5  # float32 factors
    if norm == "columns":
        c = W.norm(dim=0).double()
        assert (dW.norm(dim=0) <= limit * c * slack).all()
        top = c.max().item()
    elif norm == "rows":
        c = W.norm(dim=1).double()
        assert (dW.norm(dim=1) <= limit * c * slack).all()
        top = c.max().item()
    else:
        top = W.norm().item() if norm == "matrix" else 1.0
    assert dW.norm() <= limit * top * slack
    assert method.bound(p).item() == pytest.approx(limit * top, rel=1e-5)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("norm", NORMS)
def test_diagnostics_report_the_bound_that_is_proved(start, norm):
    model = shake(adapted(LAYERS["Linear"], DeLoRA(r=4, lam=3.0, start=start, norm=norm)))
    p, W = model.layer.adapter, model.layer.base.weight
    c = {"columns": W.norm(dim=0).max(), "rows": W.norm(dim=1).max(), "matrix": W.norm(), "none": torch.tensor(1.0)}[norm]
    lam = p.lam.abs().item()
    report = inspect(model)["layer"]
    assert report.bound == pytest.approx(c.item() * {"subtract": lam + 3.0, "copy": 2 * lam}.get(start, lam), rel=1e-5)
    assert report.bound_used == pytest.approx(report.distance / report.bound)
    assert report.lam == p.lam.item()


def test_softness_is_where_a_term_has_71_percent_of_its_size():
    out, s = 50, 0.03
    W = torch.randn(out, 20)
    method = DeLoRA(r=1, lam=2.0, norm="none", start="soft", softness=s)
    p = method.init(W)
    p["B"] = torch.full((out, 1), s)
    update = method.update(None, p | measure(method, W))
    assert (update.up @ update.down).norm().item() == pytest.approx(2.0 / math.sqrt(2), rel=1e-5)


def test_copy_follows_the_present_lam_and_subtract_the_first():
    layer = LAYERS["Linear"]
    for start, vanishes in (("copy", True), ("subtract", False)):
        model = shake(adapted(layer, DeLoRA(r=4, start=start)))
        with torch.no_grad():
            model.layer.adapter.lam.zero_()
        assert (change(model).abs().max() == 0).item() is vanishes


def test_a_frozen_lam_stays_frozen():
    model = adapted(LAYERS["Linear"], DeLoRA(r=4))
    lam = model.layer.adapter.tensors()["lam"]
    for mode in (True, False, True):
        model.train(mode)
        assert not lam.requires_grad
    optimizer = torch.optim.AdamW(delora.param_groups(model, lr=0.1, weight_decay=0.1))
    model(LAYERS["Linear"].x()).square().sum().backward()
    optimizer.step()
    assert model.layer.adapter.tensors()["lam"].item() == 8.0
    assert "lam" in model.layer.adapter.saved()


@pytest.mark.parametrize("start", STARTS)
def test_by_default_no_strength_trains_and_the_first_bound_holds_at_a_far_too_high_rate(start):
    torch.manual_seed(0)
    model = delora.inject(Net(), DeLoRA(r=2, reach=0.1, start=start), ["q", "v"])
    limits = {layer: report.bound for layer, report in inspect(model).items()}
    groups = delora.param_groups(model, lr=10.0)
    optimizer, x = torch.optim.AdamW(groups), ids()
    for _ in range(20):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    assert [group["name"] for group in groups] == ["adapter"]
    named = {name: id(p) for name, p in model.named_parameters() if p.requires_grad}
    assert {name.rpartition(".")[2] for name in named} == {"A", "B"}
    assert {id(p) for p in optimizer.state} == set(named.values())
    for layer, report in inspect(model).items():
        assert 0 < report.distance <= limits[layer] * (1 + 1e-5)
        assert report.bound == limits[layer]


def test_both_halves_see_the_same_dropped_input():
    """With a mask each, the start would be the base model in the mean only."""
    model = adapted(LAYERS["Linear"], DeLoRA(r=4, lam=50.0), dropout=0.5).train()
    x = LAYERS["Linear"].x()
    torch.testing.assert_close(model(x), model.layer.base(x), atol=1e-4, rtol=1e-4)
    shake(model)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: DeLoRA(r=0), "r = 0: the rank must be an integer of at least 1"),
        (lambda: DeLoRA(r=2.0), "the rank must be an integer"),
        (lambda: DeLoRA(r=True), "the rank must be an integer"),
        (lambda: DeLoRA(lam=-5), "lam = -5: must be a finite number above 0"),
        (lambda: DeLoRA(lam=0), "lam = 0: must be"),
        (lambda: DeLoRA(lam=math.nan), "lam = nan: must be"),
        (lambda: DeLoRA(lam=math.inf), "lam = inf: must be"),
        (lambda: DeLoRA(lam="15"), "lam = '15': must be"),
        (lambda: DeLoRA(softness=0.0), "softness = 0.0: must be"),
        (lambda: DeLoRA(norm="column"), "norm = 'column': must be one of 'columns', 'matrix', 'rows', 'none'"),
        (lambda: DeLoRA(start="residual"), "start = 'residual': must be one of 'subtract'"),
        (lambda: DeLoRA(learn_lam=1), "learn_lam = 1: must be True or False"),
        (lambda: DeLoRA(r=3, start="paired"), "r = 3 with start='paired': the terms cancel in pairs, so r must be even"),
        (lambda: LoRA(r=-1), "r = -1: the rank"),
        (lambda: LoRA(alpha=math.nan), "alpha = nan: must be"),
        (lambda: LoRA(rslora="yes"), "rslora = 'yes': must be True or False"),
    ],
)
def test_bad_hyperparameters_are_refused_in_words(make, words):
    with pytest.raises(ValueError) as error:
        make()
    assert words in str(error.value)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("r", [2, 8, 32])
@pytest.mark.parametrize(("out", "inp"), [(300, 400), (900, 150)])
def test_random_directions_come_to_reach(start, norm, r, out, inp):
    """Whatever the width, rank, norm and start. A term's size deviates by sqrt(1 / in), 8 %, and a mean of 64 by 1 %."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(inp, out)
    torch.nn.init.normal_(layer.weight, std=3.0)
    layer.weight.data[:, ::3] *= 0.1  # columns of different norms
    layer.weight.data[::4] *= 3.0
    model = torch.nn.Sequential(layer)
    method = DeLoRA(r=r, reach=0.1, norm=norm, start=start, softness=1e-6)
    delora.inject(model, method, ["0"])
    assert inspect(model)["0"].reach == pytest.approx(0.1, rel=1e-5)
    adapter, distances = model[0].adapter, []
    with torch.no_grad():
        for _ in range(32):
            for name in {"A", "B", "A0", "B0"} & adapter.tensors().keys():
                getattr(adapter, name).normal_()
            distances.append(delora.distances(model)["0"])
    assert sum(distances) / len(distances) == pytest.approx(0.1, rel=0.03)


def test_reach_and_lam_are_two_ways_to_say_one_thing():
    assert (DeLoRA().lam, DeLoRA().reach) == (8.0, None)
    with pytest.raises(ValueError, match="both say how strong"):
        DeLoRA(lam=3.0, reach=0.1)
    with pytest.raises(ValueError, match="above 0"):
        DeLoRA(reach=0.0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 64))
    delora.inject(model, DeLoRA(r=4, lam=3.0), ["0", "1"], overrides={"1": {"reach": 0.2}})
    reports = inspect(model)
    assert reports["0"].lam == 3.0
    assert reports["1"].reach == pytest.approx(0.2, rel=1e-5)


def test_a_matrix_of_zeros_has_no_reach():
    layer = torch.nn.Linear(4, 4)
    torch.nn.init.zeros_(layer.weight)
    with pytest.raises(ValueError, match="W is zero"):
        delora.inject(torch.nn.Sequential(layer), DeLoRA(r=2, reach=0.1), ["0"])


def test_reach_is_kept_by_files_and_by_models_that_get_their_weights_later(tmp_path):
    torch.manual_seed(0)
    weights = torch.nn.Sequential(torch.nn.Linear(8, 8)).state_dict()
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    delora.inject(model, DeLoRA(r=2, reach=0.1, norm="none"), ["0"])
    model.load_state_dict(weights, assign=True)
    model.to_empty(device="cpu") if any(p.is_meta for p in model.parameters()) else None
    model.load_state_dict(weights)
    model(torch.ones(1, 8))
    assert inspect(model)["0"].reach == pytest.approx(0.1, rel=1e-5)
    delora.save(model, tmp_path)
    again = torch.nn.Sequential(torch.nn.Linear(8, 8))
    again.load_state_dict(weights)
    delora.load(again, tmp_path)
    assert again[0].adapter.method == DeLoRA(r=2, reach=0.1, norm="none")
    assert inspect(again)["0"].lam == inspect(model)["0"].lam


def test_a_method_is_a_value():
    assert DeLoRA(r=8, lam=4) == DeLoRA(r=8, lam=4.0)
    assert len({DeLoRA(), DeLoRA(), LoRA()}) == 2
    assert eval(repr(DeLoRA(start="soft"))) == DeLoRA(start="soft")
    with pytest.raises(AttributeError):
        DeLoRA().r = 4
