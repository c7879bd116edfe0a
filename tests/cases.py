"""The layers, methods and the small model that the tests run over."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import delora
from delora import (
    ETHER,
    HRA,
    IA3,
    OFT,
    RED,
    BitFit,
    Bottleneck,
    DeLoRA,
    DoRA,
    EtherPlus,
    LoRA,
    LoReFT,
    NBLoRA,
    Reflections,
)
from delora.layer import Placed, attach
from examples.own_layer import HeadwiseLinear
from examples.own_method import VeRA


@dataclass(frozen=True)
class Layer:
    """A kind of layer: how to make one, and what goes in."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]

    def model(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The layer inside a model that makes its output smooth, so that a loss has somewhere to go."""
        return Holder(self.make()).to(dtype)

    def x(self, dtype: torch.dtype = torch.float32) -> Tensor:
        x = self.inputs()
        return x.to(dtype) if x.is_floating_point() else x


class Holder(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


LAYERS = {
    "Linear": Layer(lambda: nn.Linear(12, 10), lambda: torch.randn(3, 5, 12)),
    "Linear, no bias, one row": Layer(lambda: nn.Linear(12, 10, bias=False), lambda: torch.randn(12)),
    "Conv1D": Layer(lambda: Conv1D(10, 12), lambda: torch.randn(3, 5, 12)),
    "Conv1d": Layer(lambda: nn.Conv1d(4, 10, 3, padding=1), lambda: torch.randn(3, 4, 7)),
    "Conv2d": Layer(lambda: nn.Conv2d(3, 10, 2, stride=2, padding=1), lambda: torch.randn(3, 3, 6, 6)),
    "Conv2d, reflect": Layer(lambda: nn.Conv2d(4, 10, 3, padding=1, padding_mode="reflect"), lambda: torch.randn(2, 4, 6, 6)),
    "Conv2d, groups": Layer(lambda: nn.Conv2d(4, 10, 3, groups=2, padding=1), lambda: torch.randn(2, 4, 5, 5)),
    "Conv1d, depthwise": Layer(lambda: nn.Conv1d(10, 10, 8, groups=10, padding=4), lambda: torch.randn(3, 10, 9)),
    "Conv3d": Layer(lambda: nn.Conv3d(2, 10, 2, dilation=2), lambda: torch.randn(2, 2, 4, 4, 4)),
    "own layer": Layer(lambda: HeadwiseLinear(12, 2, 5), lambda: torch.randn(3, 5, 12)),
    "Embedding": Layer(lambda: nn.Embedding(16, 10, padding_idx=0), lambda: torch.randint(0, 16, (3, 5))),
}

STARTS = ("subtract", "copy", "paired", "soft", "zero")
NORMS = ("columns", "matrix", "rows", "none")

METHODS = {
    "LoRA": LoRA(r=4),
    "rsLoRA": LoRA(r=4, rslora=True),
    **{f"DeLoRA {start}": DeLoRA(r=4, lam=3.0, start=start) for start in STARTS},
    **{f"DeLoRA {norm}": DeLoRA(r=4, lam=3.0, norm=norm) for norm in NORMS[1:]},
    "DeLoRA fixed lam": DeLoRA(r=4, lam=3.0, learn_lam=False),
    "DoRA": DoRA(r=4),
    "DoRA fixed magnitude": DoRA(r=4, fixed_magnitude=True),
    "NB-LoRA": NBLoRA(r=4, reach=1.0),
    "ETHER": ETHER(blocks=2),
    "ETHER output": ETHER(side="output"),
    "ETHER+": EtherPlus(blocks=2),
    "ETHER+ one-sided": EtherPlus(two_sided=False),
    "ETHER+ output": EtherPlus(blocks=2, two_sided=False, side="output"),
    "E1": Reflections(r=2, learn_lam=False),
    "E2": Reflections(r=4),
    "E3": Reflections(r=4, relaxed=True),
    "OFT": OFT(blocks=2),
    "OFT constrained": OFT(blocks=2, radius=0.5),
    "HRA": HRA(r=4),
    "HRA orthogonal": HRA(r=3, orthogonal=True),
    "BitFit": BitFit(),
    "IA3": IA3(),
    "IA3 input": IA3(side="input"),
    "RED": RED(),
    "LoReFT": LoReFT(r=2),
    "Bottleneck": Bottleneck(size=3),
    "own method": VeRA(r=4),
    "Bottleneck zero": Bottleneck(size=3, start="zero", activation="relu"),
}


def settings(kind: type) -> Iterator[tuple[str, object]]:
    """A method's default, and each of its other choices: every value of its fields that are flags or literals."""
    yield kind.__name__, kind()
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        choices = (True, False) if hints[field.name] is bool else get_args(hints[field.name])
        for value in choices if get_origin(hints[field.name]) is Literal or hints[field.name] is bool else ():
            yield f"{kind.__name__} {field.name}={value}", kind(**{field.name: value})


def derived() -> Iterator[tuple[str, object]]:
    """What `METHODS` and its classes say, beside the cases written out above: a new method is tested by its line there."""
    for kind in delora.METHODS.values():
        if kind is delora.Full:
            continue
        cases = [method for method in METHODS.values() if type(method) is kind]
        for name, method in settings(kind):
            field, _, _ = name.removeprefix(f"{kind.__name__} ").partition("=")
            if not cases or (field != name and all(getattr(m, field) != getattr(method, field) for m in cases)):
                yield name, method


METHODS |= dict(derived())
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def adapted(layer: Layer, method: object, dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> nn.Module:
    return delora.inject(layer.model(dtype), method, ["layer"], dropout=dropout)  # type: ignore[arg-type]


def placed(method: object, layer: nn.Module, *args: object) -> Placed:
    """A new adapter with the layer that it is for."""
    return Placed(attach(method, layer, *args), layer)  # type: ignore[arg-type]


def plain(adapter: Placed) -> nn.Module:
    """A copy of the layer with the change in its weights."""
    layer = copy.deepcopy(adapter.base)
    for name, tensor in adapter.changed().items():
        setattr(layer, name, tensor)
    return layer


@torch.no_grad()
def shake(model: nn.Module, size: float = 0.3) -> nn.Module:
    """Move every trainable tensor away from where it started."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(size * torch.randn_like(parameter))
    return model


def gradients(model: nn.Module, x: Tensor, run: Callable[[Tensor], Tensor] | None = None) -> list[Tensor]:
    """The gradients of all that trains, from the model's output for x, or from what ``run`` makes of x with the model."""
    model.zero_grad()
    torch.manual_seed(0)  # the same entries are dropped
    (run or model)(x).square().sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.requires_grad]  # type: ignore[union-attr]


def change(model: nn.Module, path: str = "layer") -> Tensor:
    """W' - W [out, in] of an adapted layer, computed densely."""
    adapter = model.get_submodule(path).adapter
    W = adapter.host.weight()
    return adapter.update().merge(W) - W


class Net(nn.Module):
    """An embedding, two linear layers and a head: enough for what concerns a whole model."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(20, 8)
        self.q = nn.Linear(8, 8)
        self.v = nn.Linear(8, 12)
        self.classifier = nn.Sequential(nn.Linear(12, 6), nn.Tanh(), nn.Linear(6, 3))

    def forward(self, ids: Tensor) -> Tensor:
        return self.classifier(torch.tanh(self.v(torch.tanh(self.q(self.emb(ids))))).mean(1))


def ids() -> Tensor:
    return torch.randint(0, 20, (4, 6))
