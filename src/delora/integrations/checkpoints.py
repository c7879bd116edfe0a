"""A checkpoint is whole if every file is as its manifest, which is written last, describes it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from delora.formats.files import AdapterError, get, read_json, shown, write_atomically
from delora.formats.native import JSON

__all__ = ["MANIFEST", "damage", "last_checkpoint", "require_same", "write_manifest"]

MANIFEST = "manifest.json"
NUMBERED = re.compile(r"checkpoint-[0-9]{1,18}")


def write_manifest(checkpoint: Path, settings: Mapping[str, Any]) -> None:
    """Say of every file of a checkpoint what it is, and with which settings it was trained."""
    files = {path.relative_to(checkpoint).as_posix(): _measured(path) for path in _files(checkpoint)}
    write_atomically(checkpoint / MANIFEST, json.dumps({"settings": settings, "files": files}, indent=1).encode())


def require_same(checkpoint: Path, now: Mapping[str, Any]) -> None:
    """Raise an AdapterError if a checkpoint was written with other settings."""
    before = read_json(checkpoint / MANIFEST)["settings"]
    others = [key for key in now if before.get(key) != now[key]]
    if others:
        changes = ", ".join(f"{key} = {shown(before.get(key))} there, {shown(now[key])} now" for key in others)
        raise AdapterError(f"{checkpoint} was written with other settings: {changes}; train with those, or anew without it")


def last_checkpoint(folder: Path, tell: Callable[[str], None] = lambda line: None, best: bool = False) -> str | None:
    """The newest checkpoint of which every file is as it was written; what is passed over is told, with the reason.

    With ``best``, that checkpoint must be whole, too, which was the best one when it was written: at the end it is loaded.

    >>> last_checkpoint(Path("no such folder")) is None
    True
    """
    steps = {int(c.name.removeprefix("checkpoint-")): c for c in folder.glob("checkpoint-*") if NUMBERED.fullmatch(c.name)}
    passed_over: list[str] = []
    for step in sorted(steps, reverse=True):
        broken = damage(steps[step])
        if broken is None and best and (winner := _best(steps[step])) not in (None, step):
            missing = "it is missing" if winner not in steps else damage(steps[winner])
            broken = None if missing is None else f"its best checkpoint was checkpoint-{winner}, which is not whole: {missing}"
        if broken is None:
            for line in passed_over:
                tell(f"{line}; going on from {steps[step].name}")
            return str(steps[step])
        passed_over.append(f"{steps[step]} is not whole: {broken}")
    for line in passed_over:
        tell(f"{line}; no older one is whole, starting anew")
    return None


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, against its manifest; None if every file is as it was written.

    >>> damage(Path("no such folder"))
    'it has no manifest.json, which is written last: its process was stopped, or something else wrote it'
    """
    if not (checkpoint / MANIFEST).is_file():
        return f"it has no {MANIFEST}, which is written last: its process was stopped, or something else wrote it"
    try:
        manifest = read_json(checkpoint / MANIFEST)
        files = get(manifest, "files", dict, MANIFEST)
        get(manifest, "settings", dict, MANIFEST)
        for needed in (JSON, "trainer_state.json"):
            get(files, needed, dict, MANIFEST)
        for name, entry in files.items():
            path = checkpoint / name
            if not path.resolve().is_relative_to(checkpoint.resolve()) or not path.is_file():
                return f"{shown(name)} is missing"
            if _measured(path) != entry:
                return f"{shown(name)} is not what {MANIFEST} describes"
    except (AdapterError, OSError, ValueError) as error:
        return str(error)
    return None


def _best(checkpoint: Path) -> int | None:
    best = read_json(checkpoint / "trainer_state.json").get("best_global_step")
    return best if isinstance(best, int) else None


def _files(checkpoint: Path) -> list[Path]:
    temporary = (MANIFEST, ".lock")
    return sorted(p for p in checkpoint.rglob("*") if p.is_file() and p.name not in temporary and not p.name.endswith(".tmp"))


def _measured(file: Path) -> dict[str, Any]:
    with file.open("rb") as data:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(data, "sha256").hexdigest()}
