"""``delora chat``: talk with a finished run's model, at one strength or at several side by side."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

import delora
from delora import tasks
from delora.data.chats import Message
from delora.errors import UserError
from delora.evaluation.answers import answer
from delora.formats.native import require_adapter
from delora.models import adapters
from delora.training.models import language_tokenizer, template_of
from delora.training.runs import ADAPTER, RunError, adapter_in

__all__ = ["HELP", "Talk", "converse", "parse", "talk_of"]

HELP = "/strength 0,1 changes the strengths, /clear begins anew, /quit ends"


@dataclass
class Talk:
    """A chat with a model at several strengths of its adapter. Each has its own history: what was said at that strength.

    >>> Talk(None, None, [0.0, 1.0]).strengths
    [0.0, 1.0]
    """

    model: Any
    tokenizer: Any
    strengths: list[float]
    tokens: int = 256
    system: str | None = None
    histories: dict[float, list[Message]] = field(default_factory=dict)

    def ask(self, question: str) -> dict[float, str]:
        """The answer of each strength, the most probable one. If one cannot answer, nothing was said."""
        chats = {s: [*self._history(s), {"role": "user", "content": question}] for s in self.strengths}
        answers = {}
        for s, chat in chats.items():
            with at(self.model, s):
                answers[s] = answer(self.model, self.tokenizer, chat, self.tokens)
        self.histories |= {s: [*chats[s], {"role": "assistant", "content": said}] for s, said in answers.items()}
        return answers

    def turn(self, strengths: Sequence[float]) -> None:
        """Go on at other strengths. A new one takes over what was said at the first one of those before."""
        before = self._history(self.strengths[0])
        self.histories |= {s: list(before) for s in strengths if s not in self.histories and before}
        self.strengths = list(strengths)

    def clear(self) -> None:
        """Forget what was said."""
        self.histories = {}

    def _history(self, s: float) -> list[Message]:
        start = [] if self.system is None else [{"role": "system", "content": self.system}]
        return self.histories.get(s, start)


@contextmanager
def at(model: Any, s: float) -> Iterator[None]:
    """The model at a strength of its adapter; at 0 it is the base model, whatever else was trained beside."""
    if s == 0:
        with delora.disabled(model):
            yield
    else:
        delora.strength(model, s)
        yield


def parse(text: str) -> list[float]:
    """Strengths, such as ``0,1``: 0 is the base, 1 what was trained.

    Raises:
        UserError: they are no numbers of at least 0.

    >>> parse("0, 0.5")
    [0.0, 0.5]
    """
    try:
        values = [float(value) for value in text.split(",")]
    except ValueError:
        values = [-1.0]
    if not all(0 <= value < float("inf") for value in values):
        raise UserError(f"strengths {text!r}: expected numbers of at least 0 with commas between them, such as 0,1")
    return list(dict.fromkeys(values))


def talk_of(run: Path, strengths: Sequence[float] | None = None, adapter: Path | None = None, **options: Any) -> Talk:
    """The chat with a run's model. ``adapter``: another folder's in place of the run's. Default strength: the adapter's own.

    Raises:
        UserError: the folder holds no finished run, or its model writes no text.
    """
    experiment = tasks.of_run(run)
    folder = adapter or adapter_in(run)
    require_adapter(folder)
    model: Any = tasks.find(experiment.task).base(experiment)
    if not getattr(model, "can_generate", lambda: False)():
        raise RunError(
            f"{run} is of the task {experiment.task}, whose model writes no text: delora chat is for language models"
        )
    delora.load(model, folder, methods=experiment.adapter.classes())
    tokenizer = language_tokenizer(experiment.model)
    tokenizer.chat_template = template_of(folder) or template_of(run / ADAPTER) or tokenizer.chat_template
    model.to(torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")
    own = [a.strength for a in adapters(model).values() if not a.whole][:1]
    return Talk(model, tokenizer, list(strengths or own or [1.0]), **options)


def converse(talk: Talk, lines: Iterable[str], console: Console) -> None:
    """Answer each line, or do as it says if it begins with a slash, until ``/quit`` or the end.

    >>> converse(Talk(None, None, [1.0]), ["/strength 0,2", "/quit", "never read"], Console(width=80))
    strength 0, 2
    """
    for line in lines:
        command, _, rest = line.strip().partition(" ")
        try:
            if command in ("/quit", "/exit", "/q"):
                return
            if command == "/clear":
                talk.clear()
            elif command == "/strength":
                talk.turn(parse(rest))
                console.print(f"strength {', '.join(f'{s:g}' for s in talk.strengths)}", markup=False, highlight=False)
            elif command.startswith("/"):
                console.print(HELP, markup=False, highlight=False)
            elif command:
                show(talk.ask(line.strip()), console)
        except (UserError, ValueError) as error:  # the talk goes on
            console.print(str(error), markup=False, highlight=False, style="red")


def show(answers: dict[float, str], console: Console) -> None:
    """Print the answers: one as it is, several side by side."""
    if len(answers) == 1:
        console.print(*answers.values(), markup=False, highlight=False, soft_wrap=True)
        return
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0), expand=True)
    for s in answers:
        table.add_column(f"strength {s:g}{' (the base model)' if s == 0 else ''}", ratio=1, overflow="fold")
    table.add_row(*map(Text, answers.values()))
    console.print(table)
