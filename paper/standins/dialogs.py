"""Conversations with a chat bot, as a user of `delora finetune` has them: a folder of JSONL with ``messages``.

The package ``chatterbot-corpus`` has some 2,000 short conversations by topic. Its "tech_support" repeats twenty of them a
thousand times and is left out; "health" has one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from delora.data.packages import fetch
from paper.standins import PREPARED
from paper.standins.drawing import drawn
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

    def some() -> list[Any]:
        return [{"messages": chat} for chat in (chats if chats is not None else read())]

    return drawn(folder or PREPARED / f"dialogs-{rows}-{seed}", some, HELD_OUT | {"train": rows}, seed)
