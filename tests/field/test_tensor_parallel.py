"""Tensor parallel layers: two processes that compute a part each do what one process does."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.utils.checkpoint
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import delora
from delora import OFT, DeLoRA, DoRA, LoRA
from delora.diagnostics import inspect
from delora.sharded import is_sharded
from tests.field.test_sharded import ids, same, tensors, trained
from tests.processes import all_hold


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    """Two blocks of layers divided by rows and by columns; an embedding and a head that give all; and a plain layer."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.blocks = nn.Embedding(20, 8), nn.ModuleList([Block(), Block()])
        self.plain, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.emb(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(torch.tanh(self.plain(x)).mean(1))


PLAN = {
    "emb": RowwiseParallel(input_layouts=Replicate()),
    "blocks.*.up": ColwiseParallel(),
    "blocks.*.down": RowwiseParallel(),
    "head": ColwiseParallel(output_layouts=Replicate()),
}
TARGETS = ["up", "down", "emb", "plain"]


def net(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype)


def parallel(dtype: torch.dtype = torch.float32) -> nn.Module:
    return parallelize_module(net(dtype), init_device_mesh("cpu", (2,)), PLAN)


def adapt(model: nn.Module, method: object, **options: object) -> nn.Module:
    torch.manual_seed(1)
    return delora.inject(model, method, TARGETS, **options)  # type: ignore[arg-type, call-overload]


def trains_as_one(rank: int, method: object) -> None:
    one = adapt(net(), method)
    two = parallel()
    torch.manual_seed(1 + rank)  # the first one's draws count
    delora.inject(two, method, TARGETS)  # type: ignore[arg-type, call-overload]
    torch.testing.assert_close(torch.stack(trained(two, ids())), torch.stack(trained(one, ids())), rtol=1e-5, atol=1e-6)
    after = tensors(two)
    for name, t in tensors(one).items():
        torch.testing.assert_close(after[name], t, rtol=1e-4, atol=1e-6)
        if not is_sharded(two.state_dict()[name]):
            first = after[name].clone()
            torch.distributed.broadcast(first, 0)
            assert torch.equal(first, after[name])


def does_what_one_does(rank: int, folder: str, method: object) -> None:
    two = adapt(parallel(), method)
    trained(two, ids(), steps=3)
    place = Path(folder) / type(method).__name__
    saved = delora.save(two, place)
    one = delora.load(net(), saved)
    x, y = ids(), two(ids())
    torch.testing.assert_close(one(x), y)
    assert delora.distances(one) == delora.distances(two)
    assert inspect(one) == inspect(two)
    torch.testing.assert_close(delora.load(parallel(), saved)(x), y)
    delora.export.peft(one, f"{place}-{rank}/peft")
    delora.export.peft(two, saved / "peft")
    same(load_file(f"{place}-{rank}/peft/adapter_model.safetensors"), load_file(saved / "peft/adapter_model.safetensors"))
    for model in (one, two):
        delora.strength(model, 0.5)
    torch.testing.assert_close(one(x), two(x))
    with delora.disabled(two):
        torch.testing.assert_close(two(x), net()(x))
    before = tensors(two)
    with torch.no_grad(), delora.merged(one), delora.merged(two):
        same(tensors(one), tensors(two))
        torch.testing.assert_close(one(x), two(x))
    same(tensors(two), before)
    same(tensors(delora.merge(one)), tensors(delora.merge(two)))
    torch.testing.assert_close(one(x), two(x))


def checkpointed(rank: int) -> None:
    one, two = adapt(net(), DeLoRA(r=2)), adapt(parallel(), DeLoRA(r=2))
    for block in two.blocks:
        block.forward = (lambda run: lambda x: torch.utils.checkpoint.checkpoint(run, x, use_reentrant=False))(block.forward)
    for model in (one, two):
        model(ids()).square().mean().backward()
    for (name, p), q in zip(one.named_parameters(), two.parameters(), strict=True):
        if p.grad is not None:
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-6, msg=name)


def transformers_plan(rank: int, folder: str) -> None:
    """A Llama loaded with ``tp_plan="auto"``, in float32 and bfloat16."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.distributed import DistributedConfig

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}  # as torchrun does

    if rank == 0:
        sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=21)
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes)).save_pretrained(f"{folder}/llama")
    torch.distributed.barrier()

    def adapted(**options: object) -> nn.Module:
        model = LlamaForCausalLM.from_pretrained(f"{folder}/llama", **options)
        torch.manual_seed(1)
        return delora.inject(model, DeLoRA(r=2), "all-linear")

    one, two = adapted(), adapted(distributed_config=DistributedConfig(tp_size=2))
    assert is_sharded(two.model.layers[0].mlp.up_proj.base.weight)
    optimizers = [torch.optim.SGD(delora.param_groups(model, lr=0.3), momentum=0.9) for model in (one, two)]
    for _ in range(20):
        for model, optimizer in zip((one, two), optimizers, strict=True):
            model(ids(), labels=ids()).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    after = tensors(two)
    for name, t in tensors(one).items():
        torch.testing.assert_close(after[name], t, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(two(ids()).logits, one(ids()).logits)
    saved = delora.save(two, f"{folder}/llama-adapter")
    one = delora.load(LlamaForCausalLM.from_pretrained(f"{folder}/llama"), saved)
    assert delora.distances(one) == delora.distances(two)
    with torch.no_grad():
        torch.testing.assert_close(two(ids()).logits, one(ids()).logits)
        same(tensors(delora.merge(one)), tensors(delora.merge(two)))
        torch.testing.assert_close(two(ids()).logits, one(ids()).logits)


def what_cannot_be_right_is_refused(rank: int) -> None:
    for method in (DoRA(r=2), OFT(blocks=1)):
        with pytest.raises(TypeError, match="tensor parallel Linear by"):
            delora.inject(parallel(), method, ["up"])
    with pytest.raises(ValueError, match="cannot be trained whole"):
        delora.inject(parallel(), LoRA(r=2), ["up"], also_train=["head"])
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
    twice = fully_shard(parallelize_module(net(), mesh["tp"], PLAN), mesh=mesh["dp"])
    with pytest.raises(ValueError, match="both tensor parallel and sharded"):
        delora.inject(twice, LoRA(r=2), ["up"])
    for style, words in (
        (ColwiseParallel(use_local_output=False), "DTensor"),
        (ColwiseParallel(input_layouts=Shard(-1)), "4 of 8 features and gave 4 of 8"),
    ):
        mixed = parallelize_module(net(), init_device_mesh("cpu", (2,)), {"plain": style})
        delora.inject(mixed, LoRA(r=2), ["plain"])
        with pytest.raises(ValueError, match=words):
            mixed.plain(torch.ones(4, 4 if "features" in words else 8))
    style = ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate())
    sequence = parallelize_module(net(), init_device_mesh("cpu", (2,)), {"plain": style})
    delora.inject(sequence, LoRA(r=2), ["plain"])
    with pytest.raises(ValueError, match="divide the sequence"):
        sequence(ids())


@pytest.mark.slow
def test_two_processes_that_compute_parts_do_what_one_does(tmp_path):
    methods = (DeLoRA(r=2), LoRA(r=2))
    laws = {f"trains {type(m).__name__}": (trains_as_one, (m,)) for m in methods}
    laws |= {f"does {type(m).__name__}": (does_what_one_does, (str(tmp_path), m)) for m in methods}
    laws["checkpointed"] = checkpointed, ()
    laws["refused"] = what_cannot_be_right_is_refused, ()
    laws["transformers"] = transformers_plan, (str(tmp_path),)
    all_hold(laws, tmp_path)
