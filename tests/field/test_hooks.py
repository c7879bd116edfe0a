"""1b, 1i. A layer with hooks, or with a forward of its own on the instance, is the same layer merged, saved and ejected."""

from __future__ import annotations

import functools
import types

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import ModelHook, SequentialHook, add_hook_to_module, remove_hook_from_module
from torch import nn

import delora
from delora import DeLoRA, DoRA
from delora.hosts import host
from tests.cases import shake

CALLS: list[str] = []


class Seen(ModelHook):
    """Something that can be seen from outside."""

    def post_forward(self, module, output):
        CALLS.append("hook")
        return output


def hooked(model):
    for layer in list(model):
        add_hook_to_module(layer, SequentialHook(Seen(), ModelHook()))


def rebound(model):
    for layer in list(model):
        old = layer.forward
        layer.forward = types.MethodType(lambda self, *args, old=old: (CALLS.append("method"), old(*args))[1], layer)


def wrapped(model):
    for layer in list(model):
        old = layer.forward
        layer.forward = functools.wraps(old)(lambda *args, old=old: (CALLS.append("closure"), old(*args))[1])


def dispatched(model):
    dispatch_model(model, {"": "cpu"}, force_hooks=True)
    CALLS.append("nothing that could be seen")


@pytest.mark.parametrize("patch", [hooked, rebound, wrapped, dispatched])
@pytest.mark.parametrize("method", [DeLoRA(r=2), DoRA(r=2)], ids=["DeLoRA", "DoRA"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_patched_layers_merge_and_come_back(patch, method, when, tmp_path):
    torch.manual_seed(1)
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(3, 4)
    if when == "before":
        patch(model)
        layers, base = list(model), model(x)
        shake(delora.inject(model, method, ["0", "1"]))
    else:
        layers, base = list(model), None
        shake(delora.inject(model, method, ["0", "1"]))
        patch(model)
    changed = model(x)
    if base is not None:
        assert not torch.allclose(changed, base)
        with delora.disabled(model):
            torch.testing.assert_close(model(x), base)
    if when == "before":
        with delora.merged(model):
            assert list(model) == layers
            torch.testing.assert_close(model(x), changed)
        torch.testing.assert_close(model(x), changed)
        delora.save(model, tmp_path)
        delora.merge(model)
        CALLS[:] = ["dispatch"] if patch is dispatched else []
        torch.testing.assert_close(model(x), changed)
        assert CALLS  # what was set on the layer still runs
        for layer in model:
            remove_hook_from_module(layer)
    else:
        delora.save(model, tmp_path)
        assert torch.equal(model(x), changed)


@pytest.mark.parametrize("method", [DeLoRA(r=2), DoRA(r=2)], ids=["DeLoRA", "DoRA"])
def test_weights_that_a_hook_keeps_elsewhere(method, tmp_path):
    torch.manual_seed(1)
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(3, 4)
    plain = delora.inject(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), method, ["0", "1"])
    before = model(x)
    state = {key: t.clone() for key, t in model.state_dict().items()}
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert model[0].weight.is_meta
    looked_at = host(model[0])
    assert (looked_at.shape, looked_at.dtype, looked_at.device) == ((4, 4), torch.float32, torch.device("cpu"))
    with looked_at.held():
        assert torch.equal(looked_at.rows(1, 3), state["0.weight"][1:3])
        assert not model[0].weight.is_meta  # they came once, for the whole context
    assert model[0].weight.is_meta
    delora.inject(model, method, ["0", "1"])
    assert not any(p.is_meta for layer in model for p in layer.adapters.parameters())
    torch.testing.assert_close(model(x), before)  # training starts at the base
    shake(model)
    changed = model(x)
    changed.sum().backward()
    assert delora.distances(model)
    delora.save(model, tmp_path)
    delora.eject(plain)
    plain.load_state_dict(state)
    delora.load(plain, tmp_path)
    torch.testing.assert_close(plain(x), changed)
    with pytest.raises(ValueError, match="cannot merge '0': its weight is kept elsewhere by a hook"):
        delora.merge(model)
