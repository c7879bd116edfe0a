"""TRL's SFTTrainer on a plainly injected model: it trains, saves, resumes, and its fused head reads the adapted head."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import delora
from delora import DeLoRA
from tests import tiny
from tests.cases import shake

# TRL's own default is the old name of this option of transformers.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")

QUIET = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "logging_strategy": "no", "save_strategy": "no"}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    return tiny.make_language_model(tmp_path_factory.mktemp("llama"))


def base(source: str, dtype: torch.dtype = torch.float32):
    return AutoModelForCausalLM.from_pretrained(source, dtype=dtype)


def texts(n: int = 8) -> Dataset:
    return Dataset.from_dict({"text": [f"word{i} good fine word{i + 1} great lovely" for i in range(n)]})


def trainer(model, folder: Path, source: str, kind=SFTTrainer, lam_lr=None, **changes) -> SFTTrainer:
    rates = {} if lam_lr is None else {"lam_lr": lam_lr}
    values = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2, **QUIET} | changes
    tokenizer = AutoTokenizer.from_pretrained(source)
    return kind(model, SFTConfig(str(folder), **values), train_dataset=texts(), processing_class=tokenizer, **rates)


def words() -> dict[str, torch.Tensor]:
    x = torch.randint(3, 30, (2, 7))
    return {"input_ids": x, "labels": x}


@pytest.mark.slow
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "autocast"])
def test_sft_trains_the_adapter_alone_and_it_saves_and_loads(source, tmp_path, bf16):
    """With TRL's defaults, gradient checkpointing among them."""
    model = delora.inject(base(source), DeLoRA(r=2), "all-linear")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    made = trainer(model, tmp_path, source, bf16=bf16)
    made.train()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    delora.save(model, tmp_path / "adapter")
    x, again = words(), delora.load(base(source), tmp_path / "adapter").eval()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):  # in which the Trainer leaves the forward of its model
        torch.testing.assert_close(again(**x).loss, model.eval()(**x).loss)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*a model with adapters is written")
def test_a_stopped_sft_goes_on_to_the_same_numbers(source, tmp_path):
    def run(folder: Path, steps: int, resume: str | None = None):
        torch.manual_seed(0)
        model = delora.inject(base(source), DeLoRA(r=2), ["q_proj", "v_proj"], dropout=0.1)
        made = trainer(
            model, folder, source, max_steps=steps, save_strategy="steps", save_steps=2, lr_scheduler_type="constant"
        )
        made.train(resume_from_checkpoint=resume)
        return [p.detach().clone() for p in model.parameters()]

    whole = run(tmp_path / "whole", 4)
    run(tmp_path / "half", 2)
    again = run(tmp_path / "half", 4, str(tmp_path / "half" / "checkpoint-2"))
    assert all(torch.equal(a, b) for a, b in zip(again, whole, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["target", "whole"])
def test_the_fused_head_is_the_adapted_one(source, tmp_path, how):
    """TRL computes the loss from the weight of the head, without calling the head."""
    heads = {"targets": ["q_proj", "lm_head"]} if how == "target" else {"targets": ["q_proj"], "also_train": ["lm_head"]}
    model = delora.inject(base(source), DeLoRA(r=2), **heads)
    shake(model, 0.1)
    x = words()
    plain = model(**x).loss
    plain.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    made = trainer(model, tmp_path, source, gradient_checkpointing=False)
    fused = model(**x, fused_lm_head=True)
    torch.testing.assert_close(fused.loss, plain)
    fused.loss.backward()
    for name, gradient in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient)
    assert made.model is model
