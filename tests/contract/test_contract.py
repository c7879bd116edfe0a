"""The promises that every method keeps on every layer in every dtype."""

from __future__ import annotations

import functools
import inspect

import pytest
import torch
import torch.utils.checkpoint

import delora
from delora import DeLoRA, diagnostics, frozen
from delora.frozen import Frozen
from delora.hosts import host
from delora.methods.base import has_dropout, starts_at_base
from delora.updates import wide
from tests.cases import DTYPES, LAYERS, METHODS, adapted, change, gradients, shake

EXACT = (
    "LoRA",
    "rsLoRA",
    "DeLoRA soft",
    "DeLoRA zero",
    "NB-LoRA",
    "DoRA",
    "DoRA fixed magnitude",
    "IA3",
    "IA3 input",
    "BitFit",
    "RED",
    "own method",
)


UNMERGEABLE = "it edits the output of the layer, which no weight can express"


@pytest.fixture(params=LAYERS, ids=str)
def layer(request):
    return LAYERS[request.param]


@pytest.fixture(params=METHODS, ids=str)
def method(request):
    return METHODS[request.param]


def in_every_dtype(law):
    """One test of a law for all dtypes: to set up and report a test apart for each costs more than what it computes."""

    @functools.wraps(law)
    def test(**arguments):
        for dtype in DTYPES:
            torch.manual_seed(0)
            try:
                law(dtype=dtype, **arguments)
            except Exception as error:
                error.add_note(f"in {dtype}")
                raise

    signature = inspect.signature(law)
    test.__signature__ = signature.replace(parameters=[p for p in signature.parameters.values() if p.name != "dtype"])
    return test


def rounding(reference: torch.Tensor, terms: int = 1) -> float:
    """What a sum of numbers of this size may lose in this dtype."""
    return 8 * terms * torch.finfo(reference.dtype).eps * max(1.0, reference.abs().max().item())


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@in_every_dtype
def test_training_starts_at_the_base(layer, method, dtype, dropout):
    x = layer.x(dtype)
    model = layer.model(dtype)
    before = model(x)
    if dropout and not has_dropout(method):
        with pytest.raises(ValueError, match=f"dropout = 0.5, but {type(method).__name__} does not support dropout"):
            delora.inject(model, method, ["layer"], dropout=dropout)
        return
    delora.inject(model, method, ["layer"], dropout=dropout).train()
    after = model(x)
    assert after.dtype == before.dtype
    if not starts_at_base(method):
        # A start that is only near zero may vanish in half precision.
        assert dtype in (torch.bfloat16, torch.float16) or not torch.equal(after, before)
    elif any(method == METHODS[name] for name in EXACT):
        assert torch.equal(after, before)
    else:
        # The halves that cancel are of size lam |c| |x| / sqrt(r), at most this:
        assert (after - before).abs().max().item() <= rounding(before, 3) * (2 if dropout else 1)


@in_every_dtype
def test_merging_changes_nothing(layer, method, dtype):
    model = shake(adapted(layer, method, dtype)).eval()
    x = layer.x(dtype)
    before = model(x)
    kind = type(model.layer.base)
    state = set(model.layer.base.state_dict())
    if not model.layer.adapter.mergeable():
        with pytest.raises(ValueError, match=f"cannot merge 'layer': {UNMERGEABLE}"):
            delora.merge(model)
        assert torch.equal(model(x), before)
        return
    delora.merge(model)
    assert type(model.layer) is kind
    # A layer without a bias may get one, where its kind has a place for it.
    assert set(model.layer.state_dict()) - state <= ({"bias"} if hasattr(model.layer, "bias") else set())
    assert state <= set(model.layer.state_dict())
    assert model.layer.weight.dtype == dtype
    tolerance = rounding(before, 12)  # W' itself is rounded to the dtype, once for each of at most 27 inputs
    torch.testing.assert_close(model(x), before, atol=tolerance, rtol=tolerance)


@in_every_dtype
def test_merged_restores_every_bit_ten_times_over(layer, method, dtype):
    model = shake(adapted(layer, method, dtype)).eval()
    x = layer.x(dtype)
    weight, before = model.layer.base.weight, model(x)
    bits = weight.detach().clone()
    if not model.layer.adapter.mergeable():
        with pytest.raises(ValueError, match=UNMERGEABLE), delora.merged(model):
            pass
        assert torch.equal(model(x), before)
        return
    for _ in range(10):
        with delora.merged(model):
            assert type(model.layer) is type(layer.make())
            assert not any("adapters" in name for name in model.state_dict())
        assert model.layer.base.weight is weight
        assert torch.equal(weight, bits)
    assert torch.equal(model(x), before)


def test_strength_is_a_dial(layer, method):
    strength_is_a_dial(shake(adapted(layer, method)).eval(), layer.x())


def strength_is_a_dial(model, x):
    mergeable = model.layer.adapter.mergeable()
    whole = change(model) if mergeable else None
    with delora.disabled(model):
        base = model(x)
    full = model(x)
    delora.strength(model, 0)
    assert torch.equal(model(x), base)
    delora.strength(model, 0.5)
    torch.testing.assert_close(model(x), (base + full) / 2)
    if mergeable:
        torch.testing.assert_close(change(model), whole / 2)
    delora.strength(model, 1)
    assert torch.equal(model(x), full)


@in_every_dtype
def test_eject_gives_the_base_back(layer, method, dtype):
    model = layer.model(dtype)
    x, inner = layer.x(dtype), model.layer
    before = model(x)
    shake(delora.inject(model, method, ["layer"]))
    delora.eject(model)
    assert model.layer is inner
    assert torch.equal(model(x), before)
    assert all(p.requires_grad for p in model.parameters())


@in_every_dtype
def test_gradients_reach_every_trainable_tensor_and_nothing_else(layer, method, dtype):
    model = shake(adapted(layer, method, dtype))
    (model(layer.x(dtype)).float() ** 2).mean().backward()
    for name, parameter in model.named_parameters():
        if name.startswith("layer.base."):
            assert parameter.grad is None
        else:
            assert parameter.dtype == wide(dtype)
            assert torch.isfinite(parameter.grad).all()
            assert parameter.grad.abs().max() > 0


def test_distance_and_spectrum_from_factors_are_those_of_the_dense_change(layer, method):
    model = shake(adapted(layer, method, torch.float64))
    report = diagnostics.inspect(model)["layer"]
    adapter = model.layer.adapter
    if not adapter.mergeable():
        assert delora.distances(model) == {}
        assert report.distance is report.relative is report.spectral is None
        return
    dense = change(model)
    W, b = adapter.host.weight(), adapter.host.bias()
    if adapter.low_rank() is None:
        new_b = adapter.update().bias(b)
        shift = W.new_zeros(len(W)) if new_b is None else new_b if b is None else new_b - b
        size = torch.cat([dense.flatten(), shift]).norm().item()
        base = W.norm() if b is None else torch.cat([W.flatten(), b]).norm()
        assert report.distance == pytest.approx(size, rel=1e-9)
        assert delora.distances(model)["layer"] == pytest.approx(size / base.item(), rel=1e-9)
        assert report.spectral is report.effective_rank is None
        return
    sigma = torch.linalg.svdvals(dense)
    share = sigma / sigma.sum()
    assert report.distance == pytest.approx(dense.norm().item(), rel=1e-9)
    assert delora.distances(model)["layer"] == pytest.approx((dense.norm() / W.norm()).item(), rel=1e-9)
    assert report.spectral == pytest.approx(sigma[0].item(), rel=1e-9)
    assert report.effective_rank == pytest.approx(torch.special.entr(share).sum().exp().item(), rel=1e-6)


@in_every_dtype
def test_a_file_brings_the_adapter_back_bit_for_bit(layer, method, dtype, tmp_path):
    dropout = 0.25 if has_dropout(method) else 0.0
    model = shake(adapted(layer, method, dtype, dropout=dropout)).eval()
    base = {key: t.clone() for key, t in model.layer.base.state_dict().items()}
    delora.strength(model, 0.75)
    delora.save(model, tmp_path / str(dtype))
    fresh = layer.model(dtype).eval()
    fresh.layer.load_state_dict(base)
    delora.load(fresh, tmp_path / str(dtype), methods=[type(method)])
    x = layer.x(dtype)
    assert torch.equal(fresh(x), model(x))
    assert fresh.layer.adapter.method == method
    assert fresh.layer.adapter.dropout == dropout


def test_a_base_checkpoint_from_before_injection_loads_and_the_adapter_keeps_its_values(layer, method):
    model = layer.model()
    before = {key: torch.randn_like(t) for key, t in model.state_dict().items()}
    shake(delora.inject(model, method, ["layer"]))
    kept = {key: t.clone() for key, t in model.layer.adapter.saved().items()}
    model.load_state_dict(before)
    assert torch.equal(model.layer.weight, before["layer.weight"])
    for key, tensor in model.layer.adapter.saved().items():
        assert torch.equal(tensor, kept[key])
    # What the method knows of W is that of the new W.
    other = layer.model()
    other.load_state_dict(before)
    delora.inject(other, method, ["layer"])
    for key, tensor in kept.items():
        other.layer.adapter.put(key, tensor, torch.device("cpu"))
    assert torch.equal(model(x := layer.x()), other(x))


def test_a_meta_model_is_as_good_as_any_once_it_has_weights(layer, method):
    for assign in (False, True):
        with torch.device("meta"):
            model = delora.inject(layer.model(), method, ["layer"])
        if not assign:
            model.to_empty(device="cpu")
        real = layer.model()
        model.load_state_dict(real.state_dict(), assign=assign)
        x = layer.x()
        if starts_at_base(method):
            torch.testing.assert_close(model(x), real(x))
        twin = delora.inject(real, method, ["layer"]).layer.adapter
        for key, tensor in model.layer.adapter.tensors().items():
            assert torch.isfinite(tensor).all()
            if key not in twin.saved():  # measured of W
                assert torch.equal(tensor, twin.tensors()[key])
        assert shake(model)(x).isfinite().all()


def test_shapes_are_inferred_on_the_meta_device(layer, method):
    x = layer.x()
    expected = layer.model()(x)
    with torch.device("meta"):
        model = delora.inject(layer.model(), method, ["layer"])
    seen = model(x.to("meta"))
    assert (seen.shape, seen.dtype) == (expected.shape, expected.dtype)


def test_a_materialised_model_that_is_filled_by_hand_measures_its_weights_when_it_runs(layer):
    with torch.device("meta"):
        model = delora.inject(layer.model(), DeLoRA(r=2), ["layer"])
    model.to_empty(device="cpu")
    torch.nn.init.normal_(model.layer.base.weight)
    if getattr(model.layer.base, "bias", None) is not None:
        torch.nn.init.zeros_(model.layer.base.bias)
    x = layer.x()
    torch.testing.assert_close(model(x), model.layer.base(x))
    expected = model.layer.adapter.host.weight().norm(dim=0)
    torch.testing.assert_close(model.layer.adapter.tensors()["c"], expected)


def test_autocast_keeps_the_output_dtype_of_the_layer(layer, method):
    model, x = layer.model(), layer.x()
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(x).dtype
        assert shake(delora.inject(model, method, ["layer"]))(x).dtype == expected


COMPILED = [(kind, name) for kind in LAYERS for name in ("LoRA", "DeLoRA subtract", "DeLoRA soft")]
COMPILED += [("Linear", name) for name in METHODS if ("Linear", name) not in COMPILED]
COMPILED += [(kind, name) for kind in ("Conv2d", "Embedding") for name in ("DoRA", "ETHER+", "OFT", "RED")]


@pytest.mark.parametrize(("kind", "name"), COMPILED)
def test_compiles_to_one_graph(kind, name):
    layer = LAYERS[kind]
    model = shake(adapted(layer, METHODS[name], dropout=0.0))
    x = layer.x()
    torch.compiler.reset()  # each case is a program of its own
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    compiled(x).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_gradient_checkpointing_changes_no_gradient(layer, method):
    model = shake(adapted(layer, method, torch.float64, dropout=0.5 if has_dropout(method) else 0.0)).train()
    x = layer.x(torch.float64)
    x = x.requires_grad_() if x.is_floating_point() else x
    plain = gradients(model, x)
    for use_reentrant in (False, True) if x.is_floating_point() else (False,):
        again = gradients(model, x, lambda x, r=use_reentrant: torch.utils.checkpoint.checkpoint(model, x, use_reentrant=r))
        torch.testing.assert_close(again, plain)  # not bit for bit: the order of a sum follows the memory layout


@in_every_dtype
def test_a_host_tells_shape_dtype_and_device_and_reads_any_rows(layer, dtype):
    looked_at = host(layer.model(dtype).layer)
    W = looked_at.matrix().detach()
    assert (looked_at.shape, looked_at.dtype, looked_at.device) == (tuple(W.shape), dtype, W.device)
    out = len(W)
    for start, stop in ((0, out), (0, 1), (out // 2, out), (3, 7)):
        rows = looked_at.rows(start, stop)
        assert torch.equal(rows, W[start:stop])
        assert not rows.requires_grad


@in_every_dtype
def test_what_a_weight_tells_in_blocks_is_what_the_dense_matrix_tells(layer, dtype, monkeypatch):
    monkeypatch.setattr(frozen, "ON_CPU", 40)
    looked_at = host(layer.model(dtype).layer)
    W, dense = Frozen(looked_at), looked_at.matrix().detach().double()
    out, inp = dense.shape
    close = {"rtol": 4 * torch.finfo(wide(dtype)).eps, "atol": 0.0}
    for told, known in ((W.column_norms(), dense.norm(dim=0)), (W.row_norms(), dense.norm(dim=1)), (W.norm(), dense.norm())):
        assert told.dtype == wide(dtype)
        torch.testing.assert_close(told.double(), known, **close)
    norm, probe = W.fingerprint()
    p, q = (f(torch.arange(1.0, n + 1, dtype=torch.float64)) for f, n in ((torch.cos, out), (torch.sin, inp)))
    assert norm == pytest.approx(dense.norm().item(), rel=1e-6)
    assert probe == pytest.approx((p @ dense @ q).item(), abs=1e-5 * norm)
    x, y = torch.randn(inp, 2, dtype=wide(dtype)), torch.randn(3, out, dtype=wide(dtype))
    torch.testing.assert_close(W.times(x), dense.to(x.dtype) @ x)
    torch.testing.assert_close(W.products(x, y), (dense.to(x.dtype) @ x, y @ dense.to(y.dtype)))
    assert torch.equal(torch.cat([block.clone() for _, block in W.blocks()]), looked_at.weight())
    assert torch.equal(W.dense(), looked_at.weight())
    assert W.on_meta().column_norms().shape == (inp,)
