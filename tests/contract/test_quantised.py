"""The promises of the contract on layers whose weight is kept in codes, each made by its own library."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
import torch.utils.checkpoint
from torch import nn

import delora
from delora import DeLoRA, DoRA, LoRA
from delora.hosts import Fused, fused, host, quantised_host
from delora.methods.base import has_dropout, starts_at_base
from delora.models import adapters
from tests.cases import METHODS, Holder, change, gradients, shake
from tests.contract.test_contract import EXACT, UNMERGEABLE, rounding, strength_is_a_dial
from tests.quantised import IN, KINDS, OUT, Kind, x

for library in ("bitsandbytes", "torchao", "optimum.quanto", "hqq"):
    pytest.importorskip(library)

DTYPES = (torch.float32, torch.bfloat16)
# Every method on two kinds that compute differently, one method of every sort on all the others.
SORTS = ("LoRA", "DeLoRA subtract", "DoRA", "ETHER+", "BitFit")
PAIRS = [(kind, name) for kind in ("bitsandbytes nf4", "bitsandbytes int8") for name in METHODS]
PAIRS += [(kind, name) for kind in KINDS for name in SORTS if (kind, name) not in PAIRS]
each_pair = pytest.mark.parametrize(("kind", "method"), [(KINDS[k], METHODS[m]) for k, m in PAIRS], ids=map(", ".join, PAIRS))
each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def adapted(kind: Kind, method, dtype=torch.float32, **options) -> nn.Module:
    return delora.inject(kind.model(dtype), method, ["layer"], **options)


def codes(layer: nn.Module) -> list[torch.Tensor]:
    return [t.clone() for t in quantised_host(layer).stored()]


@each_kind
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_a_host_tells_what_its_layer_computes_and_reads_any_rows(kind, dtype, bias):
    layer = kind.model(dtype, bias).layer
    look = host(layer)
    W, b = look.weight(), look.bias()
    assert (look.shape, look.device) == ((OUT, IN), W.device)
    assert look.dtype.is_floating_point
    inputs = x(dtype)
    y = layer(inputs)
    expected = nn.functional.linear(inputs.float(), W, b).to(dtype)
    torch.testing.assert_close(y, expected, atol=rounding(y, 4), rtol=0)
    for start, stop in ((0, OUT), (0, 1), (OUT // 2, OUT), (3, 7)):
        rows = look.rows(start, stop)
        assert rows.dtype == look.dtype
        assert torch.equal(rows.float(), W[start:stop])
        assert not rows.requires_grad


@pytest.mark.parametrize("name", ["hqq 4 bit", "quanto qint4"])
def test_what_is_dequantised_whole_is_so_once_for_all_blocks(name, monkeypatch):
    layer = KINDS[name].model().layer
    look, calls = host(layer), []
    owner = type(layer if name.startswith("hqq") else layer.weight)
    whole = owner.dequantize
    monkeypatch.setattr(owner, "dequantize", lambda self: calls.append(1) or whole(self))
    with look.held():
        blocks = [look.rows(n, n + 8) for n in range(0, OUT, 8)]
    assert len(calls) == 1
    assert torch.equal(torch.cat(blocks), look.matrix())  # read anew, nothing is kept
    assert len(calls) == 2


@each_kind
def test_a_weight_is_read_once_and_again_only_when_it_changed(kind, monkeypatch, tmp_path):
    owner, reads = type(host(kind.model().layer)), []
    rows = owner.rows
    monkeypatch.setattr(owner, "rows", lambda self, start, stop: reads.append((start, stop)) or rows(self, start, stop))
    model = adapted(kind, DeLoRA(r=4))
    assert reads == [(0, OUT)]
    model(x())
    delora.save(model, tmp_path)
    norm = model.layer.adapter.frozen.norm()
    assert reads == [(0, OUT)]
    for t in quantised_host(model.layer.base).stored():
        if t.is_floating_point() and t.element_size() > 1 and not t.is_inference():
            t.data.mul_(2)  # the scales
    assert model.layer.adapter.frozen.norm() > 1.5 * norm
    assert len(reads) == 2


@each_pair
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_training_starts_at_the_base(kind, method, dropout):
    if dropout and not has_dropout(method):
        return
    model, inputs = kind.model(), x()
    before = model(inputs)
    after = delora.inject(model, method, ["layer"], dropout=dropout)(inputs)
    assert after.dtype == before.dtype
    if not starts_at_base(method):
        assert not torch.equal(after, before)
    elif any(method == METHODS[name] for name in EXACT):
        assert torch.equal(after, before)
    else:
        assert (after - before).abs().max().item() <= rounding(before, 3) * (2 if dropout else 1)


@each_pair
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merging_gives_a_dense_layer_that_computes_the_same(kind, method, dtype):
    model = shake(adapted(kind, method, dtype))
    inputs = x(dtype)
    before = model(inputs)
    layer, kept = model.layer.base, codes(model.layer.base)
    if not model.layer.adapter.mergeable():
        with pytest.raises(ValueError, match=f"cannot merge 'layer': {UNMERGEABLE}"):
            delora.merge(model)
        return
    delora.merge(model)
    changes_bias_alone = method == METHODS["BitFit"] and "bias" in layer._parameters
    assert model.layer is layer if changes_bias_alone else type(model.layer) is nn.Linear
    if not changes_bias_alone:
        assert all(p.dtype == dtype for p in model.layer.parameters())
        assert all(torch.equal(a, b) for a, b in zip(codes(layer), kept, strict=True))  # nothing was written into the codes
    tolerance = rounding(before, 12)
    torch.testing.assert_close(model(inputs), before, atol=tolerance, rtol=tolerance)


@each_pair
def test_merged_restores_the_very_module(kind, method):
    model = shake(adapted(kind, method))
    inputs = x()
    layer, before, kept = model.layer.base, model(inputs), codes(model.layer.base)
    if not model.layer.adapter.mergeable():
        return
    for requantise in (False, True):
        with delora.merged(model, requantise=requantise):
            assert not isinstance(model.layer, delora.Adapted)
            assert not any("adapters" in name for name in model.state_dict())
            assert requantise == (quantised_host(model.layer) is not None) or method == METHODS["BitFit"]
        assert model.layer.base is layer
        assert all(torch.equal(a, b) for a, b in zip(codes(layer), kept, strict=True))
        assert torch.equal(model(inputs), before)


@each_kind
def test_quantised_anew_the_layer_is_of_the_same_kind_and_as_near_as_its_codes_allow(kind):
    model = shake(adapted(kind, DeLoRA(r=4, lam=3.0)), 0.1)
    layer = model.layer.base
    W = model.layer.adapter.update().merge(host(layer).weight())
    bias = host(layer).bias()
    delora.merge(model, requantise=True)
    assert type(model.layer) is type(layer)
    assert model.layer is not layer
    look, old = host(model.layer), host(layer)
    assert (look.kind, look.dtype, look.bytes()) == (old.kind, old.dtype, old.bytes())
    assert [(t.dtype, t.shape) for t in look.stored()] == [(t.dtype, t.shape) for t in old.stored()]
    assert torch.equal(look.bias(), bias)
    assert (look.weight() - W).abs().max() <= kind.step * W.abs().max()
    inputs = x()
    y = model(inputs)
    expected = nn.functional.linear(inputs, look.weight(), bias)
    torch.testing.assert_close(y, expected, atol=rounding(y, 4), rtol=0)


@each_pair
def test_strength_is_a_dial(kind, method):
    strength_is_a_dial(shake(adapted(kind, method)), x())


@each_pair
def test_eject_gives_the_very_layer_back(kind, method):
    model, inputs = kind.model(), x()
    layer, before, kept = model.layer, model(inputs), codes(model.layer)
    shake(delora.inject(model, method, ["layer"]))
    model(inputs)
    delora.eject(model)
    assert model.layer is layer
    assert torch.equal(model(inputs), before)
    assert all(torch.equal(a, b) for a, b in zip(codes(layer), kept, strict=True))


@each_pair
def test_gradients_are_those_of_a_dense_layer_with_the_same_numbers(kind, method):
    model, inputs = shake(adapted(kind, method)), x().requires_grad_()
    (model(inputs).float() ** 2).mean().backward()
    gradient = inputs.grad.clone()
    found = {}
    for name, parameter in model.named_parameters():
        if name.startswith("layer.base."):
            assert parameter.grad is None
        else:
            assert parameter.dtype == torch.float32
            assert parameter.grad.abs().max() > 0
            found[name] = parameter.grad
    look = host(model.layer.base)
    dense = nn.Linear(IN, OUT, bias=True, device="meta")
    dense.weight, dense.bias = nn.Parameter(look.weight()), nn.Parameter(look.bias())
    twin = nn.Module()
    twin.layer = dense
    twin = delora.inject(twin, method, ["layer"])
    for name, tensor in model.layer.adapter.tensors().items():
        twin.layer.adapter.put(name, tensor.detach().clone())
    again = inputs.detach().clone().requires_grad_()
    (twin.layer(again).float() ** 2).mean().backward()
    assert (again.grad - gradient).norm() <= 1e-3 * gradient.norm()
    for name, parameter in twin.named_parameters():
        if name in found and not name.startswith("layer.base."):
            assert (parameter.grad - found[name]).norm() <= 1e-3 * found[name].norm()


@each_pair
def test_distances_are_those_of_the_dense_change(kind, method):
    model = shake(adapted(kind, method))
    adapter = model.layer.adapter
    if not adapter.mergeable() or adapter.low_rank() is None:
        return
    expected = change(model).norm() / adapter.host.weight().norm()
    assert delora.distances(model)["layer"] == pytest.approx(expected.item(), rel=1e-4)


@each_pair
def test_a_file_brings_the_adapter_back_bit_for_bit(kind, method, tmp_path):
    dropout = 0.25 if has_dropout(method) else 0.0
    model = shake(adapted(kind, method, dropout=dropout)).eval()
    inputs = x()
    y = model(inputs)
    delora.strength(model, 0.75)
    y = model(inputs)
    delora.save(model, tmp_path)
    fresh = delora.load(kind.model().eval(), tmp_path, methods=[type(method)])
    assert torch.equal(fresh(inputs), y)
    assert fresh.layer.adapter.method == method


@each_pair
def test_autocast_keeps_the_output_dtype_of_the_layer(kind, method):
    model, inputs = kind.model(), x()
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(inputs).dtype
        y = shake(delora.inject(model, method, ["layer"]))(inputs)
    assert y.dtype == expected
    if kind.autocast:
        y.float().sum().backward()
        assert all(p.grad is not None for p in model.layer.adapters.parameters())


@each_pair
def test_gradient_checkpointing_changes_no_gradient(kind, method):
    model = shake(adapted(kind, method, dropout=0.5 if has_dropout(method) else 0.0))
    inputs = x().requires_grad_()
    plain = gradients(model, inputs)
    for use_reentrant in (False, True):
        again = gradients(
            model, inputs, lambda x, r=use_reentrant: torch.utils.checkpoint.checkpoint(model, x, use_reentrant=r)
        )
        torch.testing.assert_close(again, plain, rtol=1e-4, atol=1e-4 * max(p.abs().max().item() for p in plain))


@each_kind
@pytest.mark.parametrize("method", [LoRA(r=4), DeLoRA(r=4)], ids=str)
def test_an_export_as_lora_is_read_back_as_the_same_change(kind, method, tmp_path):
    model = shake(adapted(kind, method))
    inputs = x()
    delora.export.peft(model, tmp_path)
    again = delora.load(kind.model(), tmp_path, allow_other_base=True)
    torch.testing.assert_close(again(inputs), model(inputs), rtol=1e-4, atol=1e-4)


@each_kind
def test_the_summary_counts_weights_and_bytes(kind):
    model = adapted(kind, LoRA(r=4))
    found = delora.summary(model)
    assert found.base == IN * OUT + OUT
    [(name, layers, weights, size)] = found.quantised
    assert (layers, weights) == (1, IN * OUT + OUT)
    assert name in str(found)
    bits = 8 * sum(t.numel() * t.element_size() for t in quantised_host(model.layer.base).stored()) / weights
    assert f"{size:,} bytes ({bits:.2f} bits each)" in str(found)
    assert 2 < bits < 16


@each_kind
def test_a_quantised_layer_is_never_trained_whole(kind):
    model = nn.Sequential(kind.model(), nn.Linear(OUT, OUT))
    names, trains = list(model.state_dict()), [p.requires_grad for p in model.parameters()]
    for also in (["0.layer"], ["0"]):
        with pytest.raises(ValueError, match="cannot be trained whole: codes take no gradient"):
            delora.inject(model, LoRA(r=2), ["1"], also_train=also)
    assert (names, trains) == (list(model.state_dict()), [p.requires_grad for p in model.parameters()])


@each_kind
def test_all_linear_takes_them(kind):
    model = nn.Sequential(kind.model(), nn.Linear(OUT, OUT))
    delora.inject(model, LoRA(r=2), "all-linear")
    assert list(delora.distances(model)) == ["0.layer", "1"]


@each_kind
def test_copies_and_pickles_are_as_good_as_the_library_makes_them(kind):
    model, inputs = shake(adapted(kind, DoRA(r=4))), x()
    y = model(inputs)
    again = [copy.deepcopy(model)] if kind.copies else []
    if kind.pickles:
        again.append(pickle.loads(pickle.dumps(model)))
    for other in again:
        assert torch.equal(other(inputs), y)
        shake(other)
        delora.merge(other)
    assert torch.equal(model(inputs), y)


@pytest.fixture(
    params=[Fused({"k": OUT // 4, "v": 3 * OUT // 4}), Fused({"k": 3, "v": 5}, repeats=OUT // 8)], ids=["together", "apart"]
)
def how(request, monkeypatch):
    monkeypatch.setitem(fused.registry, Holder, {"layer": request.param})
    return request.param


@each_kind
@pytest.mark.parametrize("name", ["DeLoRA subtract", "DoRA"])
def test_slices_of_a_quantised_layer(kind, name, how, tmp_path):
    """Each slice is a matrix of its own: the dequantised rows with the method's own change."""
    model = shake(delora.inject(kind.model(), METHODS[name], {"layer": ["v"]}))
    look, placed, inputs = host(model.layer.base), adapters(model)["layer.v"], x()
    W, b, before = look.weight(), look.bias(), model(inputs)
    rows = how.rows("v")
    assert torch.equal(placed.host.rows(1, 4), W[rows[1:4]])
    W[rows] = placed.update().merge(W[rows])
    torch.testing.assert_close(before, nn.functional.linear(inputs, W, b), atol=rounding(before, 12), rtol=0)
    delora.save(model, tmp_path)
    assert json.loads((tmp_path / "adapter.json").read_text())["layers"]["layer.v"]["base"]["kind"] == look.kind
    fresh = delora.load(kind.model(), tmp_path)
    assert torch.equal(fresh(inputs), before)
    with pytest.raises(delora.AdapterError, match="the weights of layer.v are not those"):
        delora.load(Holder(nn.Linear(IN, OUT)), tmp_path)
    delora.merge(model)
    assert type(model.layer) is nn.Linear
    torch.testing.assert_close(model.layer.weight, W, atol=rounding(W), rtol=0)
