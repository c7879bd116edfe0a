"""1h. However a model is cast, what trains stays in float32; float16 never leaves its range in a factor."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import delora
from delora import DeLoRA, DoRA, LoRA
from tests.cases import Net, ids, shake

CASTS = {
    "to": lambda model, dtype: model.to(dtype),
    "half": lambda model, dtype: model.half() if dtype == torch.float16 else model.bfloat16(),
    "module by module": lambda model, dtype: [part.to(dtype) for part in model.children()],
    "_apply": lambda model, dtype: model._apply(lambda t: t.to(dtype) if t.is_floating_point() else t),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cast", CASTS)
def test_a_cast_model_trains_its_adapters_in_float32(cast, dtype, tmp_path):
    model = delora.inject(Net(), DeLoRA(r=2, learn_lam=True), ["q", "v"], also_train=["classifier"])
    CASTS[cast](model, dtype)
    assert model.q.base.weight.dtype == dtype
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    optimizer = torch.optim.AdamW(delora.param_groups(model, lr=1e-3))
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    for _ in range(3):
        y = model(ids())
        assert y.dtype == dtype
        y.float().square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    still = [n for n, p in model.named_parameters() if n in before and torch.equal(p, before[n])]
    assert not still
    assert 0 < abs(model.q.adapter.lam.item() - 8.0) < 0.0625  # less than bfloat16's next number
    delora.save(model, tmp_path)
    fresh = Net().to(dtype)
    fresh.load_state_dict(plain_state(model))
    x = ids()
    torch.testing.assert_close(delora.load(fresh, tmp_path)(x), model(x))


def plain_state(model):
    with delora.disabled(model):
        return {k.replace(".base.", "."): v for k, v in model.state_dict().items() if ".adapters." not in k}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_head_of_a_half_precision_base_trains_in_float32_and_merges_into_its_dtype(dtype):
    model, x = Net().to(dtype), ids()
    before = model(x)
    delora.inject(model, LoRA(r=2), ["q"], also_train=["classifier"])
    assert torch.equal(model(x), before)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    shake(model, 0.05)
    after = model(x)
    with delora.merged(model):
        assert {p.dtype for p in model.parameters()} == {dtype}
        torch.testing.assert_close(model(x), after, rtol=8 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)
    model(x).float().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_wider_cast_widens():
    model = delora.inject(Net(), DeLoRA(r=2), ["q"]).double()
    assert {p.dtype for p in model.parameters()} == {torch.float64}


@pytest.mark.parametrize("method", [DeLoRA(r=2, start="soft"), DeLoRA(r=2), DoRA(r=2), LoRA(r=2)], ids=str)
@pytest.mark.parametrize("length", [0.0, 1e-9, 1e6])
def test_float16_stays_in_its_range_where_the_change_is_small(method, length):
    torch.manual_seed(0)
    model = delora.inject(nn.Sequential(nn.Linear(8, 8)).half(), method, ["0"])
    adapter = model[0].adapter
    with torch.no_grad():
        direction = torch.randn(8)
        adapter.B[:, 0] = length * direction / direction.norm()
        if isinstance(method, (LoRA, DoRA)) and length:
            adapter.A[0] *= 1e-3 / length  # a small product of a large and a small factor
    x = torch.randn(4, 8, dtype=torch.float16)
    y = model(x)
    assert y.isfinite().all()
    W = adapter.update().merge(adapter.host.weight())
    expected = nn.functional.linear(x.float(), W, adapter.host.bias())
    torch.testing.assert_close(y.float(), expected, rtol=2e-2, atol=2e-2)
    y.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
