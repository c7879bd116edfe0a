"""Saves an adapter to the folder argv[1] and dies at its argv[2]-th act on the disk: python -m tests.crashing FOLDER N."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

import delora
from tests.cases import Net, shake

acts = 0


def act() -> None:
    global acts
    acts += 1
    if acts == int(sys.argv[2]):
        os._exit(9)


def crashing(function):
    def wrapped(*args, **kwargs):
        act()
        return function(*args, **kwargs)

    return wrapped


class InHalves:
    """A file whose every write can be cut short."""

    def __init__(self, file) -> None:
        self.file = file

    def write(self, data) -> None:
        self.file.write(data[: len(data) // 2])
        self.file.flush()
        act()
        self.file.write(data[len(data) // 2 :])

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.file.close()


def main() -> None:
    torch.manual_seed(0)
    model = delora.inject(Net(), delora.LoRA(r=2), ["q"])
    torch.manual_seed(5)  # not the values of the adapter that is there already
    shake(model)
    open_path = Path.open

    def opened(path, mode="r", **options):
        file = open_path(path, mode, **options)
        return InHalves(file) if "w" in mode else file

    Path.open = opened
    os.fsync, os.replace, os.unlink = crashing(os.fsync), crashing(os.replace), crashing(os.unlink)
    delora.save(model, sys.argv[1])
    print("done")


if __name__ == "__main__":
    main()
