"""Adapter files on disk: atomic writes, and reads that never unpickle and explain what is wrong."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from delora.errors import UserError
from delora.methods import Full
from delora.methods.base import Method

__all__ = [
    "PARTIAL",
    "AdapterError",
    "Saved",
    "SavedLayer",
    "TensorFile",
    "get",
    "read_json",
    "whole_folder",
    "write_atomically",
]

MAX_JSON = 64 * 2**20  # bytes; far more than any real adapter needs, far less than fills the memory


class AdapterError(UserError, ValueError):
    """An adapter's files cannot be read, or do not fit the model, which was not changed.

    >>> issubclass(AdapterError, ValueError)
    True
    """


def write_atomically(file: Path, data: bytes) -> None:
    """Write a file so that at any moment, even after a power failure, it holds all old bytes or all new ones.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_atomically(Path(folder) / "a.txt", b"abc")
    ...     (Path(folder) / "a.txt").read_text()
    'abc'
    """
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as out:
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


PARTIAL = ".partial-"  # the prefix of a folder that is being written


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
    with tempfile.TemporaryDirectory(prefix=PARTIAL, dir=target.parent) as scratch:
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


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        AdapterError: the file holds anything else.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = (Path(folder) / "a.json").write_text('{"r": 8}')
    ...     read_json(Path(folder) / "a.json")
    {'r': 8}
    """
    size = file.stat().st_size
    if size > MAX_JSON:
        raise AdapterError(f"{file} has {size:,} bytes, more than an adapter's description can have ({MAX_JSON:,})")

    def no_constant(name: str) -> Any:
        raise ValueError(f"it holds {name}")

    try:
        value = json.loads(file.read_text("utf-8"), parse_constant=no_constant)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{file} is not valid JSON (truncated?): {error}") from error
    if not isinstance(value, dict):
        raise AdapterError(f"{file} must hold a JSON object, not a {type(value).__name__}")
    return value


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
        raise AdapterError(f"{where}: {key!r} must be {names}, got {value!r}")
    return value


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
            self._file = safe_open(path, framework="pt")
            keys = self._file.keys()
            self.shapes = {key: tuple(self._file.get_slice(key).get_shape()) for key in keys}
        except (SafetensorError, OSError) as error:
            raise AdapterError(f"{path} is not a whole safetensors file: {error}") from error

    def read(self, key: str) -> Tensor:
        """One tensor; an AdapterError if it cannot be read or is not finite."""
        try:
            tensor = self._file.get_tensor(key)
        except (SafetensorError, OSError, ValueError) as error:
            raise AdapterError(f"{self.path}: cannot read {key!r}: {error}") from error
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise AdapterError(f"{self.path}: {key!r} holds NaN or infinity")
        return tensor


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
    tensors: dict[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Saved:
    """An adapter on disk: everything but its tensors, which ``file`` reads."""

    source: Path
    file: TensorFile
    layers: dict[str, SavedLayer]
    base_model: str | None
