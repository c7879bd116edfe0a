"""Exports of a bounded rank and in a narrower dtype: the nearest change, its error told, and exact where that is possible."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

import delora
from delora import DeLoRA, Full, LoRA
from delora.formats.nearest import HEADER, Approximation
from delora.updates import LowRank
from tests import tiny_diffusion
from tests.cases import Net, ids, shake
from tests.test_diffusers_files import adapted
from tests.test_peft_files import TARGETS, Everything, peft_of


def header(file):
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    return json.loads(metadata[HEADER]) if HEADER in metadata else None


def changes(folder):
    """The change of each layer in a PEFT folder, as a matrix in float64."""
    t = {key: tensor.double() for key, tensor in load_file(folder / "adapter_model.safetensors").items()}
    stems = [key.removesuffix(".lora_A.weight") for key in t if key.endswith(".lora_A.weight")]
    return {stem.removeprefix("base_model.model."): t[f"{stem}.lora_B.weight"] @ t[f"{stem}.lora_A.weight"] for stem in stems}


@given(st.integers(1, 7), st.integers(1, 6), st.integers(1, 9), st.integers(1, 9), st.integers(0, 999))
@settings(max_examples=60, deadline=None)
def test_no_change_of_the_rank_is_nearer(k, rank, out, inp, seed):
    """Eckart and Young, from the dense matrix; also for factors with more columns than the matrix has."""
    torch.manual_seed(seed)
    factors = LowRank(torch.randn(out, k), torch.randn(k, inp))
    form = Approximation(rank)
    written = form.of("x", factors)
    dense = factors.up.double() @ factors.down.double()
    s = torch.linalg.svdvals(dense)
    error = (written.up.double() @ written.down.double() - dense).norm()
    assert len(written.down) <= max(rank, 1)
    torch.testing.assert_close(error, s[rank:].norm(), rtol=1e-4, atol=1e-5 * float(s.norm()))
    if rank < k:
        assert form.errors["x"] == pytest.approx(float(error / s.norm()), rel=1e-3, abs=1e-6)
    else:
        assert written is factors
        assert not form.errors


@pytest.mark.parametrize("conv1d", [True, False])
@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0, 1.5])
def test_peft_gives_the_model_whose_weights_are_the_nearest(conv1d, strength, tmp_path):
    """On layers of all kinds: the export of rank 2 is the base with each weight's change cut to two singular values."""
    base, x = Everything(conv1d).eval(), ids()
    model = delora.inject(copy.deepcopy(base), DeLoRA(2, lam=15.0), TARGETS, also_train=["classifier"])
    delora.strength(shake(model).eval(), strength)
    expected = copy.deepcopy(base)
    delora.merge(merged := copy.deepcopy(model))
    expected.load_state_dict(merged.state_dict())
    for name in TARGETS:
        new, old = expected.get_parameter(f"{name}.weight"), base.get_parameter(f"{name}.weight")
        U, s, V = torch.linalg.svd((new.data - old.data).double().flatten(1), full_matrices=False)
        new.data = old.data + ((U[:, :2] * s[:2]) @ V[:2]).view_as(old).float()
    if strength:
        with pytest.warns(UserWarning, match=r"rank = 2: of 5 of 5 layers the nearest"):
            delora.export.peft(model, tmp_path, rank=2)
    else:
        delora.export.peft(model, tmp_path, rank=2)
    torch.testing.assert_close(peft_of(base, tmp_path)(x), expected(x), rtol=1e-4, atol=1e-5)
    if strength:
        assert not torch.allclose(expected(x), model(x), rtol=1e-3, atol=1e-4), "the rank loses nothing"
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"]) == (2, {})


def test_the_errors_told_are_those_of_the_file(tmp_path):
    model = delora.inject(Net(), DeLoRA(4), ["q", "v"])
    shake(model)
    delora.export.peft(model, tmp_path / "exact")
    for dtype in (None, torch.bfloat16):
        with pytest.warns(UserWarning, match="at most") as told:
            delora.export.peft(model, tmp_path / "near", rank=3, dtype=dtype)
        assert len(told) == 1
        exact, near = changes(tmp_path / "exact"), changes(tmp_path / "near")
        seen = header(tmp_path / "near" / "adapter_model.safetensors")
        assert seen["rank"] == 3
        assert seen["dtype"] == (None if dtype is None else "bfloat16")
        for layer, W in exact.items():
            assert seen["errors"][layer] == pytest.approx(float((near[layer] - W).norm() / W.norm()), rel=0.01)
        worst = max(seen["errors"], key=seen["errors"].__getitem__)
        assert f"{seen['errors'][worst]:.2g} at most ({worst})" in str(told[0].message)


@pytest.mark.parametrize("start", ["soft", "paired", "subtract"])
def test_where_the_rank_suffices_nothing_is_lost_and_nothing_said(start, tmp_path):
    r = {"subtract": 8}.get(start, 4)  # the rank that this start needs: the table of the docs
    model = shake(delora.inject(Net(), DeLoRA(4, start=start), ["q", "v"]))
    delora.export.peft(model, tmp_path / "a")
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["r"] == r
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        delora.export.peft(model, tmp_path / "b", rank=r)
    assert header(tmp_path / "b" / "adapter_model.safetensors") is None
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_change_whose_terms_hide_a_lower_rank_is_exact_without_a_word(tmp_path):
    model = shake(delora.inject(Net(), LoRA(4), ["q"]))
    model.q.adapter.adapter.A.data[2:] = model.q.adapter.adapter.A.data[:2]  # rank 2 in 4 terms
    at_start = delora.inject(Net(), DeLoRA(4, start="copy"), ["q"])  # its terms cancel to nothing
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        delora.export.peft(model, tmp_path / "a", rank=2)
        delora.export.peft(at_start, tmp_path / "b", rank=2)
    W = delora.models.adapters(model)["q"].low_rank()
    torch.testing.assert_close(changes(tmp_path / "a")["q"].float(), W.up @ W.down, rtol=1e-5, atol=1e-6)
    assert changes(tmp_path / "b")["q"].norm() < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("turn", [1.0, 1e-2, 1e-4])
def test_a_dtype_rounds_the_change_by_its_own_precision(dtype, turn, tmp_path):
    """Also where a residual start nearly cancels, in which rounding the factors as they are would leave nothing right."""
    model = delora.inject(Net(), DeLoRA(4, lam=3.0), ["q", "v"])
    for layer in (model.q, model.v):
        for t in (layer.adapter.adapter.A, layer.adapter.adapter.B):
            t.data += turn * t.data.std() * torch.randn_like(t)
    delora.export.peft(model, tmp_path / "exact")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        delora.export.peft(model, tmp_path / "short", dtype=dtype)
    tensors = load_file(tmp_path / "short" / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {dtype}
    exact, short = changes(tmp_path / "exact"), changes(tmp_path / "short")
    naive = []
    for layer, W in exact.items():
        assert (short[layer] - W).norm() <= torch.finfo(dtype).eps * W.norm()
        factors = delora.models.adapters(model)[layer].low_rank()
        naive.append(float((factors.up.to(dtype).double() @ factors.down.to(dtype).double() - W).norm() / W.norm()))
    if turn < 1e-3:
        assert max(naive) > 1, "rounding as it is would do: the test has nothing to tell"


def test_what_the_dtype_cannot_hold_is_told_or_refused(tmp_path):
    small = shake(delora.inject(Net(), LoRA(2), ["q"]))
    delora.strength(small, 1e-12)
    with pytest.warns(
        UserWarning, match="dtype = torch.float16: of 1 of 1 layers"
    ):  # its factors are below the smallest number
        delora.export.peft(small, tmp_path / "a", dtype=torch.float16)
    large = delora.inject(Net(), Full(), ["classifier"], name="x")
    delora.inject(large, LoRA(2), ["q"], also_train=["classifier"])
    next(iter(large.classifier.adapter.module.parameters())).data.fill_(1e5)
    with pytest.raises(ValueError, match="classifier.*holds NaN or infinity: nothing was written"):
        delora.export.peft(large, tmp_path / "b", dtype=torch.float16)
    for words, options in (
        ("rank = 0: the rank of an export must be", {"rank": 0}),
        ("dtype = torch.float8_e4m3fn: an export is written in float32", {"dtype": torch.float8_e4m3fn}),
        ("rank and dtype are for kind='lora'", {"rank": 2, "kind": "delora"}),
    ):
        with pytest.raises(ValueError, match=words):
            delora.export.peft(small, tmp_path / "b", **options)
    small.q.adapter.adapter.A.data[:] = float("nan")
    with pytest.raises(ValueError, match="q holds NaN or infinity"):
        delora.export.peft(small, tmp_path / "b", rank=1)
    assert not (tmp_path / "b").exists()


@pytest.mark.filterwarnings("ignore::FutureWarning")  # diffusers calls names of peft that are to go
@pytest.mark.parametrize("kohya", [False, True])
def test_diffusers_draws_what_the_nearest_weights_draw(tmp_path, kohya):
    pipe = adapted(tiny_diffusion.pipeline(), DeLoRA(r=4, lam=4.0), r".*(attn1\.to_[qk]|resnets\.0\.conv1)")
    with pytest.warns(UserWarning, match="rank = 3: of"):
        file = delora.export.diffusers(pipe, tmp_path / "near", kohya=kohya, rank=3)
    exact = tiny_diffusion.pipeline()
    delora.merge(pipe.unet)
    with torch.no_grad():
        expected = tiny_diffusion.pipeline()
        for name, new in pipe.unet.named_parameters():
            old = expected.unet.get_parameter(name)
            if not torch.equal(new, old):
                U, s, V = torch.linalg.svd((new - old).double().flatten(1), full_matrices=False)
                old += ((U[:, :3] * s[:3]) @ V[:3]).view_as(old).float()
        exact.load_lora_weights(file.parent)
        torch.testing.assert_close(tiny_diffusion.picture(exact), tiny_diffusion.picture(expected), rtol=1e-4, atol=1e-4)
    ranks = {t.shape[0] for key, t in load_file(file).items() if "lora_A" in key or "lora_down" in key}
    assert ranks == {3}
    assert header(file)["rank"] == 3


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kohya", [False, True])
def test_diffusers_draws_the_picture_of_every_strength(tmp_path, kohya):
    pipe, seen = adapted(tiny_diffusion.pipeline(), DeLoRA(r=2, lam=4.0)), []
    for strength in (0, 0.5, 1, 1.5):
        delora.strength(pipe.unet, strength)
        delora.export.diffusers(pipe, tmp_path / str(strength), kohya=kohya)
        fresh = tiny_diffusion.pipeline()
        fresh.load_lora_weights(tmp_path / str(strength))
        with torch.no_grad():
            seen.append(tiny_diffusion.picture(fresh))
            torch.testing.assert_close(seen[-1], tiny_diffusion.picture(pipe), rtol=1e-4, atol=1e-4)
    assert all((picture - seen[0]).abs().max() > 0.01 for picture in seen[1:]), "the strength does nothing"


def test_a_dtype_in_image_programs_files(tmp_path):
    pipe = adapted(tiny_diffusion.pipeline(), DeLoRA(r=2), ["to_q"])
    tensors = load_file(delora.export.diffusers(pipe, tmp_path, kohya=True, dtype=torch.bfloat16))
    assert {t.dtype for key, t in tensors.items() if not key.endswith("alpha")} == {torch.bfloat16}
    assert {t.dtype for key, t in tensors.items() if key.endswith("alpha")} == {torch.float32}
