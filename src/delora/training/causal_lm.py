"""What the tasks on causal language models share: chat templates, samples beside the base model's, delivery."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from pydantic import Field
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import delora
from delora.data import alpaca
from delora.data.examples import DataError
from delora.errors import nearest_path
from delora.evaluation.answers import answer, continued
from delora.evaluation.language import perplexity, predicted
from delora.formats.files import read_json, write_atomically
from delora.formats.native import is_adapter
from delora.training import delivery
from delora.training.config import ConfigError, Count, Experiment, Strict
from delora.training.models import language_model, language_tokenizer, template_of
from delora.training.runs import RunError
from delora.training.task import Kind, Validation

__all__ = [
    "COMPARED",
    "NEXT",
    "OTHER",
    "UNCUT",
    "Evaluate",
    "Material",
    "Samples",
    "context_length",
    "delivered",
    "forgets",
    "marked",
    "opened",
    "other_text",
    "require_template",
    "speaking",
    "templated",
    "validated",
]

NEXT = "next.json"
OTHER = "perplexity of other text"
READ = 65_536  # characters of the other text
COMPARED = 64  # test rows on which the delivered files are compared with the trained model
UNCUT = 1 << 30  # more tokens than any row has


class Evaluate(Strict):
    """``sample``: questions that the model, and the base model beside it, answers at every validation, into samples.jsonl.

    ``text``: a file of other text, whose perplexity, before and after, says what is forgotten; its first 65,536 characters.

    >>> Evaluate(sample=["Who are you?"]).tokens
    64
    """

    sample: list[str] = Field(default=[])
    tokens: Count = 64
    text: str | None = None


@dataclass(frozen=True)
class Material:
    """A run's rows as tensors, the chat template's text that they were rendered by, and what is to be told of them.

    ``other``: the text whose perplexity says what is forgotten.

    >>> Material([], [], [], None, ["mine: 8 of 90 rows are cut"]).told[0]
    'mine: 8 of 90 rows are cut'
    """

    train: list[dict[str, Tensor]]
    validation: list[dict[str, Tensor]]
    test: list[dict[str, Tensor]]
    template: str | None
    told: list[str]
    other: str | None = None


class Samples(TrainerCallback):
    """Adds to ``samples.jsonl``, at every validation, the answers of the model and of the base model to fixed questions.

    >>> Samples(Path("samples.jsonl"), None, Evaluate()).file.name
    'samples.jsonl'
    """

    def __init__(self, file: Path, tokenizer: Any, settings: Evaluate) -> None:
        self.file, self.tokenizer, self.settings = file, tokenizer, settings

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        model, settings = kwargs["model"], self.settings
        before = self.file.read_text("utf-8").splitlines() if self.file.is_file() else []
        lines = [line for line in before if json.loads(line)["step"] < state.global_step]  # a resumption's are written anew
        training = model.training
        for question in settings.sample:
            chat = [{"role": "user", "content": question}]
            with delora.disabled(model):
                was = answer(model, self.tokenizer, chat, settings.tokens)
            now = answer(model, self.tokenizer, chat, settings.tokens)
            row = {"step": state.global_step, "epoch": state.epoch, "question": question, "base": was, "adapted": now}
            lines.append(json.dumps(row, ensure_ascii=False))
        model.train(training)
        if state.is_world_process_zero:
            write_atomically(self.file, "".join(line + "\n" for line in lines).encode())


def templated(model: str, given: str | None, where: str) -> Any:
    """A model's tokenizer, with the chat template that is given: "alpaca", a file of Jinja, or its own.

    Raises:
        ConfigError: there is no such template; ``where`` begins the message.
    """
    tokenizer = language_tokenizer(model)
    if given == "alpaca":
        tokenizer.chat_template = alpaca.template(tokenizer)
    elif given is not None:
        if not Path(given).is_file():
            near = nearest_path(given, ["alpaca"])
            raise ConfigError(f'{where}: data.template = {given!r}: there is no such file{near}; another is "alpaca"')
        tokenizer.chat_template = Path(given).read_text("utf-8")
    return tokenizer


def marked(row: Mapping[str, Tensor], tokenizer: Any) -> str:
    """A row's text, with what is trained in double brackets."""
    ids, trained = row["input_ids"].tolist(), row["labels"].ne(alpaca.IGNORED).tolist()
    pieces = [(on, [i for i, _ in group]) for on, group in groupby(zip(ids, trained, strict=True), key=lambda each: each[1])]
    return "".join(f"[[{tokenizer.decode(part)}]]" if on else tokenizer.decode(part) for on, part in pieces)


def context_length(model: Any, tokenizer: Any, lengths: Sequence[int]) -> int:
    """The most tokens that a model and its tokenizer take; the longest of the lengths, where neither says it.

    >>> from types import SimpleNamespace
    >>> config, tokenizer = SimpleNamespace(max_position_embeddings=512), SimpleNamespace(model_max_length=UNCUT)
    >>> context_length(SimpleNamespace(config=config), tokenizer, [30, 40])
    512
    """
    known = [getattr(model.config, "max_position_embeddings", 0), tokenizer.model_max_length]
    return min([most for most in known if 0 < most < UNCUT], default=max(lengths))


def require_template(experiment: Experiment, asked: Evaluate, template: str | None) -> None:
    """Raises a `ConfigError` if there are questions and no chat template to ask them by."""
    if asked.sample and template is None:
        raise ConfigError(
            f"{experiment.name}: evaluate.sample: the tokenizer of {experiment.model} has no chat template to ask by: give "
            "data.template, or no samples"
        )


def other_text(experiment: Experiment, asked: Evaluate, tokenizer: Any) -> str | None:
    """The text of the file ``evaluate.text``.

    Raises:
        DataError: there is no such file, it is no text in UTF-8, or it has less than two tokens.
    """
    if asked.text is None:
        return None
    where, file = f"{experiment.name}: evaluate.text = {asked.text!r}", Path(asked.text)
    if not file.is_file():
        raise DataError(f"{where}: there is no such file{nearest_path(asked.text)}")
    try:
        with file.open(encoding="utf-8") as lines:
            text = lines.read(READ)
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: it is no text in UTF-8: {error}") from error
    if len(tokenizer(text[:1000], add_special_tokens=False, verbose=False)["input_ids"]) < 2:
        raise DataError(f"{where}: it has less than two tokens, and a perplexity needs more")
    return text


def forgets(model: Any, tokenizer: Any, text: str | None) -> dict[str, float]:
    """The perplexity of other text, under its name among the scores; nothing where there is no text."""
    return {} if text is None else {OTHER: perplexity(model, tokenizer, text)}


def validated(metric: str, score: Callable[[Any], float], tokenizer: Any, text: str | None) -> Validation:
    """What a strength is chosen by; with other text, its perplexity is what is forgotten."""
    if text is None:
        return Validation(metric, score)
    return Validation(metric, score, OTHER, lambda model: perplexity(model, tokenizer, text))


def speaking(experiment: Experiment, adapter: Path, plain: bool = False) -> tuple[Kind, nn.Module, Callable[[str], str]]:
    """What ``respond`` of a task gives: the language model, and its most probable answer to a question; ``plain``, or without
    a chat template, how it goes on with a text."""
    model, tokenizer = language_model(experiment.model, experiment.train.weights)
    tokenizer.chat_template = template_of(adapter) or tokenizer.chat_template

    def said(prompt: str) -> str:
        if plain or tokenizer.chat_template is None:
            return continued(model, tokenizer, tokenizer(prompt, verbose=False)["input_ids"])
        return answer(model, tokenizer, [{"role": "user", "content": prompt}])

    return "text", model, said


def opened(experiment: Experiment, folder: Path) -> tuple[Any, Any]:
    """The language model of a folder, which holds an adapter of the experiment's or a whole model, and its tokenizer.

    Raises:
        RunError: there is no such folder.
    """
    if is_adapter(folder):
        model, tokenizer = language_model(experiment.model, experiment.train.weights)
        delora.load(model, folder, methods=experiment.adapter.classes())
        return model, tokenizer
    if not folder.is_dir():
        raise RunError(f"there is no folder {folder}{nearest_path(folder)}")
    return language_model(str(folder), experiment.train.weights)


def delivered(
    experiment: Experiment, run: Path, rows: Sequence[Mapping[str, Any]], template: str | None, out: Path
) -> tuple[dict[str, int], int]:
    """Write ``adapter``, ``merged`` and ``peft`` with the chat template, read each back, count equal next tokens in the first
    of the rows, which the run's `NEXT` has.

    In float32 all must be equal, and the mean loss to 0.8 %; in bfloat16 the loss alone (`delivery.equal_tokens`).
    """
    trained, compared = read_json(run / NEXT), rows[:COMPARED]
    exact = experiment.train.weights == experiment.train.precision == "fp32"

    def same(kind: str, model: Any) -> int:
        return delivery.equal_tokens(out / kind, predicted(model, compared), trained, exact)

    def fresh() -> Any:
        return language_model(experiment.model, experiment.train.weights)[0]

    made = delivery.deliver(experiment, run, out, fresh, AutoModelForCausalLM, same, template)
    return made, len(trained["tokens"])
