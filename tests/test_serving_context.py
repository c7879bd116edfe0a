"""Within `delora.serving` a model computes what it computes outside, with changes that are taken once."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import delora
from delora import DeLoRA
from tests.cases import LAYERS, METHODS, Net, ids, shake
from tests.field.test_readers import Reads


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layer", LAYERS.values(), ids=list(LAYERS))
def test_every_method_on_every_layer_is_as_outside(layer, dtype):
    for method in {"whole": delora.Full(), **METHODS}.values():
        torch.manual_seed(0)
        model = layer.model(dtype)
        try:
            delora.inject(model, method, ["layer"])
        except ValueError:  # blocks that do not divide this layer
            continue
        shake(model).eval()
        delora.strength(model, 0.7)
        x = layer.x(dtype)
        y = model(x)
        with delora.serving(model):
            # In half precision the branch is rounded once more, before it is added.
            rounding = 4 * torch.finfo(dtype).eps * y.abs().max().item()
            torch.testing.assert_close(model(x), y, atol=rounding, rtol=1e-5)
        assert torch.equal(model(x), y)


def test_who_reads_weights_reads_the_adapted_ones():
    model, x = shake(delora.inject(Reads(), DeLoRA(r=2), ["q", "k", "out", "emb"])).eval(), torch.randn(3, 4)
    y = model(x)
    with delora.serving(model):
        torch.testing.assert_close(model(x), y)


def test_an_update_is_built_once():
    calls = []

    class Counted(DeLoRA):
        def update(self, W, p):
            calls.append(1)
            return super().update(W, p)

    model, x = shake(delora.inject(Net(), Counted(r=2), ["q", "v"])).eval(), ids()
    with delora.serving(model):
        built = len(calls)
        for _ in range(3):
            model(x)
    assert built == len(calls) == 2


def test_it_is_for_inference():
    model = shake(delora.inject(Net(), DeLoRA(r=2), ["q", "v"])).eval()
    with delora.serving(model):
        model.train()
        with pytest.raises(ValueError, match=r"delora.serving is for inference.*model.eval\(\)"):
            model(ids())


def test_hooks_of_a_layer_run_inside_and_copies_are_whole():
    model, seen = shake(delora.inject(Net(), DeLoRA(r=2), ["q", "v"])).eval(), []
    model.q.base.register_forward_hook(lambda *_: seen.append(1))
    x = ids()
    with delora.serving(model):
        y = model(x)
        assert torch.equal(copy.deepcopy(model)(x), y)
    assert len(seen) == 2


def test_the_cast_input_of_autocast_is_as_outside():
    model, x = shake(delora.inject(nn.Sequential(nn.Linear(4, 4)), DeLoRA(r=2), ["0"])).eval(), torch.randn(3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
        with delora.serving(model):
            served = model(x)
    assert served.dtype == y.dtype == torch.bfloat16
    torch.testing.assert_close(served, y, atol=0.1, rtol=0.02)
