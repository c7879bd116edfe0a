"""Instructions in the form of Alpaca (Taori et al. 2023): reading, the prompt template, tokens with labels."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from delora.data.examples import DataError
from delora.errors import nearest_path

__all__ = ["FILE", "IGNORED", "Instruction", "encode", "read", "split", "template", "trained"]

# The archive that the published runs were trained on, from the GitHub repository tloen/alpaca-lora: 51,759 instructions.
FILE = "alpaca_data_cleaned_archive.json"
IGNORED = -100  # a label that the loss leaves out

_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)


@dataclass(frozen=True)
class Instruction:
    """An instruction, perhaps with an input, and the response to it.

    >>> Instruction("Name a primary colour.", "Red.").prompt.splitlines()[-1]
    '### Response:'
    """

    instruction: str
    output: str
    input: str = ""

    @property
    def prompt(self) -> str:
        """Alpaca's template. No newline after "Response:", as in the script that prepared the published runs' data."""
        return (_WITH_INPUT if self.input else _WITHOUT_INPUT).format(instruction=self.instruction, input=self.input)


def read(source: str) -> list[Instruction]:
    """The instructions of a ``.json`` (a list) or ``.jsonl`` file, of a folder with `FILE` in it, or of a Hub data set.

    Raises:
        DataError: there are none, or one lacks a key; the message says what to fetch.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = Path(folder, "mine.jsonl")
    ...     _ = file.write_text('{"instruction": "Name a primary colour.", "output": "Red."}')
    ...     read(str(file))
    [Instruction(instruction='Name a primary colour.', output='Red.', input='')]
    """
    path = Path(source)
    file = path / FILE if path.is_dir() else path
    rows = _rows(file) if file.is_file() else _hub(source)
    if not rows:
        raise DataError(f"{source} holds no instruction")
    return [_instruction(row, f"{source}, item {number}") for number, row in enumerate(rows, 1)]


def _rows(file: Path) -> list[Any]:
    try:
        text = file.read_text("utf-8")
        # Not splitlines(), which would cut at separators that JSON allows inside a string.
        rows = [json.loads(line) for line in text.split("\n") if line.strip()] if file.suffix == ".jsonl" else json.loads(text)
    except ValueError as error:
        raise DataError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(rows, list):
        raise DataError(f"{file}: expected a list of instructions, got a {type(rows).__name__}")
    return rows


def _hub(source: str) -> list[Any]:
    from datasets import load_dataset

    try:
        if source.count("/") != 1 or Path(source).suffix in (".json", ".jsonl") or Path(source).exists():
            raise OSError("it is not a name on the Hub")
        return list(load_dataset(source, split="train"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"there are no instructions at {source!r}{nearest_path(source)}: it is no file, no folder that holds {FILE}, and "
            f"the Hugging Face Hub did not provide it ({error}). Fetch {FILE} from the GitHub repository tloen/alpaca-lora and "
            "give its path as data.source"
        ) from error


def _instruction(row: Any, where: str) -> Instruction:
    texts = row if isinstance(row, dict) else {}
    values = {"input": texts.get("input") or ""} | {key: texts.get(key) for key in ("instruction", "output")}
    for key, value in values.items():
        if not isinstance(value, str):
            raise DataError(f"{where}: expected the texts instruction, output and, optionally, input; {key} is {value!r}")
    return Instruction(**values)


def split(instructions: Sequence[Instruction], seed: int = 42, test: int = 2000) -> tuple[list[Instruction], list[Instruction]]:
    """A training and a test part, divided as by torch's `random_split`; the published runs use seed 42 and test on 2,000.

    >>> train, test = split([Instruction("Count.", str(number)) for number in range(5)], test=2)
    >>> len(train), len(test)
    (3, 2)
    """
    train = len(instructions) - test
    if train < 1:
        raise DataError(f"there are {len(instructions):,} instructions: {test:,} for the test leave none to train on")
    order = torch.randperm(len(instructions), generator=torch.Generator().manual_seed(seed)).tolist()
    return [instructions[i] for i in order[:train]], [instructions[i] for i in order[train:]]


def encode(item: Instruction, tokenizer: Any, max_tokens: int = 256, response_only: bool = False) -> dict[str, list[int]]:
    """The token ids of prompt, response and end token, cut to ``max_tokens``; with a start token if the tokenizer adds one.

    Every token is a label, as in the published runs. With ``response_only`` the prompt's tokens are not.

    >>> class Letters:
    ...     eos_token_id = 0
    ...     def __call__(self, text):
    ...         return {"input_ids": [ord(letter) for letter in text]}
    >>> encode(Instruction("Say hi.", "hi"), Letters(), response_only=True)["labels"][-4:]
    [-100, 104, 105, 0]
    """
    ids = [*tokenizer(item.prompt + item.output)["input_ids"], tokenizer.eos_token_id][:max_tokens]
    hidden = min(len(tokenizer(item.prompt)["input_ids"]), len(ids)) if response_only else 0
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [IGNORED] * hidden + ids[hidden:]}


def trained(encoded: dict[str, list[int]]) -> int:
    """The number of tokens that the loss is on. The first one has none before it to be predicted from.

    >>> trained({"labels": [1, IGNORED, 3]})
    1
    """
    return sum(label != IGNORED for label in encoded["labels"][1:])


# One instruction and its response as `encode` makes them. More turns follow in the same form; a system's message takes the
# place of the sentence before them. An input is the user's message's own key ``input``.
_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' and loop.first %}{{ message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'user' %}"
    "{% if loop.first %}{{ WITH_INPUT if message['input'] else WITHOUT_INPUT }}"
    "{% elif loop.previtem['role'] != 'system' %}{{ '\\n\\n' }}{% endif %}"
    "{{ '### Instruction:\\n' + message['content'] }}"
    "{% if message['input'] %}{{ '\\n\\n### Input:\\n' + message['input'] }}{% endif %}"
    "{{ '\\n\\n### Response:' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('the template of Alpaca has no turn of ' + message['role'] + ' here') }}{% endif %}"
    "{% endfor %}"
)


def template(tokenizer: Any) -> str:
    """The chat template that renders an instruction and its response as `encode` does; with a start token if the tokenizer
    adds one.

    >>> class Letters:
    ...     bos_token_id = None
    >>> template(Letters()).startswith("{% for message in messages %}")
    True
    """
    starts = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    text = ("{{ bos_token }}" if starts else "") + _TEMPLATE
    for name, words in (("WITH_INPUT", _WITH_INPUT), ("WITHOUT_INPUT", _WITHOUT_INPUT)):
        text = text.replace(name, json.dumps(words.partition("### ")[0]))
    return text
