"""Adapter files on disk: atomic writes, reads that never unpickle and that say what is wrong."""

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
    "AdapterError",
    "Saved",
    "SavedLayer",
    "TensorFile",
    "get",
    "read_json",
    "whole_folder",
    "write_atomically",
]

MAX_JSON = 64 * 2**20  # far above any real adapter, far below what hurts


class AdapterError(UserError, ValueError):
    """An adapter's files cannot be read, or do not fit the model. Nothing in the model was changed."""


def write_atomically(file: Path, data: bytes) -> None:
    """The file holds the old bytes or the new ones at any moment, also if the machine stops."""
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
    if hasattr(os, "O_DIRECTORY"):  # makes the rename itself last, on systems that can
        directory = os.open(file.parent, os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


PARTIAL = ".partial-"  # how a folder that is being written begins


@contextmanager
def whole_folder(target: Path, replace: bool = False) -> Iterator[Path]:
    """Within the context a new folder to fill. When the context ends well, it takes its place as ``target`` by a rename.

    So what lies at ``target`` is always whole. If another process was faster, its folder stays, unless ``replace``.
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
    """A JSON object; an AdapterError for anything else."""
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
    """``data[key]``, of the right type; an AdapterError that says where it is missing or wrong."""
    value = data.get(key, default)
    if value is ...:
        raise AdapterError(f"{where}: {key!r} is missing")
    if value is not default and (not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)):
        names = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise AdapterError(f"{where}: {key!r} must be {names}, got {value!r}")
    return value


class TensorFile:
    """A safetensors file: what it holds is known before any of it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = safe_open(path, framework="pt")
            keys = self._file.keys()
            self.shapes = {key: tuple(self._file.get_slice(key).get_shape()) for key in keys}
        except (SafetensorError, OSError) as error:
            raise AdapterError(f"{path} is not a whole safetensors file: {error}") from error

    def read(self, key: str) -> Tensor:
        try:
            tensor = self._file.get_tensor(key)
        except (SafetensorError, OSError, ValueError) as error:
            raise AdapterError(f"{self.path}: cannot read {key!r}: {error}") from error
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise AdapterError(f"{self.path}: {key!r} holds NaN or infinity")
        return tensor


@dataclass(frozen=True)
class SavedLayer:
    """One layer of an adapter on disk; ``tensors`` maps each tensor's name to its key in the file and its shape."""

    method: Method | Full
    dropout: float = 0.0
    strength: float = 1.0
    shape: tuple[int, ...] | None = None  # of W, where it is known
    base: dict[str, Any] | None = None  # what is known of the W it was trained on
    tensors: dict[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Saved:
    """An adapter on disk, read but for its tensors."""

    source: Path
    file: TensorFile
    layers: dict[str, SavedLayer]
    base_model: str | None
