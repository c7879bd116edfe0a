"""What is reported about a change is what the dense matrices say."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import delora
from delora import DeLoRA, LoRA, LoReFT
from delora.diagnostics import Recorder, column_norms, inspect, singular_values
from delora.updates import LowRank
from tests.cases import Net, change, ids, shake


def test_the_distance_right_after_the_start_is_not_drowned_by_the_halves():
    """The two halves are of size lam, their difference of 1e-7 lam: squaring first would lose it."""
    model = delora.inject(nn.Sequential(nn.Linear(32, 32)).double(), DeLoRA(r=4), ["0"])
    assert delora.distances(model)["0"] < 1e-15
    with torch.no_grad():
        model[0].adapter.A.add_(1e-9 * torch.randn_like(model[0].adapter.A))
    dense = change(model, "0").norm().item()
    assert inspect(model)["0"].distance == pytest.approx(dense, rel=1e-5)
    assert dense > 0


def test_singular_values_of_factors():
    update = LowRank(torch.randn(9, 3), torch.randn(3, 7))
    expected = torch.linalg.svdvals(update.up.double() @ update.down.double())[:3]
    torch.testing.assert_close(singular_values(update), expected, rtol=1e-10, atol=1e-10)


def test_effective_rank_is_that_of_equal_directions():
    """k orthogonal directions of equal size have effective rank k."""
    model = delora.inject(nn.Sequential(nn.Linear(8, 8)), LoRA(r=4, alpha=4.0), ["0"])
    for k in (1, 3, 4):
        p = model[0].adapter
        p.A.data = torch.eye(4, 8)
        p.B.data = torch.eye(8, 4) * (torch.arange(4) < k)
        assert inspect(model)["0"].effective_rank == pytest.approx(k)


def test_no_change_reports_zero():
    model = delora.inject(Net(), LoRA(r=2), ["q"], also_train=["classifier"])
    report = inspect(model)
    assert report["q"].distance == report["q"].effective_rank == 0
    assert report["classifier"].distance == 0
    assert report["q"].bound is None
    assert report["q"].reachable is None


def test_no_matrix_of_the_layers_size_is_built(monkeypatch):
    model = shake(delora.inject(nn.Sequential(nn.Linear(300, 300)), DeLoRA(r=2), ["0"]))
    with torch.autograd.profiler.profile(record_shapes=True) as profile:
        delora.distances(model)
    sizes = [shape for event in profile.function_events for shape in event.input_shapes]
    assert any(s == [300, 300] for s in sizes)  # W itself, for its norm
    made = {e.name for e in profile.function_events if "mm" in e.name and [300, 300] in e.input_shapes}
    assert not made


def test_strength_scales_distance_and_bound():
    model = shake(delora.inject(Net(), DeLoRA(r=2), ["q"]))
    full = inspect(model)["q"]
    delora.strength(model, 0.5)
    half = inspect(model)["q"]
    assert half.distance == pytest.approx(full.distance / 2)
    assert half.bound_used == pytest.approx(full.bound_used)


@pytest.mark.parametrize("start", ["subtract", "copy", "paired", "soft", "zero"])
@pytest.mark.parametrize("norm", ["columns", "matrix", "rows", "none"])
def test_the_reachable_size_is_that_of_random_directions(start, norm):
    """Its relative deviation is about sqrt(2 / (in out)), 0.4 % for this layer; lam has moved since the start."""
    torch.manual_seed(0)
    model = delora.inject(
        nn.Sequential(nn.Linear(400, 300)), DeLoRA(r=8, lam=3.0, norm=norm, start=start, softness=1e-6), ["0"]
    )
    p = model[0].adapter
    with torch.no_grad():
        p.lam.fill_(2.0)
        for t in (p.A, p.B):
            t.normal_()
    report = inspect(model)["0"]
    assert report.reachable == pytest.approx(report.distance, rel=0.02)
    assert report.reachable < report.bound
    delora.strength(model, 0.5)
    assert inspect(model)["0"].reachable == pytest.approx(report.reachable / 2)


def test_column_norms():
    model = delora.inject(Net(), DeLoRA(r=2), ["q"])
    norms = column_norms(model, ["q", "v"])
    torch.testing.assert_close(norms["q"], model.q.weight.norm(dim=0))
    torch.testing.assert_close(norms["v"], model.v.weight.norm(dim=0))


def test_the_recorder_follows_training():
    model = delora.inject(Net(), DeLoRA(r=2, start="soft"), ["q", "v"], also_train=["classifier"])
    recorder = Recorder(model)
    optimizer = torch.optim.AdamW(delora.param_groups(model, lr=1e-2))
    rows = []
    for _ in range(3):
        model(ids()).square().sum().backward()
        optimizer.step()
        rows.append(recorder.record())
    assert "turn_B" not in rows[0]  # B came from zero: no angle
    assert rows[1]["turn_B"] > 0
    distances = delora.distances(model)
    assert rows[-1]["distance"] == pytest.approx((distances["q"] + distances["v"]) / 2)
    assert 0 < rows[-1]["spectral"] <= rows[-1]["distance"]
    assert 0 < rows[-1]["bound_used"] < 1
    expected = [r.reachable / model.get_submodule(name).base.weight.norm() for name, r in inspect(model).items() if r.lam]
    assert rows[-1]["reach"] == pytest.approx(sum(expected).item() / len(expected))


def test_the_recorder_has_the_distance_of_one_layer():
    model = delora.inject(Net(), DeLoRA(r=2), ["q", "v"], also_train=["classifier"])
    recorder = Recorder(model, layers=["v"])
    assert recorder.record()["|dW| v"] == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        nn.init.normal_(model.v.adapter.A)
    assert recorder.record()["|dW| v"] == pytest.approx(change(model, "v").norm().item(), rel=1e-4)
    for layers, such in ((["k"], "q, v"), (["vv"], "v")):
        with pytest.raises(ValueError, match=f"'{layers[0]}' is no adapted layer whose weights change; such are {such}"):
            Recorder(model, layers)
    both = nn.ModuleDict({"first": model, "second": delora.inject(Net(), DeLoRA(r=2), ["q"])})
    assert list(Recorder(both, ["first.v"]).layers) == ["first.v"]
    assert Recorder(both, ["v"]).layers["v"].A is model.v.adapter.A
    with pytest.raises(ValueError, match="'q' is the end of 2 adapted layers' names; such as first.q, second.q"):
        Recorder(both, ["q"])
    edits = delora.inject(nn.Sequential(nn.Linear(2, 2)), LoReFT(), ["0"])
    with pytest.raises(ValueError, match="such are none"):
        Recorder(edits, ["0"])


def test_turns_are_angles_in_degrees():
    model = delora.inject(nn.Sequential(nn.Linear(2, 2)), LoRA(r=1), ["0"])
    p = model[0].adapter
    p.A.data, p.B.data = torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0], [0.0]])
    recorder = Recorder(model)
    p.A.data, p.B.data = torch.tensor([[0.0, 5.0]]), torch.tensor([[1.0], [1.0]])
    row = recorder.record()
    assert row["turn_A"] == pytest.approx(90)
    assert row["turn_B"] == pytest.approx(45)
    assert math.isclose(recorder.record()["turn_B"], 0, abs_tol=1e-5)
