"""Conversations of a user's own: turns with a role and a content, as chat templates take them; ShareGPT's too."""

from __future__ import annotations

from typing import Any

from delora.data.examples import DataError
from delora.data.rows import brief

__all__ = ["ROLES", "conversation", "is_turns", "pair", "silent"]

ROLES = ("system", "developer", "user", "assistant", "tool")
# ShareGPT's names of the roles.
FROM = {"human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "model": "assistant"}
FROM |= {"assistant": "assistant", "system": "system", "tool": "tool", "observation": "tool", "function_call": "assistant"}


def is_turns(value: Any) -> bool:
    """Whether a value is a list of turns.

    >>> is_turns([{"role": "user", "content": "Hello."}]), is_turns("Hello.")
    (True, False)
    """
    return isinstance(value, list) and bool(value) and all(isinstance(turn, dict) for turn in value)


def conversation(value: Any, where: str) -> list[dict[str, Any]]:
    """The turns of a row, each with a ``role`` of `ROLES` and a ``content``; keys without a value are left out.

    Raises:
        DataError: it is no conversation; the message names the turn.

    >>> conversation([{"from": "human", "value": "Hello."}, {"from": "gpt", "value": "Ahoy."}], "mine.jsonl, row 1")
    [{'role': 'user', 'content': 'Hello.'}, {'role': 'assistant', 'content': 'Ahoy.'}]
    """
    if not is_turns(value):
        raise DataError(f'{where}: expected a list of turns such as {{"role": "user", "content": "..."}}, got {brief(value)}')
    return [_turn(turn, f"{where}, turn {number}") for number, turn in enumerate(value, 1)]


def _turn(turn: dict[str, Any], where: str) -> dict[str, Any]:
    given = {key: each for key, each in turn.items() if each is not None}
    if "from" in given or "value" in given:
        name = given.pop("from", None)
        role = FROM.get(name.lower()) if isinstance(name, str) else None
        given = {"role": role or name, "content": given.pop("value", None)} | given
    role, content = given.get("role"), given.get("content")
    if role not in ROLES:
        raise DataError(f"{where}: the role {brief(role)} is none of {', '.join(ROLES)}; rename it")
    if content is None and given.get("tool_calls"):
        return {"role": role, "content": "", **given}
    if isinstance(content, list):
        content = _joined(content, where)
    if not isinstance(content, str):
        raise DataError(f"{where} ({role}): content = {brief(content)} is no text; write what was said")
    return {**given, "role": role, "content": content}


def _joined(pieces: list[Any], where: str) -> str:
    """The text of a content in pieces, as of models that also see pictures."""
    for piece in pieces:
        if not isinstance(piece, dict) or piece.get("type") != "text" or not isinstance(piece.get("text"), str):
            raise DataError(f"{where}: {brief(piece)} is no piece of text; only texts are trained on")
    return "".join(piece["text"] for piece in pieces)


def silent(turns: list[dict[str, Any]]) -> bool:
    """Whether nothing in a conversation can be trained on, or one of the assistant's turns is empty.

    >>> silent([{"role": "user", "content": "Hello."}, {"role": "assistant", "content": " "}])
    True
    """
    answers = [turn for turn in turns if turn["role"] == "assistant"]
    return not answers or any(not turn["content"].strip() and not turn.get("tool_calls") for turn in answers)


def pair(prompt: Any, chosen: list[dict[str, Any]], rejected: list[dict[str, Any]]) -> tuple[Any, list[Any], list[Any]]:
    """The prompt of two conversations, and what each of them goes on with.

    Files repeat the prompt in both, or have it nowhere else: then it is all that they begin with alike.

    >>> hello, ahoy = {"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Ahoy."}
    >>> go = {"role": "assistant", "content": "Go away."}
    >>> pair(None, [hello, ahoy], [hello, go]) == pair("Hello.", [hello, ahoy], [hello, go]) == ([hello], [ahoy], [go])
    True
    """
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) and prompt else list(prompt or [])
    alike = 0
    for a, b in zip(chosen, rejected, strict=False):
        if a != b:
            break
        alike += 1
    if not asked:
        asked, chosen, rejected = chosen[:alike], chosen[alike:], rejected[alike:]
    elif chosen[: len(asked)] == rejected[: len(asked)] == asked:
        chosen, rejected = chosen[len(asked) :], rejected[len(asked) :]
    return asked, chosen, rejected
