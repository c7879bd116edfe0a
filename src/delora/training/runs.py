"""A run's folder: its configuration, its result, and who may write to it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from delora.files import read_json, write_atomically
from delora.training.config import Experiment, differences

CONFIG, RESULT, METRICS = "config.json", "result.json", "metrics.jsonl"


class RunError(RuntimeError):
    """A run cannot be made, or did not come out as it must."""


@dataclass(frozen=True)
class Result:
    """What one run gave. Accuracies and ``distance``, the mean |dW|/|W| of the adapted layers, are shares.

    ``row`` is the run's line in a table, ``folder`` the name of its folder. A run whose loss ceased to be a number has
    ``diverged``, the step at which it was seen, and no scores.
    """

    name: str
    row: str
    folder: str
    method: str
    trainable: int
    seconds: float
    validation_accuracy: float | None = None
    test_accuracy: float | None = None
    best_epoch: int | None = None
    adapter_bytes: int | None = None
    distance: float | None = None
    bound_used: float | None = None
    diverged: int | None = None

    def write(self, folder: Path) -> None:
        write_json(folder / RESULT, dataclasses.asdict(self))

    @classmethod
    def read(cls, folder: Path) -> Result | None:
        """The result of a finished run; None for one that is not finished."""
        return cls(**read_json(folder / RESULT)) if (folder / RESULT).is_file() else None


def shown(results: Sequence[Result]) -> list[Result]:
    """One result for each row of a table: the best by validation of those that share it."""
    rows: dict[str, Result] = {}
    for result in results:
        rows[result.row] = max(rows.get(result.row, result), result, key=lambda r: r.validation_accuracy or 0.0)
    return list(rows.values())


def write_json(file: Path, value: Any) -> None:
    write_atomically(file, (json.dumps(value, indent=1 if isinstance(value, dict) else None, allow_nan=False) + "\n").encode())


def claim(folder: Path, experiment: Experiment) -> None:
    """Make the folder that of this experiment, or find that it is.

    Raises:
        RunError: it is another experiment's, or holds other things; nothing is changed.
    """
    asked, file = experiment.model_dump(mode="json"), folder / CONFIG
    if file.is_file():
        changes = [(key, was, now) for key, was, now in differences(read_json(file), asked) if key != "out"]
        if changes:
            key, was, now = changes[0]
            more = f" (and {len(changes) - 1} more)" if len(changes) > 1 else ""
            raise RunError(
                f"{folder} holds a run with other settings: {key} is {json.dumps(was)} there, {json.dumps(now)} now{more}; "
                "choose another folder with out=..., or start anew with --fresh, which deletes that run"
            )
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunError(f"{folder} is not empty and holds no run: choose another folder with out=...")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(file, asked)


def discard(folder: Path) -> None:
    """Delete a run, and nothing that is none."""
    if (folder / CONFIG).is_file():
        # One rename first: a deletion that is stopped half-way must not leave half a run.
        trash = folder.with_name(f".{folder.name}.deleted")
        shutil.rmtree(trash, ignore_errors=True)
        folder.rename(trash)
        shutil.rmtree(trash)


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Within the context no other process may run in this folder. The lock ends with the process, however that ends."""
    try:
        import fcntl
    except ImportError:  # Windows has no such lock
        yield
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f".{folder.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RunError(f"another process is running in {folder}") from error
        yield
