"""Alpaca's template, the labels, and data that are not what they should be."""

from __future__ import annotations

import json

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from torch.utils.data import random_split
from transformers import PreTrainedTokenizerFast

from delora.data import alpaca
from delora.data.alpaca import IGNORED, Instruction
from delora.data.examples import DataError

ITEM = Instruction("Add.", " three", "1 2")
WITH_INPUT = """\
Below is an instruction that describes a task, paired with an input that provides further context. \
Write a response that appropriately completes the request.

### Instruction:
Add.

### Input:
1 2

### Response:"""
WITHOUT_INPUT = """\
Below is an instruction that describes a task. Write a response that appropriately completes the request.

### Instruction:
Add.

### Response:"""


@pytest.fixture(scope="module")
def tokenizer():
    """One token for each word; ``<s>`` before every text, as LLaMA's tokenizer puts it."""
    words = dict.fromkeys(["<s>", "</s>", *WITH_INPUT.split(), "three"])
    tokens = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<s>"))
    tokens.pre_tokenizer = WhitespaceSplit()
    tokens.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokens, bos_token="<s>", eos_token="</s>")


def test_the_template_with_and_without_an_input():
    assert ITEM.prompt == WITH_INPUT
    assert Instruction("Add.", "3").prompt == WITHOUT_INPUT
    braces = Instruction("Explain {input}.", "x", "{instruction}")  # a text that looks like a field stays as it is
    assert "\nExplain {input}.\n" in braces.prompt
    assert "\n{instruction}\n" in braces.prompt


def test_tokens_and_labels(tokenizer):
    words = ["<s>", *WITH_INPUT.split(), "three", "</s>"]
    whole = alpaca.encode(ITEM, tokenizer)
    assert tokenizer.convert_ids_to_tokens(whole["input_ids"]) == words
    assert whole["labels"] == whole["input_ids"]
    assert whole["attention_mask"] == [1] * len(words)
    response = alpaca.encode(ITEM, tokenizer, response_only=True)
    assert response["labels"] == [IGNORED] * (len(words) - 2) + whole["input_ids"][-2:]
    for response_only in (False, True):
        cut = alpaca.encode(ITEM, tokenizer, max_tokens=5, response_only=response_only)
        assert cut["input_ids"] == whole["input_ids"][:5]
        assert cut["labels"] == ([IGNORED] * 5 if response_only else whole["input_ids"][:5])


def test_a_file_its_lines_and_its_folder_hold_the_same(tmp_path):
    rows = [{"instruction": "a", "input": "", "output": "b\u2028c"}, {"instruction": "d", "output": "e"}]
    (tmp_path / alpaca.FILE).write_text(json.dumps(rows))
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), "utf-8")
    expected = [Instruction("a", "b\u2028c"), Instruction("d", "e")]
    for source in (tmp_path, tmp_path / alpaca.FILE, tmp_path / "rows.jsonl"):
        assert alpaca.read(str(source)) == expected


def test_the_parts_are_those_of_torchs_random_split():
    items = [Instruction(str(i), "") for i in range(50)]
    train, test = alpaca.split(items, test=20)
    assert (len(train), len(test)) == (30, 20)
    assert [train, test] == [list(part) for part in random_split(items, [30, 20], torch.Generator().manual_seed(42))]
    assert {*train, *test} == {*items}
    assert alpaca.split(items, seed=1, test=20) != (train, test)
    with pytest.raises(DataError, match="leave none"):
        alpaca.split(items, test=50)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"instruction": "a", "output": "b"}, {"instruction": "a"}]', "item 2: expected .*; output is None"),
        ('[{"instruction": 3, "output": "b"}]', "item 1: expected .*; instruction is 3"),
        ('["a"]', "item 1: expected"),
        ("[]", "holds no instruction"),
        ("", "not valid JSON"),
        ('{"instruction": "a"}', "expected a list of instructions, got a dict"),
    ],
)
def test_bad_data_are_refused_in_words(tmp_path, text, message):
    (tmp_path / "data.json").write_text(text)
    with pytest.raises(DataError, match=message):
        alpaca.read(str(tmp_path / "data.json"))


@pytest.mark.parametrize("source", ["nowhere.json", "no/such/folder", "an/unknown.jsonl"])
def test_what_is_not_there_says_what_to_fetch(source):
    with pytest.raises(DataError, match=f"(?s){source}.*Fetch {alpaca.FILE} .*tloen/alpaca-lora.*data.source"):
        alpaca.read(source)
