"""A reference is what the model was, shares its base's memory, and stays so whatever happens to the model."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer

import delora
from delora import DeLoRA, DoRA, LoRA
from delora.integrations import AdapterCheckpoints
from tests import tiny
from tests.cases import Net, ids, shake
from tests.field.test_trl import QUIET, base

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")  # TRL's use of transformers


class Normed(Net):
    def __init__(self) -> None:
        super().__init__()
        self.classifier.append(nn.BatchNorm1d(3))


def storages(*models: nn.Module) -> int:
    """The bytes of all parameters and buffers, each memory once."""
    tensors = [t for model in models for t in (*model.parameters(), *model.buffers())]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize("method", [DeLoRA(r=2), DoRA(r=2)], ids=["DeLoRA", "DoRA"])
@pytest.mark.parametrize("what", ["new", "continued", "disabled", "no adapter", "by hand"])
def test_it_stays_what_the_model_was_with_one_base_in_memory(method, what):
    model, x = Normed().eval(), ids()
    if what == "no adapter":
        model.requires_grad_(False)
    else:
        delora.inject(model, method, ["q", "v"], dropout=0.5, name="other")
        delora.inject(model, method, ["q", "v"], dropout=0.5, also_train=["classifier"])
    if what == "continued":
        shake(model)
    if what == "by hand":
        model.emb.requires_grad_(True)
    alone, before = storages(model), model(x)
    if what == "disabled":
        with delora.disabled(model):
            before, ref = model(x), delora.reference(model)
    else:
        ref = delora.reference(model)
    assert torch.equal(ref(x), before)
    assert not ref.training
    assert not any(p.requires_grad for p in ref.parameters())
    frozen = {id(p) for p in model.parameters() if not p.requires_grad}
    copied = [p for p in ref.parameters() if id(p) not in frozen]
    extra = sum(t.nbytes for t in (*copied, *ref.buffers()))
    assert storages(model, ref) <= alone + extra
    assert ("q.weight" if what == "no adapter" else "q.base.weight") in {
        n for n, p in ref.named_parameters() if id(p) in frozen
    }

    model.train()
    if what != "no adapter":
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
        model(x).square().sum().backward()
        optimizer.step()
        assert not torch.allclose(model.eval()(x), before)
        assert torch.equal(ref(x), before)
        delora.activate(model, "other")
        delora.strength(model, 0.5)
        assert torch.equal(ref(x), before)
        delora.merge(model)
        assert torch.equal(ref(x), before)
    twin = copy.deepcopy(ref)
    assert torch.equal(twin(x), before)


def test_it_is_refused_where_it_would_be_wrong():
    model = delora.inject(Net(), DeLoRA(r=2), ["q"])
    with delora.merged(model), pytest.raises(ValueError, match=r"reference inside delora\.merged"):
        delora.reference(model)


# ---------------------------------------------------------------- TRL


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    return tiny.make_language_model(tmp_path_factory.mktemp("llama"))


def pairs() -> Dataset:
    rows = [{"prompt": f"user word{i}", "chosen": " good fine", "rejected": " bad poor"} for i in range(4)]
    return Dataset.from_list(rows)


class Preferred(AdapterCheckpoints, DPOTrainer):
    """Takes the model's own reference, as no other is given."""


OPTIONS = (
    {"max_steps": 2, "per_device_train_batch_size": 4, "bf16": False}
    | QUIET
    | {"logging_strategy": "steps", "logging_steps": 1}
)


def policy(source: str, kind: str) -> nn.Module:
    model = base(source)
    if kind != "new":  # another adapter before: trained on, or merged
        shake(delora.inject(model, LoRA(r=2), ["q_proj", "v_proj"], dropout=0.3), 0.2)
    if kind == "merged":
        delora.merge(model)
    if kind != "continued":
        delora.inject(model, DeLoRA(r=2), ["q_proj", "v_proj"], dropout=0.3)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["new", "continued", "merged"])
@pytest.mark.parametrize("how", ["given", "by itself"])
def test_the_first_loss_of_dpo_is_ln_2(source, tmp_path, kind, how):
    model, tokenizer = policy(source, kind), AutoTokenizer.from_pretrained(source)
    arguments = DPOConfig(str(tmp_path), learning_rate=1e-2, **OPTIONS)
    given = {"ref_model": delora.reference(model)} if how == "given" else {}
    made = (DPOTrainer if given else Preferred)(
        model, args=arguments, train_dataset=pairs(), processing_class=tokenizer, **given
    )
    weights = {t.untyped_storage().data_ptr() for t in made.model.parameters() if not t.requires_grad}
    assert weights <= {t.untyped_storage().data_ptr() for t in made.ref_model.parameters()}
    made.train()
    losses = [row["loss"] for row in made.state.log_history if "loss" in row]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-7)
    assert losses[1] < losses[0]


@pytest.mark.slow
def test_kto_and_grpo(source, tmp_path):
    class Judged(AdapterCheckpoints, KTOTrainer):
        pass

    class Rewarded(AdapterCheckpoints, GRPOTrainer):
        pass

    tokenizer = AutoTokenizer.from_pretrained(source)
    rows = [{"prompt": f"user word{i}", "completion": " good fine", "label": bool(i % 2)} for i in range(4)]
    model = policy(source, "continued")
    made = Judged(
        model,
        args=KTOConfig(str(tmp_path / "kto"), **OPTIONS),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    made.train()
    assert next(row["kl"] for row in made.state.log_history if "kl" in row) == pytest.approx(0, abs=1e-6)

    model = policy(source, "continued")
    arguments = GRPOConfig(
        str(tmp_path / "grpo"),
        beta=0.1,
        disable_dropout=True,
        num_generations=2,
        max_completion_length=4,
        learning_rate=1e-2,
        **OPTIONS,
    )
    made = Rewarded(
        model,
        args=arguments,
        reward_funcs=lambda completions, **_: [float(len(c)) for c in completions],
        train_dataset=pairs().select_columns("prompt"),
        processing_class=tokenizer,
    )
    weights = {t.untyped_storage().data_ptr() for t in made.model.parameters() if not t.requires_grad}
    assert weights <= {t.untyped_storage().data_ptr() for t in made.ref_model.parameters()}
    made.train()
    assert next(row["kl"] for row in made.state.log_history if "kl" in row) == pytest.approx(0, abs=1e-6)
