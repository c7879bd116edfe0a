"""Adapter files on disk: writes that are whole or not there, and reads that never unpickle, are bounded, and explain errors."""

from __future__ import annotations

import errno
import gc
import importlib
import json
import math
import os
import re
import reprlib
import secrets
import shutil
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from delora.errors import UserError
from delora.methods import Full
from delora.methods.base import Method

fcntl: Any = None  # Windows has none
with suppress(ImportError):
    fcntl = importlib.import_module("fcntl")

__all__ = [
    "PARTIAL",
    "AdapterError",
    "Saved",
    "SavedLayer",
    "TensorFile",
    "beyond_float32",
    "get",
    "known_keys",
    "leftovers",
    "locked",
    "no_room",
    "parsed",
    "printable",
    "read_json",
    "require_bounded",
    "shown",
    "too_much",
    "whole_folder",
    "write_atomically",
]

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
TORCHS_FULL = ("iostream error", "PytorchStreamWriter failed writing", "inline_container")
# Enough for 60,000 adapted layers: each takes about 450 bytes, 4 objects and lists, and 12 values.
MAX_JSON = 64 * 2**20  # bytes
MAX_CONTAINERS, MAX_VALUES, MAX_DIGITS = 2**18, 2**20, 40
MAX_HEADER, MAX_TENSORS = 48 * 2**20, 2**18  # of a safetensors file: bytes of its header, tensors
MAX_NAME, MAX_PARTS = 1024, 64  # characters of a layer's or a tensor's name, parts between its dots
STALE = 600.0  # seconds after which a temporary file, or a lock that no system call holds, is taken for one of a dead process
PATIENCE = 120.0  # seconds that a saver waits for another one


def printable(text: str, newlines: bool = True) -> str:
    r"""A text with every character that is not printable written as its escape; without ``newlines``, line breaks as well.

    A name from a file can hold the codes that move a terminal's cursor or rename its window.

    >>> printable("q\x1b[2J\nv"), printable("q\nv", newlines=False)
    ('q\\x1b[2J\nv', 'q\\nv')
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or (newlines and c == "\n") else repr(c)[1:-1] for c in text)


_short = reprlib.Repr()
_short.maxstring = _short.maxother = 200
_short.maxlong = MAX_DIGITS
_short.maxlevel = 3


def shown(value: object) -> str:
    """The ``repr`` of a value from a file, cut where it is long.

    >>> shown("a" * 1000)[:4], len(shown("a" * 1000))
    ("'aaa", 200)
    """
    return _short.repr(value)


class AdapterError(UserError, ValueError):
    r"""An adapter's files cannot be read, or do not fit the model, which was not changed. Its text can be printed safely.

    >>> issubclass(AdapterError, ValueError), str(AdapterError("no layer \x1b[2J"))
    (True, 'no layer \\x1b[2J')
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


# ---------------------------------------------------------------- writing


def write_atomically(file: Path, data: bytes) -> None:
    """Write a file so that at any moment, even after a power failure, it holds all old bytes or all new ones.

    Temporary files of this file that a process left which was killed are removed when they are ten minutes old.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_atomically(Path(folder) / "a.txt", b"abc")
    ...     (Path(folder) / "a.txt").read_text()
    'abc'
    """
    temporary, alone = file.with_name(f".{file.name}.tmp"), True
    try:
        opened = temporary.open("xb")
    except FileExistsError:  # another process writes the file now, or was killed while it did
        temporary, alone = file.with_name(f".{file.name}.{secrets.token_hex(8)}.tmp"), False
        opened = temporary.open("xb")
    try:
        with opened as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if hasattr(os, "O_DIRECTORY"):  # flushes the rename to the disk, on systems that support it
        directory = os.open(file.parent, os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    for old in () if alone else leftovers(file):  # looked for only then: a folder may have as many files as a data set
        with suppress(FileNotFoundError):
            if time.time() - old.stat().st_mtime > STALE:
                old.unlink()


def no_room(error: BaseException) -> str | None:
    """Why a file could not be written, if the disk is full or a limit on it is reached; None if that is not what happened.

    torch's and safetensors' own errors are no OSErrors, and say it in words alone.

    >>> no_room(OSError(errno.ENOSPC, "No space left on device")), no_room(OSError(errno.ENOENT, "No such file"))
    ('No space left on device', None)
    """
    if isinstance(error, OSError):
        return error.strerror if error.errno in FULL else None
    text = str(error)
    code = next((code for code in FULL if f"os error {code})" in text or os.strerror(code) in text), None)
    if code is not None:
        return os.strerror(code)
    return "torch could not write all of it" if any(words in text for words in TORCHS_FULL) else None


def leftovers(file: Path) -> list[Path]:
    """The temporary files of `write_atomically` for a file: of processes that write it now, or that were killed.

    >>> leftovers(Path("no such folder") / "a.txt")
    []
    """
    name = re.compile(rf"\.{re.escape(file.name)}(\.[0-9a-f]+)?\.tmp")
    return [other for other in _inside(file.parent) if name.fullmatch(other.name)]


def _inside(folder: Path) -> list[Path]:
    with suppress(FileNotFoundError):
        return list(folder.iterdir())
    return []


@contextmanager
def locked(file: Path) -> Iterator[BinaryIO]:
    """A context in which this process alone has a lock file, which is open for notes on what is being done.

    The lock ends with the process, however that ends: the next process then finds its notes. Else the file is deleted.

    Raises:
        AdapterError: another process had it for two minutes.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with locked(Path(folder) / ".lock") as notes:
    ...         _ = notes.write(b"a")
    ...     list(Path(folder).iterdir())
    []
    """
    end = time.monotonic() + PATIENCE
    while (notes := _flocked(file) if fcntl is not None else _created(file)) is None:
        if time.monotonic() > end:
            raise AdapterError(
                f"another process has been saving into {file.parent} for {PATIENCE:.0f} seconds: save into another folder, or "
                f"delete {file} if there is no such process"
            )
        time.sleep(0.01)
    try:
        yield notes
    finally:
        path, ours = Path(notes.name), os.fstat(notes.fileno())
        if fcntl is None:  # Windows deletes no open file
            notes.close()
        with suppress(OSError):
            if os.path.samestat(ours, path.stat()):
                path.unlink()
        notes.close()


def _flocked(file: Path) -> BinaryIO | None:
    """The lock file, held through the system; None if another process holds it."""
    notes = _opened(file, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(notes, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The one who had it before may have deleted the file that was opened here: then it locks nobody out.
        if os.path.samestat(os.fstat(notes.fileno()), file.stat()):
            return notes
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError:  # a file system without locks
        notes.close()
        return _created(file.with_name(f"{file.name}-"))
    notes.close()
    return None


def _created(file: Path) -> BinaryIO | None:
    """The lock file, held by its existence; None if another process holds it. It is taken from one that holds it too long."""
    left = b""
    try:
        if time.time() - file.stat().st_mtime > STALE:
            taken = file.with_name(f"{file.name}.{secrets.token_hex(8)}.tmp")
            os.replace(file, taken)
            left = taken.read_bytes()[:4096]
            taken.unlink()
    except FileNotFoundError:
        pass
    try:
        notes = _opened(file, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    except FileExistsError:
        return None
    notes.write(left)
    notes.seek(0)
    return notes


def _opened(file: Path, flags: int) -> BinaryIO:
    return open(file, "r+b", opener=lambda path, _: os.open(path, flags, 0o666))


PARTIAL = ".partial-"  # the prefix of a folder that is being written
ALIVE = ".alive"  # the lock in it of the process that writes


@contextmanager
def whole_folder(target: Path, replace: bool = False) -> Iterator[Path]:
    """A context with a new folder to fill, which is renamed to ``target`` if the context ends without an error.

    So ``target`` is never half-written. If another process was faster, its folder stays, unless ``replace`` is True.

    >>> with tempfile.TemporaryDirectory() as place:
    ...     with whole_folder(Path(place) / "run") as new:
    ...         _ = (new / "a.txt").write_text("abc")
    ...     (Path(place) / "run" / "a.txt").read_text()
    'abc'
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _clear(target.parent)
    with tempfile.TemporaryDirectory(prefix=PARTIAL, dir=target.parent) as scratch, locked(Path(scratch) / ALIVE):
        new, old = Path(scratch) / "new", Path(scratch) / "old"
        new.mkdir()
        yield new
        if replace and target.exists():
            target.rename(old)
        try:
            new.rename(target)
        except OSError:
            if not target.is_dir():
                if old.exists():
                    old.rename(target)
                raise


def _clear(place: Path) -> None:
    """Delete the folders that processes were writing which were killed: nobody has their lock."""
    for scratch in place.glob(f"{PARTIAL}*"):
        if (scratch / ALIVE).is_file() and not (scratch / "old").exists():
            with suppress(OSError):
                notes = _flocked(scratch / ALIVE) if fcntl is not None else None
                if notes is not None:
                    with notes:
                        shutil.rmtree(scratch)


# ---------------------------------------------------------------- reading


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object: of a bounded size, with finite numbers, and with no key twice.

    Raises:
        AdapterError: the file holds anything else, or cannot be read.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = (Path(folder) / "a.json").write_text('{"r": 8}')
    ...     read_json(Path(folder) / "a.json")
    {'r': 8}
    """
    try:
        with file.open("rb") as data:
            raw = data.read(MAX_JSON + 1)
    except OSError as error:
        raise AdapterError(f"{file} cannot be read: {error.strerror or error}") from error
    if len(raw) > MAX_JSON:
        raise AdapterError(
            f"{file} has {file.stat().st_size:,} bytes, more than an adapter's description can have ({MAX_JSON:,})"
        )
    value = parsed(raw, f"{file} is not valid JSON (truncated?)", f"{file} holds more than an adapter's description can have")
    if not isinstance(value, dict):
        raise AdapterError(f"{file} must hold a JSON object, not a {type(value).__name__}")
    return value


def parsed(raw: bytes, damaged: str, large: str) -> Any:
    """The value of a JSON text: of a bounded size, with finite numbers, and with no key twice.

    Raises:
        AdapterError: it is anything else; the message begins with ``damaged`` or, for what is too much, with ``large``.

    >>> parsed(b'{"r": 8}', "a.json is damaged", "a.json is too large")
    {'r': 8}
    """
    if (much := too_much(raw)) is not None:
        raise AdapterError(f"{large}: {much}")
    collecting = gc.isenabled()
    gc.disable()  # it would look at all these values again and again: half of the time
    try:
        return json.loads(
            raw.decode("utf-8"),
            parse_constant=_no_constant,
            parse_int=_whole_number,
            parse_float=_finite_number,
            object_pairs_hook=_without_repetition,
        )
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{damaged}: {error}") from error
    finally:
        if collecting:
            gc.enable()


def too_much(raw: bytes) -> str | None:
    """What a JSON text has too much of to be read; None if it can be.

    >>> too_much(b"[" * 300_000), too_much(b"[]")
    ('300,000 objects and lists; 262,144 are read', None)
    """
    counts = {
        "bytes": (len(raw), MAX_JSON),
        "objects and lists": (raw.count(b"{") + raw.count(b"["), MAX_CONTAINERS),
        "values": (raw.count(b","), MAX_VALUES),
    }
    return next((f"{n:,} {what}; {most:,} are read" for what, (n, most) in counts.items() if n > most), None)


def _no_constant(name: str) -> Any:
    raise ValueError(f"it holds {name}")


def _whole_number(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"it holds a number of {len(text):,} digits")
    return int(text)


def _finite_number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"it holds {text[:MAX_DIGITS]}, which is beyond all numbers")
    return number


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"it holds the key {shown(next(key for key in values if keys.count(key) > 1))} twice")
    return values


def get(data: dict[str, Any], key: str, kind: type | tuple[type, ...], where: object, default: Any = ...) -> Any:
    """``data[key]`` or, if it is missing, ``default``.

    Raises:
        AdapterError: the key is missing without a default, or its value has the wrong type; ``where`` begins the message.

    >>> get({"r": 8}, "r", int, "adapter.json"), get({}, "r", int, "adapter.json", default=None)
    (8, None)
    """
    value = data.get(key, default)
    if value is ...:
        raise AdapterError(f"{where}: {key!r} is missing")
    if value is not default and (not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)):
        names = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise AdapterError(f"{where}: {key!r} must be {names}, got {shown(value)}")
    return value


def known_keys(data: Mapping[str, Any], known: Collection[str], where: object) -> None:
    """Raise an AdapterError if a JSON object has a key that is not known.

    >>> known_keys({"r": 8}, ["r", "alpha"], "adapter.json")
    """
    unknown = next((key for key in data if key not in known), None)
    if unknown is not None:
        raise AdapterError(
            f"{where}: unknown key {shown(unknown)}: known are {', '.join(known)}; it is damaged, or a newer delora wrote it"
        )


def require_bounded(name: str, where: object) -> None:
    """Raise an AdapterError if a layer's or a tensor's name is longer than any model's.

    >>> require_bounded("encoder.layer.0.query", "adapter.json")
    """
    if len(name) > MAX_NAME or name.count(".") >= MAX_PARTS:
        raise AdapterError(
            f"{where}: the name {shown(name)} has {len(name):,} characters in {name.count('.') + 1:,} parts: more than "
            f"{MAX_NAME:,} in {MAX_PARTS} parts are not read"
        )


def beyond_float32(fields: Mapping[str, Any]) -> str | None:
    """The first number among a method's hyperparameters that float32 cannot hold, as ``name = value``; None if there is none.

    >>> beyond_float32({"r": 8, "lam": 1e39}), beyond_float32({"r": 8, "lam": 8.0})
    ('lam = 1e+39', None)
    """
    largest = torch.finfo(torch.float32).max
    for name, value in fields.items():
        if isinstance(value, (int, float)) and not -largest <= value <= largest:
            return f"{name} = {shown(value)}"
    return None


DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL")


class TensorFile:
    """A safetensors file; ``shapes`` holds the shape of every tensor before any tensor is read.

    >>> from safetensors.torch import save_file
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_file({"A": torch.ones(2, 3)}, f"{folder}/a.safetensors")
    ...     file = TensorFile(Path(folder) / "a.safetensors")
    ...     file.shapes, file.read("A").sum().item()
    ({'A': (2, 3)}, 6.0)
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.shapes = _shapes(path)
            self._file = safe_open(path, framework="pt")
            keys = set(self._file.keys())
        except AdapterError:
            raise
        except (SafetensorError, OSError, RuntimeError) as error:
            raise AdapterError(f"{path} is not a whole safetensors file: {error}") from error
        if keys != set(self.shapes):
            raise AdapterError(f"{path} was changed while it was read")

    def read(self, key: str) -> Tensor:
        """One tensor; an AdapterError if it cannot be read or is not finite."""
        try:
            tensor = self._file.get_tensor(key)
        except (SafetensorError, OSError, ValueError) as error:
            raise AdapterError(f"{self.path}: cannot read {key!r}: {error}") from error
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise AdapterError(f"{self.path}: {key!r} holds NaN or infinity")
        return tensor


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes in the header of a safetensors file, after a check of its size and of every entry."""
    broken = f"{path} is not a whole safetensors file"
    with path.open("rb") as data:
        size = int.from_bytes(data.read(8), "little")
        if size > MAX_HEADER:
            raise AdapterError(f"{broken}: its header would have {size:,} bytes, more than {MAX_HEADER:,} are not read")
        header = parsed(data.read(size), broken, f"{path} holds more tensors than are read")
    if not isinstance(header, dict):
        raise AdapterError(f"{broken}: its header is no object")
    header.pop("__metadata__", None)
    if len(header) > MAX_TENSORS:
        raise AdapterError(f"{path} holds {len(header):,} tensors: more than {MAX_TENSORS:,} are not read")
    shapes = {}
    for key, entry in header.items():
        require_bounded(key, path)
        if not isinstance(entry, dict):
            raise AdapterError(f"{broken}: {key!r} is described by {shown(entry)}")
        kind, shape = get(entry, "dtype", str, f"{path}, {key!r}"), get(entry, "shape", list, f"{path}, {key!r}")
        if kind not in DTYPES:
            raise AdapterError(f"{path}: {key!r} is of the dtype {shown(kind)}: {', '.join(DTYPES)} are read")
        if not all(type(n) is int and n >= 0 for n in shape):
            raise AdapterError(f"{broken}: {key!r} has the shape {shown(shape)}")
        shapes[key] = tuple(shape)
    return shapes


@dataclass(frozen=True)
class SavedLayer:
    """One layer of an adapter on disk; ``tensors`` maps each tensor's name to its key in the file and its shape.

    >>> SavedLayer(Full()).strength
    1.0
    """

    method: Method | Full
    dropout: float = 0.0
    strength: float = 1.0
    shape: tuple[int, ...] | None = None  # of W, if known
    base: dict[str, Any] | None = None  # what is known of the W that it was trained on
    peft: str = ""  # PEFT's name of its kind, if PEFT wrote it
    tensors: dict[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Saved:
    """An adapter on disk: everything but its tensors, which ``file`` reads."""

    source: Path
    file: TensorFile
    layers: dict[str, SavedLayer]
    base_model: str | None
