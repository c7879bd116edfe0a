"""1e. What is set around a call (autocast, inference mode, default dtype and device) changes nothing of what it does."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn

import delora
from delora import DeLoRA, DoRA
from tests.cases import Net, ids, shake


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


AMBIENT = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "default dtype": lambda: default_dtype(torch.float64),
    "half": lambda: default_dtype(torch.float16),
    "default device": lambda: torch.device("meta"),
}


def lifecycle(around, folder) -> list[torch.Tensor]:
    """Inject, save, load, blend, export and merge, each within the context; what can be seen of it, computed outside."""
    torch.manual_seed(0)
    model, other, x = Net(), Net(), ids()
    other.load_state_dict(model.state_dict())
    torch.manual_seed(1)
    with around():
        delora.inject(model, DeLoRA(r=2), ["q", "v"], also_train=["classifier"])
        delora.inject(model, DoRA(r=2), ["q"], name="b")
        delora.activate(model, "default")
    assert all(not p.is_inference() and p.dtype == torch.float32 for p in model.parameters())
    torch.manual_seed(2)
    shake(model)
    seen = [model(x)]
    with around():
        delora.save(model, folder / "adapter")
        delora.export.peft(model, folder / "peft")
        delora.load(other, folder / "adapter")
        delora.blend(model, {"default": 0.5}, name="c")
        distances = delora.distances(model)
    seen += [other(x), model(x), torch.tensor(list(distances.values()))]
    seen.append(model(x))
    with around():
        delora.activate(model, "default")
        with delora.merged(model):
            pass
        delora.merge(model)
    seen += [model(x), *model.state_dict().values()]
    assert all(not p.is_inference() for p in model.parameters())
    model(x).sum().backward()
    return seen


@pytest.mark.parametrize("kind", AMBIENT)
def test_the_same_as_outside(kind, tmp_path):
    expected = lifecycle(contextlib.nullcontext, tmp_path / "outside")
    for value, wanted in zip(lifecycle(AMBIENT[kind], tmp_path / "inside"), expected, strict=True):
        assert value.dtype == wanted.dtype
        assert torch.equal(value, wanted)


def test_a_double_model_stays_double(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4)).double()
    with torch.autocast("cpu", torch.bfloat16):
        delora.inject(model, DeLoRA(r=2), ["0"])
    assert {p.dtype for p in model.parameters()} == {torch.float64}
