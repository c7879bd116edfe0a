"""The hand-written branch is the plain one: in value, in gradient, under dropout; and it keeps less."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

import delora
from delora import DeLoRA, LoRA
from delora.lowrank import _AddLowRank, _Linear, add_low_rank, drop
from tests.cases import Holder, shake
from tests.test_modes import Attention, saved_tensors


def tensors(*shape, out=5, k=3, inp=4):
    shapes = (*shape, out), (*shape, inp), (k, inp), (out, k)  # y, x, down, up
    return tuple(torch.randn(*each, dtype=torch.float64, requires_grad=True) for each in shapes)


def with_constants(down, up, constant):
    """Both factors with further terms that do not train."""
    _, _, down0, up0 = (t.detach() for t in tensors(1, k=constant))
    return torch.cat([down, down0]), torch.cat([up, up0], 1)


@pytest.mark.parametrize("constant", [0, 2])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("shape", [(7,), (2, 3), (1, 2, 3)])
def test_the_gradient_is_that_of_the_value(shape, dropout, constant):
    torch.manual_seed(0)

    def branch(y, x, down, up):
        torch.manual_seed(1)
        return _AddLowRank.apply(y.clone(), x, *with_constants(down, up, constant), dropout, 11, constant)

    assert torch.autograd.gradcheck(branch, tensors(*shape))


@pytest.mark.parametrize("constant", [0, 2])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("shape", [(7,), (2, 3)])
def test_the_gradient_with_the_layer_is_that_of_the_value(shape, dropout, constant):
    torch.manual_seed(0)
    W, b = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, dtype=torch.float64)

    def layer(x, down, up):
        torch.manual_seed(1)
        return _Linear.apply(x, W, b, *with_constants(down, up, constant), dropout, 11, constant)

    _, *rest = tensors(*shape)
    assert torch.autograd.gradcheck(layer, tuple(rest))


def test_without_dropout_it_is_the_plain_sum():
    y, x, down, up = tensors(2, 3)
    torch.testing.assert_close(add_low_rank(y.clone(), x, down, up, 0.0), y + x @ down.T @ up.T)


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dropout_drops_its_share_and_keeps_the_mean(probability, dtype):
    n = 200_001  # not a multiple of the four entries that one random word serves
    x = torch.ones(n, dtype=dtype)
    dropped = drop(x, probability, 5)
    share = (dropped == 0).double().mean().item()
    deviation = (probability * (1 - probability) / n) ** 0.5
    assert abs(share - probability) < 5 * deviation + 2**-17
    kept = dropped[dropped != 0].double()
    assert kept.unique().numel() == 1
    assert kept[0].item() == pytest.approx(1 / (1 - probability), rel=torch.finfo(dtype).eps + 2**-13)
    assert torch.equal(drop(x, probability, 5), dropped)
    assert not torch.equal(drop(x, probability, 6), dropped)


def test_neighbours_are_dropped_independently():
    """Four entries share one random word."""
    n = 400_000
    gone = (drop(torch.ones(n), 0.3, 1) == 0).double()
    for lag in (1, 2, 3, 4):
        together = (gone[:-lag] * gone[lag:]).mean().item()
        assert abs(together - 0.09) < 10 * (0.09 * 0.91 / n) ** 0.5


def test_dropout_keeps_no_second_x():
    tokens, d = 400, 32
    model = delora.inject(Attention(d), DeLoRA(r=2), ["q", "k", "v"], dropout=0.1).train()
    x = torch.randn(tokens, d)
    big = [t for t in saved_tensors(model, x) if t.numel() >= x.numel()]
    assert [t.data_ptr() for t in big] == [x.data_ptr()]


def test_a_hook_that_kept_the_layers_own_output_keeps_it_as_it_was():
    model = shake(delora.inject(Holder(nn.Linear(6, 5)), LoRA(r=2), ["layer"]))
    seen = []
    model.layer.base.register_forward_hook(lambda module, args, out: seen.append(out))
    x = torch.randn(3, 6)
    model(x)
    assert torch.equal(seen[0], nn.functional.linear(x, model.layer.base.weight, model.layer.base.bias))


def doubled(module, x):
    return 2 * nn.Linear.forward(module, x)


OWN_WAYS = {
    "forward hook": lambda base: base.register_forward_hook(lambda module, args, out: 2 * out),
    "forward pre-hook": lambda base: base.register_forward_pre_hook(lambda module, args: (2 * args[0],)),
    "forward of its own": lambda base: setattr(base, "forward", partial(doubled, base)),
}


@pytest.mark.parametrize("way", OWN_WAYS.values(), ids=list(OWN_WAYS))
def test_what_somebody_put_around_the_layer_is_run(way):
    """Accelerate's offloading and DeepSpeed's gathering work this way."""
    model = shake(delora.inject(Holder(nn.Linear(6, 5, bias=False)), LoRA(r=2), ["layer"]))
    x = torch.randn(3, 6)
    plain, base = model(x), model.layer.base(x)
    way(model.layer.base)
    torch.testing.assert_close(model(x), plain + base)


@pytest.mark.parametrize("hook", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_backward_hooks_of_the_layer_are_run(hook):
    model = shake(delora.inject(Holder(nn.Linear(6, 5)), LoRA(r=2), ["layer"]))
    seen = []
    getattr(model.layer.base, hook)(lambda *args: seen.append(len(args)))
    model(torch.randn(3, 6, requires_grad=True)).sum().backward()
    assert len(seen) == 1


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_base_that_trains_has_its_gradient(name):
    model = shake(delora.inject(Holder(nn.Linear(6, 5)), LoRA(r=2), ["layer"]))
    parameter = model.layer.base.get_parameter(name).requires_grad_()
    x = torch.randn(3, 6)
    model(x).sum().backward()
    expected = x.sum(0).expand(5, 6) if name == "weight" else torch.full((5,), 3.0)
    torch.testing.assert_close(parameter.grad, expected)


def test_gradients_of_every_sample_by_torch_func():
    model = shake(delora.inject(Holder(nn.Linear(6, 5)), LoRA(r=2), ["layer"]))
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    x = torch.randn(4, 3, 6)
    each = vmap(grad(lambda p, x: functional_call(model, p, (x,)).square().sum()), (None, 0))(trained, x)
    for n in range(4):
        model.zero_grad()
        model(x[n]).square().sum().backward()
        for name, p in model.named_parameters():
            if p.requires_grad:
                torch.testing.assert_close(each[name][n], p.grad)


def test_a_second_derivative_is_refused_not_wrong():
    model = shake(delora.inject(Holder(nn.Linear(6, 5)), LoRA(r=2), ["layer"]))
    x = torch.randn(3, 6, requires_grad=True)
    (slope,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.square().sum().backward()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=lambda c: c.__name__)
def test_inference(context):
    model = shake(delora.inject(Holder(nn.Linear(6, 5)), LoRA(r=2), ["layer"])).eval()
    x = torch.randn(3, 6)
    expected = model(x).detach()
    with context():
        assert torch.equal(model(x), expected)
