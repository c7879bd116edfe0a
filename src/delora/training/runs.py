"""A run's folder: its configuration, its result, and the lock that lets one process at a time write to it."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import os
import shlex
import shutil
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pydantic import TypeAdapter, ValidationError
from rich.console import Console
from safetensors import SafetensorError

from delora.errors import UserError
from delora.formats.files import AdapterError, get, leftovers, no_room, parsed, read_json, shown, write_atomically
from delora.formats.native import is_adapter
from delora.training.config import Experiment, differences

__all__ = [
    "Interrupted",
    "Result",
    "Row",
    "RunContext",
    "RunError",
    "adapter_in",
    "as_csv",
    "best_rows",
    "claim",
    "discard",
    "exclusive",
    "place",
    "read_metrics",
    "read_samples",
    "refuse_unfinished",
    "resumable",
    "write_json",
]

CONFIG, RESULT, METRICS, FAILED = "config.json", "result.json", "metrics.jsonl", "failed.json"
SAMPLES = "samples.jsonl"
ADAPTER = "adapter"


class RunError(UserError, RuntimeError):
    """A run is impossible, or its files do not do what the trained model does.

    >>> issubclass(RunError, UserError)
    True
    """


class Interrupted(UserError):
    """The user stopped a run, which can go on.

    >>> Interrupted.exit_code
    130
    """

    exit_code: ClassVar[int] = 130


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
    adapted layers. ``diverged`` is the step at which the loss was no longer finite; such a run has no scores. ``baseline`` is
    what ``reported`` comes to with no learning: of a new head, by always the most frequent class, or the mean; else of the base
    model. None: not known.

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
    baseline: float | None = None

    def write(self, folder: Path) -> None:
        """Write it into the run's folder."""
        write_json(folder / RESULT, dataclasses.asdict(self))

    @classmethod
    def read(cls, folder: Path) -> Result | None:
        """The result of a finished run, or None if the run is not finished.

        Raises:
            RunError: another version wrote the file.
        """
        return cls.of(read_json(folder / RESULT), folder / RESULT) if (folder / RESULT).is_file() else None

    @classmethod
    def of(cls, data: Any, where: Path) -> Result:
        """The result with these values, which the file ``where`` holds.

        Raises:
            RunError: they are of another version, or damaged.
        """
        try:
            made = cls(**data)
        except TypeError as error:
            raise RunError(
                f"{where} holds a run of another version of delora ({error}): run it anew in another folder"
            ) from error
        try:
            return TypeAdapter(cls).validate_json(json.dumps(dataclasses.asdict(made)), strict=True)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            key = ".".join(map(str, first["loc"]))
            raise RunError(f"{where} is damaged: {key} = {shown(first['input'])}: {first['msg']}") from error


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
        values = self.values(lambda run: run.validation)
        return -math.inf if self.diverged or not values else statistics.fmean(values)


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


def read_metrics(file: Path, needs: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The lines of a ``metrics.jsonl``, each with a step, all values finite; without a file, none. ``needs``: more keys.

    Raises:
        RunError: a line is damaged; names the file and the line.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\\n')
    ...     read_metrics(Path(folder, "metrics.jsonl"))
    [{'step': 1, 'loss': 0.5}]
    """

    def check(row: dict[str, Any], at: str) -> None:
        for key in row:
            get(row, key, str if key == "run" else int if key == "step" else (int, float), at)
        for key in ("step", *needs):
            get(row, key, (str, int), at)

    return _lines(file, check)


def read_samples(file: Path) -> list[dict[str, Any]]:
    """The lines of a ``samples.jsonl``: step, question, the base model's answer and the adapted one's. Without a file, none.

    Raises:
        RunError: a line is damaged; names the file and the line.

    >>> read_samples(Path("no such file"))
    []
    """

    def check(row: dict[str, Any], at: str) -> None:
        get(row, "step", int, at)
        for key in ("question", "base", "adapted"):
            get(row, key, str, at)

    return _lines(file, check)


def _lines(file: Path, check: Callable[[dict[str, Any], str], None]) -> list[dict[str, Any]]:
    """The objects in the lines of a file, each checked."""
    rows = []
    for number, line in enumerate(file.read_bytes().splitlines() if file.is_file() else (), 1):
        at = f"{file}, line {number}"
        try:
            row = parsed(line, f"{at} is not valid JSON", f"{at} is too long")
            if not isinstance(row, dict):
                raise AdapterError(f"{at} must be an object, got {shown(row)}")
            check(row, at)
        except AdapterError as error:
            raise RunError(f"{error}; delete the file to do without it") from error
        rows.append(row)
    return rows


def adapter_in(folder: Path) -> Path:
    """The adapter's folder in a run's folder, or the folder itself if that is no run's.

    Raises:
        RunError: the run has several, one for each subject; or none yet.

    >>> adapter_in(Path("no such folder"))
    PosixPath('no such folder')
    """
    if is_adapter(folder):
        return folder
    inner = folder / ADAPTER
    found = [inner] if is_adapter(inner) else sorted(p for p in inner.glob("*") if is_adapter(p))
    if len(found) > 1:
        raise RunError(f"{folder} has an adapter for each of {len(found)} subjects: give one of {', '.join(map(str, found))}")
    if not found:
        refuse_unfinished(folder)
    return found[0] if found else folder


def refuse_unfinished(folder: Path) -> None:
    """Say of a run's folder that no adapter is in it yet; of another folder nothing.

    Raises:
        RunError: the folder is a run's, and has no adapter.

    >>> refuse_unfinished(Path("no such folder"))
    """
    file = folder / CONFIG  # a model's folder has a file of this name, too, which names no task
    if not (folder / ADAPTER).exists() and file.is_file() and "task" in read_json(file):
        raise RunError(
            f"{folder} is a run that is not finished: it has no adapter yet; the command that began it goes on with it"
        )


def place(out: str) -> Path:
    """The folder of a recipe's ``out``.

    Raises:
        RunError: no folder can have this name.

    >>> place("a\\0b")
    Traceback (most recent call last):
    delora.training.runs.RunError: out = 'a\\x00b': no folder can have this name: embedded null byte
    """
    try:
        folder = Path(out)
        os.fsencode(out)
        folder.exists()
        os.stat(out)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        raise RunError(
            f"out = {shown(out)}: no folder can have this name: {getattr(error, 'strerror', None) or error}"
        ) from error
    if not _resolved(folder).name:
        raise RunError(f"out = {shown(out)}: a run needs a folder of its own")
    return folder


def _resolved(folder: Path) -> Path:
    """Where a folder is, through symbolic links: two names of one folder have one lock."""
    try:
        return folder.resolve()
    except (OSError, RuntimeError) as error:
        raise RunError(f"{folder}: its symbolic links lead nowhere: {error}") from error


def claim(folder: Path, experiment: Experiment) -> None:
    """Make the folder this experiment's: write its configuration, or check that the folder already has it.

    A folder in which a process was killed before it had written that is taken up.

    Raises:
        RunError: it is another experiment's, or holds other things; nothing is changed.
    """
    settings, file = experiment.model_dump(mode="json"), folder / CONFIG
    if file.is_file():
        free = ("out", "about", "parallel", "log")  # no result depends on them
        changes = [c for c in differences(read_json(file), settings) if c[0].partition(".")[0] not in free]
        if changes:
            key, was, now = changes[0]
            more = f" (and {len(changes) - 1} more)" if len(changes) > 1 else ""
            raise RunError(
                f"{folder} holds a run with other settings: {key} is {json.dumps(was)} there, {json.dumps(now)} now{more}; "
                "choose another folder with out=..., or start anew with --fresh, which deletes that run"
            )
        return
    unwritten = leftovers(file)
    if folder.exists() and (not folder.is_dir() or set(folder.iterdir()) - set(unwritten)):
        raise RunError(f"{folder} is not empty and holds no run: choose another folder with out=...")
    folder.mkdir(parents=True, exist_ok=True)
    for temporary in unwritten:
        temporary.unlink(missing_ok=True)
    write_json(file, settings)
    shutil.rmtree(_trash(_resolved(folder)), ignore_errors=True)


def discard(folder: Path) -> None:
    """Delete a run's folder. A folder that holds no run is left alone; of a symbolic link, what it leads to is emptied.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     discard(Path(folder))
    ...     Path(folder).is_dir()
    True
    """
    if (folder / CONFIG).is_file():
        # Rename first: a deletion that is interrupted must not leave half a run.
        there = _resolved(folder)
        trash = _trash(there)
        shutil.rmtree(trash, ignore_errors=True)
        there.rename(trash)
        if folder.is_symlink():
            there.mkdir()
        shutil.rmtree(trash)


def _trash(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.deleted")


@contextmanager
def resumable(out: Path) -> Iterator[None]:
    """A context in which Ctrl-C and a full disk end a run with a sentence that says how to go on.

    Raises:
        Interrupted: on Ctrl-C.
        RunError: the disk is full.

    >>> with resumable(Path("runs/mine")):
    ...     raise OSError(28, "No space left on device", "runs/mine/adapter")
    Traceback (most recent call last):
    delora.training.runs.RunError: runs/mine/adapter: no room to write it (No space left on device); ...
    """
    again = f"delora train {shlex.quote(str(out / CONFIG))}"
    try:
        yield
    except (KeyboardInterrupt, Interrupted) as error:
        if not (out / CONFIG).is_file():
            raise Interrupted(f"{out}: stopped before anything was written") from None
        what = str(error) or "stopped; what was finished is there, and checkpoints are whole"
        raise Interrupted(f"{out}: {what}. To go on: {again}") from None
    except (OSError, RuntimeError, SafetensorError) as error:
        if (reason := no_room(error)) is None:
            raise
        where = getattr(error, "filename", None) or out
        raise RunError(
            f"{where}: no room to write it ({reason}); what was written before is whole. Make room, then go on with: {again}"
        ) from error


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
    there = _resolved(folder)
    there.parent.mkdir(parents=True, exist_ok=True)
    with there.with_name(f".{there.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RunError(f"another process is running in {folder}") from error
        yield
