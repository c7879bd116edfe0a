"""Every method equals its equation, in value and in gradient, in float64: the matrix it merges and the output it gives."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from delora import (
    ETHER,
    HRA,
    IA3,
    METHODS,
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
from tests.cases import NORMS, STARTS, placed, plain
from tests.oracles import slow

OUT, IN = 8, 6


def adapter(method):
    """The method on a linear layer, all its tensors at random values, lam0 != lam."""
    layer = nn.Linear(IN, OUT).double().requires_grad_(False)
    made = placed(method, layer)
    for key, tensor in made.saved().items():
        positive = key in ("lam", "lam0", "sigma")
        made.put(key, torch.rand(1, dtype=torch.float64) + 0.5 if positive else torch.randn_like(tensor))
    return made


def compare(ours, theirs, p):
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    probe = torch.randn_like(ours)
    grads = torch.autograd.grad((ours * probe).sum(), list(p.values()), retain_graph=True)
    expected = torch.autograd.grad((theirs * probe).sum(), list(p.values()), retain_graph=True)
    for key, grad, reference in zip(p, grads, expected, strict=True):
        torch.testing.assert_close(grad, reference, rtol=1e-10, atol=1e-12, msg=key)


def trained(made):
    return {key: t.requires_grad_() for key, t in made.saved().items()}


def check(method, equation, prepare=lambda p: None):
    """``equation(W, p)`` gives W'."""
    made = adapter(method)
    with torch.no_grad():
        prepare(made.saved())
    p = trained(made)
    W, b, x = made.base.weight, made.base.bias, torch.randn(3, IN, dtype=torch.float64)
    compare(made.update().merge(W), equation(W, p), p)
    compare(made(x), x @ equation(W, p).T + b, p)


def check_output(method, equation):
    """``equation(y, p)`` gives the new output for one output vector of the layer."""
    made = adapter(method)
    p = trained(made)
    x = torch.randn(2, 3, IN, dtype=torch.float64)
    y = made.base(x)
    expected = torch.stack([torch.stack([equation(row, p) for row in rows]) for rows in y])
    compare(made(x), expected, p)
    return made, x, expected


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("softness", [0.03, 1.0])
def test_delora_is_a_sum_of_normalised_rank_one_terms(norm, start, softness):
    def under_the_clamp(p):  # one term is so small that PEFT's clamp shows
        p["B"][:, 0] *= 1e-5

    method = DeLoRA(r=4, lam=2.0, norm=norm, start=start, softness=softness)
    check(method, lambda W, p: slow.delora(W, p, norm, start, softness), under_the_clamp)


@pytest.mark.parametrize("rslora", [False, True])
def test_lora_is_a_sum_of_scaled_rank_one_terms(rslora):
    check(LoRA(r=4, alpha=3.0, rslora=rslora), lambda W, p: slow.lora(W, p, 3.0 / (2.0 if rslora else 4.0)))


def test_copy_is_the_authors_formula():
    check(DeLoRA(r=4, lam=2.0, start="copy"), slow.authors_delora)


@pytest.mark.parametrize("fixed", [False, True])
def test_dora_rescales_the_rows_of_lora(fixed):
    check(DoRA(r=4, alpha=3.0, fixed_magnitude=fixed), lambda W, p: slow.dora(W, p, 3.0 / 4.0))


@pytest.mark.parametrize("blocks", [1, 2])
def test_ether_multiplies_by_reflections(blocks):
    check(ETHER(blocks), lambda W, p: W @ slow.ether_matrix(p["u"]))
    check(ETHER(blocks, side="output"), lambda W, p: slow.ether_matrix(p["u"]) @ W)


@pytest.mark.parametrize("blocks", [1, 2])
def test_ether_plus_multiplies_from_one_or_both_sides(blocks):
    def both(W, p):
        return slow.ether_matrix(p["u_out"], p["v_out"]) @ W @ slow.ether_matrix(p["u"], p["v"])

    check(EtherPlus(blocks), both)
    check(EtherPlus(blocks, two_sided=False), lambda W, p: W @ slow.ether_matrix(p["u"], p["v"]))
    check(EtherPlus(blocks, two_sided=False, side="output"), lambda W, p: slow.ether_matrix(p["u"], p["v"]) @ W)


@pytest.mark.parametrize("r", [2, 4])
def test_the_rungs_between_ether_plus_and_delora(r):
    check(Reflections(r), slow.reflections)
    check(Reflections(r, relaxed=True), slow.relaxed)


@pytest.mark.parametrize("blocks", [1, 2, 3])
@pytest.mark.parametrize("radius", [None, 0.5, 1e9])
def test_oft_is_cayleys_transform(blocks, radius):
    check(OFT(blocks, radius), lambda W, p: slow.oft(W, p["Q"], IN // blocks, radius))


@pytest.mark.parametrize("r", [2, 4])
def test_hra_is_a_chain_of_reflections(r):
    check(HRA(r), lambda W, p: slow.hra(W, p["U"], orthogonal=False))
    check(HRA(r + 1, orthogonal=True), lambda W, p: slow.hra(W, p["U"], orthogonal=True))


@pytest.mark.parametrize("r", [1, 3, 6])
def test_nb_lora_is_a_product_of_two_parts_of_cayleys_matrix(r):
    check(NBLoRA(r, sigma=2.0), slow.nblora)


def test_ia3_scales_the_input():
    check(IA3(side="input"), lambda W, p: torch.stack([W[:, j] * p["l"][j] for j in range(IN)], dim=1))


SHIFTS = {
    BitFit(): lambda y, p: torch.stack([y[i] + p["d"][i] for i in range(OUT)]),
    IA3(): lambda y, p: torch.stack([y[i] * p["l"][i] for i in range(OUT)]),
    RED(): lambda y, p: torch.stack([p["l"][i] * y[i] + p["d"][i] for i in range(OUT)]),
}


@pytest.mark.parametrize("method", SHIFTS, ids=str)
def test_scales_and_shifts_of_the_output(method):
    made, x, expected = check_output(method, SHIFTS[method])
    torch.testing.assert_close(plain(made)(x), expected, rtol=1e-12, atol=1e-12)


def test_loreft_replaces_what_lies_in_the_span_of_the_rows():
    check_output(LoReFT(r=3), slow.loreft)


def test_the_bottleneck_adapter():
    check_output(Bottleneck(size=3), slow.bottleneck)


def test_every_method_of_the_paper_and_its_rivals_have_their_equations_here():
    """One that is added has its own beside them (CONTRIBUTING, step 3); full finetuning has none."""
    here = {value for value in globals().values() if isinstance(value, type)}
    paper = {DeLoRA, LoRA, DoRA, ETHER, EtherPlus, OFT, Reflections, BitFit, IA3, RED, LoReFT, Bottleneck}
    assert paper | {HRA, NBLoRA} <= here & set(METHODS.values())
