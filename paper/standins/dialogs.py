"""Conversations with a chat bot, as a user of `delora finetune` has them: a folder of JSONL with ``messages``.

The package ``chatterbot-corpus`` has some 2,000 short conversations by topic. Its "tech_support" repeats twenty of them a
thousand times and is left out; "health" has one.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import yaml

from delora.data.packages import fetch
from delora.formats.files import whole_folder
from paper.standins import PREPARED
from paper.standins.packages import CHATTERBOT

__all__ = ["prepared", "read"]

LEFT_OUT = ("tech_support", "health")
HELD_OUT = {"validation": 60, "test": 100}
ROLES = ("user", "assistant")


def read(folder: Path | None = None) -> list[list[dict[str, str]]]:
    """The conversations as chats, each once, by topic in alphabetical order; each begins with the user and ends with an answer.

    Raises:
        PackageError: the package cannot be fetched; the error says what to do by hand.
    """
    chats: dict[str, list[dict[str, str]]] = {}
    for file in sorted((folder or fetch(CHATTERBOT)).glob("*.yml")):
        if file.stem not in LEFT_OUT:
            for turns in yaml.safe_load(file.read_text("utf-8"))["conversations"]:
                answered = turns[: len(turns) // 2 * 2]
                chat = [{"role": ROLES[i % 2], "content": str(turn)} for i, turn in enumerate(answered)]
                if chat:
                    chats.setdefault(json.dumps(chat), chat)
    return list(chats.values())


def prepared(rows: int, seed: int, folder: Path | None = None, chats: list[Any] | None = None) -> Path:
    """A folder with ``rows`` chats to train on, and others to validate and test on; it is made if it is not there."""
    folder = folder or PREPARED / f"dialogs-{rows}-{seed}"
    if folder.is_dir():
        return folder
    some = chats if chats is not None else read()
    order = random.Random(seed).sample(some, sum(HELD_OUT.values()) + rows)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with whole_folder(folder) as new:
        for part, count in (HELD_OUT | {"train": rows}).items():
            lines = [json.dumps({"messages": order.pop()}) + "\n" for _ in range(count)]
            (new / f"{part}.jsonl").write_text("".join(lines), "utf-8")
    return folder
