"""DeepSpeed's ZeRO-2 and ZeRO-3: two processes do what one process does.

DeepSpeed is installed in a folder of its own (``make .venv/deepspeed``), because transformers, accelerate and Lightning would
import it wherever they find it.
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from safetensors.torch import load_file
from torch import Tensor, nn

import delora
from delora import OFT, BitFit, DeLoRA, DoRA, LoRA
from delora.diagnostics import Recorder, inspect
from delora.sharded import numbers
from delora.zero import is_divided
from tests.field.test_sharded import (
    METHODS,
    Net,
    adapt,
    adapt_attention,
    ids,
    mean,
    net,
    own,
    same,
    trained,
    with_attention,
)
from tests.processes import all_hold

FOLDER = Path(sys.prefix) / "deepspeed"
CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_clipping": 0.0,  # 1.0, if nothing is said
    "zero_allow_untested_optimizer": True,
}
# Stage, whether the model is made within zero.Init, and whether everything is empty between uses.
WAYS = {"2": (2, False, 0), "3": (3, False, 0), "3 kept": (3, False, 1000), "3 init": (3, True, 0)}


def deepspeed() -> Any:
    if str(FOLDER) not in sys.path and FOLDER.is_dir():
        sys.path.append(str(FOLDER))
    import deepspeed

    # Its shared memory between the processes of one machine would have to be compiled.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not deepspeed.comm.is_initialized():
        rank = str(torch.distributed.get_rank())
        os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_SIZE": "2"}  # as torchrun does
        deepspeed.init_distributed("gloo", verbose=False)
    return deepspeed


def config(way: str, **more: Any) -> dict[str, Any]:
    stage, _, threshold = WAYS[way]
    return CONFIG | {"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": threshold}} | more


def plain(way: str, **more: Any) -> nn.Module:
    """The model before anything is done to it, divided already if it is made within zero.Init."""
    if not WAYS[way][1]:
        return net()
    torch.manual_seed(0)
    with deepspeed().zero.Init(config_dict_or_path=config(way, **more)):
        return Net()


def engine(model: nn.Module, way: str, **more: Any) -> Any:
    optimizer = torch.optim.SGD(delora.param_groups(model, lr=0.03), momentum=0.9)
    return deepspeed().initialize(model=model, optimizer=optimizer, config=config(way, **more))[0]


def run(engine: Any, x: Tensor, steps: int = 20) -> list[Tensor]:
    losses = []
    for _ in range(steps):
        loss = (engine(x) - 1).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.detach())
    return losses


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: numbers(p) for name, p in (*model.named_parameters(), *model.named_buffers())}


# ---------------------------------------------------------------- laws, each run by two processes


def trains_as_one(rank: int, method: object, way: str) -> None:
    one, two = adapt(net(), method), adapt(plain(way), method)
    losses = run(engine(two, way), own(rank, ids()))
    torch.testing.assert_close(mean(losses), torch.stack(trained(one, ids())), rtol=1e-5, atol=1e-6)
    after = tensors(two)
    for name, t in tensors(one).items():
        torch.testing.assert_close(after[name], t, rtol=1e-4, atol=1e-6)


def does_what_one_does(rank: int, folder: str, method: object, way: str) -> None:
    """Files, merging, measuring of a model in DeepSpeed's hands: as of the whole in one process."""
    two = adapt(plain(way), method)
    runs = engine(two, way)
    run(runs, own(rank, ids()), steps=3)
    x = ids()
    with torch.no_grad():
        y = runs(x)
    place = Path(folder) / f"{type(method).__name__}-{way}-{rank}"
    saved = delora.save(runs, place if way == "2" else place.with_name(place.name[:-1]))
    one = delora.load(net(), saved)  # written on two, read on one
    torch.testing.assert_close(one(x), y)
    assert delora.distances(one) == delora.distances(two)
    assert inspect(one) == inspect(two)
    assert Recorder(one).record() == Recorder(two).record()
    assert str(delora.summary(one)) == str(delora.summary(two))
    if not isinstance(method, (DoRA, OFT)):
        delora.export.peft(one, place / "peft-one")
        delora.export.peft(two, saved / "peft")
        same(load_file(place / "peft-one/adapter_model.safetensors"), load_file(saved / "peft/adapter_model.safetensors"))
    with delora.disabled(two), torch.no_grad():
        torch.testing.assert_close(runs(x), net()(x))
    with torch.no_grad():
        for model in (one, two):
            delora.strength(model, 0.5)
        torch.testing.assert_close(runs(x), one(x))
        before = tensors(two)
        with delora.merged(one), delora.merged(two):
            same(tensors(one), tensors(two))
            torch.testing.assert_close(runs(x), one(x))
        same(tensors(two), before)
        torch.testing.assert_close(runs(x), one(x))
        for model in (one, two):
            delora.strength(model, 1.0)
    other = adapt(net(), method)
    trained(other, ids(), 2)
    changed = delora.save(other, place)
    delora.load(one, changed)
    delora.load(two, changed)
    for model in (two, delora.load(plain(way), changed)):  # over an adapter, and anew
        still = runs if model is two else engine(model, way)
        for group in still.optimizer.param_groups:
            group["lr"] = 0.0
        run(still, own(rank, ids()), steps=1)  # ZeRO writes the parameters anew from its own copy
        same(tensors(model), tensors(one))
    delora.load(two, saved)
    one = delora.load(net(), saved)
    same(tensors(delora.merge(one)), tensors(delora.merge(two)))
    with torch.no_grad():
        torch.testing.assert_close(runs(x), one(x))
    if WAYS[way][0] == 3:
        assert all(is_divided(p) for p in two.parameters())


def in_bfloat16(rank: int, folder: str, way: str) -> None:
    """DeepSpeed computes with rounded numbers and keeps the full ones: those are what is saved, measured and merged."""
    more = {"bf16": {"enabled": True}}
    for method in (DeLoRA(r=2), DeLoRA(r=2, start="copy")):
        two, one = plain(way, **more).to(torch.bfloat16), net(torch.bfloat16)
        one.load_state_dict({name: numbers(p) for name, p in two.named_parameters()})  # in zero.Init, others are drawn
        two = adapt(two, method)
        with torch.no_grad(), delora.disabled(two):
            runs = engine(two, way, **more)
            base = runs(ids())
        with torch.no_grad():
            assert torch.equal(runs(ids()), base)
        losses = mean([loss.float() for loss in run(runs, own(rank, ids()))])
        assert losses[-1] < 0.5 * losses[0]
        rounded = torch.float32 if way == "3 init" else torch.bfloat16
        assert all(p.dtype == rounded for p in two.parameters() if p.requires_grad)
        saved = delora.save(runs, f"{folder}/bf16-{way}-{method.start}")
        delora.load(one, saved)
        stored = load_file(next(saved.glob("*.safetensors")))
        assert any((t != t.bfloat16()).any() for t in stored.values())
        torch.testing.assert_close(runs(ids()), one(ids()), rtol=0.05, atol=0.05)
        assert delora.distances(one) == delora.distances(two)
        same(tensors(delora.merge(one)), tensors(delora.merge(two)))


def made_inside_zero_init(rank: int, folder: str) -> None:
    """inject and load within zero.Init: what they make is float32 and whole, and the same on all processes."""
    one = adapt(net(), DeLoRA(r=2))
    saved = delora.save(one, f"{folder}/inside-{rank}")
    torch.manual_seed(0)
    with deepspeed().zero.Init(config_dict_or_path=config("3 init", bf16={"enabled": True})):
        model = Net()
        torch.manual_seed(rank)  # the first process's draw counts
        delora.inject(model, DeLoRA(r=2), ["q"])
        loaded = delora.load(Net(), saved, allow_other_base=True)
        made = nn.Linear(2, 2)
    for each in (model, loaded):
        assert all(p.dtype == torch.float32 and p.numel() and not is_divided(p) for p in each.parameters() if p.requires_grad)
    assert is_divided(made.weight)
    assert is_divided(model.head.weight)
    for t in (*model.blocks[0].q.adapter.tensors().values(), model.blocks[0].q.adapter.A):
        first = t.detach().clone()
        torch.distributed.broadcast(first, 0)
        assert torch.equal(first, t)


def what_cannot_be_right_is_refused(rank: int, folder: str, way: str) -> None:
    model = plain(way)
    if way == "3 init":
        torch.manual_seed(rank)
    two = delora.inject(model, DeLoRA(r=2), ["q"])
    runs = engine(two, way)
    for each in (runs, two):
        for call in (
            lambda m: delora.inject(m, LoRA(r=2), ["v"], name="other"),
            lambda m: delora.activate(m, "default"),
            lambda m: delora.blend(m, {"default": 1.0}, "other"),
        ):
            with pytest.raises(ValueError, match="deepspeed.initialize"):
                call(each)
    saved = delora.save(two, f"{folder}/refused-{way}-{rank if way == '2' else ''}")
    with pytest.raises(ValueError, match="deepspeed.initialize"):
        delora.load(two, saved, name="other")
    delora.eject(two)
    with pytest.raises(ValueError, match="deepspeed.initialize"):
        delora.inject(runs, LoRA(r=2), ["v"])


def draws_that_differ_are_refused(rank: int, way: str) -> None:
    model = net()
    torch.manual_seed(rank)
    runs = engine(delora.inject(model, DeLoRA(r=2), ["q"]), way)
    with pytest.raises(ValueError, match=f"process {1 - rank} drew other adapters than process {rank}"):
        runs(ids())


def biases(rank: int) -> None:
    """A bias that changes; a layer that has none cannot be given one."""

    def model() -> Net:
        made = net()
        made.blocks[1].v = nn.Linear(8, 8, bias=False)
        return delora.inject(made, BitFit(), ["q"])  # type: ignore[return-value]

    one, two = model(), model()
    run(engine(two, "3"), own(rank, ids()), 3)
    trained(one, ids(), 3)
    for (name, a), b in zip(tensors(delora.merge(one)).items(), tensors(delora.merge(two)).values(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def checkpointed_and_accumulated(rank: int) -> None:
    one, two = adapt(net(), DeLoRA(r=2)), adapt(net(), DeLoRA(r=2))
    for model in (one, two):
        for block in model.blocks:
            block.forward = (lambda run: lambda x: torch.utils.checkpoint.checkpoint(run, x, use_reentrant=False))(
                block.forward
            )
    runs = engine(two, "3", gradient_accumulation_steps=2)
    run(runs, own(rank, ids()), 6)
    trained(one, ids(), 3)
    after = tensors(two)
    for name, t in tensors(one).items():
        torch.testing.assert_close(after[name], t, rtol=1e-4, atol=1e-6)


def shared_weights_are_not_torn(rank: int) -> None:
    model = net()
    model.head = nn.Linear(8, 20, bias=False)
    model.head.weight = model.emb.weight
    engine(delora.inject(model, LoRA(r=2), ["emb"]), "3")
    before = tensors(model)
    with pytest.raises(ValueError, match=r"cannot merge 'emb': .* share.* 'head'"):
        delora.merge(model)
    same(tensors(model), before)


def matrices_that_parents_use(rank: int, folder: str) -> None:
    """An attention's packed projection, and one whose weight it reads instead of calling it."""

    one, two = adapt_attention(with_attention()), adapt_attention(with_attention())
    runs = engine(two, "3")
    losses = mean(run(runs, own(rank, ids()), 5))
    torch.testing.assert_close(losses, torch.stack(trained(one, ids(), 5)), rtol=1e-5, atol=1e-6)
    one = delora.load(with_attention(), delora.save(two, f"{folder}/packed"))
    assert delora.distances(one) == delora.distances(two)
    with torch.no_grad():
        torch.testing.assert_close(one(ids()), runs(ids()))
        with delora.merged(two):
            torch.testing.assert_close(one(ids()), runs(ids()))
    same(tensors(delora.merge(one)), tensors(delora.merge(two)))


def transformers_trainer(rank: int, folder: str) -> None:
    """The Trainer with a configuration of DeepSpeed, which from_pretrained reads, too: it divides the model as it is loaded."""
    deepspeed()
    from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

    if rank == 0:
        torch.manual_seed(0)
        sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=20)
        off = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        BertForSequenceClassification(BertConfig(**sizes, **off)).save_pretrained(f"{folder}/base")
    torch.distributed.barrier()

    def adapted() -> nn.Module:
        model = BertForSequenceClassification.from_pretrained(f"{folder}/base")
        torch.manual_seed(1)
        return delora.inject(model, DeLoRA(r=2), ["query", "value"], also_train=["classifier"])

    one, labels = adapted(), torch.tensor([0, 1, 1, 0])
    optimizer = torch.optim.SGD(delora.param_groups(one, lr=0.3))
    for _ in range(4):
        one(ids(), labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    options = dict(optim="sgd", lr_scheduler_type="constant", learning_rate=0.3, max_grad_norm=0.0, max_steps=4)
    options |= dict(use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no", average_tokens_across_devices=False)
    auto = dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_clipping"), "auto")
    divided = CONFIG | auto | {"zero_optimization": {"stage": 3}}
    arguments = TrainingArguments(f"{folder}/run", per_device_train_batch_size=2, deepspeed=divided, **options)
    two = adapted()
    assert is_divided(two.bert.encoder.layer[0].attention.self.query.base.weight)
    rows = [{"input_ids": ids()[i], "labels": labels[i]} for i in range(4)]  # all of them in each step
    Trainer(two, arguments, train_dataset=rows).train()
    after = tensors(two)
    for name, t in tensors(one).items():
        torch.testing.assert_close(after[name], t, rtol=1e-4, atol=1e-6)
    assert delora.distances(delora.load(one, delora.save(two, f"{folder}/trained"))) == delora.distances(two)


CASES = [("DeLoRA", way) for way in WAYS] + [("DoRA", "3"), ("EtherPlus", "3 init"), ("OFT", "3")]


@pytest.mark.slow
@pytest.mark.skipif(
    not FOLDER.is_dir() and find_spec("deepspeed") is None, reason="DeepSpeed is not installed: make .venv/deepspeed"
)
def test_zero_does_what_one_process_does(tmp_path):
    laws = {f"trains {m} {w}": (trains_as_one, (METHODS[m], w)) for m, w in CASES}
    laws |= {f"does {m} {w}": (does_what_one_does, (str(tmp_path), METHODS[m], w)) for m, w in CASES}
    folder = str(tmp_path)
    laws |= {f"in_bfloat16 {w}": (in_bfloat16, (folder, w)) for w in ("2", "3", "3 init")}
    laws |= {f"refused {w}": (what_cannot_be_right_is_refused, (folder, w)) for w in ("2", "3", "3 init")}
    laws |= {f"draws {w}": (draws_that_differ_are_refused, (w,)) for w in ("2", "3")}
    for law in (biases, checkpointed_and_accumulated, shared_weights_are_not_torn):
        laws[law.__name__] = law, ()
    for law in (made_inside_zero_init, matrices_that_parents_use, transformers_trainer):
        laws[law.__name__] = law, (folder,)
    all_hold(laws, tmp_path)
