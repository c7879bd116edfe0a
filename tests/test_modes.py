"""Half precision, autocast, checkpointing, compilation, copies, pickles, several processes; and what they cost in memory."""

from __future__ import annotations

import copy
import io
from contextlib import ExitStack

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import delora
from delora import DeLoRA
from delora.models import unwrapped
from tests.cases import METHODS, Net, ids, shake
from tests.processes import in_two_processes

SOME = [METHODS[name] for name in ("LoRA", "DeLoRA subtract", "DeLoRA copy", "DeLoRA paired", "DeLoRA soft")]


class Attention(nn.Module):
    """q, k and v of one block read the same x."""

    def __init__(self, d: int = 32) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(d, d) for _ in range(3))

    def forward(self, x):
        return self.q(x) + self.k(x) + self.v(x)


def saved_tensors(model, x, **context):
    """The tensors kept for backward, one for each storage."""
    kept = {}

    def pack(tensor):
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with ExitStack() as stack:
        if context:
            stack.enter_context(torch.autocast("cpu", **context))
        stack.enter_context(saved_tensors_hooks(pack, lambda t: t))
        model(x).float().sum()
    return list(kept.values())


@pytest.mark.parametrize("method", SOME, ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_nothing_of_a_tokens_size_is_kept_in_float32_when_x_is_bf16(method, autocast):
    tokens, d = 400, 32
    model = Attention(d) if autocast else Attention(d).bfloat16()
    delora.inject(model, method, ["q", "k", "v"])
    x = torch.randn(tokens, d, dtype=torch.bfloat16)
    kept = saved_tensors(model, x, **({"dtype": torch.bfloat16} if autocast else {}))
    big = [t for t in kept if t.shape[0] == tokens]
    assert big
    assert {t.dtype for t in big} == {torch.bfloat16}


@pytest.mark.parametrize("method", SOME, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_q_k_and_v_keep_x_once_without_dropout(method, dtype):
    tokens, d = 400, 32
    model = delora.inject(Attention(d).to(dtype), method, ["q", "k", "v"])
    x = torch.randn(tokens, d, dtype=dtype)
    wide = [t for t in saved_tensors(model, x) if t.shape == x.shape]
    assert [t.data_ptr() for t in wide] == [x.data_ptr()]


@pytest.mark.parametrize("method", SOME, ids=str)
def test_bf16_and_fp16_bases_train(method):
    for dtype in (torch.bfloat16, torch.float16):
        model, x = delora.inject(Net().to(dtype), method, ["emb", "q", "v"], also_train=["classifier"]), ids()
        assert model(x).dtype == dtype
        assert model.q.adapter.A.dtype == torch.float32
        optimizer = torch.optim.AdamW(delora.param_groups(model, lr=1e-3))
        before = delora.distances(model)["q"]
        model(x).float().square().sum().backward()
        optimizer.step()
        assert delora.distances(model)["q"] > before


def test_lam_moves_by_less_than_bf16_could_hold():
    """A strength of 8 kept in bf16 could not move by 0.005: it is kept in float32."""
    model = delora.inject(Net().bfloat16(), DeLoRA(r=2, lam=8.0, learn_lam=True), ["q"])
    optimizer = torch.optim.AdamW(delora.param_groups(shake(model, 0.01), lr=1e-3, lam_lr=5e-3))
    before = model.q.adapter.lam.item()
    model(ids()).float().square().sum().backward()
    optimizer.step()
    assert 0 < abs(model.q.adapter.lam.item() - before) < 0.006


@pytest.mark.parametrize("method", SOME, ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(method, dropout, reentrant):
    model = shake(delora.inject(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), method, ["0", "1"], dropout=dropout)).train()
    x = torch.randn(4, 6, requires_grad=True)

    def gradients(run):
        torch.manual_seed(7)
        model.zero_grad()
        run().square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    plain = gradients(lambda: model(x))
    again = gradients(lambda: checkpoint(model, x, use_reentrant=reentrant))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("method", SOME, ids=str)
def test_a_whole_model_compiles_to_one_graph(method):
    torch.compiler.reset()
    model, x = shake(delora.inject(Net(), method, ["emb", "q", "v"], also_train=["classifier"])), ids()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = model(x)
    torch.testing.assert_close(compiled(x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert compiled(x).dtype == torch.bfloat16
    # The wrapper is looked through, and what is switched takes effect.
    assert delora.distances(compiled) == delora.distances(model)
    with delora.disabled(compiled):
        assert not torch.allclose(compiled(x), expected)
    delora.strength(compiled, 0.5)
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.slow
def test_inductor_computes_the_same():
    torch.compiler.reset()
    model, x = shake(delora.inject(Net(), DeLoRA(r=2), ["q", "v"])), ids()
    compiled = torch.compile(model, fullgraph=True)
    compiled(x).square().sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    model(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", SOME, ids=str)
def test_a_copy_is_a_model_of_its_own(method):
    model, x = shake(delora.inject(Net(), method, ["q", "v"], also_train=["classifier"])), ids()
    twin = copy.deepcopy(model)
    before = model(x)
    assert torch.equal(twin(x), before)
    shake(twin)
    assert torch.equal(model(x), before)
    assert not torch.equal(twin(x), before)
    assert twin.q.adapter.host.layer is twin.q.base
    delora.merge(twin)
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("method", SOME, ids=str)
def test_a_pickled_model_comes_back(method):
    model, x = shake(delora.inject(Net(), method, ["q", "v"], also_train=["classifier"])), ids()
    data = io.BytesIO()
    torch.save(model, data)
    data.seek(0)
    twin = torch.load(data, weights_only=False)
    assert torch.equal(twin(x), model(x))
    base = Net()
    twin.load_state_dict(base.state_dict())  # the hooks came along
    with delora.disabled(twin):
        assert torch.equal(twin(x), base(x))


def test_a_state_dict_of_the_adapted_model_comes_back():
    model, x = shake(delora.inject(Net(), DeLoRA(r=2), ["q", "v"], also_train=["classifier"])), ids()
    twin = delora.inject(Net(), DeLoRA(r=2), ["q", "v"], also_train=["classifier"])
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(x), model(x))
    state = model.state_dict()
    del state["q.adapters.default.A"]
    with pytest.raises(RuntimeError, match="Missing key.*q.adapters.default.A"):
        twin.load_state_dict(state)


def test_a_missing_base_weight_is_still_missing():
    model = delora.inject(Net(), DeLoRA(r=2), ["q"])
    state = Net().state_dict()
    del state["q.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*q\.base\.weight"):
        model.load_state_dict(state)


# ---------------------------------------------------------------- several processes


def build():
    torch.manual_seed(0)
    return delora.inject(Net(), DeLoRA(r=2), ["emb", "q", "v"], also_train=["classifier"])


def step(model, x):
    optimizer = torch.optim.AdamW(delora.param_groups(model, lr=1e-2))
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return {n: p.detach().clone() for n, p in unwrapped(model).named_parameters()}


def work(rank: int, folder: str) -> None:
    model = nn.parallel.DistributedDataParallel(build())
    x = torch.arange(24).reshape(4, 6) % 20
    state = step(model, x[rank * 2 : rank * 2 + 2])
    torch.save(state, f"{folder}/{rank}.pt")
    if rank == 0:
        delora.save(model, f"{folder}/adapter")


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    in_two_processes(work, str(tmp_path))
    x = torch.arange(24).reshape(4, 6) % 20
    expected = step(build(), x)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for name, tensor in expected.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], tensor, rtol=1e-4, atol=1e-6)
    torch.manual_seed(0)
    loaded = delora.load(Net(), tmp_path / "adapter")
    assert torch.equal(loaded.q.adapter.A, first["q.adapters.default.A"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", SOME, ids=str)
def test_on_a_gpu(method, tmp_path):
    model, x = shake(delora.inject(Net(), method, ["emb", "q", "v"], also_train=["classifier"])).eval(), ids()
    expected = model(x)
    model.cuda()
    torch.testing.assert_close(model(x.cuda()).cpu(), expected, rtol=1e-4, atol=1e-4)
    delora.save(model, tmp_path)
    with torch.autocast("cuda", torch.bfloat16):
        assert model(x.cuda()).dtype == torch.bfloat16
    base = delora.eject(copy.deepcopy(model))
    torch.testing.assert_close(delora.load(base, tmp_path)(x.cuda()), model(x.cuda()))
