"""The harness's scores are those of log-likelihoods computed by hand."""

from __future__ import annotations

import json

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from delora.data.sentences import Question
from delora.evaluation.harness import as_task, score

WORDS = ["<pad>", "</s>", "is", "a", "stone", "water", "fire", "hot", "cold", "very", "extremely", "long"]
ITEMS = [
    {"question": "fire is", "choices": ["hot", "extremely cold"], "answer": 0},
    {"question": "a stone is", "choices": ["very very hot", "cold"], "answer": 1},
    {"question": "water is a", "choices": ["long fire", "stone"], "answer": 0},
]


@pytest.fixture
def loaded():
    """A small random model, and its tokenizer of whole words."""
    pytest.importorskip("lm_eval")
    torch.manual_seed(1)
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), initializer_range=0.5, **shape)).eval()
    tokens = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    tokens.pre_tokenizer = WhitespaceSplit()
    return model, PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="<pad>", eos_token="</s>")


def likelihood(model, tokenizer, question: str, choice: str) -> float:
    before, after = tokenizer(question)["input_ids"], tokenizer(choice)["input_ids"]
    with torch.no_grad():
        logs = model(torch.tensor([before + after])).logits[0].log_softmax(-1)
    return sum(logs[len(before) - 1 + i, token].item() for i, token in enumerate(after))


def test_scores_equal_likelihoods_computed_by_hand(loaded, tmp_path):
    file = tmp_path / "items.jsonl"
    file.write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    task = {
        "task": "made",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}, "cache_dir": str(tmp_path)},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }

    by_hand = {}
    for metric, size in (("acc", lambda _: 1), ("acc_norm", len)):
        scores = [[likelihood(*loaded, item["question"], c) / size(c) for c in item["choices"]] for item in ITEMS]
        by_hand[metric] = sum(s.index(max(s)) == item["answer"] for s, item in zip(scores, ITEMS, strict=True)) / 3
    seen = score(*loaded, [task], batch_size=2)["made"]
    assert by_hand["acc"] != by_hand["acc_norm"], "the test has nothing to tell: choose another seed"
    assert {key: seen[key] for key in by_hand} == pytest.approx(by_hand)


def test_own_questions_have_the_log_probability_of_the_right_answer(loaded, tmp_path):
    """Among the answers to choose from, and of the answer that is right."""
    questions = [Question(i["question"], output=i["choices"][i["answer"]], choices=tuple(i["choices"])) for i in ITEMS]
    by_hand = []
    for question in questions:
        logs = torch.tensor([likelihood(*loaded, question.prompt, c) for c in question.choices], dtype=torch.float64)
        by_hand.append(logs.log_softmax(0)[question.choices.index(question.output)].item())
    seen = score(*loaded, [as_task("mine", questions, tmp_path)], batch_size=2)["mine"]
    assert 0 < seen["acc"] < 1, "the test has nothing to tell: choose another seed"
    assert seen["likelihood"] == pytest.approx(sum(by_hand) / len(by_hand))
