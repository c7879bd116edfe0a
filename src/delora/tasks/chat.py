"""A causal language model on a user's own chats, completions or texts, rendered by the model's own chat template.

The scores: the probability of a held-out token of an answer (its geometric mean), and the perplexity, of the base model too;
with ``evaluate.text`` the perplexity of other text, which says what is forgotten.
The best epoch is chosen by the first one on the validation part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

import delora
from delora.data import tables
from delora.data.chats import Encoded, encode
from delora.data.examples import DataError
from delora.data.packing import Collator, keeps_apart, packed
from delora.evaluation.language import log_likelihood, predicted, token_sums
from delora.training import parallel
from delora.training.causal_lm import (
    COMPARED,
    NEXT,
    UNCUT,
    Evaluate,
    Material,
    Samples,
    context_length,
    delivered,
    forgets,
    marked,
    opened,
    other_text,
    require_template,
    speaking,
    templated,
    validated,
)
from delora.training.config import ConfigError, Experiment, Strict
from delora.training.defaults import Sketch
from delora.training.experiments import adapt, begin, conclude, fit
from delora.training.models import language_model, language_skeleton
from delora.training.runs import SAMPLES, Result, RunContext, write_json
from delora.training.task import Kind, Validation

__all__ = [
    "Data",
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

PARALLEL = True
METRIC = "likelihood"
NOT_SHARES = ("perplexity",)
KINDS = ("chat", "completion", "text")


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
        watch=[Samples(context.folder / SAMPLES, tokenizer, experiment.evaluate)] if experiment.evaluate.sample else [],
        train_dataset=packed(data.train, experiment.data.max_tokens) if experiment.data.packing else data.train,
        eval_dataset=data.validation,
        data_collator=Collator(tokenizer.pad_token_id),
        preprocess_logits_for_metrics=token_sums,
        compute_metrics=lambda output: {METRIC: math.exp(output.predictions[:, 0].sum() / output.predictions[:, 1].sum())},
    )

    def every() -> dict[str, float]:
        return scored(model, tokenizer, experiment, data.test) | forgets(model, tokenizer, data.other)

    def score() -> dict[str, Any]:
        following = predicted(model, data.test[:COMPARED])  # of a model in parts all processes compute it
        if parallel.first():
            write_json(context.folder / NEXT, following)
        scores = every()
        with delora.disabled(model):
            scores |= {f"{name} before": value for name, value in every().items()}
        best = {"validation": trainer.state.best_metric, "best_epoch": trainer.best_epoch()}
        return best | {"test": scores[METRIC], "scores": scores, "baseline": scores[f"{METRIC} before"]}

    return conclude(experiment, context, model, trainer, METRIC, METRIC, score)


def scored(model: Any, tokenizer: Any, experiment: Settings, rows: Sequence[dict[str, Tensor]]) -> dict[str, float]:
    """The probability of a trained token, and the perplexity."""
    mean = log_likelihood(model, rows, Collator(tokenizer.pad_token_id), experiment.train.batch_size)
    return {METRIC: math.exp(mean), "perplexity": math.exp(-mean)}


# ---------------------------------------------------------------- data


def tokenizer_of(experiment: Settings) -> Any:
    """The model's tokenizer, with the experiment's chat template.

    Raises:
        ConfigError: there is no such template.
    """
    return templated(experiment.model, experiment.data.template, experiment.name)


def material(experiment: Settings) -> Material:
    """The experiment's rows."""
    data = experiment.data
    given: dict[str, Any] = {"kind": data.kind, "columns": data.columns or None, "group": data.group}
    table = tables.read(data.source, **given, seed=experiment.seed)
    if table.kind not in KINDS:
        hint = (
            'task = "preference" trains on pairs'
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
    other = other_text(experiment, experiment.evaluate, tokenizer)
    return Material(parts["train"], parts["validation"], parts["test"], tokenizer.chat_template, told, other)


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
    tokenizer, model = templated(name, template, "finetune"), language_skeleton(name)
    encoded = encode([_row(row, template) for row in table.parts["train"]], tokenizer, UNCUT, "the rows to train on")
    if not encoded.rows:
        raise DataError("no row has a token to train on: the chat template and the rows do not go together")
    lengths = [len(row["labels"]) for row in encoded.rows]

    def batch(rows: int, length: int) -> dict[str, Tensor]:
        blank = torch.zeros(length, dtype=torch.long)
        if data.get("packing"):
            return Collator(0)(packed([{"input_ids": blank, "labels": blank}] * rows, length))
        return Collator(0)([{"input_ids": blank, "labels": blank}] * rows)

    return Sketch(model, [], lengths, context_length(model, tokenizer, lengths), marked(encoded.rows[0], tokenizer), batch)


# ---------------------------------------------------------------- before all runs, and after


def check(experiment: Settings) -> Material:
    """Raises an error for anything that would make a run fail, before one starts; returns its data."""
    adapt(language_skeleton(experiment.model), experiment)
    data = material(experiment)
    require_template(experiment, experiment.evaluate, data.template)
    return data


def base(experiment: Settings) -> nn.Module:
    """The frozen language model."""
    return language_model(experiment.model, experiment.train.weights)[0]


def respond(experiment: Settings, adapter: Path) -> tuple[Kind, nn.Module, Callable[[str], str]]:
    """The language model, and its most probable answer to a question; how it goes on, if it was trained on texts."""
    return speaking(experiment, adapter, plain=experiment.data.kind == "text")


def deliver(experiment: Settings, run: Path, data: Material, out: Path) -> tuple[dict[str, int], int]:
    """Write ``adapter``, ``merged`` and ``peft`` with the chat template, read each back, count the equal next tokens."""
    return delivered(experiment, run, data.test, data.template, out)


def evaluate(experiment: Settings, folder: Path) -> tuple[dict[str, float], int]:
    """The scores of an adapter, or of a whole model; and the number of test rows."""
    data, tokenizer = check(experiment), tokenizer_of(experiment)
    model, _ = opened(experiment, folder)
    return scored(model, tokenizer, experiment, data.test) | forgets(model, tokenizer, data.other), len(data.test)


def validation(experiment: Settings, data: Material) -> Validation:
    """The probability of a token of the validation part, by which the best epoch is chosen."""
    tokenizer = tokenizer_of(experiment)

    def score(model: Any) -> float:
        return scored(model, tokenizer, experiment, data.validation)[METRIC]

    return validated(METRIC, score, tokenizer, data.other)
