"""Instruction tuning of a causal language model, on Alpaca or on questions about rated sentences.

The scores: multiple choice through lm-evaluation-harness, the probability of held-out tokens, and the perplexity on other text,
before and after training.
"""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Literal, Self, cast

from pydantic import Field, model_validator
from torch import nn
from torch.utils.data import Dataset
from transformers import DataCollatorForSeq2Seq

from delora.data import alpaca, sentences
from delora.data.alpaca import Instruction
from delora.data.examples import DataError
from delora.data.sentences import QUESTIONS, Question
from delora.errors import nearest_path
from delora.evaluation import harness
from delora.evaluation.answers import continued
from delora.evaluation.language import perplexity, predicted
from delora.training import parallel
from delora.training.causal_lm import COMPARED, NEXT, delivered, opened
from delora.training.config import ConfigError, Count, Experiment, Strict
from delora.training.experiments import adapt, begin, conclude, fit
from delora.training.models import language_model, language_skeleton, language_tokenizer
from delora.training.runs import Result, RunContext, write_json
from delora.training.task import Kind, Validation

__all__ = [
    "Data",
    "Evaluate",
    "Material",
    "Settings",
    "base",
    "check",
    "columns",
    "deliver",
    "evaluate",
    "material",
    "respond",
    "run",
    "validation",
]

PARALLEL = True
METRIC = "likelihood"
OTHER = 200  # sentences of a domain, for the perplexity
SELECTION = "The best setting of a row was chosen by the probability of the tokens of held-out instructions."
NOT_SHARES = ("perplexity",)


class Data(Strict):
    """The instructions: Alpaca's, ``test`` of them held out; or, if a ``domain`` is given, questions about its rated sentences.

    ``source``: a packaged data set, a file or a folder, or a name on the Hugging Face Hub. The loss is on all tokens, or with
    ``response_only`` on those of the response. Texts of more than ``max_tokens`` tokens are cut.

    >>> Data.model_validate({}).source, Data.model_validate({"domain": "movie"}).sizes()
    ('alpaca_data_cleaned_archive.json', (2000, 1000, 1500))
    """

    source: str
    domain: Literal["movie", "product", "newspaper", "tweet"] | None = None
    train: Count | None = None
    validation: Count | None = None
    test: Count | None = None
    max_tokens: int = Field(ge=3)
    response_only: bool = False

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        alpacas = {"source": alpaca.FILE, "test": 2000, "max_tokens": 256}
        rated = {"source": "vaderSentiment", "train": 2000, "validation": 1000, "test": 1500, "max_tokens": 256}
        return (alpacas if values.get("domain") is None else rated) | values

    @model_validator(mode="after")
    def _parts(self) -> Self:
        for key in ("train", "validation") if self.domain is None else ():
            if getattr(self, key) is not None:
                raise ValueError(f"data.{key} is for the rated sentences; Alpaca's are all that test leaves")
        return self

    def sizes(self) -> tuple[int, int, int]:
        """How many of the rated sentences are for training, validation and test."""
        return cast(tuple[int, int, int], (self.train, self.validation, self.test))


class Evaluate(Strict):
    """How the model is scored.

    ``tasks`` are those of lm-evaluation-harness, or "sentiment" and "rating" on the test sentences, with ``shots`` examples
    before each question. ``text``: for the perplexity, a file, or a domain, of which it is 200 sentences. ``before``: whether
    the base model is scored too.

    >>> Evaluate(tasks=["arc_challenge"]).shots
    0
    """

    tasks: list[str] = Field(default=[])
    shots: Annotated[int, Field(ge=0)] = 0
    batch_size: Count = 8
    text: str | None = None
    before: bool = True


class Settings(Experiment):
    """An experiment of this kind.

    >>> adapter = {"method": "lora", "r": 4, "targets": ["q_proj"]}
    >>> recipe = {"task": "instructions", "name": "mine", "out": "runs/mine", "model": "llm", "adapter": adapter}
    >>> Settings.model_validate(recipe).data.test
    2000
    """

    task: Literal["instructions"]
    data: Data = Data.model_validate({})
    evaluate: Evaluate = Evaluate()

    def other_data(self) -> bool:
        return self.data.domain is not None


def columns(experiment: Settings) -> list[str]:
    """Each benchmark, if there are several.

    >>> from types import SimpleNamespace
    >>> columns(SimpleNamespace(evaluate=Evaluate(tasks=["arc_challenge", "mmlu"])))
    ['arc_challenge', 'mmlu']
    """
    return experiment.evaluate.tasks if len(experiment.evaluate.tasks) > 1 else []


@dataclass(frozen=True)
class Material:
    """A run's data. ``questions``: those about the test sentences, by their kind; ``other``: the text for the perplexity.

    >>> Material([Instruction("Say hi.", "hi")], [], {}, None).train[0].output
    'hi'
    """

    train: list[Instruction]
    held_out: list[Instruction]
    questions: dict[str, list[Question]]
    other: str | None


def run(experiment: Settings, context: RunContext, data: Material) -> Result:
    """Model, inject, data, train, evaluate. An interrupted run resumes from its last checkpoint, with the same results."""
    before = scores_before(experiment, data)
    begin(experiment, context)
    model, tokenizer = language_model(experiment.model, experiment.train.weights)
    adapt(model, experiment)
    trainer = fit(
        experiment,
        context,
        model,
        metric=None,
        tokens=True,
        train_dataset=Encoded(data.train, tokenizer, experiment),
        eval_dataset=Encoded(data.held_out, tokenizer, experiment),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )

    def score() -> dict[str, Any]:
        tokens = predicted(model, compared(experiment, tokenizer, data))
        if parallel.first():
            write_json(context.folder / NEXT, tokens)
        loss = next(line["eval_loss"] for line in reversed(trainer.state.log_history) if "eval_loss" in line)
        likelihood = math.exp(-loss)
        scores = {METRIC: likelihood} | scored(model, tokenizer, experiment, data)
        last = math.ceil(trainer.state.epoch or 0)  # which an experiment with train.steps may have begun only
        figures = {"validation": likelihood, "test": scores[reported(experiment)], "best_epoch": last}
        every = scores | {f"{name} before": value for name, value in before.items()}
        return figures | {"scores": every, "baseline": before.get(reported(experiment))}

    return conclude(experiment, context, model, trainer, METRIC, reported(experiment), score)


@dataclass(frozen=True)
class Encoded(Dataset[Any]):
    """Instructions as tokens with labels, tokenised one by one."""

    part: Sequence[Instruction]
    tokenizer: Any
    experiment: Settings

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        data = self.experiment.data
        return alpaca.encode(self.part[index], self.tokenizer, data.max_tokens, data.response_only)


def material(experiment: Settings) -> Material:
    """The experiment's instructions, questions and text."""
    data, text = experiment.data, experiment.evaluate.text
    other = None
    if text in sentences.DOMAINS:
        other = "\n".join(s.text for s in sentences.read(text, neutral=True)[:OTHER])
    elif text is not None:
        if not Path(text).is_file():
            raise DataError(
                f"evaluate.text = {text!r}: there is no such file, and no such domain ({', '.join(sentences.DOMAINS)})"
                f"{nearest_path(text, sentences.DOMAINS)}"
            )
        other = Path(text).read_text("utf-8")
    if data.domain is None:
        train, held_out = alpaca.split(alpaca.read(data.source), 42, cast(int, data.test))
        return Material(*learnable(experiment, train, held_out), {}, other)
    parts = sentences.split(sentences.read(data.domain, data.source, neutral=True), experiment.seed, *data.sizes())

    def every(part: list[sentences.Sentence]) -> list[Instruction]:
        return [question for kind in QUESTIONS for question in sentences.questions(kind, part)]

    questions = {kind: sentences.questions(kind, parts.test) for kind in QUESTIONS if kind in experiment.evaluate.tasks}
    return Material(*learnable(experiment, every(parts.train), every(parts.validation)), questions, other)


def learnable(
    experiment: Settings, train: list[Instruction], held_out: list[Instruction]
) -> tuple[list[Instruction], list[Instruction]]:
    """The two parts without the instructions that ``max_tokens`` leaves no token of the response: their loss is no number.

    Raises:
        DataError: all of a part are so.
    """
    if not experiment.data.response_only:  # every token is a label
        return train, held_out
    tokenizer = language_tokenizer(experiment.model)
    kept = []
    for part, name in ((train, "to train on"), (held_out, "held out")):
        encoded = Encoded(part, tokenizer, experiment)
        some = [item for i, item in enumerate(part) if alpaca.trained(encoded[i])]
        most = f"data.max_tokens = {experiment.data.max_tokens}"
        if not some:
            raise DataError(
                f"{experiment.name}: the prompts of all {len(part):,} instructions {name} fill {most}, so that no token of a "
                "response is left to train on: raise it, or shorten the prompts"
            )
        if left := len(part) - len(some):
            warnings.warn(
                f"{experiment.name}: {left:,} of {len(part):,} instructions {name} are left out: their prompts fill {most}, "
                "so that no token of the response is left",
                stacklevel=2,
            )
        kept.append(some)
    return kept[0], kept[1]


# ---------------------------------------------------------------- scores


def reported(experiment: Settings) -> str:
    """The score that the table shows: the mean over the tasks or, without tasks, the probability of a held-out token."""
    return "average" if experiment.evaluate.tasks else METRIC


def scored(model: Any, tokenizer: Any, experiment: Settings, data: Material) -> dict[str, float]:
    """The tasks' scores as shares, their mean, and the perplexity on the other text."""
    settings, scores = experiment.evaluate, {}
    if settings.tasks:
        model.eval()
        with tempfile.TemporaryDirectory() as folder:
            tasks = [
                harness.as_task(name, data.questions[name], Path(folder)) if name in data.questions else name
                for name in settings.tasks
            ]
            results = harness.score(model, tokenizer, tasks, settings.batch_size, settings.shots)
        # The paper's MMLU is the mean over subjects.
        scores = {name: results[name].get("acc_macro", results[name]["acc"]) for name in settings.tasks}
        scores["average"] = fmean(scores.values())
    if data.other is not None:
        scores["perplexity"] = perplexity(model, tokenizer, data.other)
    return scores


_BEFORE: dict[str, dict[str, float]] = {}


def scores_before(experiment: Settings, data: Material) -> dict[str, float]:
    """`scored` of the base model, once for all runs with the same base model and data."""
    settings = experiment.model_dump_json(include={"model", "data", "evaluate", "seed"})
    key = f"{settings} {experiment.train.weights}"
    if key not in _BEFORE:
        _BEFORE[key] = {}
        if experiment.evaluate.before and (experiment.evaluate.tasks or data.other is not None):
            _BEFORE[key] = scored(*language_model(experiment.model, experiment.train.weights), experiment, data)
    return _BEFORE[key]


# ---------------------------------------------------------------- before all runs, and after


def check(experiment: Settings) -> Material:
    """Raises an error for anything that would make a run fail, before one starts; returns its data. Loads the benchmarks'."""
    adapt(language_skeleton(experiment.model), experiment)
    _tasks(experiment)
    data = material(experiment)
    harness_tasks = [name for name in experiment.evaluate.tasks if name not in data.questions]
    if harness_tasks:
        harness.load(harness_tasks)
    return data


def _tasks(experiment: Settings) -> None:
    for name in experiment.evaluate.tasks:
        if name in QUESTIONS and experiment.data.domain is None:
            raise ConfigError(f"{experiment.name}: evaluate.tasks: {name} is about the rated sentences: give data.domain")


def base(experiment: Settings) -> nn.Module:
    """The frozen language model."""
    return language_model(experiment.model, experiment.train.weights)[0]


def respond(experiment: Settings, adapter: Path) -> tuple[Kind, nn.Module, Callable[[str], str]]:
    """The language model, and its most probable response to an instruction."""
    model, tokenizer = language_model(experiment.model, experiment.train.weights)

    def response(prompt: str) -> str:
        return continued(model, tokenizer, tokenizer(Instruction(prompt, "").prompt, verbose=False)["input_ids"]).strip()

    return "text", model, response


def deliver(experiment: Settings, run: Path, data: Material, out: Path) -> tuple[dict[str, int], int]:
    """Write ``adapter``, ``merged`` and ``peft``, read each back into a fresh model, count the equal next tokens."""
    tokenizer = language_tokenizer(experiment.model)
    rows = compared(experiment, tokenizer, data)
    return delivered(experiment, run, rows, chat_template(experiment, tokenizer, data), out)


def compared(experiment: Settings, tokenizer: Any, data: Material) -> list[dict[str, list[int]]]:
    """The instructions on which the delivered files are compared with the trained model."""
    part = data.held_out[:COMPARED]
    return [Encoded(part, tokenizer, experiment)[i] for i in range(len(part))]


def chat_template(experiment: Settings, tokenizer: Any, data: Material) -> str | None:
    """The template by which a server renders what was trained; None, and a warning, if the tokenizer renders it otherwise."""
    tokenizer.chat_template = alpaca.template(tokenizer)
    for item in data.held_out[:COMPARED]:
        asked = {"role": "user", "content": item.instruction, "input": item.input}
        chat = [asked, {"role": "assistant", "content": item.output}]
        if tokenizer.apply_chat_template(chat)["input_ids"] != alpaca.encode(item, tokenizer, 2**31)["input_ids"]:
            warnings.warn(
                f"{experiment.name}: the tokenizer of {experiment.model} makes other tokens of the template of Alpaca than of "
                "the trained text: the delivered folders have no chat template; ask the model by the text itself",
                stacklevel=2,
            )
            return ""
    return str(tokenizer.chat_template)


def evaluate(experiment: Settings, folder: Path) -> tuple[dict[str, float], int]:
    """The scores of an adapter, or of a whole model; and the number of held-out instructions."""
    data = check(experiment)
    model, tokenizer = opened(experiment, folder)
    return scored(model, tokenizer, experiment, data), len(data.held_out)


def validation(experiment: Settings, data: Material) -> Validation:
    """The probability of a held-out token, as after training; what is forgotten is the perplexity of the other text."""
    tokenizer, other = language_tokenizer(experiment.model), data.other
    encoded, collate, size = (
        Encoded(data.held_out, tokenizer, experiment),
        DataCollatorForSeq2Seq(tokenizer),
        experiment.train.batch_size,
    )

    def score(model: Any) -> float:
        device, total = next(model.parameters()).device, 0.0
        for start in range(0, len(encoded), size):
            rows = [encoded[i] for i in range(start, min(start + size, len(encoded)))]
            total += model(**collate(rows).to(device)).loss.item() * len(rows)
        return math.exp(-total / len(encoded))

    if other is None:
        return Validation(METRIC, score)
    return Validation(METRIC, score, "perplexity", lambda model: perplexity(model, tokenizer, other))
