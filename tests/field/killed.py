"""Runs of one and of two processes, killed at random moments, go on until they end: with the numbers of an unbroken run.

    python -m tests.field.killed FOLDER FIRST_SEED SEEDS

Every attempt draws how many processes it has, in which way they share the work, and when one of them, or all, are killed.
Whoever lost its partner has to end, with an error in words or with its work done, within the timeout of the process group.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import socket
import sys
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from delora.errors import UserError
from tests.field.recipes import KINDS, make, same, trained

KILLS = 3  # of one run; then it may end
TIMEOUT = 20  # of the process group, in seconds
IN_WORDS = 3
FORK = multiprocessing.get_context("fork")  # nothing is imported again


def work(rank: int, n: int, port: int, folder: Path, kind: str, out: str, how: str) -> None:
    """One process of a run. ``OUT-RANK.met`` says that it has met the others, ``OUT-RANK.log`` what it printed."""
    log = folder / f"{out}-{rank}.log"
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    if n > 1:
        torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT))
    log.with_suffix(".met").touch()
    try:
        trained(folder, kind, out, f"parallel={how}")
    except UserError as error:
        print(error, flush=True)
        os._exit(IN_WORDS)
    os._exit(0)  # see tests.processes


def started(n: int, folder: Path, kind: str, out: str, how: str) -> list[Any]:
    """The processes of an attempt, which have met."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    for old in folder.glob(f"{out}-*.met"):
        old.unlink()
    running = [FORK.Process(target=work, args=(rank, n, port, folder, kind, out, how)) for rank in range(n)]
    for process in running:
        process.start()
    while len(list(folder.glob(f"{out}-*.met"))) < n:
        time.sleep(0.02)
    return running


def campaign(folder: Path, kind: str, seed: int, seconds: float) -> Counter[str]:
    """One run to its end, of which at most `KILLS` attempts are killed within ``seconds``; and what happened."""
    draw, out, told = random.Random(seed), f"{kind}-{seed}", Counter[str]()
    for attempt in range(KILLS + 1):
        n, how = draw.choice([(1, "none"), (2, "ddp"), (2, "fsdp2")])
        running = started(n, folder, kind, out, how)
        if attempt < KILLS:
            time.sleep(draw.uniform(0, seconds))
            victims = draw.choice([running, [draw.choice(running)]])
            for process in victims:
                process.kill()
        for process in running:
            process.join(2 * TIMEOUT + 60 * (attempt == KILLS))
        codes = [process.exitcode for process in running]
        assert None not in codes, f"{out}: one of {n} processes ({how}) hangs: {codes}"
        logs = [(folder / f"{out}-{rank}.log").read_text() for rank in range(n)]
        for code, log in zip(codes, logs, strict=True):
            assert code in (0, -9, IN_WORDS), f"{out}: {how}, codes {codes}:\n{log}"
            assert code != IN_WORDS or "another process" in log or "process " in log, log
        told[f"{n} {how}: {'ended' if not any(codes) else f'{codes.count(-9)} killed, {codes.count(IN_WORDS)} told'}"] += 1
        if not any(codes):
            break
    same(folder, kind, out)
    return told


def reference(folder: Path) -> float:
    """Make the recipes and run them unbroken, in a process of its own: a process that trained must not fork. The seconds."""
    make(folder)
    seconds = 0.0
    for kind in KINDS:
        (process,) = started(1, folder, kind, f"one-{kind}", "none")
        began = time.monotonic()
        process.join()
        assert process.exitcode == 0, (folder / f"one-{kind}-0.log").read_text()
        seconds = max(seconds, time.monotonic() - began)
    return seconds


def main(folder: Path, first: int, seeds: int) -> None:
    seconds, told = reference(folder), Counter[str]()
    for seed in range(first, first + seeds):
        told += campaign(folder, KINDS[seed % 2], seed, seconds)
        print(f"seed {seed} equals the unbroken run", flush=True)
    for what, count in sorted(told.items()):
        print(f"{count:4d}  {what}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
