"""A frozen weight: what is asked of it is that of the dense matrix; it is read once, in blocks, and known until it changes."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import delora
from delora import DeLoRA, LoRA, frozen, hosts
from delora.frozen import Frozen, given, takes_frozen
from delora.hosts.base import by_rows
from delora.methods.base import initial, measure
from delora.updates import LowRank, Update
from tests.cases import METHODS, Holder, Net, change, ids, placed, shake

LINEAR = {name: m for name, m in METHODS.items() if placed(m, nn.Linear(12, 10)).mergeable()}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of two rows of twelve, so that these matrices have several."""
    monkeypatch.setattr(frozen, "ON_CPU", 24)


class Packed(nn.Linear):
    """A layer whose numbers are had through its host alone, which counts how many were read at most, and at once."""

    read: int = 0
    most: int = 0


class PackedHost(hosts.Linear):
    @property
    def shape(self) -> tuple[int, int]:
        return self.layer.out_features, self.layer.in_features

    @property
    def dtype(self) -> torch.dtype:
        return self.layer.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.layer.weight.device

    def matrix(self) -> Tensor:
        return self.rows(0, self.layer.out_features)

    def rows(self, start: int, stop: int) -> Tensor:
        self.layer.read += (stop - start) * self.layer.in_features
        self.layer.most = max(self.layer.most, stop - start)
        return self.layer.weight.detach()[start:stop]


@pytest.fixture
def packed():
    hosts.host.register(Packed, PackedHost)
    yield lambda dtype=torch.float32: Holder(Packed(12, 10)).to(dtype)
    del hosts.host.registry[Packed]


def reads(model: nn.Module) -> tuple[float, int]:
    """How often W was read since the last call, and how many rows at once."""
    layer = next(m for m in model.modules() if isinstance(m, Packed))
    seen = layer.read / layer.weight.numel(), layer.most
    layer.read = layer.most = 0
    return seen


# ---------------------------------------------------------------- read once


@pytest.mark.parametrize("name", LINEAR)
def test_each_verb_reads_a_weight_at_most_once_and_in_blocks(name, packed, tmp_path):
    method = LINEAR[name]
    model, other = packed(), packed()
    other.load_state_dict(model.state_dict())
    in_update = 1 if getattr(method, "reads_weight", False) else 0  # DoRA's norms of W + BA
    own = "own" in name  # takes a tensor: all of W at once
    mixes = placed(method, nn.Linear(12, 10)).update().rows(0, 1) is None  # merging needs all rows at once
    reads(model)
    delora.inject(model, method, ["layer"])
    times, most = reads(model)
    assert times <= 1
    assert most <= (10 if own else 2)
    shake(model)
    delora.save(model, tmp_path)
    times, most = reads(model)
    assert times <= 1 + in_update
    assert most <= (10 if in_update else 2)
    delora.distances(model)
    assert reads(model)[0] <= 1 + in_update
    delora.save(model, tmp_path)
    delora.distances(model)
    reads(model)
    delora.load(other, tmp_path, methods=[type(method)])
    times, most = reads(other)
    assert times <= (2 if own else 1)
    assert most <= (10 if own else 2)
    delora.merge(model)
    times, most = reads(model)
    assert times <= 1 + 2 * in_update
    assert most <= (10 if mixes or in_update else 2)


@pytest.mark.parametrize("method", [LoRA(r=2), DeLoRA(r=2)], ids=str)
def test_what_is_known_of_a_weight_is_not_read_again(method, packed, tmp_path):
    model = packed()
    delora.inject(model, method, ["layer"])
    delora.save(model, tmp_path)
    reads(model)
    delora.save(model, tmp_path)
    delora.distances(model)
    delora.diagnostics.inspect(model)
    assert reads(model) == (0, 0)


CHANGES = {
    "written to": lambda model: model.layer.base.weight.mul_(2),
    "written to beside autograd": lambda model: model.layer.base.weight.data.mul_(2),
    "replaced": lambda model: setattr(model.layer.base, "weight", nn.Parameter(2 * model.layer.base.weight)),
    "its data replaced": lambda model: setattr(model.layer.base.weight, "data", 2 * model.layer.base.weight.data),
    "loaded": lambda model: model.load_state_dict({"layer.weight": 2 * model.layer.base.weight}, strict=False),
    "cast": lambda model: model.to(torch.bfloat16).to(torch.float32),
    "copied": lambda model: copy.deepcopy(model).layer.base.weight.mul_(2),
}


@torch.no_grad()
@pytest.mark.parametrize("how", CHANGES)
@pytest.mark.parametrize("method", [LoRA(r=2), DeLoRA(r=2)], ids=str)
def test_a_weight_that_changed_is_read_again(method, how, tmp_path):
    model = delora.inject(Holder(nn.Linear(12, 10)), method, ["layer"])
    delora.distances(model)
    delora.save(model, tmp_path)
    CHANGES[how](model)
    adapter = model.layer.adapter
    assert adapter.frozen.norm().item() == pytest.approx(adapter.host.weight().norm().item(), rel=1e-6)
    assert adapter.frozen.fingerprint() == pytest.approx(Frozen(adapter.host.weight()).fingerprint(), rel=1e-6)


def test_one_number_changed_by_hand_is_seen_after_refresh():
    model = delora.inject(Holder(nn.Linear(64, 64)), DeLoRA(r=2, norm="matrix"), ["layer"])
    model.layer.base.weight.data[3, 5] = 50.0
    model.layer.refresh()
    assert model.layer.adapter.tensors()["c"].item() == pytest.approx(model.layer.base.weight.norm().item(), rel=1e-6)
    assert model.layer.adapter.frozen.norm().item() > 50


def test_autocast_does_not_touch_what_is_measured():
    W = torch.randn(10, 12)
    with torch.autocast("cpu", torch.bfloat16):
        told = Frozen(W).fingerprint()
    assert told == pytest.approx(Frozen(W.double()).fingerprint(), rel=1e-5)


# ---------------------------------------------------------------- who is given what


class Halves:
    """Not one of ours: its functions take a tensor."""

    def init(self, W):
        assert type(W) is Tensor
        return {"s": nn.Parameter(torch.linalg.svdvals(W))}

    def measure(self, W):
        return {"m": W.abs().amax(dim=0)}


class Sizes(DeLoRA):
    @takes_frozen
    def measure(self, W):
        return super().measure(W) | {"rows": W.row_norms()}


def test_a_function_is_given_what_it_takes():
    W = torch.randn(6, 4).bfloat16()
    method = Halves()
    torch.testing.assert_close(initial(method, Frozen(W))["s"].detach(), torch.linalg.svdvals(W.float()))
    assert torch.equal(measure(method, W)["m"], W.float().abs().amax(dim=0))
    both = measure(Sizes(), Frozen(W))
    torch.testing.assert_close(both["c"], W.float().norm(dim=0))
    torch.testing.assert_close(both["rows"], W.float().norm(dim=1))
    torch.testing.assert_close(Sizes().measure(W), both)
    assert given(lambda W: type(W), Frozen(W)) is Tensor


# ---------------------------------------------------------------- updates by rows, and how large they are at most


@torch.no_grad()
@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize("name", LINEAR)
def test_an_update_of_rows_is_the_rows_of_the_update(name, strength):
    model = shake(adapted_linear(LINEAR[name]))
    delora.strength(model, strength)
    adapter = model.layer.adapter
    W, update = adapter.host.weight(), adapter.update()
    whole = update.merge(W)
    new = torch.cat([part.merge(block) for _, block, part in by_rows(update, Frozen(W))])
    torch.testing.assert_close(new, whole)
    assert whole.norm().item() <= update.largest(W.norm().item())


@torch.no_grad()
@pytest.mark.parametrize("name", LINEAR)
def test_no_update_is_larger_than_it_says(name):
    for size in (0.01, 1.0, 100.0):
        model = shake(adapted_linear(LINEAR[name]), size)
        adapter = model.layer.adapter
        for W in (torch.randn(10, 12, dtype=torch.float64), torch.zeros(10, 12, dtype=torch.float64)):
            update = adapter.update()
            assert update.merge(W.float()).norm().item() <= update.largest(W.norm().item()) * (1 + 1e-5)


def adapted_linear(method: object) -> nn.Module:
    return delora.inject(Holder(nn.Linear(12, 10)), method, ["layer"])  # type: ignore[arg-type]


# ---------------------------------------------------------------- all or nothing


def test_a_change_that_overflows_is_refused_before_any_layer_is_merged():
    net = delora.inject(Net().half(), LoRA(r=2), ["q", "v"])
    torch.nn.init.constant_(net.q.adapter.B, 1.0)
    torch.nn.init.constant_(net.v.adapter.B, 1e6)
    before = [net.q.base.weight.clone(), net.v.base.weight.clone()]
    with pytest.raises(ValueError, match="cannot merge 'v': its new weight would hold NaN or infinity"):
        delora.merge(net)
    assert torch.equal(net.q.base.weight, before[0])
    assert torch.equal(net.v.base.weight, before[1])


def test_a_large_change_that_does_not_overflow_is_merged():
    """What the sizes leave open is computed: here the bound of the norm is far beyond float16, no number is."""
    model = delora.inject(Holder(nn.Linear(64, 64, bias=False)).half(), LoRA(r=1), ["layer"])
    with torch.no_grad():
        model.layer.adapter.A.fill_(1.0)
        model.layer.adapter.B.fill_(200.0)  # alpha / r = 16: entries of 3,200, a norm of 204,800
    assert not model.layer.adapter.is_finite()
    expected = change(model)
    W = model.layer.adapter.host.weight().clone()
    torch.testing.assert_close(delora.merge(model).layer.weight.float(), W + expected, rtol=1e-3, atol=1e-3)


def test_a_weight_without_numbers_is_refused():
    net = delora.inject(Net(), LoRA(r=2), ["q", "v"])
    with torch.no_grad():
        net.v.base.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="cannot merge 'v'"):
        delora.merge(net)
    assert [type(net.q).__name__, type(net.v).__name__] == ["Adapted", "Adapted"]


class Interrupted(LowRank):
    """Fails while the second layer is merged, as when memory runs out."""

    left = 1

    def rows(self, start: int, stop: int) -> LowRank:
        if stop > start:
            if not Interrupted.left:
                raise MemoryError
            Interrupted.left -= stop == 8
        return LowRank(self.up[start:stop], self.down)


class Interrupting(LoRA):
    def update(self, W: Tensor | None, p: dict[str, Tensor]) -> Update:
        update = super().update(W, p)
        return Interrupted(update.up, update.down)


def test_a_merge_that_is_interrupted_leaves_a_model_that_computes_the_same():
    torch.manual_seed(0)
    net = shake(delora.inject(Net(), Interrupting(r=2), ["q", "v"]))
    x = ids()
    before = net(x)
    Interrupted.left = 1
    with pytest.raises(MemoryError):
        delora.merge(net)
    assert [type(net.q).__name__, type(net.v).__name__] == ["Linear", "Adapted"]
    torch.testing.assert_close(net(x), before)
    Interrupted.left = 100
    torch.testing.assert_close(delora.merge(net)(x), before)
    assert type(net.v) is nn.Linear


def test_the_old_weights_of_a_merged_layer_stay_with_whoever_holds_them():
    model = shake(adapted_linear(DeLoRA(r=2)))
    held, bits = model.layer.base.weight, model.layer.base.weight.detach().clone()
    state = model.state_dict()
    delora.merge(model)
    assert torch.equal(held, bits)
    assert torch.equal(state["layer.base.weight"], bits)
    assert not torch.equal(model.layer.weight, bits)


def test_merged_weights_take_the_memory_that_nobody_else_sees():
    model = shake(adapted_linear(DeLoRA(r=2)))
    at, expected = model.layer.base.weight.data_ptr(), model.layer.adapter.host.weight() + change(model)
    delora.merge(model)
    assert model.layer.weight.data_ptr() == at
    torch.testing.assert_close(model.layer.weight.detach(), expected.detach())


HOLDERS = {
    "a view": lambda model: model.layer.base.weight.detach().T,
    "the parameter": lambda model: model.layer.base.weight,
    "an optimizer": lambda model: torch.optim.SGD(model.layer.base.parameters()),
    "another model": lambda model: nn.Sequential(*[_sharing(model.layer.base)]),
    "an array": lambda model: model.layer.base.weight.detach().numpy(),
}


def _sharing(layer: nn.Linear) -> nn.Linear:
    other = nn.Linear(12, 10)
    other.weight = layer.weight
    return other


@pytest.mark.parametrize("who", HOLDERS)
def test_whoever_else_holds_the_old_weight_keeps_it(who):
    model = shake(adapted_linear(DeLoRA(r=2)))
    bits, at = model.layer.base.weight.detach().clone(), model.layer.base.weight.data_ptr()
    held = HOLDERS[who](model)
    delora.merge(model)
    assert model.layer.weight.data_ptr() != at
    old = {
        "a view": lambda: held.T,
        "the parameter": lambda: held,
        "an optimizer": lambda: held.param_groups[0]["params"][0],
        "another model": lambda: held[0].weight,
        "an array": lambda: torch.from_numpy(held),
    }[who]()
    assert torch.equal(old, bits)


def test_a_graph_that_waits_for_its_backward_keeps_the_old_weight():
    model = shake(adapted_linear(DeLoRA(r=2)))
    x = torch.randn(3, 12, requires_grad=True)
    with delora.disabled(model):
        y = model(x).sum()
    expected = model.layer.base.weight.detach().sum(0)
    delora.merge(model)
    y.backward()
    torch.testing.assert_close(x.grad[0], expected)
