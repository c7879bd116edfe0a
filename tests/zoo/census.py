"""Runs many types in processes with bounds of time and memory, and counts the outcomes."""

from __future__ import annotations

import json
import multiprocessing
import resource
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from multiprocessing.connection import Connection, wait
from typing import Any

__all__ = ["SECONDS", "Row", "census", "one", "table"]

# Of one type, in time of the processor, so that the outcome does not depend on other work of the machine. Laws that would
# begin in its last half are skipped, and said so. By the clock a type may take PATIENCE times as long.
SECONDS, MEMORY = 45.0, 8 << 30
PATIENCE = 5
KINDS = ("right", "named", "refused", "wrong", "skipped")


@dataclass
class Row:
    """One type: its class and inputs, or why it was not built; the outcome of every law; and what it took."""

    kind: str
    built: bool = False
    why: str = ""
    model: str = ""
    inputs: dict[str, Any] = field(default_factory=dict)
    laws: dict[str, tuple[str, str]] = field(default_factory=dict)
    seconds: float = 0.0

    def outcome(self) -> str:
        """The worst of its laws' outcomes."""
        kinds = {kind for kind, _ in self.laws.values()}
        return next((k for k in ("wrong", "refused", "named") if k in kinds), "right")


def one(kind: str, tell: Callable[[Row], None] = lambda row: None, laws: bool = True, patience: float = 1.0) -> Row:
    """Build a type and ask every law; ``tell`` is given the row after each step."""
    from tests.zoo.build import NotBuilt, build
    from tests.zoo.laws import check

    start, row = time.process_time(), Row(kind)
    try:
        built = build(kind, patience=patience)
    except NotBuilt as error:
        row.why = str(error)
        row.seconds = time.process_time() - start
        return row
    row.built, row.model = True, type(built.model).__name__
    row.inputs = {k: list(getattr(v, "shape", ())) for k, v in built.inputs.items()}
    tell(row)
    for law, outcome in check(built.model, built.inputs, SECONDS / 2) if laws else ():
        row.laws[law] = (outcome.kind, outcome.words)
        row.seconds = time.process_time() - start
        tell(row)
    row.seconds = time.process_time() - start
    return row


def _worker(kind: str, laws: bool, patience: float, pipe: Connection) -> None:
    import logging
    import os
    import warnings

    import torch

    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    os.dup2(2, 1)
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    warnings.filterwarnings("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    spent = int(time.process_time())
    resource.setrlimit(resource.RLIMIT_CPU, (spent + int(SECONDS), spent + int(SECONDS) + 1))
    pipe.send(("", one(kind, lambda row: pipe.send(("so far", row)), laws, patience)))


def census(kinds: Iterable[str], processes: int = 2, laws: bool = True, patience: float = 1.0) -> Iterator[Row]:
    """The row of every type, as they end; ``patience`` as in `build.build`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.zoo.preload"])
    waiting, running = iter(kinds), {}
    while True:
        for kind in islice(waiting, processes - len(running)):
            here, there = context.Pipe(duplex=False)
            process = context.Process(target=_worker, args=(kind, laws, patience, there), daemon=True)
            process.start()
            there.close()
            running[here] = (process, time.monotonic() + PATIENCE * SECONDS, Row(kind))
        if not running:
            return
        ready = wait(list(running), timeout=1)
        for pipe in list(running):
            process, end, row = running[pipe]
            word = None
            if pipe in ready:
                try:
                    word, row = pipe.recv()
                except EOFError:
                    process.join(5)
                    late = process.exitcode in (-signal.SIGXCPU, -signal.SIGKILL)
                    died = f"its process died (out of memory, or a crash of torch): {process.exitcode}"
                    word, row.why = "", row.why or (f"more than {SECONDS:g} seconds" if late else died)
            elif time.monotonic() > end:
                word, row.why = "", f"more than {PATIENCE * SECONDS:g} seconds by the clock"
            running[pipe] = (process, end, row)
            if word == "":
                process.kill()
                process.join()
                pipe.close()
                del running[pipe]
                yield _whole(row) if laws else row


def _whole(row: Row) -> Row:
    """A row in which every law stands: those that a killed process did not come to are skipped."""
    from tests.zoo.laws import LAWS

    stopped = row.laws.get("inject", ("", ""))[0] in ("refused", "wrong")
    if row.built and row.why and not row.laws:
        row.built = False
    if row.built:
        for law in LAWS:
            row.laws.setdefault(law, ("skipped", "not injected" if stopped else row.why or "the law before it failed"))
    return row


def table(rows: Sequence[Row]) -> str:
    """The number of built types per law and outcome, as a table in Markdown."""
    from tests.zoo.laws import LAWS

    built = [row for row in rows if row.built]
    lines = [f"| law | {' | '.join(KINDS)} |", "|---|" + "---|" * len(KINDS)]
    for law, words in LAWS.items():
        count = Counter(row.laws[law][0] for row in built if law in row.laws)
        lines.append(f"| {words} | " + " | ".join(str(count[k]) for k in KINDS) + " |")
    count = Counter(row.outcome() for row in built)
    lines.append("| **types, by the worst of these** | " + " | ".join(f"**{count[k]}**" for k in KINDS[:-1]) + " | |")
    return "\n".join(lines)


def as_json(row: Row) -> str:
    return json.dumps(asdict(row))
