"""A run's folder: its configuration, its result, and the lock that lets one process at a time write to it."""

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
    """A run is impossible, or its files do not do what the trained model does.

    >>> issubclass(RunError, UserError)
    True
    """


@dataclass(frozen=True)
class RunContext:
    """Where one run goes and what it is called.

    ``folder`` is the run's own; ``shared`` is for files that all runs of an experiment share, such as encoded pictures.
    ``row`` and ``setting`` are those of its `Result`; ``console`` shows its progress.

    >>> RunContext(Path("runs/mine/variants/a"), Path("runs/mine"), "DeLoRA", "DeLoRA 3e-3", Console(quiet=True)).row
    'DeLoRA'
    """

    folder: Path
    shared: Path
    row: str
    setting: str
    console: Console


@dataclass(frozen=True)
class Result:
    """What came of one run.

    ``row`` is the run's line in a table, ``setting`` the name that it shares with its runs of other seeds, ``folder`` the name
    of its folder. ``validation`` is the value of ``metric`` at its best epoch. At that epoch, ``test`` is the value of
    ``reported`` on the test part, and ``scores`` has every metric of the task there. ``distance`` is the mean |dW|/|W| of the
    adapted layers. ``diverged`` is the step at which the loss was no longer finite; such a run has no scores.

    >>> names = dict(name="a", row="LoRA", setting="LoRA 3e-3", folder="a", task="cola", method="LoRA(r=8)")
    >>> result = Result(**names, seed=0, metric="matthews", reported="matthews", trainable=10, seconds=1.0, test=0.6)
    >>> result.test
    0.6
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
        """Write it into the run's folder."""
        write_json(folder / RESULT, dataclasses.asdict(self))

    @classmethod
    def read(cls, folder: Path) -> Result | None:
        """The result of a finished run, or None if the run is not finished.

        Raises:
            RunError: another version wrote the file.
        """
        return cls.of(read_json(folder / RESULT), folder) if (folder / RESULT).is_file() else None

    @classmethod
    def of(cls, data: Any, where: Path) -> Result:
        """The result with these fields. ``where`` is for the message of an error."""
        try:
            return cls(**data)
        except TypeError as error:
            raise RunError(
                f"{where} holds a run of another version of delora ({error}): run it anew in another folder"
            ) from error


@dataclass(frozen=True)
class Row:
    """A line of a table: the runs of one setting, one for each seed.

    >>> names = dict(name="a", row="LoRA", setting="LoRA 3e-3", folder="a", task="cola", method="LoRA(r=8)")
    >>> result = Result(**names, seed=0, metric="matthews", reported="matthews", trainable=10, seconds=1.0, test=0.6)
    >>> Row([result]).values(lambda run: run.test)
    [0.6]
    """

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
        """One value of each run that has it."""
        return [value for run in self.runs if (value := score(run)) is not None]

    def validation(self) -> float:
        """The mean over seeds, by which a row's setting is chosen; -inf if it diverged with any seed."""
        return -math.inf if self.diverged else statistics.fmean(self.values(lambda run: run.validation))


def best_rows(results: Sequence[Result]) -> list[Row]:
    """The rows of a table: among the settings of one row and one task, the best by its mean validation.

    >>> names = dict(name="a", row="LoRA", folder="a", task="cola", method="LoRA(r=8)", metric="matthews")
    >>> rest = dict(seed=0, reported="matthews", trainable=10, seconds=1.0, test=0.6)
    >>> low, high = (Result(**names, **rest, setting=f"LoRA {v}", validation=v) for v in (0.5, 0.7))
    >>> [row.setting for row in best_rows([low, high])]
    ['LoRA 0.7']
    """
    settings: dict[tuple[str, str, str], Row] = {}
    for result in results:
        settings.setdefault((result.task, result.row, result.setting), Row([])).runs.append(result)
    rows: dict[tuple[str, str], Row] = {}
    for row in settings.values():
        key = (row.runs[0].task, row.name)
        rows[key] = max(rows.get(key, row), row, key=Row.validation)
    return list(rows.values())


def write_json(file: Path, value: Any) -> None:
    """Write a JSON file; it exists only when it is complete.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_json(Path(folder, "scores.json"), [0.5, 0.7])
    ...     Path(folder, "scores.json").read_text()
    '[0.5, 0.7]\\n'
    """
    write_atomically(file, (json.dumps(value, indent=1 if isinstance(value, dict) else None, allow_nan=False) + "\n").encode())


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as the text of a CSV file, with a column for each key that any of them has.

    >>> print(as_csv([{"case": "LoRA", "test": 0.6}, {"case": "DeLoRA", "seed": 1}]), end="")
    case,test,seed
    LoRA,0.6,
    DeLoRA,,1
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def claim(folder: Path, experiment: Experiment) -> None:
    """Make the folder this experiment's: write its configuration, or check that the folder already has it.

    Raises:
        RunError: it is another experiment's, or holds other things; nothing is changed.
    """
    settings, file = experiment.model_dump(mode="json"), folder / CONFIG
    if file.is_file():
        free = ("out", "about")  # no result depends on them
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
    """Delete a run's folder. A folder that holds no run is left alone.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     discard(Path(folder))
    ...     Path(folder).is_dir()
    True
    """
    if (folder / CONFIG).is_file():
        # Rename first: a deletion that is interrupted must not leave half a run.
        trash = folder.with_name(f".{folder.name}.deleted")
        shutil.rmtree(trash, ignore_errors=True)
        folder.rename(trash)
        shutil.rmtree(trash)


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Within the context no other process may run in this folder. The lock ends with the process, however that ends.

    Raises:
        RunError: another process is running there.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder, exclusive(Path(folder, "run")):
    ...     with exclusive(Path(folder, "run")):
    ...         pass
    Traceback (most recent call last):
        ...
    delora.training.runs.RunError: another process is running in ...
    """
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
