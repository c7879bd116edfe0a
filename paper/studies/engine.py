"""Runs the jobs of a study on all cores. Each run is a row of ``<study>.jsonl``; a run whose row exists is not run again."""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import platform
import sys
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console

import delora
from delora.formats.files import write_atomically
from delora.training.runs import RunContext


def read(study: str, results: Path) -> list[dict[str, Any]]:
    """The rows of a study so far, without a last line that a stopped run left unfinished."""
    file = results / f"{study}.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.is_file() else []
    return [json.loads(line) for line in lines]


def whole(study: str, module: Any) -> list[dict[str, Any]]:
    """The rows of a study if every run of it is kept, else none: half the seeds would say nothing."""
    rows = read(study, module.RESULTS)
    return rows if rows and len(rows) == len(list(module.STUDIES[study]())) else []


def context(folder: Path, shared: Path | None = None) -> RunContext:
    """A run in the folder ``run`` of a folder, without a word on the screen."""
    return RunContext(folder / "run", shared or folder, "run", "run", Console(quiet=True))


def short(value: Any) -> Any:
    """The value with every number rounded to five significant digits, which keeps the files small."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {k: short(v) for k, v in value.items()}
    return [short(v) for v in value] if isinstance(value, list) else value


def run(
    study: str,
    jobs: Iterable[Any],
    work: Callable[[Any], dict[str, Any]],
    results: Path,
    console: Console,
    workers: int | None = None,
) -> None:
    """Runs the missing jobs of a study and writes each row when its run ends. A job that raises is reported; the others go on.

    A job is a dataclass. Its ``key()`` holds JSON values that identify it within the study, and is part of its row.
    """
    rows = read(study, results)
    missing = []
    for job in jobs:
        key = short(job.key())
        # A field at its default is in neither the key nor the row.
        names = {*key, *(f.name for f in dataclasses.fields(job))}
        if not any(key == {name: row[name] for name in names if name in row} for row in rows):
            missing.append(job)
    console.print(f"{study}: {len(rows)} runs are there, {len(missing)} to do")
    if not missing:
        return
    results.mkdir(parents=True, exist_ok=True)
    file, failed = results / f"{study}.jsonl", 0
    write_atomically(file, "".join(json.dumps(row) + "\n" for row in rows).encode())
    with ProcessPoolExecutor(workers or os.cpu_count(), multiprocessing.get_context("spawn")) as pool, file.open("a") as kept:
        pending = {pool.submit(work, job): job for job in missing}
        for number, finished in enumerate(as_completed(pending), 1):
            try:
                kept.write(json.dumps(short(finished.result())) + "\n")
                kept.flush()
            except Exception as error:
                failed += 1
                console.print(f"{pending[finished].key()} failed: {error}", markup=False)
            if number % 20 == 0 or number == len(missing):
                console.print(f"{study}: {number} of {len(missing)}", highlight=False)
    seconds = sum(row["seconds"] for row in read(study, results))
    about = {
        "command": f"python -m paper.studies.{results.name} {study}",
        "cpu_minutes": round(seconds / 60, 1),
        "delora": delora.__version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
    write_atomically(results / f"{study}.json", (json.dumps(about, indent=1) + "\n").encode())
    if failed:
        raise SystemExit(f"{failed} runs of {study} failed")


def command(studies: Mapping[str, Callable[[], Iterable[Any]]], results: Path, run: Callable[..., None]) -> None:
    """The command line of a module of studies."""
    parser = argparse.ArgumentParser(description="Run the missing runs of the named studies, or of all.")
    parser.add_argument("studies", nargs="*", default=list(studies), metavar="STUDY", help=", ".join(studies))
    parser.add_argument("--workers", type=int, help="processes at a time; all cores if not given")
    options = parser.parse_args()
    if unknown := [name for name in options.studies if name not in studies]:
        sys.exit(f"{unknown[0]} is no study; known are {', '.join(studies)}")
    for name in options.studies:
        run(name, studies[name](), results, Console(), options.workers)
