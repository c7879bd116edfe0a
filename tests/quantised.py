"""The quantised layers that the tests run over, made with the libraries themselves."""

from __future__ import annotations

import shutil
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from examples.own_quantised import RowwiseInt8
from tests.cases import Holder

IN, OUT = 64, 32  # a block of codes is at least 32 weights


@dataclass(frozen=True)
class Kind:
    """A kind of quantised layer: how to make one of a dense layer; the coarsest step of its codes, as a share of max |W|."""

    make: Callable[[nn.Linear], nn.Module]
    step: float
    pickles: bool = True  # can the library's layer be pickled, and copied?
    copies: bool = True
    autocast: bool = True  # does its own backward work under autocast?

    def model(self, dtype: torch.dtype = torch.float32, bias: bool = True, seed: int = 0) -> nn.Module:
        """The layer inside a model, always with the same weights for the same seed."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            dense = nn.Linear(IN, OUT, bias=bias).to(dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what the libraries say of themselves
            return Holder(self.make(dense)).train()


def x(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(3, 5, IN).to(dtype)


def _bits4(quant: str, nested: bool = False) -> Callable[[nn.Linear], nn.Module]:
    def make(dense: nn.Linear) -> nn.Module:
        import bitsandbytes as bnb

        options: Any = {"bias": dense.bias is not None, "quant_type": quant, "compress_statistics": nested}
        layer = bnb.nn.Linear4bit(IN, OUT, compute_dtype=dense.weight.dtype, **options)
        layer.load_state_dict(dense.state_dict())
        layer.to(dense.weight.dtype)
        layer.weight = bnb.nn.Params4bit(dense.weight.detach(), module=layer, **{k: options[k] for k in list(options)[1:]})
        return layer.to("cpu")  # quantises

    return make


def _int8(dense: nn.Linear) -> nn.Module:
    import bitsandbytes as bnb

    layer = bnb.nn.Linear8bitLt(IN, OUT, bias=dense.bias is not None, has_fp16_weights=False)
    layer.load_state_dict(dense.state_dict())
    if dense.bias is not None:
        layer.bias.data = dense.bias.detach().clone()
    return layer.requires_grad_(False).to("cpu")


def _torchao(config: str, **options: Any) -> Callable[[nn.Linear], nn.Module]:
    def make(dense: nn.Linear) -> nn.Module:
        from torchao import quantization as q

        if "group" in options:
            made = getattr(q, config)(weight_dtype=options["dtype"], granularity=q.PerGroup(options["group"]))
        else:
            made = getattr(q, config)()
        model = nn.Sequential(dense)
        q.quantize_(model, made)
        return model[0]

    return make


def _can_compile() -> None:
    """On a CPU quanto unpacks 4 bits by a kernel that it compiles: skip without a compiler; and it waits for ever on the lock
    that a process has left which was stopped meanwhile."""
    from optimum.quanto.library.extensions.cpp import ext

    if shutil.which("c++") is None:
        pytest.skip("quanto compiles its kernel for 4 bits, and there is no C++ compiler")
    lock = Path(ext.build_directory, "lock")
    if lock.exists() and time.time() - lock.stat().st_mtime > 600:
        lock.unlink(missing_ok=True)


def _quanto(name: str) -> Callable[[nn.Linear], nn.Module]:
    def make(dense: nn.Linear) -> nn.Module:
        from optimum import quanto

        if name == "qint4":
            _can_compile()
        model = nn.Sequential(dense)
        quanto.quantize(model, weights=getattr(quanto, name))
        quanto.freeze(model)
        return model[0]

    return make


def _hqq(bits: int) -> Callable[[nn.Linear], nn.Module]:
    def make(dense: nn.Linear) -> nn.Module:
        from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

        config = BaseQuantizeConfig(nbits=bits, group_size=32, axis=1)
        return HQQLinear(dense.requires_grad_(False), config, compute_dtype=dense.weight.dtype, device="cpu")

    return make


KINDS = {
    "bitsandbytes nf4": Kind(_bits4("nf4"), 0.16),
    "bitsandbytes nf4, scales quantised": Kind(_bits4("nf4", nested=True), 0.17),
    "bitsandbytes fp4": Kind(_bits4("fp4"), 0.18),
    "bitsandbytes int8": Kind(_int8, 0.5 / 127 + 1e-3),
    "torchao int8": Kind(_torchao("Int8WeightOnlyConfig"), 0.5 / 127 + 1e-3, pickles=False),
    "torchao int4": Kind(_torchao("IntxWeightOnlyConfig", dtype=torch.int4, group=32), 0.08, pickles=False),
    "torchao float8_e4m3fn": Kind(_torchao("Float8WeightOnlyConfig"), 1 / 16, pickles=False),
    "quanto qint8": Kind(_quanto("qint8"), 0.5 / 127 + 1e-3, copies=False),
    "quanto qint4": Kind(_quanto("qint4"), 0.08, copies=False),
    "quanto qfloat8_e4m3fn": Kind(_quanto("qfloat8"), 1 / 16, pickles=False, copies=False),
    "hqq 4 bit": Kind(_hqq(4), 0.08, autocast=False),
    "hqq 2 bit": Kind(_hqq(2), 0.4, autocast=False),
    "RowwiseInt8": Kind(
        lambda d: RowwiseInt8(d.weight.detach(), None if d.bias is None else d.bias.detach()), 0.5 / 127 + 1e-3
    ),
}
