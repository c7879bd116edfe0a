"""A causal language model on a user's own chats, completions or texts, rendered by the model's own chat template.

The scores: the probability of a held-out token of an answer (its geometric mean), and the perplexity, of the base model too.
The best epoch is chosen by the first one on the validation part.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import delora
from delora.data import alpaca, tables
from delora.data.chats import Encoded, encode
from delora.data.examples import DataError
from delora.data.packing import Collator, keeps_apart, packed
from delora.errors import nearest_path
from delora.evaluation.answers import answer, continued
from delora.evaluation.language import log_likelihood, predicted, token_sums
from delora.formats.files import read_json, write_atomically
from delora.formats.native import is_adapter
from delora.training import delivery, parallel
from delora.training.config import ConfigError, Count, Experiment, Strict
from delora.training.defaults import Sketch
from delora.training.experiments import adapt, begin, conclude, fit
from delora.training.models import language_model, language_skeleton, language_tokenizer, template_of
from delora.training.runs import Result, RunContext, RunError, write_json
from delora.training.task import Kind, Validation

__all__ = [
    "Data",
    "Evaluate",
    "Material",
    "Settings",
    "base",
    "check",
    "deliver",
    "evaluate",
    "material",
    "respond",
    "run",
    "sketch",
    "tokenizer_of",
    "validation",
]

NEXT, SAMPLES = "next.json", "samples.jsonl"
METRIC = "likelihood"
COMPARED = 64  # test rows on which the delivered files are compared with the trained model
NOT_SHARES = ("perplexity",)
KINDS = ("chat", "completion", "text")
UNCUT = 1 << 30  # more tokens than any row has


class Data(Strict):
    """The user's own rows: chats (``messages``), prompts with completions, Alpaca's, or plain texts; see `delora.data.tables`.

    ``kind``, ``columns`` and ``group`` are for files whose columns do not say it. Chats and completions of more than
    ``max_tokens`` tokens are cut; what has no trained token left is left out, and told. With ``packing`` several rows go into
    one of ``max_tokens`` tokens, and ``train.batch_size`` counts these. ``template`` takes the place of the tokenizer's own
    chat template: "alpaca", or a file of Jinja.

    >>> Data(source="chat.jsonl").max_tokens
    1024
    """

    source: str
    kind: Literal["chat", "completion", "text"] | None = None
    columns: dict[str, str] = Field(default={})
    group: str | None = None
    max_tokens: Annotated[int, Field(ge=8)] = 1024
    packing: bool = False
    template: str | None = None


class Evaluate(Strict):
    """``sample``: questions that the model, and the base model beside it, answers at every validation, into samples.jsonl.

    >>> Evaluate(sample=["Who are you?"]).tokens
    64
    """

    sample: list[str] = Field(default=[])
    tokens: Count = 64


class Settings(Experiment):
    """An experiment of this kind.

    >>> adapter = {"method": "lora", "r": 4, "targets": "all-linear"}
    >>> recipe = {"task": "chat", "name": "mine", "out": "runs/mine", "model": "llm", "adapter": adapter}
    >>> Settings.model_validate(recipe | {"data": {"source": "chat.jsonl"}}).data.packing
    False
    """

    task: Literal["chat"]
    data: Data
    evaluate: Evaluate = Evaluate()

    def other_data(self) -> bool:
        return True


@dataclass(frozen=True)
class Material:
    """A run's rows as tensors, the chat template's text that they were rendered by, and what is to be told of them.

    >>> Material([], [], [], None, ["mine: 8 of 90 rows are cut"]).told[0]
    'mine: 8 of 90 rows are cut'
    """

    train: list[dict[str, Tensor]]
    validation: list[dict[str, Tensor]]
    test: list[dict[str, Tensor]]
    template: str | None
    told: list[str]


def run(experiment: Settings, context: RunContext, data: Material) -> Result:
    """Model, inject, data, train, evaluate. An interrupted run resumes from its last checkpoint, with the same results."""
    model: Any
    model, _ = language_model(experiment.model, experiment.train.weights)
    if experiment.data.packing and not keeps_apart(model):
        raise ConfigError(
            f"{experiment.name}: data.packing: {experiment.model} ({type(model).__name__}) lets a row see those packed before "
            "it, so that another loss would be trained: packing=false"
        )
    begin(experiment, context)
    tokenizer = tokenizer_of(experiment)
    for line in data.told:
        context.console.print(line, markup=False, style="dim")
    adapt(model, experiment)
    trainer = fit(
        experiment,
        context,
        model,
        metric=METRIC,
        tokens=True,
        watch=[Samples(context.folder / SAMPLES, tokenizer, experiment)] if experiment.evaluate.sample else [],
        train_dataset=packed(data.train, experiment.data.max_tokens) if experiment.data.packing else data.train,
        eval_dataset=data.validation,
        data_collator=Collator(tokenizer.pad_token_id),
        preprocess_logits_for_metrics=token_sums,
        compute_metrics=lambda output: {METRIC: math.exp(output.predictions[:, 0].sum() / output.predictions[:, 1].sum())},
    )

    def score() -> dict[str, Any]:
        if parallel.first():
            write_json(context.folder / NEXT, predicted(model, data.test[:COMPARED]))
        scores = scored(model, tokenizer, experiment, data.test)
        with delora.disabled(model):
            scores |= {f"{name} before": value for name, value in scored(model, tokenizer, experiment, data.test).items()}
        best = {"validation": trainer.state.best_metric, "best_epoch": trainer.best_epoch()}
        return best | {"test": scores[METRIC], "scores": scores}

    return conclude(experiment, context, model, trainer, METRIC, METRIC, score)


def scored(model: Any, tokenizer: Any, experiment: Settings, rows: Sequence[dict[str, Tensor]]) -> dict[str, float]:
    """The probability of a trained token, and the perplexity."""
    mean = log_likelihood(model, rows, Collator(tokenizer.pad_token_id), experiment.train.batch_size)
    return {METRIC: math.exp(mean), "perplexity": math.exp(-mean)}


class Samples(TrainerCallback):
    """Adds to ``samples.jsonl``, at every validation, the answers of the model and of the base model to fixed questions.

    >>> Samples(Path("samples.jsonl"), None, None).file.name
    'samples.jsonl'
    """

    def __init__(self, file: Path, tokenizer: Any, experiment: Any) -> None:
        self.file, self.tokenizer, self.experiment = file, tokenizer, experiment

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        model, settings = kwargs["model"], self.experiment.evaluate
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


# ---------------------------------------------------------------- data


def tokenizer_of(experiment: Settings) -> Any:
    """The model's tokenizer, with the experiment's chat template.

    Raises:
        ConfigError: there is no such template.
    """
    return _templated(experiment.model, experiment.data.template, experiment.name)


def _templated(model: str, given: str | None, where: str) -> Any:
    tokenizer = language_tokenizer(model)
    if given == "alpaca":
        tokenizer.chat_template = alpaca.template(tokenizer)
    elif given is not None:
        if not Path(given).is_file():
            near = nearest_path(given, ["alpaca"])
            raise ConfigError(f'{where}: data.template = {given!r}: there is no such file{near}; another is "alpaca"')
        tokenizer.chat_template = Path(given).read_text("utf-8")
    return tokenizer


def material(experiment: Settings) -> Material:
    """The experiment's rows."""
    data = experiment.data
    given: dict[str, Any] = {"kind": data.kind, "columns": data.columns or None, "group": data.group}
    table = tables.read(data.source, **given, seed=experiment.seed)
    if table.kind not in KINDS:
        hint = (
            "delora.reference and TRL's DPOTrainer train on pairs (docs/trainers.md)"
            if table.kind == "preference"
            else "of texts with labels delora finetune makes a classifier; for the texts alone: data.kind=text"
        )
        raise DataError(f"{data.source} has rows of {table.kind}, and the task chat takes {', '.join(KINDS)}: {hint}")
    tokenizer = tokenizer_of(experiment)
    told = list(table.told)
    parts = {}
    for part, rows in table.parts.items():
        some = [_row(row, data.template) for row in rows]
        encoded = encode(some, tokenizer, data.max_tokens, f"{data.source} ({part})")
        told += _told(encoded, len(some), part, data.max_tokens)
        if not encoded.rows:
            raise DataError(
                f"{data.source} ({part}): no row has a token to train on within data.max_tokens = {data.max_tokens}: raise it"
            )
        parts[part] = encoded.rows
    return Material(parts["train"], parts["validation"], parts["test"], tokenizer.chat_template, told)


def _row(row: Mapping[str, Any], template: str | None) -> dict[str, Any]:
    """A row as the template takes it: Alpaca's has a place for the input apart from the instruction."""
    made = {key: value for key, value in row.items() if value is not None}
    if template == "alpaca" and "instruction" in made:
        asked = {"role": "user", "content": made["instruction"], "input": made.get("input", "")}
        return {"prompt": [asked], "completion": [{"role": "assistant", "content": made["completion"]}]}
    return made


def _told(encoded: Encoded, rows: int, part: str, most: int) -> list[str]:
    lengths = sorted(len(row["labels"]) for row in encoded.rows)
    told = []
    if lengths:
        told.append(
            f"{part}: {len(lengths):,} rows of {lengths[len(lengths) // 2]:,} tokens (median; longest {lengths[-1]:,}), "
            f"{encoded.trained:,} of {encoded.length:,} tokens are trained"
        )
    if encoded.cut:
        told.append(f"{part}: {encoded.cut:,} of {rows:,} rows are cut at data.max_tokens = {most}")
    if encoded.untrained:
        told.append(f"{part}: {encoded.untrained:,} of {rows:,} rows are left out, having no token to train on within that")
    if encoded.joined:
        told.append(
            f"{part}: in {encoded.joined:,} of {rows:,} rows the answer's first token also holds the prompt's end: it is "
            "not trained"
        )
    if encoded.endless:
        told.append(
            f"{part}: in {encoded.endless:,} of {rows:,} rows the chat template ends an answer without a token of its own: the "
            "model does not learn when to stop"
        )
    return told


def sketch(name: str, table: tables.Table, data: Mapping[str, Any]) -> Sketch:
    """What there is to know of a model and a table before a recipe is made: lengths, and one row with its trained tokens."""
    template = data.get("template")
    tokenizer, model = _templated(name, template, "finetune"), language_skeleton(name)
    encoded = encode([_row(row, template) for row in table.parts["train"]], tokenizer, UNCUT, "the rows to train on")
    if not encoded.rows:
        raise DataError("no row has a token to train on: the chat template and the rows do not go together")
    lengths = [len(row["labels"]) for row in encoded.rows]
    known = [getattr(model.config, "max_position_embeddings", 0), tokenizer.model_max_length]
    limit = min([most for most in known if 0 < most < UNCUT], default=max(lengths))

    def batch(rows: int, length: int) -> dict[str, Tensor]:
        blank = torch.zeros(length, dtype=torch.long)
        if data.get("packing"):
            return Collator(0)(packed([{"input_ids": blank, "labels": blank}] * rows, length))
        return Collator(0)([{"input_ids": blank, "labels": blank}] * rows)

    return Sketch(model, [], lengths, limit, _marked(encoded.rows[0], tokenizer), batch)


def _marked(row: Mapping[str, Tensor], tokenizer: Any) -> str:
    """A row's text, with what is trained in double brackets."""
    ids, trained = row["input_ids"].tolist(), row["labels"].ne(alpaca.IGNORED).tolist()
    pieces = [(on, [i for i, _ in group]) for on, group in groupby(zip(ids, trained, strict=True), key=lambda each: each[1])]
    return "".join(f"[[{tokenizer.decode(part)}]]" if on else tokenizer.decode(part) for on, part in pieces)


# ---------------------------------------------------------------- before all runs, and after


def check(experiment: Settings) -> Material:
    """Raises an error for anything that would make a run fail, before one starts; returns its data."""
    adapt(language_skeleton(experiment.model), experiment)
    data = material(experiment)
    if experiment.evaluate.sample and data.template is None:
        raise ConfigError(
            f"{experiment.name}: evaluate.sample: the tokenizer of {experiment.model} has no chat template to ask by: give "
            "data.template, or no samples"
        )
    return data


def base(experiment: Settings) -> nn.Module:
    """The frozen language model."""
    return language_model(experiment.model, experiment.train.weights)[0]


def respond(experiment: Settings, adapter: Path) -> tuple[Kind, nn.Module, Callable[[str], str]]:
    """The language model, and its most probable answer to a question; how it goes on, if it was trained on texts."""
    model, tokenizer = language_model(experiment.model, experiment.train.weights)
    tokenizer.chat_template = template_of(adapter) or tokenizer.chat_template

    def said(prompt: str) -> str:
        if experiment.data.kind == "text" or tokenizer.chat_template is None:
            return continued(model, tokenizer, tokenizer(prompt, verbose=False)["input_ids"])
        return answer(model, tokenizer, [{"role": "user", "content": prompt}])

    return "text", model, said


def deliver(experiment: Settings, run: Path, data: Material, out: Path) -> tuple[dict[str, int], int]:
    """Write ``adapter``, ``merged`` and ``peft`` with the chat template, read each back, count the equal next tokens.

    In float32 all must be equal, and the mean loss to 0.8 %; in bfloat16 the loss alone (`delivery.equal_tokens`).
    """
    trained, rows = read_json(run / NEXT), data.test[:COMPARED]
    exact = experiment.train.weights == experiment.train.precision == "fp32"

    def same(kind: str, model: Any) -> int:
        return delivery.equal_tokens(out / kind, predicted(model, rows), trained, exact)

    fresh = partial(base, experiment)
    made = delivery.deliver(experiment, run, out, fresh, AutoModelForCausalLM, same, data.template)
    return made, len(trained["tokens"])


def evaluate(experiment: Settings, folder: Path) -> tuple[dict[str, float], int]:
    """The scores of an adapter, or of a whole model; and the number of test rows."""
    data, weights, tokenizer = check(experiment), experiment.train.weights, tokenizer_of(experiment)
    if is_adapter(folder):
        model, _ = language_model(experiment.model, weights)
        delora.load(model, folder, methods=experiment.adapter.classes())
    elif folder.is_dir():
        model, _ = language_model(str(folder), weights)
    else:
        raise RunError(f"there is no folder {folder}{nearest_path(folder)}")
    return scored(model, tokenizer, experiment, data.test), len(data.test)


def validation(experiment: Settings, data: Material) -> Validation:
    """The probability of a token of the validation part, by which the best epoch is chosen."""
    tokenizer = tokenizer_of(experiment)
    return Validation(METRIC, lambda model: scored(model, tokenizer, experiment, data.validation)[METRIC])
