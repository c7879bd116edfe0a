"""The estimated memory of a step is what torch's allocator has given out at its peak."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import delora
from delora import DeLoRA
from delora.training import memory
from delora.training.config import ConfigError

ROWS, LENGTH = 8, 32


def encoder() -> nn.Module:
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "vocab_size": 50}
    model = BertForSequenceClassification(BertConfig(**shape, num_hidden_layers=3))
    return delora.inject(model, DeLoRA(r=4, reach=0.1), targets="all-linear", also_train=["classifier"])


def decoder(checkpointing: bool = False, layers: int = 1) -> nn.Module:
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "vocab_size": 4000}
    model = LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=layers, use_cache=False, tie_word_embeddings=True))
    if checkpointing:
        memory.checkpoint(model)
    return delora.inject(model, DeLoRA(r=4, reach=0.1), targets="all-linear")


def whole() -> nn.Module:
    model = BertForSequenceClassification(
        BertConfig(hidden_size=128, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)
    )
    return delora.inject(model, delora.METHODS["full"](), targets="all-linear")


def of_classes() -> dict[str, torch.Tensor]:
    return {**tokens(), "labels": torch.zeros(ROWS, dtype=torch.long)}


def of_tokens() -> dict[str, torch.Tensor]:
    return {**tokens(), "labels": torch.zeros(ROWS, LENGTH, dtype=torch.long)}


def tokens() -> dict[str, torch.Tensor]:
    mask = torch.ones(ROWS, LENGTH, dtype=torch.long)
    mask[0, LENGTH // 2 :] = 0
    return {"input_ids": torch.zeros(ROWS, LENGTH, dtype=torch.long), "attention_mask": mask}


def measured(make: Callable[[], nn.Module], batch: dict[str, Any], precision: str, accumulation: int) -> int:
    """The most bytes that the CPU's allocator had given out, from the model's making to the end of the second step."""
    gc.collect()  # what earlier tests left would be given back while this is measured
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as taken:
        model = make().train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        for _ in range(2):
            for _ in range(accumulation):
                with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                    loss = model(**batch)["loss"]
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    sizes = [(e.start_ns(), e.nbytes()) for e in taken.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for _, size in sorted(sizes, key=lambda each: each[0]):
        now += size
        most = max(most, now)
    return most


@pytest.mark.parametrize(
    ("make", "batch", "precision", "accumulation"),
    [
        (encoder, of_classes, "fp32", 1),
        (decoder, of_tokens, "fp32", 2),
        (decoder, of_tokens, "bf16", 1),
        (lambda: decoder(checkpointing=True, layers=3), of_tokens, "fp32", 1),
        (whole, of_classes, "fp32", 1),
    ],
    ids=["a classifier", "a large vocabulary", "autocast", "checkpointing", "trained whole"],
)
def test_the_estimate_is_what_a_real_step_takes(make, batch, precision, accumulation):
    with torch.device("meta"):
        found = memory.estimate(make(), batch(), precision, accumulation=accumulation)
    real = measured(make, batch(), precision, accumulation)
    print(found, found.peak / 1e9, real / 1e9, found.peak / real)
    assert found.peak == pytest.approx(real, rel=0.1)


def test_checkpointing_keeps_less_and_changes_no_gradient():
    """To rounding: what is computed again is computed from the same numbers."""
    models = []
    for again in (False, True):
        torch.manual_seed(0)
        models.append(decoder(again, layers=4).train())
        ids = torch.arange(ROWS * LENGTH).view(ROWS, LENGTH)
        models[-1](input_ids=ids, labels=ids)["loss"].backward()
    one, two = ({name: p.grad for name, p in model.named_parameters() if p.requires_grad} for model in models)
    assert set(one) == set(two)
    for name, grad in one.items():
        torch.testing.assert_close(two[name], grad)
    with torch.device("meta"):
        kept, again = (memory.estimate(decoder(checks, layers=4), of_tokens()).saved for checks in (False, True))
    logits = ROWS * LENGTH * 4000 * 4  # of which two are kept whatever the blocks do
    assert again - 2 * logits < (kept - 2 * logits) / 2


def test_a_model_that_cannot_checkpoint_says_so():
    with pytest.raises(ConfigError, match="train.checkpointing = true: a Sequential does not offer it"):
        memory.checkpoint(nn.Sequential(nn.Linear(2, 2)))


@pytest.mark.parametrize(
    ("found", "checkpointing", "words"),
    [
        (memory.Memory(peak=100, weights=60, trained=20, saved=15, operation=5), False, []),  # it fits to the byte
        (memory.Memory(peak=101, weights=60, trained=20, saved=16, operation=5), False, ["train.checkpointing=true, or lower"]),
        (memory.Memory(peak=101, weights=60, trained=20, saved=16, operation=5), True, ["a word: lower train.batch_size"]),
        (memory.Memory(peak=120, weights=80, trained=20, saved=15, operation=5), False, ["its weights alone do not fit"]),
    ],
)
def test_the_warning_begins_at_the_first_byte_that_is_too_much(found, checkpointing, words):
    _, *warned = memory.told(found, 100, "cpu", checkpointing)
    assert len(warned) == len(words)
    assert all(word in line for word, line in zip(words, warned, strict=True))
