"""The rows of a user's own files, with the place of each: CSV, TSV, JSON, JSONL, Parquet, a folder of them, a data set.

Nothing guesses types: a cell of a CSV file stays the text that stands in it ("01", "NA"), for it may be a class's name.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from delora.data.examples import DataError
from delora.errors import nearest_path

__all__ = ["LARGEST", "PARTS", "Rows", "brief", "files", "part_of", "read_file", "read_source"]

LARGEST = 1_000_000  # characters of a cell
SEPARATORS = (",", ";", "\t")
# How the parts of a data set are called in files' names, and what they are called here.
PARTS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev", "eval"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}


@dataclass
class Rows:
    """Rows as dicts that all have the same ``columns``; ``at`` says where each stands, such as "tickets.csv, row 3".

    >>> Rows(["text"], [{"text": "Hello."}], ["mine.csv, row 2"]).values("text")
    ['Hello.']
    """

    columns: list[str]
    rows: list[dict[str, Any]] = field(default_factory=list)
    at: list[str] = field(default_factory=list)
    told: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.rows)

    def values(self, column: str) -> list[Any]:
        """A column's values, row by row."""
        return [row[column] for row in self.rows]


def read_source(source: str | Path) -> dict[str, Rows]:
    """The parts of a file, a folder, a saved data set or a data set on the Hub: "train" alone, or those that it names.

    Raises:
        DataError: it is not there, or is malformed; the message names the file, the row and what to do.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "mine.csv").write_text("text,label\\nHello.,01\\n")
    ...     read_source(f"{folder}/mine.csv")["train"].rows
    [{'text': 'Hello.', 'label': '01'}]
    """
    path = Path(source)
    if path.is_file():
        return {"train": read_file(path)}
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _saved(path)
    if path.is_dir():
        return {part: _joined([read_file(file) for file in found]) for part, found in files(path).items()}
    return _hub(str(source))


def read_file(file: Path) -> Rows:
    """The rows of one file.

    Raises:
        DataError: its ending is of no known kind, or it is malformed.
    """
    reader = READERS.get(file.suffix.lower())
    if reader is None:
        what = f"a name that ends in {file.suffix}" if file.suffix else "a name without an ending"
        raise DataError(f"{file}: {what} says no format that is read; save it as one of {', '.join(READERS)}")
    try:
        if not file.stat().st_size:
            raise DataError(f"{file} is empty: it needs a row for each example")
        rows = reader(file)
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}") from error
    if not rows.columns:
        raise DataError(f"{file} has no columns: it needs a row for each example")
    return rows


def files(folder: Path) -> dict[str, list[Path]]:
    """The files of a folder by the part that their names, or those of the folders they are in, begin with.

    Where no name is that of a part, all are "train".

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for name in ("train.csv", "dev.csv"):
    ...         _ = Path(folder, name).write_text("text")
    ...     sorted(files(Path(folder)))
    ['train', 'validation']
    """
    inside = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    data = sorted(p for p in inside if p.suffix.lower() in READERS and not any(part.startswith(".") for part in p.parts))
    if not data:
        raise DataError(f"{folder} is a folder without data: none of its files ends in {', '.join(READERS)}")
    parts: dict[str, list[Path]] = {}
    for path in data:
        named = next((part for name in reversed(path.parts) if (part := part_of(name))), None)
        parts.setdefault(named or "", []).append(path)
    unnamed = parts.pop("", [])
    if parts and unnamed:
        raise DataError(
            f"{folder / unnamed[0]} is of no part, but {folder / next(iter(parts.values()))[0]} is: let the files' names begin "
            "with train, validation or test"
        )
    return {part: [folder / p for p in paths] for part, paths in (parts or {"train": unnamed}).items()}


def part_of(name: str) -> str | None:
    """The part that a file's name begins with.

    >>> part_of("dev-00001.parquet"), part_of("testimony.csv")
    ('validation', None)
    """
    return PARTS.get(re.split(r"[^a-z]", name.lower(), maxsplit=1)[0])


def _joined(all_rows: list[Rows]) -> Rows:
    """The rows of several files, which must have the same columns."""
    first, *others = all_rows
    joined = Rows(list(first.columns), list(first.rows), list(first.at), list(first.told))
    for other in others:
        if set(other.columns) != set(first.columns):
            odd = sorted(set(other.columns) ^ set(first.columns))[0]
            where, has = (other, first) if odd in first.columns else (first, other)
            raise DataError(
                f"{_file(where)} has no column {odd!r}, which {_file(has)} has: all files of a part need the same columns"
            )
        joined.rows += other.rows
        joined.at += other.at
        joined.told += other.told
    return joined


def _file(rows: Rows) -> str:
    return rows.at[0].rpartition(", ")[0] if rows.at else "a file without rows"


# ---------------------------------------------------------------- text


def _text(file: Path) -> str:
    """A text file's content: UTF-8, with or without a mark of the byte order, or UTF-16 with one."""
    data = file.read_bytes()
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        try:
            return data.decode("utf-16")
        except UnicodeDecodeError as error:
            raise DataError(f"{file} begins as UTF-16 and is not: {error.reason}; save it as UTF-8") from error
    if b"\0" in data:
        row = data[: data.index(b"\0")].count(b"\n") + 1
        raise DataError(f"{file}, line {row}: holds a zero byte, so it is no text file; save it as {file.suffix} in UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        row = data[: error.start].count(b"\n") + 1
        raise DataError(
            f"{file}, line {row}: the byte 0x{data[error.start]:02x} is not UTF-8; save the file as UTF-8 (in a spreadsheet: "
            f'"CSV UTF-8"; at a shell: iconv -f latin1 -t utf-8)'
        ) from error


@contextmanager
def _cells() -> Iterator[None]:
    before = csv.field_size_limit(LARGEST)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _csv(file: Path) -> Rows:
    """A table of separated values: by tabs (TSV), else by commas, semicolons or tabs, whichever divides all rows alike."""
    text = _text(file)
    separators = ("\t",) if file.suffix.lower() == ".tsv" else SEPARATORS
    with _cells():
        return _separated(file, text, max(separators, key=lambda each: _regular(text, each)))


def _regular(text: str, separator: str) -> tuple[bool, int]:
    """Whether a separator divides the first rows alike, and into how many cells."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
    try:
        widths = [len(row) for row, _ in zip((row for row in reader if row), range(50), strict=False)]
    except csv.Error:
        return False, 0
    return len(widths) > 0 and widths[0] > 1 and len(set(widths)) == 1, widths[0] if widths else 0


def _separated(file: Path, text: str, separator: str) -> Rows:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    row, table = 0, []
    try:
        for row, cells in enumerate(reader, 1):
            if any(cell.strip() for cell in cells) or len(cells) > 1:  # blank lines are no rows
                table.append((row, cells))
    except csv.Error as error:
        raise DataError(f"{file}, row {row + 1}: {_refusal(str(error))}") from error
    if not table:
        raise DataError(f"{file} holds blank lines alone: it needs a row for each example, below one of the columns' names")
    (_, header), *body = table
    names = [name.strip() for name in header]
    for name in names:
        if name and names.count(name) > 1:
            raise DataError(f"{file}, row 1: two columns are called {name!r}; rename one")
    for row, cells in body:
        if len(cells) != len(header):
            raise DataError(
                f"{file}, row {row}: has {len(cells)} cells, but row 1 names {len(header)} columns ({', '.join(names)}); "
                f"a text with {'a tab' if separator == chr(9) else repr(separator)} in it must stand in quotes"
            )
    rows = Rows([name for name in names if name])
    if len(rows.columns) < len(names):
        rows.told.append(f"{file}: {len(names) - len(rows.columns)} columns without a name are left out")
    rows.rows = [{name: cell for name, cell in zip(names, cells, strict=True) if name} for _, cells in body]
    rows.at = [f"{file}, row {row}" for row, _ in body]
    return rows


def _refusal(problem: str) -> str:
    if "field limit" in problem:
        return f"a cell has more than {LARGEST:,} characters: either a quote is never closed, or cut the text"
    if "unexpected end" in problem:
        return "a quote is opened and never closed; close it, or double a quote that belongs to the text"
    if "expected after" in problem:
        return "a quote inside a quoted cell must be doubled"
    return f"{problem}; save the table as CSV anew"


# ---------------------------------------------------------------- JSON


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise _Twice(next(name for name in names if names.count(name) > 1))
    return made


class _Twice(ValueError):
    pass


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except _Twice as error:
        raise DataError(f"{where}: the key {str(error)!r} stands twice in one object; rename one") from error
    except json.JSONDecodeError as error:
        column = f"character {error.colno}" if "\n" not in text.strip() else f"line {error.lineno}, character {error.colno}"
        raise DataError(f"{where}: is not valid JSON at {column} ({error.msg}); correct it") from error
    except RecursionError as error:
        raise DataError(f"{where}: its values are nested too deeply; a row is an object of texts and lists") from error
    except ValueError as error:  # an integer of thousands of digits
        raise DataError(f"{where}: is not valid JSON ({error}); correct it") from error


def _jsonl(file: Path) -> Rows:
    return _lines(file, _text(file))


def _lines(file: Path, text: str) -> Rows:
    # Not splitlines(), which would cut at separators that JSON allows inside a string.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if lines and lines[0][1].strip() == "[":
        raise DataError(f"{file}, line 1: is a list over many lines, not one object a line; name the file .json")
    return _objects(file, [(f"{file}, row {number}", _parsed(line, f"{file}, row {number}")) for number, line in lines])


def _json(file: Path) -> Rows:
    """A list of objects; or, as many write it, one object a line."""
    text = _text(file)
    lines = [line for line in text.split("\n") if line.strip()]
    if len(lines) > 1 and all(line.strip().startswith("{") and line.strip().endswith("}") for line in lines):
        return _lines(file, text)
    value = _parsed(text, str(file))
    if isinstance(value, dict):
        lists = [key for key, inner in value.items() if isinstance(inner, list) and inner and isinstance(inner[0], dict)]
        hint = f"its rows seem to be under {lists[0]!r}: write that list alone" if lists else "write [{...}, {...}]"
        raise DataError(f"{file}: holds one object, expected a list with one object for each row; {hint}")
    if not isinstance(value, list):
        raise DataError(f"{file}: holds a {type(value).__name__}, expected a list with one object for each row")
    return _objects(file, [(f"{file}, row {number}", item) for number, item in enumerate(value, 1)])


def _objects(file: Path, items: list[tuple[str, Any]]) -> Rows:
    columns: dict[str, None] = {}
    for where, item in items:
        if not isinstance(item, dict):
            raise DataError(f'{where}: expected an object such as {{"text": "...", "label": "..."}}, got {brief(item)}')
        columns |= dict.fromkeys(item)
    if not items:
        raise DataError(f"{file} holds no rows: it needs one object for each example")
    return Rows(list(columns), [{c: item.get(c) for c in columns} for _, item in items], [where for where, _ in items])


def brief(value: Any) -> str:
    """A value as a message shows it: in at most 60 characters.

    >>> brief("a" * 100)
    "'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa..."
    """
    text = repr(value[:100] if isinstance(value, str | bytes) else value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# ---------------------------------------------------------------- Parquet, and the datasets library


def _parquet(file: Path) -> Rows:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(file).read()
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise DataError(f"{file} is no Parquet file, or not a whole one ({reason}); write or fetch it anew") from error
    names = table.column_names
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"{file}: two columns are called {name!r}; rename one")
    rows = table.to_pylist()
    return Rows(names, rows, [f"{file}, row {number}" for number in range(1, len(rows) + 1)])


def _saved(folder: Path) -> dict[str, Rows]:
    import datasets
    import pyarrow

    try:
        loaded = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, pyarrow.ArrowException) as error:
        raise DataError(f"{folder} is a damaged data set ({type(error).__name__}: {error}); save it anew") from error
    return _parts(loaded if isinstance(loaded, dict) else {"train": loaded}, str(folder))


def _hub(name: str) -> dict[str, Rows]:
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name) or Path(name).suffix.lower() in READERS:
        raise DataError(f"there is no file and no folder {name}{nearest_path(name)}: give the path of your data")
    import datasets

    try:
        loaded = datasets.load_dataset(name)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"there is no file and no folder {name!r}{nearest_path(name)}, and the Hugging Face Hub did not provide "
            f"a data set of this name ({type(error).__name__}); give a file's path, or fetch it where there is a network: "
            f"hf download {name} --repo-type dataset --local-dir FOLDER"
        ) from error
    return _parts(loaded, name)


def _parts(loaded: Any, source: str) -> dict[str, Rows]:
    """The parts of a `datasets.DatasetDict`. Classes that are stored as numbers get their names."""
    import datasets

    found = {part_of(name): name for name in reversed(loaded)}
    if unknown := [name for name in loaded if part_of(name) is None]:
        if len(loaded) > 1:
            raise DataError(f"{source}: {unknown[0]!r} is of no part; name the parts train, validation and test")
        found = {"train": unknown[0]}
    parts = {}
    for part, name in found.items():
        data = loaded[name]
        columns, rows = list(data.column_names), [dict(row) for row in data]
        for column, feature in data.features.items():
            if isinstance(feature, datasets.ClassLabel) and feature.names:
                for row in rows:
                    row[column] = None if row[column] is None or row[column] < 0 else feature.names[row[column]]
        parts[str(part)] = Rows(columns, rows, [f"{source}, {name}, row {number}" for number in range(1, len(rows) + 1)])
    return parts


READERS = {".csv": _csv, ".tsv": _csv, ".json": _json, ".jsonl": _jsonl, ".ndjson": _jsonl, ".parquet": _parquet}
