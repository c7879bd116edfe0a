"""FSDP2, DDP: two processes with parts of a model do what one process does with the whole of it."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.utils.checkpoint
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import delora
from delora import OFT, DeLoRA, DoRA, EtherPlus, LoRA
from delora.diagnostics import Recorder, inspect
from delora.meeting import ProcessError
from delora.sharded import is_sharded, whole
from delora.torch_private import process_store
from tests.processes import all_hold

METHODS = {type(m).__name__: m for m in (DeLoRA(r=2), DoRA(r=2), EtherPlus(blocks=2), OFT(blocks=2))}
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.v = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.v(torch.tanh(self.q(x))))


class Net(nn.Module):
    """Two blocks that are sharded each, and what is left for the root: an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.blocks = nn.Embedding(20, 8), nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.emb(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def net(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype)


def adapt(model: nn.Module, method: object, targets: object = ("q", "v", "emb")) -> nn.Module:
    torch.manual_seed(1)
    return delora.inject(model, method, list(targets), also_train=["head"])  # type: ignore[arg-type, call-overload]


def shard(model: nn.Module, **options: object) -> nn.Module:
    for block in model.blocks:  # type: ignore[union-attr]
        fully_shard(block, **options)  # type: ignore[arg-type]
    return fully_shard(model, **options)  # type: ignore[arg-type]


@torch.no_grad()
def shake(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1 * torch.randn_like(parameter))


def sharded(method: object, when: str) -> nn.Module:
    return shard(adapt(net(), method)) if when == "before" else adapt(shard(net()), method)


def ids() -> Tensor:
    return torch.arange(24).reshape(4, 6) % 20


def own(rank: int, x: Tensor) -> Tensor:
    return x[2 * rank : 2 * rank + 2]


def trained(model: nn.Module, x: Tensor, steps: int = 20, evaluate: bool = False) -> list[Tensor]:
    """The losses. SGD: AdamW divides gradients by their size, and so makes rounding of a zero as large as a step."""
    optimizer = torch.optim.SGD(delora.param_groups(model, lr=0.03), momentum=0.9)
    losses = []
    for _ in range(steps):
        if evaluate:
            with torch.no_grad():
                model(ids())
        optimizer.zero_grad()
        loss = (model(x) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def mean(losses: list[Tensor]) -> Tensor:
    total = torch.stack(losses)
    dist.all_reduce(total)
    return total / 2


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(t.detach()) for name, t in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert set(a) == set(b)
    for name in a:
        assert torch.equal(a[name], b[name]), name


# ---------------------------------------------------------------- laws, each run by two processes


def trains_as_one(rank: int, method: object, when: str) -> None:
    one, two = adapt(net(), method), sharded(method, when)
    torch.testing.assert_close(mean(trained(two, own(rank, ids()))), torch.stack(trained(one, ids())), rtol=1e-5, atol=1e-6)
    delora.param_groups(two, 0.03)  # gathers nothing and frees what the last forward left
    for name, t in tensors(one).items():
        torch.testing.assert_close(tensors(two)[name], t, rtol=1e-4, atol=1e-6)


def does_what_one_does(rank: int, folder: str, method: object, when: str) -> None:
    """Files, merging, measuring: with parts as with the whole, bit for bit where no sum has another order."""
    two = sharded(method, when)
    trained(two, own(rank, ids()), steps=3)
    place = Path(folder) / f"{type(method).__name__}-{when}-{rank}"
    saved = delora.save(two, place.with_name(place.name[:-1]))
    one = delora.load(net(), saved)  # written on two, read on one
    x, y = ids(), two(ids())
    assert torch.equal(one(x), y)
    assert delora.distances(one) == delora.distances(two)
    assert inspect(one) == inspect(two)
    assert Recorder(one).record() == Recorder(two).record()
    again = delora.save(one, place)  # the same file, whoever writes
    assert json.loads((again / "adapter.json").read_text()) == json.loads((saved / "adapter.json").read_text())
    if not isinstance(method, (DoRA, OFT)):
        delora.export.peft(one, place / "peft")
        delora.export.peft(two, saved / "peft")
        same(load_file(place / "peft/adapter_model.safetensors"), load_file(saved / "peft/adapter_model.safetensors"))
    shake(one)
    changed = delora.save(one, place)
    for fresh in (two, shard(net())):  # written on one, read on two: over an adapter, and anew
        delora.load(fresh, changed)
        assert torch.equal(fresh(x), one(x))
    with delora.disabled(two):
        assert torch.equal(two(x), net()(x))
    for model in (one, two):
        delora.strength(model, 0.5)
    assert torch.equal(two(x), one(x))
    y = two(x)
    before = tensors(two)
    delora.param_groups(two, 0.03)
    with delora.merged(one), delora.merged(two):
        same(tensors(one), tensors(two))
        assert torch.equal(two(x), one(x))
    delora.param_groups(two, 0.03)
    same(tensors(two), before)
    assert torch.equal(two(x), y)
    same(tensors(delora.merge(one)), tensors(delora.merge(two)))
    assert torch.equal(two(x), one(x))
    assert all(is_sharded(p) for p in two.blocks[0].parameters())  # type: ignore[union-attr, index]


def mixed_precision_starts_at_the_base(rank: int, when: str) -> None:
    """MixedPrecisionPolicy rounds what trains, and with it the frozen half that must cancel it."""
    for method in (DeLoRA(r=2), DeLoRA(r=2, start="copy"), DeLoRA(r=2, start="paired")):
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
        model = net(torch.bfloat16)
        model = (
            shard(adapt(model, method), mp_policy=policy) if when == "before" else adapt(shard(model, mp_policy=policy), method)
        )
        with delora.disabled(model):
            base = model(ids())
        assert torch.equal(model(ids()), base), method
        assert model(ids()).dtype == torch.bfloat16
        losses = mean(trained(model, own(rank, ids())))
        assert losses[-1] < 0.5 * losses[0]
        assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def state_dicts(rank: int, when: str) -> None:
    method = DeLoRA(r=2)
    one, two = adapt(net(), method), sharded(method, when)
    trained(two, own(rank, ids()), steps=3)
    full = get_model_state_dict(two, options=WHOLE)
    y = two(ids())
    if rank == 0:
        one.load_state_dict(full)
        assert torch.equal(one(ids()), y)
    fresh = sharded(method, when)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(fresh, full if rank == 0 else {}, options=options)
    assert torch.equal(fresh(ids()), y)
    adapters = get_model_state_dict(two, options=StateDictOptions(full_state_dict=True, ignore_frozen_params=True))
    assert not any(".base." in name for name in adapters)


def distributed_checkpoints(rank: int, folder: str) -> None:
    import torch.distributed.checkpoint as dcp

    two = sharded(DeLoRA(r=2), "before")
    trained(two, own(rank, ids()), steps=3)
    dcp.save(get_model_state_dict(two), checkpoint_id=f"{folder}/dcp")
    for when in ("before", "after"):
        fresh = sharded(DeLoRA(r=2), when)
        state = get_model_state_dict(fresh)
        dcp.load(state, checkpoint_id=f"{folder}/dcp")
        set_model_state_dict(fresh, state)
        assert torch.equal(fresh(ids()), two(ids()))
    if rank == 0:
        torch.save(two(ids()), f"{folder}/dcp.pt")
    else:
        two(ids())


def checkpointed_and_accumulated(rank: int, when: str) -> None:
    """Activation checkpointing; and gradients of two batches, the first of which is not sent away."""
    one, two = adapt(net(), DeLoRA(r=2)), sharded(DeLoRA(r=2), when)
    for model in (one, two):
        for block in model.blocks:
            block.forward = (lambda run: lambda x: torch.utils.checkpoint.checkpoint(run, x, use_reentrant=False))(
                block.forward
            )
    x = ids()
    one(x).square().mean().backward()
    (one(x + 1 - 20 * (x == 19)).square().mean()).backward()
    two.set_requires_gradient_sync(False)
    two(own(rank, x)).square().mean().backward()
    two.set_requires_gradient_sync(True)
    two(own(rank, x + 1 - 20 * (x == 19))).square().mean().backward()
    for (name, p), q in zip(one.named_parameters(), two.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(whole(q.grad), p.grad, rtol=1e-4, atol=1e-6)


def trained_after_evaluation(rank: int, when: str) -> None:
    """A forward without a backward leaves parameters gathered that are not resharded: nothing reads or writes those."""
    for reshard in (True, False):
        one = adapt(net(), DeLoRA(r=2))
        model = shard(adapt(net(), DeLoRA(r=2)), reshard_after_forward=reshard) if when == "before" else None
        model = model or adapt(shard(net(), reshard_after_forward=reshard), DeLoRA(r=2))
        a, b = trained(one, ids(), 3, evaluate=True), mean(trained(model, own(rank, ids()), 3, evaluate=True))
        torch.testing.assert_close(b, torch.stack(a))
        with torch.no_grad():
            y = model(ids())
        torch.testing.assert_close(delora.merge(model)(ids()), y)


def two_adapters(rank: int, when: str) -> None:
    def both(model: nn.Module) -> nn.Module:
        delora.inject(model, DeLoRA(r=2), ["blocks.0.q"], name="a")
        return delora.inject(model, LoRA(r=2), ["blocks.1.q"], name="b")

    torch.manual_seed(3)
    one = both(net())
    torch.manual_seed(3)
    two = shard(both(net())) if when == "before" else both(shard(net()))
    for name in ("b", "a"):
        for model in (one, two):
            delora.activate(model, name)
        torch.testing.assert_close(mean(trained(two, own(rank, ids()), 5)), torch.stack(trained(one, ids(), 5)))
    for model in (one, two):
        delora.blend(model, {"a": 0.5, "b": 2.0}, "ab")
    torch.testing.assert_close(two(ids()), one(ids()))
    delora.eject(two)
    assert torch.equal(two(ids()), net()(ids()))


def draws_that_differ_are_refused(rank: int) -> None:
    model = net()
    torch.manual_seed(rank)
    shard(delora.inject(model, DeLoRA(r=2), ["q"]))
    with pytest.raises(ValueError, match=f"process {1 - rank} drew other adapters than process {rank}"):
        model(ids())
    one, model = net(), shard(net())
    torch.manual_seed(rank)
    delora.inject(model, DeLoRA(r=2), ["q"])
    torch.manual_seed(0)
    delora.inject(one, DeLoRA(r=2), ["q"])
    for key in ("A", "A0"):  # after fully_shard, all have those of the first
        assert torch.equal(whole(getattr(model.blocks[1].q.adapter, key).detach()), getattr(one.blocks[1].q.adapter, key))
    with delora.disabled(model):
        base = model(ids())
    torch.testing.assert_close(model(ids()), base)


def shared_weights_are_not_torn(rank: int) -> None:
    model = net()
    model.head = nn.Linear(8, 20, bias=False)
    model.head.weight = model.emb.weight
    fully_shard(delora.inject(model, LoRA(r=2), ["emb"]))
    shake(model)
    before = tensors(model)
    with pytest.raises(ValueError, match=r"cannot merge 'emb': .* share.* 'head'"):
        delora.merge(model)
    same(tensors(model), before)


def only_all_together(rank: int, folder: str) -> None:
    """A process that does not come, does something else or fails is an error in words on the other, and soon."""
    two = sharded(DeLoRA(r=2), "before")
    store = process_store()
    patience = store.timeout
    store.set_timeout(timedelta(seconds=1))
    try:
        if rank == 0:
            with pytest.raises(ProcessError, match=r"delora.save: .* process 1 did not come within 1 seconds"):
                delora.save(two, f"{folder}/alone")
            assert not Path(folder, "alone").exists()
    finally:
        store.set_timeout(patience)
        dist.barrier()
    if rank == 1:  # the number of its meetings must be the other's
        with pytest.raises(ProcessError, match="process 0 called delora.save while process 1 called delora.distances"):
            delora.distances(two)
    Path(folder, "file").touch()
    with pytest.raises(OSError if rank == 0 else ProcessError, match="file" if rank == 0 else "process 0 failed: .*file"):
        delora.save(two, f"{folder}/file")
    assert delora.distances(two).keys() == {"emb", "blocks.0.q", "blocks.0.v", "blocks.1.q", "blocks.1.v", "head"}  # as ever


def fsdp1_is_refused(rank: int, folder: str) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    model = FSDP(adapt(net(), DeLoRA(r=2)), use_orig_params=True, device_id=torch.device("cpu"))
    for call in (delora.distances, delora.merge, lambda m: delora.save(m, f"{folder}/fsdp1")):
        with pytest.raises(ValueError, match="FSDP1.*fully_shard"):
            call(model)
    with FSDP.summon_full_params(model):
        assert delora.distances(model) == delora.distances(adapt(net(), DeLoRA(r=2)))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(x, x, x, need_weights=False)[0] + x  # type: ignore[no-any-return]


def with_attention() -> nn.Module:
    model = net()
    model.blocks[1] = Attention()
    return model


def adapt_attention(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    return delora.inject(model, DeLoRA(r=2), ["in_proj_weight", "out_proj"])


def packed_matrices(rank: int, folder: str, when: str) -> None:
    """Matrices in parameters of a module, which runs with changed ones in place."""

    one = adapt_attention(with_attention())
    two = shard(adapt_attention(with_attention())) if when == "before" else adapt_attention(shard(with_attention()))
    torch.testing.assert_close(
        mean(trained(two, own(rank, ids()), 5)), torch.stack(trained(one, ids(), 5)), rtol=1e-5, atol=1e-6
    )
    one = delora.load(with_attention(), delora.save(two, f"{folder}/packed-{when}"))
    assert delora.distances(one) == delora.distances(two)
    y = two(ids())
    assert torch.equal(one(ids()), y)
    with delora.merged(two):
        torch.testing.assert_close(two(ids()), y)
    same(tensors(delora.merge(one)), tensors(delora.merge(two)))


def without_torchs_private_store(rank: int) -> None:
    hidden = dist.distributed_c10d._get_default_store
    del dist.distributed_c10d._get_default_store
    try:
        assert delora.distances(sharded(LoRA(r=2), "before"))["blocks.0.q"] == 0
    finally:
        dist.distributed_c10d._get_default_store = hidden


def ddp_trains_as_one(rank: int, folder: str, method: object) -> None:
    one, two = adapt(net(), method), adapt(net(), method)
    ddp = nn.parallel.DistributedDataParallel(two)
    torch.testing.assert_close(mean(trained(ddp, own(rank, ids()))), torch.stack(trained(one, ids())), rtol=1e-5, atol=1e-6)
    for name, t in tensors(one).items():
        torch.testing.assert_close(tensors(two)[name], t, rtol=1e-4, atol=1e-6)
    saved = delora.save(ddp, f"{folder}/ddp-{type(method).__name__}-{rank}")
    fresh = delora.load(net(), saved)
    assert torch.equal(fresh(ids()), two(ids()))
    delora.load(ddp, saved)  # over the adapter that is there


BEFORE_AND_AFTER = ("before", "after")
CASES = [("DeLoRA", "before"), ("DeLoRA", "after"), ("DoRA", "before"), ("EtherPlus", "after"), ("OFT", "before")]


@pytest.mark.slow
def test_two_processes_do_what_one_does(tmp_path):
    laws = {f"trains {m} {w}": (trains_as_one, (METHODS[m], w)) for m, w in CASES}
    laws |= {f"does {m} {w}": (does_what_one_does, (str(tmp_path), METHODS[m], w)) for m, w in CASES}
    for law in (
        mixed_precision_starts_at_the_base,
        state_dicts,
        checkpointed_and_accumulated,
        trained_after_evaluation,
        two_adapters,
    ):
        laws |= {f"{law.__name__} {w}": (law, (w,)) for w in BEFORE_AND_AFTER}
    for law in (
        draws_that_differ_are_refused,
        shared_weights_are_not_torn,
        without_torchs_private_store,
    ):
        laws[law.__name__] = law, ()
    laws |= {law.__name__: (law, (str(tmp_path),)) for law in (distributed_checkpoints, only_all_together, fsdp1_is_refused)}
    laws |= {f"packed {w}": (packed_matrices, (str(tmp_path), w)) for w in BEFORE_AND_AFTER}
    laws["ddp"] = ddp_trains_as_one, (str(tmp_path), METHODS["DeLoRA"])
    all_hold(laws, tmp_path)
