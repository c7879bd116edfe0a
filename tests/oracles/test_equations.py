"""Every method equals its equation, in value and in gradient, in float64."""

from __future__ import annotations

import pytest
import torch

from delora import DeLoRA, LoRA
from delora.methods.base import measure
from tests.cases import NORMS, STARTS
from tests.oracles import slow

W = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def tensors(method):
    """All tensors of a method at random values, lam0 != lam. One term is so small that PEFT's clamp shows."""
    p = {key: torch.randn_like(t) for key, t in method.init(W).items()}
    p["B"][:, 0] *= 1e-5
    p = {key: t.requires_grad_() for key, t in p.items()}
    for key in ("lam", "lam0"):
        if key in p:
            p[key] = (torch.rand(1, dtype=torch.float64) + 0.5).requires_grad_()
    return p


def check(ours, theirs, p):
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    probe = torch.randn_like(ours)
    grads = torch.autograd.grad((ours * probe).sum(), list(p.values()))
    expected = torch.autograd.grad((theirs * probe).sum(), list(p.values()))
    for key, grad, reference in zip(p, grads, expected, strict=True):
        torch.testing.assert_close(grad, reference, rtol=1e-10, atol=1e-12, msg=key)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("softness", [0.03, 1.0])
def test_delora_is_a_sum_of_normalised_rank_one_terms(norm, start, softness):
    method = DeLoRA(r=4, lam=2.0, norm=norm, start=start, softness=softness)
    p = tensors(method)
    ours = method.update(None, p | measure(method, W)).merge(W)
    check(ours, slow.delora(W, p, norm, start, softness), p)


@pytest.mark.parametrize("rslora", [False, True])
def test_lora_is_a_sum_of_scaled_rank_one_terms(rslora):
    method = LoRA(r=4, alpha=3.0, rslora=rslora)
    p = tensors(method)
    check(method.update(None, p).merge(W), slow.lora(W, p, 3.0 / (2.0 if rslora else 4.0)), p)


def test_copy_is_the_authors_formula():
    method = DeLoRA(r=4, lam=2.0, start="copy")
    p = tensors(method)
    check(method.update(None, p | measure(method, W)).merge(W), slow.authors_delora(W, p), p)
