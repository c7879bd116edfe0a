"""A small random encoder, a small made-up data set, and a recipe over both: what the engine's tests run on."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace, WhitespaceSplit
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

GOOD, BAD = ["good", "fine", "great", "lovely"], ["bad", "poor", "awful", "dull"]
OTHER = [f"word{i}" for i in range(20)]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def make_model(folder: Path) -> str:
    torch.manual_seed(0)
    words = [*SPECIAL, *GOOD, *BAD, *OTHER]
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token"), SPECIAL, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=32, **names).save_pretrained(folder)
    return str(folder)


def make_sentences(folder: Path, n: int = 400) -> str:
    """``n`` different sentences in the data set's own format: tabs, CRLF, a mean rating."""
    draw, lines = random.Random(0), {}
    while len(lines) < n:
        good = draw.random() < 0.5
        words = draw.choices(OTHER, k=6) + draw.choices(GOOD if good else BAD, k=3)
        draw.shuffle(words)
        lines[" ".join(words)] = draw.uniform(1, 4) * (1 if good else -1)
    text = "".join(f"{i}\t{rating:.3f}\t{sentence}\r\n" for i, (sentence, rating) in enumerate(lines.items()))
    folder.mkdir(exist_ok=True)
    (folder / "movieReviewSnippets_GroundTruth.txt").write_bytes(text.encode())
    return str(folder)


def recipe(model: str, source: str, out: Path, **changes: Any) -> dict[str, Any]:
    """Dotted keys of ``changes`` are written with ``__``: ``train__epochs=2``."""
    data: dict[str, Any] = {
        "task": "sentiment",
        "name": "tiny",
        "out": str(out),
        "model": model,
        "data": {"source": source, "train": 96, "validation": 64, "test": 64, "max_tokens": 16},
        "adapter": {"method": "delora", "r": 4, "lam": 4.0, "targets": ["query", "value"], "also_train": ["classifier"]},
        "train": {"epochs": 2, "batch_size": 16, "lr": 1e-2},
    }
    for key, value in changes.items():
        *outer, last = key.split("__")
        table = data
        for part in outer:
            table = table[part]
        table[last] = value
    return data


def write(data: dict[str, Any], file: Path) -> Path:
    file.write_text(json.dumps(data))
    return file


def make_language_model(folder: Path) -> str:
    """A small random Llama and its tokenizer, which knows the words of the made-up sentences."""
    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[EOS]", "user", "assistant", *GOOD, *BAD, *OTHER]
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(words), max_position_embeddings=64, **shape, **tokens)).save_pretrained(folder)
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "[EOS]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **names).save_pretrained(folder)
    return str(folder)
