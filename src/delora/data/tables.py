"""A user's own data as a table: what it is for, which columns hold what, its three parts, and all that is odd about it."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from delora.data.dividing import divide, units
from delora.data.examples import DataError
from delora.data.recognising import KINDS, Kind, Roles, flat, measured, missing, named, recognise, recognised
from delora.data.rows import LARGEST, Rows, brief, read_source
from delora.data.turns import conversation, is_turns, pair, silent
from delora.errors import nearest

__all__ = ["KINDS", "Kind", "Table", "read"]

ORDER = ("train", "validation", "test")

MISSING = ("nan", "na", "n/a", "none", "null", "-", "?")


@dataclass(frozen=True)
class Table:
    """A user's own data.

    ``columns`` says which column of ``parts`` holds what, by role:

    ==================  ======================================================================================
    "classification"    ``text`` (one column, or a tuple of two) and ``label``, a string
    "regression"        ``text`` and ``label``, a float
    "chat"              ``messages``: turns with ``role`` and ``content``; perhaps ``tools``
    "completion"        ``prompt`` and ``completion``, strings or turns; of Alpaca's rows also ``instruction`` and ``input``
    "preference"        ``prompt``, ``chosen`` and ``rejected``, strings or turns; strings may come without a prompt
    "text"              ``text``
    ==================  ======================================================================================

    Of the last four kinds the columns bear the names of their roles, whatever they were called in the files. ``parts`` are
    "train", "validation" and "test", as the files give them or divided by `delora.data.dividing.divide`. ``labels`` are the
    classes, sorted. ``told``: sentences on what was recognised and what is odd.

    >>> Table("text", {"text": "text"}, {}, (), ()).sizes()
    {}
    """

    kind: Kind
    columns: dict[str, str | tuple[str, ...]]
    parts: dict[str, Any]
    labels: tuple[str, ...]
    told: tuple[str, ...]

    def sizes(self) -> dict[str, int]:
        """The number of rows of each part."""
        return {part: len(rows) for part, rows in self.parts.items()}


def read(
    source: str | Path,
    *,
    kind: str | None = None,
    text: str | Sequence[str] | None = None,
    label: str | None = None,
    columns: Mapping[str, str] | None = None,
    group: str | None = None,
    seed: int = 0,
) -> Table:
    """Read a user's own data.

    Args:
        source: a CSV, TSV, JSON, JSONL or Parquet file, a folder of them, a folder that `datasets` saved, or a Hub name.
        kind: one of `KINDS`. Default: as the columns say.
        text: the column of the text; of two texts, both columns, or their names with a comma between them.
        label: the column of the class or number.
        columns: the column of each role, where the names do not say it, such as ``{"prompt": "frage"}``.
        group: a column whose equal values shall not be in two parts, such as a customer's number.
        seed: decides how rows are divided.

    Raises:
        DataError: the data are missing, malformed or ambiguous; one sentence with the file, the row, and what to do.

    >>> import tempfile
    >>> rows = "".join(f"{word} number {i},{word}\\n" for i in range(10) for word in ("up", "down"))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "mine.csv").write_text("body,direction\\n" + rows)
    ...     table = read(f"{folder}/mine.csv")
    >>> table.kind, table.columns, table.labels, table.sizes()
    ('classification', {'text': 'body', 'label': 'direction'}, ('down', 'up'), {'train': 16, 'validation': 2, 'test': 2})
    """
    if kind is not None and kind not in KINDS:
        raise DataError(f"kind = {kind!r}: {nearest(kind, KINDS, repr)}")
    parts = read_source(source)
    if "train" not in parts:
        raise DataError(f"{source} has the part {next(iter(parts))!r} and none to train on: name a file train")
    for part, rows in parts.items():
        if not rows.rows:
            raise DataError(f"{source}: the part {part!r} has columns and no rows: it needs a row for each example")
    told = [sentence for rows in parts.values() for sentence in rows.told]
    found, roles = recognise(str(source), parts["train"], kind, named(text, label, columns), group)
    for rows in parts.values():
        for column in (*flat(roles), *([group] if group else [])):
            if column not in rows.columns:
                raise DataError(f"{rows.at[0]}: there is no column {column!r}; {nearest(column, rows.columns, repr)}")
    if found == "classification" and kind is None and measured(parts["train"], str(roles["label"])):
        found = "regression"
    reader = _Reader(found, roles, group)
    read_parts = {part: reader.part(parts[part]) for part in ORDER if part in parts}
    told = [recognised(str(source), found, roles, parts["train"].columns, group), *told, *reader.told()]
    return _table(str(source), found, roles, read_parts, seed, told)


# ---------------------------------------------------------------- what stands in a row


@dataclass
class _Part:
    """The rows of one part that are kept: their values by role, their place, their group."""

    rows: list[dict[str, Any]]
    at: list[str]
    group: list[Any]

    def only(self, kept: list[int]) -> _Part:
        return _Part([self.rows[i] for i in kept], [self.at[i] for i in kept], [self.group[i] for i in kept])


class _Reader:
    """Reads the rows of a kind; what is left out is counted by its reason, with the first row's place."""

    def __init__(self, kind: Kind, roles: Roles, group: str | None) -> None:
        self.kind, self.roles, self.group = kind, roles, group
        self.left: dict[str, tuple[int, str]] = {}
        self.types: dict[str, tuple[type, str]] = {}
        readers: dict[Kind, Callable[[dict[str, Any], str], dict[str, Any] | None]] = {
            "classification": self._labelled,
            "regression": self._labelled,
            "chat": self._chat,
            "completion": self._completion,
            "preference": self._preference,
            "text": self._texts,
        }
        self.row = readers[kind]

    def part(self, rows: Rows) -> _Part:
        part = _Part([], [], [])
        for row, at in zip(rows.rows, rows.at, strict=True):
            if (made := self.row(row, at)) is not None:
                part.rows.append(made)
                part.at.append(at)
                part.group.append(row[self.group] if self.group else None)
        if not part.rows:
            reason = next(iter(self.left), "is empty")
            raise DataError(f"{rows.at[0]} and all rows beside it: {reason}; fill them in, or name other columns")
        return part

    def told(self) -> list[str]:
        return [f"{at}{f' and {n - 1:,} more' if n > 1 else ''}: {reason}; left out" for reason, (n, at) in self.left.items()]

    def _leave(self, reason: str, at: str) -> dict[str, Any] | None:
        """No row: it is left out, and counted."""
        n, first = self.left.get(reason, (0, at))
        self.left[reason] = (n + 1, first)
        return None

    def _texts(self, row: dict[str, Any], at: str) -> dict[str, Any] | None:
        columns = self.roles["text"]
        made = {}
        for column in (columns,) if isinstance(columns, str) else columns:
            if missing(row[column]):
                return self._leave(f"the text {column!r} is empty", at)
            name = column if self.kind in ("classification", "regression") else "text"
            made[name] = _string(row[column], column, at)
        return made

    def _labelled(self, row: dict[str, Any], at: str) -> dict[str, Any] | None:
        column = str(self.roles["label"])
        texts = self._texts(row, at)
        if texts is None:
            return None
        if missing(row[column]):
            return self._leave(f"the label {column!r} is missing", at)
        return texts | {column: self._label(row[column], column, at)}

    def _label(self, value: Any, column: str, at: str) -> str | float:
        if isinstance(value, list | dict | tuple | bytes):
            raise DataError(f"{at}: {column} = {brief(value)}: a row has one label, a text or a number")
        if self.kind == "regression":
            try:
                number = float(value)
            except (TypeError, ValueError):
                number = math.nan
            if isinstance(value, bool) or not math.isfinite(number):
                raise DataError(
                    f"{at}: {column} = {brief(value)} is no number, and others are; correct it, or kind=classification"
                )
            return number
        if not isinstance(value, str | int | float):
            raise DataError(f"{at}: {column} = {brief(value)} is a {type(value).__name__}; a class is a text or a whole number")
        kind = str if isinstance(value, str) else bool if isinstance(value, bool) else float
        first, where = self.types.setdefault(column, (kind, at))
        if kind is not first:
            raise DataError(f"{at}: {column} = {brief(value)}, but that of {where} is of another type; write all alike")
        if isinstance(value, float) and value != int(value):
            raise DataError(f"{at}: {column} = {value!r} is no class: a class is a text or a whole number; or kind=regression")
        if isinstance(value, str):
            return _string(value, column, at)
        return str(value).lower() if isinstance(value, bool) else str(int(value))

    def _chat(self, row: dict[str, Any], at: str) -> dict[str, Any] | None:
        value = row[str(self.roles["messages"])]
        if missing(value) or value == []:
            return self._leave("the conversation is empty", at)
        turns = self._turns(value, at)
        system = row[str(self.roles["system"])] if "system" in self.roles else None
        if not missing(system) and turns[0]["role"] != "system":
            turns = [{"role": "system", "content": _string(system, "system", at)}, *turns]
        if silent(turns):
            return self._leave("no turn of the assistant's, or an empty one, so that nothing can be learned", at)
        tools = {"tools": row[str(self.roles["tools"])]} if "tools" in self.roles else {}
        return {"messages": turns} | tools

    def _turns(self, value: Any, at: str) -> list[dict[str, Any]]:
        turns = conversation(value, at)
        for turn in turns:
            _string(turn["content"], "content", at)
        return turns

    def _said(self, role: str, row: dict[str, Any], at: str) -> Any:
        """A text, or turns; None if there is nothing."""
        column = str(self.roles[role])
        value = row[column]
        if missing(value) or value == []:
            return None
        kind = list if is_turns(value) else str
        first, where = self.types.setdefault(role, (kind, at))
        made = self._turns(value, at) if kind is list else _string(value, column, at)
        if kind is not first:
            raise DataError(f"{at}: {column} = {brief(value)}, but that of {where} is of another type; write all alike")
        return made

    def _completion(self, row: dict[str, Any], at: str) -> dict[str, Any] | None:
        completion = self._said("completion", row, at)
        if completion is None or (isinstance(completion, list) and silent(completion)):
            return self._leave(f"{self.roles['completion']!r} is empty, so that nothing can be learned", at)
        if "instruction" not in self.roles:
            prompt = self._said("prompt", row, at) if "prompt" in self.roles else ""
            return {"prompt": "" if prompt is None else prompt, "completion": completion}
        instruction = self._said("instruction", row, at)
        given = self._said("input", row, at) if "input" in self.roles else None
        if instruction is None:
            return self._leave(f"{self.roles['instruction']!r} is empty", at)
        prompt = f"{instruction}\n\n{given}" if given else instruction
        return {"prompt": prompt, "completion": completion, "instruction": instruction, "input": given or ""}

    def _preference(self, row: dict[str, Any], at: str) -> dict[str, Any] | None:
        chosen, rejected = (self._said(role, row, at) for role in ("chosen", "rejected"))
        if chosen is None or rejected is None:
            return self._leave("one of the two answers is empty", at)
        if chosen == rejected:
            return self._leave("both answers are the same", at)
        prompt = self._said("prompt", row, at) if "prompt" in self.roles else None
        if isinstance(chosen, list) and isinstance(rejected, list):
            prompt, chosen, rejected = pair(prompt, chosen, rejected)
            if silent(chosen) or silent(rejected):
                return self._leave("one of the two conversations has no answer of its own, or an empty one", at)
        elif type(chosen) is not type(rejected):
            raise DataError(f"{at}: one of chosen and rejected is a text and the other one a list of turns; write both alike")
        elif "prompt" in self.roles and prompt is None:
            return self._leave(f"{self.roles['prompt']!r} is empty, so that nothing is answered", at)
        return ({} if prompt is None else {"prompt": prompt}) | {"chosen": chosen, "rejected": rejected}


def _string(value: Any, column: str, at: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{at}: {column} = {brief(value)} is no text; write it as a text in quotes, or name another column")
    if len(value) > LARGEST:
        raise DataError(f"{at}: {column} has {len(value):,} characters, the most are {LARGEST:,}: cut it")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{at}: {column} holds half a character (a lone surrogate) at {error.start}; write it anew") from error
    return value


# ---------------------------------------------------------------- the parts


def _table(source: str, kind: Kind, roles: Roles, parts: dict[str, _Part], seed: int, told: list[str]) -> Table:
    own: Roles = {name: name for name in parts["train"].rows[0]}
    columns = roles if kind in ("classification", "regression") else own
    label = str(roles["label"]) if kind == "classification" else None
    told += _clean(parts, label)
    if wanted := [part for part in ORDER if part not in parts]:
        told += _divided(source, parts, wanted, label, seed)
    labels: tuple[str, ...] = ()
    if label is not None:
        labels = _classes(source, parts, label)
        told += _oddities(parts, label, labels)
    sets = {part: _dataset(parts[part].rows) for part in ORDER}
    return Table(kind, columns, sets, labels, tuple(told))


def _key(row: dict[str, Any], label: str | None) -> str:
    """What makes a row the same text as another."""
    return json.dumps([value for name, value in sorted(row.items()) if name != label], ensure_ascii=False, default=repr)


def _clean(parts: dict[str, _Part], label: str | None) -> list[str]:
    """Tell of duplicates; leave out of a part what also stands in one that it is judged by."""
    told = []
    keys = {part: [_key(row, label) for row in rows.rows] for part, rows in parts.items()}
    if repeated := sum(len(each) - len(set(each)) for each in keys.values()):
        first = next(at for part, rows in parts.items() for at in _repeated(keys[part], rows.at))
        told.append(f"{first}: repeats another row; {repeated:,} such duplicates are kept, each text in one part alone")
    if label is not None:
        classes: dict[str, set[str]] = {}
        for part, rows in parts.items():
            for key, row in zip(keys[part], rows.rows, strict=True):
                classes.setdefault(key, set()).add(row[label])
        if torn := sum(len(each) > 1 for each in classes.values()):
            told.append(f"{torn:,} texts stand under several labels: at best one of these is right")
    for part, judges in (("train", ("validation", "test")), ("validation", ("test",))):
        seen = {key for judge in judges if judge in parts for key in keys[judge]}
        if part not in parts or not seen & set(keys[part]):
            continue
        rows = parts[part]
        kept = [i for i, key in enumerate(keys[part]) if key not in seen]
        if not kept:
            raise DataError(
                f"{rows.at[0]} and all rows of the part {part!r} also stand in another part: give it rows of its own"
            )
        first = next(at for at, key in zip(rows.at, keys[part], strict=True) if key in seen)
        told.append(
            f"{first}: also stands in {' or '.join(j for j in judges if j in parts)}; {len(rows.rows) - len(kept):,} such rows "
            f"are left out of {part}"
        )
        parts[part] = rows.only(kept)
        keys[part] = [keys[part][i] for i in kept]
    return told


def _repeated(keys: list[str], at: list[str]) -> list[str]:
    seen: set[str] = set()
    return [where for key, where in zip(keys, at, strict=True) if key in seen or seen.add(key)]  # type: ignore[func-returns-value]


def _divided(source: str, parts: dict[str, _Part], wanted: list[str], label: str | None, seed: int) -> list[str]:
    """Take the wanted parts out of the training rows."""
    train = parts["train"]
    texts = [_key(row, label) for row in train.rows]
    classes = [str(row[label]) if label is not None else "" for row in train.rows]
    if label is not None and len(set(classes)) > len(classes) / 2:
        raise _too_many(source, label, classes)
    unit = units(texts, train.group)
    chosen = divide(unit, classes, wanted, seed)
    for part in ("train", *wanted):
        these = [i for i, each in enumerate(chosen) if each == part]
        if not these:
            what = "groups" if any(each is not None for each in train.group) else "different rows"
            raise DataError(
                f"{source} has {len(set(unit))} {what}: too few to divide into train, {' and '.join(wanted)}; add rows"
            )
        parts[part] = train.only(these)
    sizes = ", ".join(f"{part} {len(parts[part].rows):,}" for part in ORDER)
    how = "by class and seed" if label is not None else "by seed"
    return [f"divided {how} {seed}: {sizes}"]


def _too_many(source: str, label: str, classes: list[str]) -> DataError:
    return DataError(
        f"{source}: the label {label!r} has {len(set(classes)):,} different values in {len(classes):,} rows, such as "
        f"{brief(classes[0])}: a class has several rows; name another column, or kind=regression for numbers"
    )


def _classes(source: str, parts: dict[str, _Part], label: str) -> tuple[str, ...]:
    found = {part: Counter(str(row[label]) for row in rows.rows) for part, rows in parts.items()}
    if len(found["train"]) < 2:
        only = next(iter(found["train"]))
        raise DataError(f"{source}: the label {label!r} is {only!r} in all rows to train on: it takes two classes or more")
    if len(found["train"]) > max(2, found["train"].total() / 2):
        raise _too_many(source, label, list(found["train"].elements()))
    for part in ("validation", "test"):
        for row, at in zip(parts[part].rows, parts[part].at, strict=True):
            if row[label] not in found["train"]:
                raise DataError(f"{at}: the label {row[label]!r} is in no row of train, so that it cannot be learned; add some")
    whole = all(re.fullmatch(r"0|-?[1-9]\d*", name) for name in found["train"])
    return tuple(sorted(found["train"], key=(lambda name: (int(name), name)) if whole else None))


def _oddities(parts: dict[str, _Part], label: str, labels: tuple[str, ...]) -> list[str]:
    counts = {part: Counter(row[label] for row in rows.rows) for part, rows in parts.items()}
    total = sum(counts.values(), Counter())
    shown = ", ".join(f"{name!r} {total[name]:,}" for name in labels[:20])
    told = [f"{len(labels)} classes: {shown}{' ...' if len(labels) > 20 else ''}"]
    if tiny := [name for name in labels if any(not counts[part][name] for part in ORDER)]:
        told.append(f"not in every part, having few rows: {', '.join(repr(name) for name in tiny[:10])}")
    if odd := [name for name in labels if name.strip().lower() in MISSING]:
        told.append(
            f"{odd[0]!r} is taken as the name of a class ({total[odd[0]]:,} rows); if a label is missing there, empty the cells"
        )
    alike: dict[str, str] = {}
    twins = [(alike.setdefault(" ".join(name.lower().split()), name), name) for name in labels]
    return told + [f"the classes {a!r} and {b!r} differ in case or spaces alone: are they one?" for a, b in twins if a != b]


def _dataset(rows: list[dict[str, Any]]) -> Any:
    """The rows as a `datasets.Dataset`. Turns keep the keys that they have: none is filled up with the others'."""
    import datasets

    def feature(name: str) -> Any:
        values = [row[name] for row in rows]
        if all(isinstance(value, float) for value in values):
            return datasets.Value("float64")
        if all(isinstance(value, str) for value in values):
            return datasets.Value("large_string")
        if name == "tools":
            return datasets.Json()
        turn = {"role": datasets.Value("string"), "content": datasets.Value("large_string")}
        plain = all(set(each) == set(turn) for value in values for each in value)
        return datasets.List(turn if plain else datasets.Json())

    return datasets.Dataset.from_dict(
        {name: [row[name] for row in rows] for name in rows[0]},
        features=datasets.Features({name: feature(name) for name in rows[0]}),
    )
