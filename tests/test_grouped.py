"""Convolutions with groups: a change of the weight as ever, and what PEFT makes of it. The contract runs on two of them."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import delora
from delora import DeLoRA, EtherPlus, LoRA
from delora.hosts import Fused, fused
from tests.cases import Holder, change, shake

MAKE = {
    "two groups": lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1, stride=2),
    "depthwise": lambda: nn.Conv1d(6, 6, 5, groups=6),
    "three dimensions": lambda: nn.Conv3d(4, 8, 2, groups=4),
    "two outputs a channel": lambda: nn.Conv2d(3, 6, 3, groups=3, bias=False),
}
CONV = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


@pytest.fixture(params=MAKE.values(), ids=MAKE)
def model(request):
    torch.manual_seed(0)
    return Holder(request.param()).eval()


def x_of(model: nn.Module) -> torch.Tensor:
    layer = getattr(model.layer, "base", model.layer)
    return torch.randn(2, layer.in_channels, *[7] * (layer.weight.ndim - 2))


def test_each_output_sees_the_inputs_of_its_group_alone(model):
    """Group by group with its own rows of W + up down, which is the definition."""
    delora.inject(model, DeLoRA(r=2), ["layer"])
    shake(model)
    layer, x = model.layer.base, x_of(model)
    W = layer.weight + change(model).view_as(layer.weight)
    parts = zip(x.chunk(layer.groups, 1), W.chunk(layer.groups), strict=True)
    y = torch.cat([CONV[W.ndim](part, rows, stride=layer.stride, padding=layer.padding) for part, rows in parts], 1)
    bias = 0 if layer.bias is None else layer.bias.view(-1, *[1] * (W.ndim - 2))
    torch.testing.assert_close(model(x), y + bias, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")  # that PEFT cannot merge it
def test_peft_reads_an_export_right(model, tmp_path):
    base, x = copy.deepcopy(model), x_of(model)
    expected = shake(delora.inject(model, DeLoRA(r=2), ["layer"]))(x)
    delora.export.peft(model, tmp_path)
    torch.testing.assert_close(peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()(x), expected)
    with pytest.raises(delora.AdapterError, match=r"with groups = \d, on which PEFT's LoRA computes something else"):
        delora.load(base, tmp_path)
    with pytest.raises(ValueError, match="of a convolution with groups mixes their inputs"):
        delora.export.peft(delora.inject(base, LoRA(r=2), ["layer"]), tmp_path, kind="own")


def test_rows_of_a_batch_run_with_adapters_of_their_own(model):
    delora.inject(model, LoRA(r=2), ["layer"], name="a")
    shake(model)
    delora.inject(model, DeLoRA(r=3), ["layer"], name="b")
    shake(model)
    delora.inject(model, EtherPlus(), ["layer"], name="c")
    shake(model)
    x = x_of(model)
    expected = []
    for row, name in enumerate("ab"):
        delora.activate(model, name)
        expected.append(model(x[row : row + 1]))
    with delora.routed(model, ["a", "b"]):
        torch.testing.assert_close(model(x), torch.cat(expected))
    delora.activate(model, "c")
    expected[0] = model(x[:1])
    with delora.routed(model, ["c", "b"]):
        torch.testing.assert_close(model(x), torch.cat(expected))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dilation": 2}, r"PEFT runs its factors without the dilation \(2, 2\) of this Conv2d"),
        ({"padding_mode": "reflect", "padding": 1}, "PEFT pads with zeros where this Conv2d pads by 'reflect'"),
    ],
)
def test_what_peft_would_run_otherwise_is_neither_written_nor_read(options, words, tmp_path):
    base = Holder(nn.Conv2d(4, 6, 3, **options))
    with pytest.raises(ValueError, match=f"layer: {words}; delora.merge writes"):
        delora.export.peft(shake(delora.inject(copy.deepcopy(base), LoRA(r=2), ["layer"])), tmp_path)
    plain = shake(delora.inject(Holder(nn.Conv2d(4, 6, 3)), LoRA(r=2), ["layer"]))
    with pytest.raises(delora.AdapterError, match=f"layer is a convolution: {words}, on which PEFT's LoRA computes something"):
        delora.load(base, delora.export.peft(plain, tmp_path))


def test_slices_of_it_are_refused(monkeypatch):
    monkeypatch.setitem(fused.registry, Holder, {"layer": Fused({"k": 2, "v": 2})})
    with pytest.raises(ValueError, match="layer.k: cannot adapt a slice of a convolution with groups"):
        delora.inject(Holder(nn.Conv1d(4, 4, 3, groups=2)), LoRA(r=1), {"layer": ["k"]})
