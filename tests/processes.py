"""Two real processes with gloo between them."""

from __future__ import annotations

import os
import socket
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.multiprocessing


def _work(rank: int, port: int, work: Callable[..., None], arguments: tuple[object, ...]) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}  # as torchrun
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(seconds=60))
    work(rank, *arguments)
    torch.distributed.barrier()
    # No orderly end: freeing torch's gloo group while its thread waits for the GIL that the freeing thread holds may hang.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _each(rank: int, laws: dict[str, tuple[Callable[..., None], tuple[object, ...]]], folder: str) -> None:
    for name, (law, arguments) in laws.items():
        try:
            law(rank, *arguments)
        except BaseException:
            with open(f"{folder}/failed-{rank}.txt", "a") as file:
                file.write(f"--- {name}, process {rank}:\n{traceback.format_exc()}\n")
        torch.distributed.barrier()


def all_hold(laws: dict[str, tuple[Callable[..., None], tuple[object, ...]]], folder: Path) -> None:
    """Every law, ``name: (work, arguments)``, holds in two processes: one launch for all. What fails is told together."""
    in_two_processes(_each, laws, str(folder))
    failed = [file.read_text() for file in sorted(folder.glob("failed-*.txt"))]
    assert not failed, "\n".join(failed)


def in_two_processes(work: Callable[..., None], *arguments: object) -> None:
    """``work(rank, *arguments)`` in process 0 and in process 1; what one of them raises is raised here."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(_work, (port, work, arguments), nprocs=2)
