"""Requests of OpenAI's protocol, read: what is not right, or not supported, is refused in words."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from starlette.requests import ClientDisconnect, Request

from delora.integrations.engine import Engine, Job, Refused
from delora.methods.base import is_number

__all__ = ["Asked", "body_of", "chat", "completion", "shown", "text"]

BODY = 1 << 20  # bytes of a request
CHOICES = 64  # texts that one request may ask for

# Fields that OpenAI's clients may send, with the values that ask for nothing beyond what is done here.
UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False, 0),
    "parallel_tool_calls": (False, True),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
}
SHARED = {"model", "max_tokens", "temperature", "top_p", "n", "stop", "stream", "stream_options", "seed", "strength", "user"}


def _fields(body: Any, own: set[str]) -> dict[str, Any]:
    if not isinstance(body, dict):
        raise Refused(f"expected a JSON object, got {shown(body)}")
    fields = {key: value for key, value in body.items() if value is not None}
    for key, value in fields.items():
        if key in UNSUPPORTED:
            if not any(value == default and (type(value) is bool) == (type(default) is bool) for default in UNSUPPORTED[key]):
                raise Refused(f"{key} = {shown(value)}: this server does not support {key}", param=key)
        elif key not in SHARED | own:
            raise Refused(f"there is no field {shown(key)}: the fields are {sorted(SHARED | own)}", param=key)
    return fields


def shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _whole(fields: Mapping[str, Any], key: str, default: int, low: int, high: int) -> int:
    value = fields.get(key, default)
    if type(value) is not int or not low <= value <= high:
        raise Refused(f"{key} = {shown(value)}: must be an integer from {low} to {high}", param=key)
    return value


def _real(fields: Mapping[str, Any], key: str, default: float, low: float, high: float) -> float:
    value = fields.get(key, default)
    if not is_number(value) or not low <= value <= high:
        raise Refused(f"{key} = {shown(value)}: must be a number from {low:g} to {high:g}", param=key)
    return float(value)


def _flag(fields: Mapping[str, Any], key: str) -> bool:
    value = fields.get(key, False)
    if type(value) is not bool:
        raise Refused(f"{key} = {shown(value)}: must be true or false", param=key)
    return value


def text(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise Refused(f"{key} = {shown(value)}: must be a text", param=key)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise Refused(f"{key}: half of a character (a lone surrogate) at place {error.start}", param=key) from error
    return value


@dataclass
class Asked:
    """A request that is right: its prompts as tokens, and how to write on.

    >>> how = dict(adapter=None, strength=None, max_tokens=1, temperature=0.0, top_p=1.0, stop=[])
    >>> asked = Asked([[1, 2]], 2, stream=False, usage=False, settings=how, seed=7)
    >>> [job.seed for job in asked.jobs(print)]
    [7, 8]
    """

    prompts: list[list[int]]
    n: int
    stream: bool
    usage: bool  # in a stream, too
    settings: dict[str, Any]
    seed: int

    def jobs(self, tell: Callable[[int, str, Any], None]) -> list[Job]:
        jobs = []
        for index in range(len(self.prompts) * self.n):
            ids = self.prompts[index // self.n]
            jobs.append(Job(ids=ids, tell=partial(tell, index), seed=(self.seed + index) % 2**63, **self.settings))
        return jobs


def _asked(engine: Engine, fields: dict[str, Any], prompts: list[list[int]], default: int) -> Asked:
    if "model" not in fields:
        raise Refused(f"the field 'model' is missing: there are {[engine.name, *engine.adapters]}", param="model")
    adapter = engine.known(fields["model"])
    strength = fields.get("strength")
    if strength is not None:
        if adapter is None:
            raise Refused(f"strength is of an adapter, and {engine.name!r} is the base model", param="strength")
        strength = _real(fields, "strength", 1.0, 0.0, 1e4)
    n = _whole(fields, "n", 1, 1, CHOICES)
    if n * len(prompts) > CHOICES:
        raise Refused(f"{len(prompts)} prompts, {n} texts each: a request may ask for {CHOICES} texts", param="n")
    key = "max_completion_tokens" if "max_completion_tokens" in fields else "max_tokens"
    longest = max(map(len, prompts))
    room = engine.context - longest if engine.context else engine.max_tokens
    if room < 1:
        raise Refused(f"the prompt has {longest} tokens: with what is to come, {engine.context} fit", param="prompt")
    max_tokens = _whole(fields, key, min(default, room, engine.max_tokens), 1, engine.max_tokens)
    if max_tokens > room:
        raise Refused(f"{longest} tokens and {max_tokens} to come are more than the {engine.context} that fit", param=key)
    stop = fields.get("stop", [])
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or len(stop) > 16 or not all(isinstance(s, str) and s for s in stop):
        raise Refused(f"stop = {shown(stop)}: must be a text, or a list of at most 16, none of them empty", param="stop")
    options = fields.get("stream_options", {})
    if not isinstance(options, dict) or set(options) - {"include_usage", "include_obfuscation"}:
        raise Refused(f"stream_options = {shown(options)}: may hold include_usage", param="stream_options")
    settings = {
        "adapter": adapter,
        "strength": strength,
        "max_tokens": max_tokens,
        "temperature": _real(fields, "temperature", 1.0, 0.0, 100.0),
        "top_p": _real(fields, "top_p", 1.0, 0.0, 1.0),
        "stop": [text(s, "stop") for s in stop],
    }
    seed = fields.get("seed", secrets.randbits(62))
    if type(seed) is not int or abs(seed) >= 2**63:
        raise Refused(f"seed = {shown(seed)}: must be an integer of 64 bits", param="seed")
    return Asked(prompts, n, _flag(fields, "stream"), _flag(options, "include_usage"), settings, seed)


def completion(engine: Engine, body: Any) -> Asked:
    fields = _fields(body, {"prompt"})
    prompt = fields.get("prompt")
    many = prompt if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else [prompt]
    if len(many) > CHOICES:
        raise Refused(f"{len(many)} prompts: a request may ask for {CHOICES} texts", param="prompt")
    return _asked(engine, fields, [_tokens(engine, each) for each in many], 16)


def _tokens(engine: Engine, prompt: Any) -> list[int]:
    if isinstance(prompt, list) and all(type(i) is int for i in prompt):
        wrong = next((i for i in prompt if not 0 <= i < engine.vocabulary), None)
        if wrong is not None:
            raise Refused(f"prompt: there is no token {shown(wrong)}, only 0 to {engine.vocabulary - 1}", param="prompt")
        ids = prompt
    elif isinstance(prompt, str):
        with engine.reading:
            ids = engine.tokenizer(text(prompt, "prompt"))["input_ids"]
    else:
        raise Refused(f"prompt = {shown(prompt)}: must be a text, a list of texts, or token ids", param="prompt")
    if not ids:
        raise Refused("the prompt has no tokens", param="prompt")
    return list(ids)


def chat(engine: Engine, body: Any) -> Asked:
    fields = _fields(body, {"messages", "max_completion_tokens"})
    if engine.tokenizer.chat_template is None:
        raise Refused(f"{engine.name!r} has no chat template: use /v1/completions", param="messages")
    messages = fields.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Refused(f"messages = {shown(messages)}: must be a list of messages", param="messages")
    read = []
    for message in messages:
        role = message.get("role") if isinstance(message, dict) else None
        if not isinstance(message, dict) or role not in ("system", "developer", "user", "assistant"):
            raise Refused(
                f"a message {shown(message)}: must have a role (system, user, assistant) and a content", param="messages"
            )
        content = message.get("content")
        if isinstance(content, list):  # of parts
            if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
                raise Refused("a message's content may hold parts of type 'text' only", param="messages")
            content = "".join(text(part.get("text"), "content") for part in content)
        read.append({"role": "system" if role == "developer" else role, "content": text(content, "content")})
    try:
        with engine.reading:
            made = engine.tokenizer.apply_chat_template(read, add_generation_prompt=True, tokenize=True, return_dict=True)
    except Exception as error:  # a template may refuse what it likes, in the ways of its own
        raise Refused(f"the model's chat template refuses these messages: {error}", param="messages") from error
    if not made["input_ids"]:
        raise Refused("the messages have no tokens", param="messages")
    return _asked(engine, fields, [list(made["input_ids"])], 256)


async def body_of(request: Request) -> Any:
    parts, size = [], 0
    try:
        async for part in request.stream():
            size += len(part)
            if size > BODY:
                raise Refused(f"the request is longer than {BODY:,} bytes", 413)
            parts.append(part)
    except ClientDisconnect as error:
        raise Refused("the client hung up before the end of its request", 499) from error
    try:
        return json.loads(b"".join(parts), parse_constant=_constant)
    except (ValueError, RecursionError) as error:
        raise Refused(f"the request is no JSON: {error or type(error).__name__}") from error


def _constant(text: str) -> None:
    raise ValueError(f"{text} is no number of JSON")
