"""Updates built together are those that each layer would build, are never stale, and leave no trace."""

from __future__ import annotations

import copy
import threading
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

import delora
from delora import DeLoRA, LoRA
from delora.models import adapters
from delora.together import _current, _Groups, built, unwatch, watched
from delora.updates import LowRank
from tests.cases import NORMS, STARTS, shake
from tests.processes import in_two_processes


class Chain(nn.Module):
    """Layers of one shape, and one of another; ``skip`` are left out, ``between`` is done before the last."""

    def __init__(self, depth=4, d=6):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(d, d) for _ in range(depth)])
        self.last = nn.Linear(d, 3)
        self.skip, self.between, self.rerun = (), None, None

    def forward(self, x):
        for n, layer in enumerate(self.layers):
            if n in self.skip:
                continue
            x = torch.tanh(layer(x) if self.rerun is None else checkpoint(layer, x, use_reentrant=self.rerun))
        if self.between is not None:
            self.between()
        return self.last(x)


def chain(method=None, depth=4, dtype=torch.float64):
    torch.manual_seed(0)
    targets = [f"layers.{n}" for n in range(depth)] + ["last"]
    return shake(delora.inject(Chain(depth).to(dtype), method or DeLoRA(r=2), targets))


def gradients(model, forward, x):
    model.zero_grad()
    y = forward(x)
    y.square().sum().backward()
    return y.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def alone(model):
    """The model's forward without its hooks: every layer builds its own update."""
    return model.forward


def assert_each_is_as_alone(model, x):
    y, together = gradients(model, model, x)
    expected, each = gradients(model, alone(model), x)
    torch.testing.assert_close(y, expected)
    assert together.keys() == each.keys()
    for name in each:
        torch.testing.assert_close(together[name], each[name], msg=name)


@pytest.fixture
def x():
    return torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("learn_lam", [True, False])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("start", STARTS)
def test_together_is_each_alone(start, norm, learn_lam, x):
    model = chain(DeLoRA(r=2, start=start, norm=norm, learn_lam=learn_lam))
    assert_each_is_as_alone(model, x)


def test_layers_of_one_shape_are_built_together(x):
    """Else all the other tests here could pass without it."""
    model = chain()
    updates = _Groups(adapters(model).values()).updates()
    several = {placed.adapter for name, placed in adapters(model).items() if name != "last"}  # the last is alone of its shape
    assert set(updates) == several
    assert len({update.down._base.data_ptr() for *_, update in updates.values()}) == 1


WRITES = {
    "optimizer.step": lambda p: torch.optim.SGD([p], lr=0.1).step(),
    "p.data.add_": lambda p: p.data.add_(p.grad),
    "p.data =": lambda p: setattr(p, "data", p.data + p.grad),
    "copy_ under no_grad": lambda p: p.detach().copy_(p.detach() + p.grad),
    "an inference tensor's": lambda p: torch.inference_mode()(lambda: p.add_(p.grad))(),
}


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("write", WRITES.values(), ids=list(WRITES))
def test_a_change_between_forwards_is_seen(write, grad, x):
    model = chain()
    before, _ = gradients(model, model, x)
    for p in model.parameters():
        if p.requires_grad:
            write(p)
    with torch.set_grad_enabled(grad):
        after = model(x)
    assert not torch.allclose(after, before)
    torch.testing.assert_close(after, alone(model)(x))


def fewer_terms(model):
    adapter = model.layers[1].adapters["default"]
    for name, dim in {"A": 0, "A0": 0, "B": 1, "B0": 1}.items():
        t = getattr(adapter, name)
        t.data = t.data.narrow(dim, 0, 1)  # of the same memory


def other_adapters(model):
    delora.inject(model, DeLoRA(r=3, start="soft"), ["layers.1", "layers.2", "layers.3"], name="other")
    shake(model, 3)


def swapped(model):
    model.layers[0], model.layers[1] = model.layers[1], model.layers[0]
    first, second = (model.layers[i].adapters["default"] for i in (0, 1))
    model.layers[0].adapters["default"], model.layers[1].adapters["default"] = second, first


STRUCTURES = {
    "one tensor is frozen": lambda model: model.layers[0].adapters["default"].A.requires_grad_(False),
    "one tensor of all is frozen": lambda model: [p.requires_grad_(False) for n, p in model.named_parameters() if "lam" in n],
    "another dtype": lambda model: model.layers[2].double(),
    "other shapes in the same memory": fewer_terms,
    "a new parameter": lambda model: setattr(model.layers[0].adapters["default"], "A", nn.Parameter(torch.randn(2, 6))),
    "other adapters are active": other_adapters,
    "adapters exchanged": swapped,
}


@pytest.mark.parametrize("change", STRUCTURES.values(), ids=list(STRUCTURES))
def test_a_change_of_structure_between_forwards_is_seen(change, x):
    model, x = chain(dtype=torch.float32), x.float()
    gradients(model, model, x)
    change(model)
    if change is STRUCTURES["another dtype"]:
        model.layers[2].register_forward_pre_hook(lambda _, args: (args[0].double(),))
        model.layers[2].register_forward_hook(lambda _, args, y: y.float())
    assert_each_is_as_alone(model, x)


def test_a_constant_written_to_before_backward_is_refused(x):
    model = chain()
    y = model(x).sum()
    model.layers[0].adapters["default"].B0.add_(1)
    with pytest.raises(RuntimeError, match="written to"):
        y.backward()


def test_a_loaded_state_dict_is_seen(x):
    model, other = chain(), chain()
    shake(other, 7)
    model(x)
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(model(x), alone(other)(x))


@pytest.mark.parametrize("write", ["optimizer.step", "p.data =", "copy_ under no_grad"])
def test_a_change_in_the_midst_of_a_forward_is_seen(write, x):
    """Where a training step is itself the forward of a module, as Lightning has it."""
    model = chain(depth=5)
    model.skip = (4,)

    def change():
        if model.skip:
            adapter = adapters(model)["layers.4"]
            for p in adapter.parameters():
                p.grad = torch.ones_like(p)
                WRITES[write](p)
            model.skip, model.between = (), None
            inner.append(model.layers[4](x).detach())

    inner = []
    model.between = change
    model(x)
    torch.testing.assert_close(inner[0], model.layers[4](x).detach())


def test_a_second_call_in_one_forward_builds_its_own(x):
    """What tells no version, such as p.data.add_, is seen there too."""
    model = chain()
    again = []

    def change():
        adapters(model)["layers.0"].A.data.add_(1)
        again.append(model.layers[0](x))

    model.between = change
    model(x)
    torch.testing.assert_close(again[0], model.layers[0](x))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("start", ["subtract", "soft"])
def test_checkpointing_changes_nothing(start, reentrant, x):
    model = chain(DeLoRA(r=2, start=start))
    x.requires_grad_()
    y, expected = gradients(model, alone(model), x)
    for whole in (False, True):
        model.rerun = None if whole else reentrant
        run = (lambda x: checkpoint(model, x, use_reentrant=reentrant)) if whole else model
        again, found = gradients(model, run, x)
        torch.testing.assert_close(again, y)
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], msg=name)


@dataclass(frozen=True)
class Counted(DeLoRA):
    """Counts how often updates are built, of how many layers at once."""

    built: ClassVar[list[int]] = []

    def update(self, W, p):
        self.built.append(len(p["A"]) if p["A"].ndim == 3 else 1)
        return super().update(W, p)


def test_in_both_runs_of_a_checkpoint_all_updates_are_built_together(x):
    model = chain(Counted(r=2))
    x.requires_grad_()
    model.rerun = False  # every layer is checkpointed, without reentrance
    Counted.built.clear()
    y, again = gradients(model, model, x)
    depth = len(model.layers)
    assert [n for n in Counted.built if n > 1] == [depth] * 3  # forward, second run, gradients through the first
    assert Counted.built.count(1) == 1  # the last layer has a shape of its own
    model.rerun = None
    plain, expected = gradients(model, model, x)
    assert torch.equal(y, plain)
    assert all(torch.equal(again[name], expected[name]) for name in expected)
    assert watched(model).again(model.layers[0].adapters["default"]) is not None  # what is left of the others is not copied
    assert torch.equal(copy.deepcopy(model)(x), y)


def test_a_checkpointed_layer_may_be_called_twice_or_outside_of_its_model(x):
    model = chain(DeLoRA(r=2))
    first, layer = model.layers[0], model.layers[0].__call__
    inner = {"twice": lambda x: first(first(x)), "once": layer}
    for run in inner.values():
        found = [
            gradients(model, lambda x, run=run, ck=ck: ck(run, x), x.clone().requires_grad_())
            for ck in (lambda run, x: run(x), lambda run, x: checkpoint(run, x, use_reentrant=False))
        ]
        torch.testing.assert_close(found[0][0], found[1][0])
        for name in found[0][1]:
            torch.testing.assert_close(found[0][1][name], found[1][1][name])


def test_a_layer_that_took_no_part_has_no_gradient(x):
    """Zeros would be decayed and would move with Adam's momentum."""
    model = chain()
    model.skip = (1,)
    with pytest.warns(UserWarning, match="1 of 5 adapted layers did not run in the first forward.*'layers.1'"):
        _, found = gradients(model, model, x)
    assert {name.split(".")[1] for name, g in found.items() if g is None} == {"1"}


def test_a_gradient_asked_for_inside_no_grad(x):
    model = chain()
    model.between = lambda: found.append(_with_grad(model.layers[0], x))
    found: list[torch.Tensor] = []
    model.skip = (0,)
    with torch.no_grad():
        model(x)
    found[0].sum().backward()
    assert adapters(model)["layers.0"].A.grad is not None


def _with_grad(layer, x):
    with torch.enable_grad():
        return layer(x)


def test_nothing_is_left_after_a_forward_or_an_error(x):
    model = chain()
    model(x)
    assert _current.get() is None

    def fail():
        assert _current.get() is not None
        raise KeyError("on the way")

    model.between = fail
    with pytest.raises(KeyError, match="on the way"):
        model(x)
    assert _current.get() is None


def test_a_model_within_a_model(x):
    inner = chain()
    outer = delora.inject(nn.Sequential(nn.Linear(6, 6, dtype=torch.float64), inner), DeLoRA(r=2), ["0"], name="outer")
    delora.activate(outer, "outer")
    delora.inject(outer, DeLoRA(r=2), ["0", *(f"layers.{n}" for n in range(4))], name="both")
    shake(outer)
    torch.testing.assert_close(outer(x), outer.forward(x))
    with torch.no_grad():
        expected = inner.forward(outer[0](x))
    torch.testing.assert_close(outer(x).detach(), expected)


def test_each_thread_has_its_own(x):
    model = chain()
    expected = model(x).detach()
    seen = []
    model.between = lambda: seen.append(in_thread(lambda: built(adapters(model)["layers.0"].adapter)))
    model.skip = (0,)
    model(x)
    assert seen == [None]
    model.skip, model.between = (), None
    torch.testing.assert_close(in_thread(lambda: model(x).detach()), expected)


def in_thread(act):
    result = []
    thread = threading.Thread(target=lambda: result.append(act()))
    thread.start()
    thread.join()
    return result[0]


def test_a_copy_builds_for_itself(x):
    model = chain()
    twin = copy.deepcopy(model)
    shake(twin, 9)
    torch.testing.assert_close(twin(x), alone(twin)(x))
    assert not torch.allclose(twin(x), model(x))


@pytest.mark.parametrize("leave", [delora.eject, delora.merge], ids=["eject", "merge"])
def test_no_hook_stays(leave):
    model = chain()
    assert model._forward_pre_hooks
    leave(model)
    assert not any((model._forward_pre_hooks, model._forward_hooks, model._forward_hooks_always_called))


def test_adapters_and_strengths_are_those_in_force(x):
    model = chain()
    delora.inject(model, LoRA(r=2), ["layers.0", "layers.1"], name="second")
    shake(model)
    for name in ("default", "second"):
        delora.activate(model, name)
        torch.testing.assert_close(model(x), alone(model)(x))
    delora.activate(model, "default")
    delora.strength(model, 0.5)
    torch.testing.assert_close(model(x), alone(model)(x))
    with delora.disabled(model):
        torch.testing.assert_close(model(x), alone(model)(x))


@dataclass(frozen=True)
class Mixed:
    """W' = W + B M A: an update with a product, which autocast would round."""

    stacks: ClassVar[bool] = True

    def init(self, W):
        return {
            "A": nn.Parameter(W[:2].clone()),
            "M": nn.Parameter(W.new_ones(2, 2)),
            "B": nn.Parameter(W.new_zeros(len(W), 2)),
        }

    def update(self, W, p):
        return LowRank(p["B"], p["M"] @ p["A"])


def test_autocast(x):
    model = chain(Mixed(), dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(x.float()), alone(model)(x.float()))


def test_hooks_that_keep_elsewhere_are_obeyed(x):
    model = chain()
    y, expected = gradients(model, alone(model), x)
    with torch.autograd.graph.save_on_cpu():
        again, found = gradients(model, model, x)
    torch.testing.assert_close(again, y)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


# ---------------------------------------------------------------- several processes


def trained(model, wrap, x):
    model = wrap(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return model


def sharded_each(model):
    for layer in [*model.layers, model.last]:
        fully_shard(layer)
    return fully_shard(model)


def sharded_whole(model):
    return fully_shard(model)


WRAPS = {
    "DDP": nn.parallel.DistributedDataParallel,
    "DDP, a layer unused": partial(nn.parallel.DistributedDataParallel, find_unused_parameters=True),
    "FSDP2, each layer": sharded_each,
    "FSDP2, the whole": sharded_whole,
}


def start(wrap):
    model = chain(dtype=torch.float32)
    model.skip = (1,) if "unused" in wrap else ()
    return model


def tokens():
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(5))


def work(rank, folder, wrap):
    model = trained(start(wrap), WRAPS[wrap], tokens()[rank * 2 : rank * 2 + 2])
    values = {n.removeprefix("module."): p for n, p in model.named_parameters() if p.requires_grad}
    whole = {n: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone() for n, p in values.items()}
    torch.save((whole, model(tokens()).detach()), f"{folder}/{rank}.pt")


@pytest.mark.slow
@pytest.mark.parametrize("wrap", WRAPS)
def test_two_processes_train_as_one(wrap, tmp_path):
    in_two_processes(work, str(tmp_path), wrap)
    expected = trained(start(wrap), alone_module, tokens())
    for rank in (0, 1):
        found, y = torch.load(tmp_path / f"{rank}.pt")
        for name, p in expected.named_parameters():
            if p.requires_grad:
                torch.testing.assert_close(found[name], p.detach(), rtol=1e-4, atol=1e-6, msg=name)
        torch.testing.assert_close(y, expected(tokens()).detach(), rtol=1e-4, atol=1e-5)


def alone_module(model):
    """The same model without its hooks: every layer builds its own."""
    unwatch(model)
    return model
