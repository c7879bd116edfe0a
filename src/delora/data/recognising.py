"""What a user's rows are for, and which column holds what: by what the user says, by the columns' names, by their values."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from delora.data.examples import DataError
from delora.data.rows import Rows, brief
from delora.errors import nearest

__all__ = ["KINDS", "Kind", "Roles", "flat", "measured", "missing", "named", "recognise", "recognised"]

Kind = Literal["classification", "regression", "chat", "completion", "preference", "text"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Roles = dict[str, str | tuple[str, ...]]

TEXTS = ("text", "sentence", "body", "content", "review", "comment", "utterance", "document")
PAIRS = (
    ("sentence1", "sentence2"),
    ("text1", "text2"),
    ("text_a", "text_b"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
)
LABELS = ("label", "labels", "class", "category", "target", "intent", "sentiment", "rating", "score", "stars", "similarity")
# Columns, by role, of what is not text and label. The first that are all there decide; a role in brackets may be absent.
SHAPES: tuple[tuple[Kind, dict[str, str], dict[str, str]], ...] = (
    ("preference", {"chosen": "chosen", "rejected": "rejected"}, {"prompt": "prompt"}),
    ("chat", {"messages": "messages"}, {"tools": "tools"}),
    ("chat", {"messages": "conversations"}, {"tools": "tools", "system": "system"}),
    ("chat", {"messages": "conversation"}, {"tools": "tools", "system": "system"}),
    ("completion", {"prompt": "prompt", "completion": "completion"}, {}),
    ("completion", {"prompt": "prompt", "completion": "response"}, {}),
    ("completion", {"instruction": "instruction", "completion": "output"}, {"input": "input"}),
    ("completion", {"instruction": "instruction", "completion": "response"}, {"input": "input"}),
)
ROLES: dict[Kind, tuple[tuple[str, ...], tuple[str, ...]]] = {  # that a kind must have, and may have
    "classification": (("text", "label"), ()),
    "regression": (("text", "label"), ()),
    "chat": (("messages",), ("tools", "system")),
    "completion": (("completion",), ("prompt", "instruction", "input")),
    "preference": (("chosen", "rejected"), ("prompt",)),
    "text": (("text",), ()),
}
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def named(text: str | Sequence[str] | None, label: str | None, columns: Mapping[str, str] | None) -> Roles:
    """The columns that the user named, by role. Two texts have a comma between their names."""
    given: Roles = {**(columns or {}), **({"label": label} if label is not None else {})}
    if text is not None:
        given["text"] = text if isinstance(text, str) else tuple(text)
    if isinstance(both := given.get("text"), str) and "," in both:
        given["text"] = tuple(name.strip() for name in both.split(","))
    if isinstance(both := given.get("text"), tuple) and len(both) == 1:
        given["text"] = both[0]
    if isinstance(both, tuple) and not 1 <= len(both) <= 2:
        raise DataError(f"text = {', '.join(both)}: an example has one or two texts; name one or two columns")
    return given


def flat(roles: Roles) -> list[str]:
    return [name for value in roles.values() for name in ((value,) if isinstance(value, str) else value)]


def recognise(source: str, rows: Rows, kind: Kind | None, given: Roles, group: str | None) -> tuple[Kind, Roles]:
    """The kind of the data, and the column of each role: as the user says, else as the columns' names and values say."""
    for column in flat(given):
        if column not in rows.columns:
            raise DataError(f"{source}: there is no column {column!r}; {nearest(column, rows.columns, repr)}")
    known = {role for must, may in ROLES.values() for role in (*must, *may)}
    if unknown := [role for role in given if role not in known]:
        raise DataError(f"{source}: no column has the role {unknown[0]!r}; {nearest(unknown[0], sorted(known), repr)}")
    if given and not {"text", "label"} & set(given):
        fitting = [k for k, (must, may) in ROLES.items() if set(must) <= set(given) <= {*must, *may} and kind in (None, k)]
        if not fitting:
            raise DataError(f"{source}: the columns for {', '.join(given)} alone make none of {', '.join(KINDS)}")
        return fitting[0], given
    lower = {column.lower(): column for column in reversed(rows.columns)}
    if not given:
        for shape, must, may in SHAPES:
            if kind in (None, shape) and all(name in lower for name in must.values()):
                return shape, {role: lower[name] for role, name in (must | may).items() if name in lower}
    if kind not in (None, "text", "classification", "regression"):
        needs = " and ".join(ROLES[kind][0])
        raise _ambiguous(source, rows, f"no columns make {kind}, which needs {needs}: --columns ROLE=COLUMN,...")
    texts = given.get("text") or _text_column(rows, lower, given.get("label"), group)
    if texts is None:
        raise _ambiguous(source, rows, "it is not clear which column is the text")
    alone = "label" not in given and ("text" in given or texts == lower.get("text") or len(rows.columns) == 1)
    if kind == "text":
        return "text", {"text": texts}
    label = given.get("label") or _label_column(rows, lower, texts, group)
    if label is None and alone and kind is None and not _others(rows, texts, group):
        return "text", {"text": texts}
    if label is None:
        raise _ambiguous(source, rows, "it is not clear which column is the label (for plain text without one: kind=text)")
    if label in (texts if isinstance(texts, tuple) else (texts,)):
        raise DataError(f"{source}: the column {label!r} cannot be both text and label: name two columns")
    return kind or "classification", {"text": texts, "label": label}


def _others(rows: Rows, texts: str | tuple[str, ...], group: str | None) -> list[str]:
    return [c for c in rows.columns if c != group and c not in ((texts,) if isinstance(texts, str) else texts)]


def _text_column(rows: Rows, lower: dict[str, str], label: Any, group: str | None) -> str | tuple[str, ...] | None:
    for pair in PAIRS:
        if all(name in lower for name in pair):
            return tuple(lower[name] for name in pair)
    named = [lower[name] for name in TEXTS if name in lower and lower[name] != label]
    if named and (len(named) == 1 or named[0] == lower.get("text")):
        return named[0]
    like = [c for c in rows.columns if c not in (label, group) and _is_prose(rows.values(c))]
    return like[0] if len(like) == 1 and not named else None


def _label_column(rows: Rows, lower: dict[str, str], texts: str | tuple[str, ...], group: str | None) -> str | None:
    others = _others(rows, texts, group)
    named = [lower[name] for name in LABELS if name in lower and lower[name] in others]
    if named and (len(named) == 1 or named[0] == lower.get("label")):
        return named[0]
    if named:
        return None
    like = [c for c in others if _repeats(rows.values(c)) or (len(others) == 1 and measured(rows, c))]
    return like[0] if len(like) == 1 else None


def _is_prose(values: list[Any]) -> bool:
    """Whether values are texts: strings that differ, most of them of several words."""
    given = [value for value in values if isinstance(value, str) and value.strip()]
    many = sum(" " in value.strip() for value in given) > len(given) / 2
    return bool(given) and many and len(given) > len(values) / 2 and len(set(given)) > len(given) / 2


def _repeats(values: list[Any]) -> bool:
    """Whether values are classes: each stands in several rows."""
    given = [value for value in values if not missing(value)]
    if not given or not all(isinstance(value, str | int) for value in given):
        return False
    return len(set(given)) <= len(given) / 2 and not _is_prose(values)


def missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value)) or (isinstance(value, str) and not value.strip())


def _numbers(values: list[Any]) -> str | None:
    """ "fractions" if most values are numbers and one has a fraction, "whole" if all numbers are whole, else None."""
    given = [value for value in values if not missing(value)]
    texts = [str(value).strip() for value in given if not isinstance(value, bool | list | dict)]
    numbers = [text for text in texts if NUMBER.fullmatch(text)]
    if not numbers or len(numbers) <= len(given) / 2:
        return None
    return "fractions" if any(re.search(r"[.eE]", number) for number in numbers) else "whole"


def measured(rows: Rows, label: str) -> bool:
    return _numbers(rows.values(label)) == "fractions"


def _ambiguous(source: str, rows: Rows, problem: str) -> DataError:
    shown = ", ".join(
        f"{c!r} (such as {brief(next((v for v in rows.values(c) if not missing(v)), None))})" for c in rows.columns
    )
    return DataError(f"{source}: {problem}. Its columns are {shown}: name them with --text COLUMN --label COLUMN")


def recognised(source: str, kind: Kind, roles: Roles, columns: list[str], group: str | None) -> str:
    uses = ", ".join(f"{role}: {' and '.join(map(repr, (c,) if isinstance(c, str) else c))}" for role, c in roles.items())
    left = [column for column in columns if column not in (*flat(roles), group)]
    note = f"; left out: {', '.join(map(repr, left))}" if left else ""
    return f"{source}: {kind} ({uses}{'; group: ' + repr(group) if group else ''}{note})"
