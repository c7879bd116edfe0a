"""A run's folder: its configuration, its result, and who may write to it."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import shutil
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from delora.errors import UserError
from delora.formats.files import read_json, write_atomically
from delora.training.config import Experiment, differences

__all__ = ["Result", "Row", "RunContext", "RunError", "as_csv", "best_rows", "claim", "discard", "exclusive", "write_json"]

CONFIG, RESULT, METRICS, FAILED = "config.json", "result.json", "metrics.jsonl", "failed.json"


class RunError(UserError, RuntimeError):
    """A run cannot be made, or did not come out as it must."""


@dataclass(frozen=True)
class RunContext:
    """Where one run goes and what it is called.

    ``folder`` is the run's own; ``shared`` is for what is the same in all runs of an experiment, such as encoded pictures.
    ``row`` and ``setting`` are those of its `Result`; ``console`` tells how it goes.
    """

    folder: Path
    shared: Path
    row: str
    setting: str
    console: Console


@dataclass(frozen=True)
class Result:
    """What one run gave.

    ``row`` is the run's line in a table, ``setting`` what it shares with its runs of other seeds, ``folder`` the name of
    its folder. ``validation`` is in ``metric``, at the epoch that was the best in it; there, ``test`` is in ``reported``,
    and ``scores`` has every metric of the task on the test part. ``distance`` is the mean |dW|/|W| of the adapted layers.
    A run whose loss ceased to be a number has ``diverged``, the step at which it was seen, and no scores.
    """

    name: str
    row: str
    setting: str
    folder: str
    seed: int
    task: str
    method: str
    metric: str
    reported: str
    trainable: int
    seconds: float
    validation: float | None = None
    test: float | None = None
    scores: dict[str, float] = dataclasses.field(default_factory=dict)
    best_epoch: int | None = None
    adapter_bytes: int | None = None
    distance: float | None = None
    bound_used: float | None = None
    diverged: int | None = None

    def write(self, folder: Path) -> None:
        write_json(folder / RESULT, dataclasses.asdict(self))

    @classmethod
    def read(cls, folder: Path) -> Result | None:
        """The result of a finished run; None for one that is not finished.

        Raises:
            RunError: the file is of another version.
        """
        return cls.of(read_json(folder / RESULT), folder) if (folder / RESULT).is_file() else None

    @classmethod
    def of(cls, data: Any, where: Path) -> Result:
        try:
            return cls(**data)
        except TypeError as error:
            raise RunError(
                f"{where} holds a run of another version of delora ({error}): run it anew in another folder"
            ) from error


@dataclass(frozen=True)
class Row:
    """A line of a table: the runs of one setting, one for each seed."""

    runs: list[Result]

    @property
    def name(self) -> str:
        return self.runs[0].row

    @property
    def setting(self) -> str:
        return self.runs[0].setting

    @property
    def diverged(self) -> list[Result]:
        return [run for run in self.runs if run.test is None]

    def values(self, score: Callable[[Result], float | None]) -> list[float]:
        """One figure of each run that has it."""
        return [value for run in self.runs if (value := score(run)) is not None]

    def validation(self) -> float:
        """The mean over seeds, by which a row's setting is chosen. One that diverged with any seed comes last."""
        return -math.inf if self.diverged else statistics.fmean(self.values(lambda run: run.validation))


def best_rows(results: Sequence[Result]) -> list[Row]:
    """The rows of a table: of the settings that share one, and its task, the best by the mean validation."""
    settings: dict[tuple[str, str, str], Row] = {}
    for result in results:
        settings.setdefault((result.task, result.row, result.setting), Row([])).runs.append(result)
    rows: dict[tuple[str, str], Row] = {}
    for row in settings.values():
        key = (row.runs[0].task, row.name)
        rows[key] = max(rows.get(key, row), row, key=Row.validation)
    return list(rows.values())


def write_json(file: Path, value: Any) -> None:
    """A JSON file, whole or not there."""
    write_atomically(file, (json.dumps(value, indent=1 if isinstance(value, dict) else None, allow_nan=False) + "\n").encode())


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as the text of a CSV file, with a column for every key that any of them has."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def claim(folder: Path, experiment: Experiment) -> None:
    """Make the folder that of this experiment, or find that it is.

    Raises:
        RunError: it is another experiment's, or holds other things; nothing is changed.
    """
    settings, file = experiment.model_dump(mode="json"), folder / CONFIG
    if file.is_file():
        free = ("out", "about")  # they decide no number
        changes = [c for c in differences(read_json(file), settings) if c[0].partition(".")[0] not in free]
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
        write_json(file, settings)


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
