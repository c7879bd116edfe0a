"""A tiny chat model over bytes, adapters of it in a folder, and a server of them on this machine."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import delora
from delora import DeLoRA, DoRA, LoRA
from delora.integrations.engine import Engine
from delora.integrations.serving import server
from tests.cases import shake

CHAT = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(BPE(vocab={letter: i for i, letter in enumerate([*letters, "<end>"])}, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>")
    fast.chat_template = CHAT
    return fast


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        eos_token_id=256,
    )
    made = LlamaForCausalLM(config).eval()
    made.lm_head.weight.data.mul_(20)  # so that the likeliest token is clear, whatever the batch
    return made


ADAPTERS = {
    "one": (DeLoRA(r=4), "all-linear"),
    "two": (LoRA(r=8), ["q_proj", "down_proj", "embed_tokens"]),
    "three": (DoRA(r=2), ["v_proj"]),
}


def shelf(folder: Path) -> Path:
    """A folder with an adapter in each of its folders, and one that is broken."""
    for name, (method, targets) in ADAPTERS.items():
        made = shake(delora.inject(model(), method, targets))
        delora.save(made, folder / name)
    (folder / "broken").mkdir()
    (folder / "broken" / "adapter.json").write_text("{")
    return folder


@contextmanager
def running(engine: Engine) -> Iterator[str]:
    """The address of a server, as long as the context lasts."""
    address: Future[str] = Future()
    runs = server(engine, "127.0.0.1", 0, address.set_result)
    thread = threading.Thread(target=runs.run)
    thread.start()
    try:
        yield address.result(30)
    finally:
        runs.should_exit = True
        thread.join()


def ask(address: str, path: str, body: Any = None, method: str | None = None) -> tuple[int, Any]:
    """The status and the JSON of an answer; a body of bytes is sent as it is."""
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    request = urllib.request.Request(address + path, data, {"Content-Type": "application/json"}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())
