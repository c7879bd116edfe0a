"""1a, 1r. A forward finds all it needs through the module that it runs in: replicas, copies, pickles."""

from __future__ import annotations

import copy
import io
import sys

import pytest
import torch
from torch import nn

import delora
from delora import DeLoRA, DoRA, EtherPlus, LoRA
from tests.cases import Net, ids, shake


def replicas(model: nn.Module, monkeypatch, count: int = 2) -> list[nn.Module]:
    """What nn.DataParallel makes of a model, by torch's own function; where it would copy to another GPU, the CPU copies."""
    module = sys.modules["torch.nn.parallel.replicate"]

    def copies(tensors, devices, detach=False):
        return [[t.clone().detach().requires_grad_(t.requires_grad and not detach) for t in tensors] for _ in devices]

    monkeypatch.setattr(module, "_get_device_index", lambda device, optional: device)
    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", copies)
    return torch.nn.parallel.replicate(model, list(range(count)))


@pytest.mark.parametrize("method", [DeLoRA(r=2), DoRA(r=2), EtherPlus(), LoRA(r=2)], ids=str)
def test_replicas_compute_what_the_model_does(method, monkeypatch):
    model = shake(
        delora.inject(Net(), method, ["emb", "v"] if "reads" in str(method) else ["q", "v"], also_train=["classifier"])
    )
    x = ids()
    expected = model(x)
    for replica in replicas(model, monkeypatch):
        torch.testing.assert_close(replica(x), expected)
        assert replica.q.base is not model.q.base


def test_a_replica_runs_its_own_weights(monkeypatch):
    """As on another device: the original may change meanwhile."""
    model = shake(delora.inject(Net(), DeLoRA(r=2), ["q", "v"]))
    x = ids()
    expected = model(x)
    first, second = replicas(model, monkeypatch)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    torch.testing.assert_close(first(x), expected)
    torch.testing.assert_close(second(x), expected)


class Stubborn(nn.Linear):
    """As torch's weight_norm: copies itself."""

    def __deepcopy__(self, memo):
        twin = Stubborn(self.in_features, self.out_features)
        twin.load_state_dict(self.state_dict())
        return twin


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_keep_their_adapters_and_run_their_own_layers(way):
    model = nn.Sequential(Stubborn(4, 4), nn.Linear(4, 4))
    shake(delora.inject(model, DeLoRA(r=2), ["0", "1"]))
    x = torch.randn(3, 4)
    expected = model(x)
    if way == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        data = io.BytesIO()
        torch.save(model, data)
        data.seek(0)
        twin = torch.load(data, weights_only=False)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    torch.testing.assert_close(twin(x), expected)
    assert delora.distances(twin)
    torch.testing.assert_close(delora.merge(twin)(x), expected)
