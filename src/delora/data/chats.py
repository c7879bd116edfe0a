"""Chats, completions and texts as token ids with labels, rendered by the tokenizer's own chat template.

The loss is on the assistant's turns alone, each with the token that ends it, or on all of a plain text. Where the template
marks the turns (``{% generation %}``), transformers tells where they are. Elsewhere a turn is what a rendering has more than
that of the messages before it, with the prompt for an answer:

    turn_i = render(m_1 ... m_i) - render(m_1 ... m_{i-1}, add_generation_prompt=True)

which needs each rendering to begin with the one before it. A template of which that is not true is refused.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers.utils.chat_template_utils import render_jinja_template

from delora.data.alpaca import IGNORED
from delora.data.examples import DataError

__all__ = ["Encoded", "Message", "Turns", "add", "encode", "end_of_turn", "messages_of", "render", "tokens", "turns"]

Message = dict[str, Any]  # role, content, and perhaps tool_calls
Span = tuple[int, int]
MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Turns:
    """A rendered conversation, and where in its text the assistant's turns are that are trained.

    >>> Turns("<user>Hi<bot>Hello", [(13, 18)]).answers()
    ['Hello']
    """

    text: str
    spans: list[Span]

    def answers(self) -> list[str]:
        """The texts that the assistant wrote."""
        return [self.text[start:end] for start, end in self.spans]


@dataclass
class Encoded:
    """Rows as tensors ``input_ids`` and ``labels``, and what is to be told of them.

    ``cut``: longer than max_tokens; ``untrained``: of these and others, left out because no token of theirs is trained;
    ``joined``: rows in which the first token of an answer also holds the end of the prompt, so that it is not trained;
    ``endless``: rows in which no trained turn ends with a token that says so.

    >>> Encoded([{"labels": torch.tensor([IGNORED, 5, 6])}]).trained
    2
    """

    rows: list[dict[str, Tensor]] = field(default_factory=list)
    cut: int = 0
    untrained: int = 0
    joined: int = 0
    endless: int = 0

    @property
    def trained(self) -> int:
        """The number of tokens that the loss is on."""
        return sum(int(row["labels"].ne(IGNORED).sum()) for row in self.rows)

    @property
    def length(self) -> int:
        """The number of tokens."""
        return sum(len(row["labels"]) for row in self.rows)


def encode(rows: Sequence[Mapping[str, Any]], tokenizer: Any, max_tokens: int, where: str = "data") -> Encoded:
    """Rows as tokens with labels. ``where`` begins the messages of errors.

    A row is a chat (``messages``, with ``tools`` if there are any), a ``prompt`` with its ``completion``, or a ``text``. Chats
    and completions of more than ``max_tokens`` tokens are cut at their end; a text is divided, and none of it is lost.

    Raises:
        DataError: the template refuses a row, or does not say where its turns are; names the row.

    >>> class Letters:
    ...     chat_template, eos_token_id = None, 0
    ...     def __call__(self, text, **options):
    ...         return {"input_ids": [ord(letter) for letter in text]}
    >>> encode([{"prompt": "Hi", "completion": "ho"}], Letters(), 8).rows[0]["labels"].tolist()
    [-100, -100, 104, 111, 0]
    """
    encoded = Encoded()
    for number, row in enumerate(rows, 1):
        add(encoded, row, tokenizer, max_tokens, f"{where}, row {number}")
    return encoded


def add(encoded: Encoded, row: Mapping[str, Any], tokenizer: Any, max_tokens: int, at: str) -> None:
    """Encodes one more row, as `encode` does; ``at`` begins the messages of errors."""
    if isinstance(text := row.get("text", row.get("completion") if row.get("prompt") == "" else None), str):
        pieces = _text(text, tokenizer, max_tokens)
    elif tokenizer.chat_template is None and isinstance(row.get("prompt"), str):
        ids, mask = _plain(row["prompt"], row["completion"], tokenizer)
        pieces = [(ids, mask)]
    else:
        messages, first = messages_of(row, at)
        found = turns(messages, tokenizer, _tools(row, at), at, first)
        ids, mask, joined, ended = tokens(found, tokenizer, at)
        pieces = [(ids, mask)]
        encoded.joined += joined
        encoded.endless += not ended
    for ids, mask in pieces:
        encoded.cut += len(ids) > max_tokens
        ids, mask = ids[:max_tokens], mask[:max_tokens]
        if not any(mask[1:]):  # the first token has none before it to be predicted from
            encoded.untrained += 1
            continue
        labels = [i if m else IGNORED for i, m in zip(ids, [False, *mask[1:]], strict=True)]
        encoded.rows.append({"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)})


def _text(text: str, tokenizer: Any, max_tokens: int) -> list[tuple[list[int], list[bool]]]:
    """The pieces of a text. Each begins with the last token of the one before, so that every token is predicted once."""
    ids = [*tokenizer(text, verbose=False)["input_ids"], tokenizer.eos_token_id]
    starts = range(0, max(len(ids) - 1, 1), max_tokens - 1)
    return [(piece := ids[start : start + max_tokens], [True] * len(piece)) for start in starts]


def _plain(prompt: str, completion: str, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """A prompt and its completion one after the other, as a model without a chat template takes them."""
    before = tokenizer(prompt, verbose=False)["input_ids"]
    after = [*tokenizer(completion, add_special_tokens=False, verbose=False)["input_ids"], tokenizer.eos_token_id]
    return before + after, [False] * len(before) + [True] * len(after)


# ---------------------------------------------------------------- rendering


def messages_of(row: Mapping[str, Any], where: str) -> tuple[list[Message], int]:
    """The messages of a row, and the place of the first one that may be trained: of a prompt nothing is.

    The arguments of a tool's call are a JSON string in some files; templates expect the object, and get it.

    >>> messages_of({"prompt": "Hi", "completion": "Hello"}, "row 1")
    ([{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello'}], 1)
    """
    if "messages" in row:
        messages, first = list(row["messages"]), 0
    else:
        before, after = row.get("prompt"), row.get("completion")
        asked = [{"role": "user", "content": before}] if isinstance(before, str) else before
        answered = [{"role": "assistant", "content": after}] if isinstance(after, str) else after
        if not isinstance(asked, list) or not isinstance(answered, list):
            raise DataError(f"{where}: expected messages, a prompt and its completion, or a text; got {', '.join(row)}")
        messages, first = [*asked, *answered], len(asked)
    if not messages or messages[0].get("role") == "assistant":
        raise DataError(f"{where}: a chat begins with a message of the user or the system, which the assistant answers")
    for i, message in enumerate(messages, 1):
        if not isinstance(content := message.get("content"), str | None):
            raise DataError(f"{where}, message {i}: the content of {message.get('role')} is no text but {str(content)[:40]!r}")
    return [_called(message) for message in messages], first


def _tools(row: Mapping[str, Any], where: str) -> Any:
    """The tools of a row, which may be a string of JSON."""
    tools = row.get("tools")
    try:
        tools = json.loads(tools) if isinstance(tools, str) and tools.strip() else tools
    except ValueError as error:
        raise DataError(f"{where}: tools is no JSON ({error}): write a list of what the assistant may call") from error
    return tools or None


def _called(message: Message) -> Message:
    calls = []
    for call in message.get("tool_calls") or []:
        called = call.get("function", call)
        if isinstance(called.get("arguments"), str):
            with suppress(ValueError):  # the model's own words may be no JSON
                called = called | {"arguments": json.loads(called["arguments"])}
        calls.append(call | {"function": called} if "function" in call else called)
    return message | {"tool_calls": calls} if calls else dict(message)


def render(
    messages: Sequence[Message], tokenizer: Any, tools: Any = None, prompt: bool = False, where: str = "this chat"
) -> str:
    """The text of a chat; with ``prompt``, and of what asks the assistant for an answer.

    Raises:
        DataError: the tokenizer has no chat template, or it refuses these messages.
    """
    if tokenizer.chat_template is None:
        raise DataError(
            f"{where}: the tokenizer of {tokenizer.name_or_path} has no chat template: give data.template, which is "
            '"alpaca" or a file of Jinja (.jinja), or finetune a model for chats'
        )
    try:
        made: Any = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=prompt)
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        roles = ", ".join(str(message.get("role")) for message in messages)
        raise DataError(f"{where}: the chat template of {tokenizer.name_or_path} refuses it ({roles}): {error}") from error
    return str(made)


def turns(messages: Sequence[Message], tokenizer: Any, tools: Any = None, where: str = "this chat", first: int = 0) -> Turns:
    """A chat's text, and where its assistant's turns are, of the messages from ``first`` on.

    Raises:
        DataError: the template drops something of the chat, or its renderings do not begin with one another.
    """

    def text(count: int, prompt: bool = False) -> str:
        return render(messages[:count], tokenizer, tools, prompt, where)

    whole = text(len(messages))
    if tools and whole == render(messages, tokenizer, where=where):
        raise DataError(f"{where}: the chat template of {tokenizer.name_or_path} has no place for tools: leave them out")
    _require_whole(messages, whole, tokenizer, where)
    start = len(_prefix(text(first, True), whole, first, tokenizer, where)) if first else 0
    if MARKED.search(tokenizer.get_chat_template(tools=tools)):
        marked = [span for span in _marked(messages, tokenizer, tools) if span[0] >= start]
        return Turns(whole, [_with_end(span, messages, text, whole, tokenizer) for span in marked])
    spans = []
    for i, message in enumerate(messages):
        if i >= first and message.get("role") == "assistant":
            before = text(i, True)
            after = _prefix(text(i + 1), whole, i, tokenizer, where)
            spans.append((len(_prefix(before, after, i, tokenizer, where)), len(after)))
    return Turns(whole, spans)


def _require_whole(messages: Sequence[Message], whole: str, tokenizer: Any, where: str) -> None:
    for i, message in enumerate(messages, 1):
        said = (message.get("content") or "").strip()
        if (
            said not in whole
            and json.dumps(said)[1:-1] not in whole
            and json.dumps(said, ensure_ascii=False)[1:-1] not in whole
        ):
            raise DataError(
                f"{where}, message {i}: the chat template of {tokenizer.name_or_path} drops words of {message.get('role')}: "
                "take them out, or give another template as data.template"
            )


def _prefix(before: str, after: str, i: int, tokenizer: Any, where: str) -> str:
    if after.startswith(before):
        return before
    at = next((k for k, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), len(after))
    raise DataError(
        f"{where}, message {i + 1}: the chat template of {tokenizer.name_or_path} renders a chat otherwise when it goes on: "
        f"{before[at : at + 20]!r} becomes {after[at : at + 20]!r}, so that it does not say where an answer begins and ends; "
        "give as data.template one that marks the answers by {% generation %} and {% endgeneration %}"
    )


def _marked(messages: Sequence[Message], tokenizer: Any, tools: Any) -> list[Span]:
    rendered: Any = render_jinja_template(
        conversations=[[{k: v for k, v in message.items() if v is not None} for message in messages]],
        tools=tools,
        chat_template=tokenizer.get_chat_template(tools=tools),
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    return [(start, end) for start, end in rendered[1][0]]


def _with_end(span: Span, messages: Sequence[Message], text: Any, whole: str, tokenizer: Any) -> Span:
    """A marked turn with the token that ends it, where the template puts that behind the mark."""
    start, end = span
    if _last_special(whole[start:end], tokenizer) is not None:
        return span
    following = next((s for s in _specials(tokenizer) if whole.startswith(s, end)), None)
    for i, message in enumerate(messages):
        if following and message.get("role") == "assistant":
            until = text(i + 1)
            if whole.startswith(until) and len(until) >= end:
                return (start, end + len(following)) if end + len(following) <= len(until) else span
    return span


# ---------------------------------------------------------------- tokens


def tokens(found: Turns, tokenizer: Any, where: str = "this chat") -> tuple[list[int], list[bool], bool, bool]:
    """The token ids of a rendered chat; which of them are trained; whether a first one is not, because it also holds the end
    of the prompt; and whether all turns end with a token that says so.

    Raises:
        DataError: the tokenizer does not tell which characters a token stands for.
    """
    try:
        made = tokenizer(found.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    except (NotImplementedError, TypeError) as error:
        raise DataError(
            f"{where}: the tokenizer of {tokenizer.name_or_path} does not say which characters a token stands for: use its "
            "fast version"
        ) from error
    ids: list[int] = made["input_ids"]
    starts, ends = ([int(pair[k]) for pair in made["offset_mapping"]] for k in (0, 1))
    mask, joined, ended = [False] * len(ids), False, bool(found.spans)
    for start, end in found.spans:
        last = _last_special(found.text[start:end], tokenizer)
        ended &= last is not None
        end = end if last is None else start + last
        k = bisect_left(starts, start)
        apart = k == 0 or ends[k - 1] == start
        if not apart and (
            ends[k - 1] > start or ids[:k] != tokenizer(found.text[:start], add_special_tokens=False)["input_ids"]
        ):
            joined = True
            k += ends[k - 1] <= start  # a token whose leading space is the prompt's does not count it
        while k < len(ids) and ends[k] <= end:
            mask[k] = True
            k += 1
    return ids, mask, joined, ended


def _specials(tokenizer: Any) -> list[str]:
    """The special tokens' texts, longest first."""
    added = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special}
    return sorted(added | {*tokenizer.all_special_tokens}, key=len, reverse=True)


def _last_special(text: str, tokenizer: Any) -> int | None:
    """Where the special token ends by which a turn ends, if it does; the blanks after it are the template's own."""
    said = text.rstrip()
    found = any(said.endswith(special) for special in _specials(tokenizer) if special)
    return len(said) if found else None


def end_of_turn(tokenizer: Any) -> int | None:
    """The id of the token that ends an assistant's turn in this tokenizer's template; None if there is none."""
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    ids, mask, _, ended = tokens(turns(chat, tokenizer), tokenizer)
    return ids[max(k for k, trained in enumerate(mask) if trained)] if ended else None
