"""A causal language model on pairs of a chosen and a rejected answer (DPO), rendered by the model's own chat template.

For a prompt x with the answers y+ and y-, the model pi and its reference pi0, which is the model before training:

    margin = beta (log pi(y+|x) / pi0(y+|x) - log pi(y-|x) / pi0(y-|x)),    loss = -log sigmoid(margin)

(Rafailov et al. 2023, arXiv:2305.18290, Eq. 7). The reference does not change, so its log-probabilities are computed once,
before the first step. The scores: the probability sigmoid(margin) of the choice (its geometric mean, 0.5 before training), by
which the best epoch is chosen on the validation part; the share of pairs whose margin is above 0; and the perplexity of the
chosen answers, of the base model too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

import delora
from delora.data import tables
from delora.data.alpaca import IGNORED
from delora.data.chats import Encoded, add
from delora.data.examples import DataError
from delora.data.packing import Collator
from delora.evaluation.language import predicted, token_sums
from delora.formats.native import is_adapter
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
from delora.training.config import Experiment, Strict
from delora.training.defaults import Sketch
from delora.training.experiments import adapt, begin, conclude, fit
from delora.training.memory import DTYPES
from delora.training.models import language_model, language_skeleton
from delora.training.runs import SAMPLES, Result, RunContext, write_json
from delora.training.task import Kind, Validation
from delora.training.trainer import RunTrainer

__all__ = [
    "Data",
    "PreferenceTrainer",
    "Settings",
    "base",
    "check",
    "deliver",
    "evaluate",
    "material",
    "respond",
    "run",
    "sketch",
    "validation",
]

PARALLEL = True
METRIC, ACCURACY = "likelihood", "accuracy"
NOT_SHARES = ("perplexity",)
SIDES = ("chosen", "rejected")
REFERENCE = "reference"
Row = dict[str, Tensor]


class Data(Strict):
    """The user's own pairs: ``prompt``, ``chosen`` and ``rejected``; see `delora.data.tables`.

    ``columns`` and ``group`` are for files whose columns do not say it. Answers are cut where a chat of more than
    ``max_tokens`` tokens ends. ``template`` takes the place of the tokenizer's own chat template: "alpaca", or a file of Jinja.

    >>> Data(source="pairs.jsonl").max_tokens
    1024
    """

    source: str
    kind: Literal["preference"] | None = None
    columns: dict[str, str] = Field(default={})
    group: str | None = None
    max_tokens: Annotated[int, Field(ge=8)] = 1024
    template: str | None = None


class Preference(Strict):
    """``beta``: how much a log-probability weighs that moves away from the reference's.

    >>> Preference().beta
    0.1
    """

    beta: Annotated[float, Field(gt=0)] = 0.1


class Settings(Experiment):
    """An experiment of this kind.

    >>> adapter = {"method": "lora", "r": 4, "targets": "all-linear"}
    >>> recipe = {"task": "preference", "name": "mine", "out": "runs/mine", "model": "llm", "adapter": adapter}
    >>> Settings.model_validate(recipe | {"data": {"source": "pairs.jsonl"}}).preference.beta
    0.1
    """

    task: Literal["preference"]
    data: Data
    preference: Preference = Preference()
    evaluate: Evaluate = Evaluate()

    def other_data(self) -> bool:
        return True


# ---------------------------------------------------------------- the loss


class Pairs:
    """Rows of pairs as one batch: for each side what `Collator` makes, its keys after "chosen_" and "rejected_".

    >>> row = {f"{side}_{key}": torch.tensor([5, 6]) for side in SIDES for key in ("input_ids", "labels")}
    >>> sorted(Pairs(0)([row]))[:3]
    ['chosen_attention_mask', 'chosen_input_ids', 'chosen_labels']
    """

    def __init__(self, pad: int) -> None:
        self.collate = Collator(pad)

    def __call__(self, rows: Sequence[Row]) -> Row:
        batch: Row = {}
        for side in SIDES:
            batch |= {f"{side}_{key}": t for key, t in self.collate([_side(row, side) for row in rows]).items()}
        return batch | ({REFERENCE: torch.stack([row[REFERENCE] for row in rows])} if REFERENCE in rows[0] else {})


def _side(row: Mapping[str, Tensor], side: str) -> Row:
    """One answer of a row, or of a batch."""
    return {key.removeprefix(f"{side}_"): t for key, t in row.items() if key.startswith(f"{side}_")}


def log_probabilities(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """The log-probabilities of the chosen and of the rejected answers, each the sum over its tokens: [rows, 2]."""
    sides = [_side(batch, side) for side in SIDES]
    longest = max(side["input_ids"].shape[1] for side in sides)
    both = {  # in one pass; what is filled up is not attended to and has no label
        key: torch.cat([nn.functional.pad(s[key], (0, longest - s[key].shape[1]), value=fill) for s in sides])
        for key, fill in (("input_ids", 0), ("attention_mask", 0), ("labels", IGNORED))
    }
    labels = both.pop("labels")
    return token_sums(model(**both).logits, labels)[:, 0].reshape(2, -1).T


def margins(found: Tensor, reference: Tensor, beta: float) -> Tensor:
    """What this module's equation says, from the log-probabilities [rows, 2] of the model and of its reference.

    >>> margins(torch.tensor([[-1.0, -5.0]]), torch.tensor([[-2.0, -4.0]]), beta=0.5).tolist()
    [1.0]
    """
    moved = found - reference
    return beta * (moved[:, 0] - moved[:, 1])


class PreferenceTrainer(RunTrainer):
    """A run's Trainer with the loss of this module on batches of `Pairs`, which have the reference's log-probabilities.

    >>> PreferenceTrainer.__mro__[1].__name__
    'RunTrainer'
    """

    def __init__(self, *args: Any, beta: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.beta = beta
        self.model_accepts_loss_kwargs = False  # the loss is not the model's own
        self.label_names = [REFERENCE]

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """The mean over the pairs of a batch."""
        found = margins(log_probabilities(model, inputs), inputs[REFERENCE], self.beta)
        loss = -logsigmoid(found).mean()
        return (loss, {"margins": found.detach()}) if return_outputs else loss


@torch.no_grad()
def referred(model: Any, rows: Sequence[Row], collate: Pairs, experiment: Settings) -> list[Row]:
    """The rows with the log-probabilities that a model gives them, as ``reference``; in the precision of the training."""
    model.eval()
    device, precision = next(model.parameters()).device, experiment.train.precision
    found: list[Tensor] = []
    for start in range(0, len(rows), experiment.train.batch_size):
        batch = {key: t.to(device) for key, t in collate(rows[start : start + experiment.train.batch_size]).items()}
        with torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32"):
            found += log_probabilities(model, batch).cpu().unbind()
    return [row | {REFERENCE: each} for row, each in zip(rows, found, strict=True)]


def judged(model: Any, rows: Sequence[Row], collate: Pairs, experiment: Settings) -> dict[str, float]:
    """The scores of a model on rows that have the reference's log-probabilities."""
    again = referred(model, rows, collate, experiment)
    found, before = (torch.stack([row[REFERENCE] for row in some]) for some in (again, rows))
    return _scores(margins(found, before, experiment.preference.beta)) | {"perplexity": perplexity(again)}


def _scores(found: Tensor) -> dict[str, float]:
    """Of margins: the geometric mean of the choices' probabilities, and the share above 0."""
    return {METRIC: logsigmoid(found).mean().exp().item(), ACCURACY: found.gt(0).float().mean().item()}


def perplexity(rows: Sequence[Row]) -> float:
    """That of the chosen answers' tokens, by the log-probabilities that the rows have."""
    count = sum(int(row[f"{SIDES[0]}_labels"].ne(IGNORED).sum()) for row in rows)
    return math.exp(-sum(row[REFERENCE][0].item() for row in rows) / count)


# ---------------------------------------------------------------- one run


def run(experiment: Settings, context: RunContext, data: Material) -> Result:
    """Model, inject, data, train, evaluate. An interrupted run resumes from its last checkpoint, with the same results."""
    model: Any
    model, _ = language_model(experiment.model, experiment.train.weights)
    begin(experiment, context)
    tokenizer = _tokenizer(experiment)
    for line in data.told:
        context.console.print(line, markup=False, style="dim")
    adapt(model, experiment)
    model.to(torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")
    collate, before = Pairs(tokenizer.pad_token_id), delora.reference(model)
    parts = {part: referred(before, getattr(data, part), collate, experiment) for part in ("train", "validation", "test")}
    answers = [_side(row, SIDES[0]) for row in data.test]
    trainer = fit(
        experiment,
        context,
        model,
        metric=METRIC,
        trainer_class=partial(PreferenceTrainer, beta=experiment.preference.beta),
        watch=[Samples(context.folder / SAMPLES, tokenizer, experiment.evaluate)] if experiment.evaluate.sample else [],
        train_dataset=parts["train"],
        eval_dataset=parts["validation"],
        data_collator=collate,
        compute_metrics=lambda output: _scores(torch.as_tensor(output.predictions)),
    )

    def score() -> dict[str, Any]:
        following = predicted(model, answers[:COMPARED])  # of a model in parts all processes compute it
        if parallel.first():
            write_json(context.folder / NEXT, following)
        scores = judged(model, parts["test"], collate, experiment) | forgets(model, tokenizer, data.other)
        scores["perplexity before"] = perplexity(parts["test"])
        with delora.disabled(model):
            scores |= {f"{name} before": value for name, value in forgets(model, tokenizer, data.other).items()}
        best = {"validation": trainer.state.best_metric, "best_epoch": trainer.best_epoch()}
        return best | {"test": scores[METRIC], "scores": scores, "baseline": 0.5}  # both answers alike

    return conclude(experiment, context, model, trainer, METRIC, METRIC, score)


# ---------------------------------------------------------------- data


def _tokenizer(experiment: Settings) -> Any:
    return templated(experiment.model, experiment.data.template, experiment.name)


def material(experiment: Settings) -> Material:
    """The experiment's pairs."""
    data = experiment.data
    table = tables.read(data.source, kind=data.kind, columns=data.columns or None, group=data.group, seed=experiment.seed)
    if table.kind != "preference":
        raise DataError(
            f"{data.source} has rows of {table.kind}, and the task preference takes pairs, with the columns chosen and rejected"
        )
    tokenizer, told, parts = _tokenizer(experiment), list(table.told), {}
    for part, rows in table.parts.items():
        parts[part], more = _encoded(rows, tokenizer, data.max_tokens, f"{data.source} ({part})", part)
        told += more
        if not parts[part]:
            raise DataError(
                f"{data.source} ({part}): no pair has a token to train on in both answers within data.max_tokens = "
                f"{data.max_tokens}: raise it"
            )
    other = other_text(experiment, experiment.evaluate, tokenizer)
    return Material(parts["train"], parts["validation"], parts["test"], tokenizer.chat_template, told, other)


def _encoded(
    rows: Iterable[Mapping[str, Any]], tokenizer: Any, max_tokens: int, where: str, part: str
) -> tuple[list[Row], list[str]]:
    """Pairs as tensors, without those that lack a token to train on; and what is to be told of them."""
    whole, kept = {side: Encoded() for side in SIDES}, []
    for number, row in enumerate(rows, 1):
        at = f"{where}, row {number}"
        if not row.get("prompt"):
            raise DataError(
                f"{at}: chosen and rejected are texts without a prompt, of which nobody can tell where the answers begin: "
                "name the prompt's column prompt, or write each as a list of turns"
            )
        sides = {side: Encoded() for side in SIDES}
        for side, encoded in sides.items():
            add(encoded, {"prompt": row["prompt"], "completion": row[side]}, tokenizer, max_tokens, at)
            whole[side].cut += encoded.cut
            whole[side].endless += encoded.endless
        if all(encoded.rows for encoded in sides.values()):
            kept.append({f"{side}_{key}": t for side, encoded in sides.items() for key, t in encoded.rows[0].items()})
    count, told = number, []
    for side, encoded in whole.items():
        if encoded.cut:
            told.append(f"{part}: {encoded.cut:,} of {count:,} {side} answers are cut at data.max_tokens = {max_tokens}")
        if encoded.endless:
            told.append(
                f"{part}: in {encoded.endless:,} of {count:,} {side} answers the chat template ends without a token of its own"
            )
    if len(kept) < count:
        told.append(f"{part}: {count - len(kept):,} of {count:,} pairs are left out: an answer has no token left to train on")
    return kept, told


def sketch(name: str, table: tables.Table, data: Mapping[str, Any]) -> Sketch:
    """What there is to know of a model and a table before a recipe is made: lengths, and one pair with its trained tokens."""
    tokenizer, model = templated(name, data.get("template"), "finetune"), language_skeleton(name)
    rows, _ = _encoded(table.parts["train"], tokenizer, UNCUT, "the rows to train on", "train")
    if not rows:
        raise DataError("no row has a token to train on: the chat template and the rows do not go together")
    lengths = [max(len(row[f"{side}_labels"]) for side in SIDES) for row in rows]
    example = " | rejected: ".join(marked(_side(rows[0], side), tokenizer) for side in SIDES)
    blank = torch.zeros(1, dtype=torch.long)

    def batch(rows: int, length: int) -> Row:
        some = {"input_ids": blank.expand(length), "labels": blank.expand(length)}
        return Collator(0)([some] * (2 * rows))

    return Sketch(model, [], lengths, context_length(model, tokenizer, lengths), example, batch)


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
    """The language model, and its most probable answer to a question."""
    return speaking(experiment, adapter)


def deliver(experiment: Settings, run: Path, data: Material, out: Path) -> tuple[dict[str, int], int]:
    """Write ``adapter``, ``merged`` and ``peft`` with the chat template, read each back, compare them on the chosen answers."""
    return delivered(experiment, run, [_side(row, SIDES[0]) for row in data.test], data.template, out)


def evaluate(experiment: Settings, folder: Path) -> tuple[dict[str, float], int]:
    """The scores of an adapter, or of a whole model, whose reference is the base model; and the number of test pairs."""
    data, collate = check(experiment), Pairs(_tokenizer(experiment).pad_token_id)
    model, tokenizer = opened(experiment, folder)
    if is_adapter(folder):
        with delora.disabled(model):
            rows = referred(model, data.test, collate, experiment)
    else:
        rows = referred(base(experiment), data.test, collate, experiment)
    return judged(model, rows, collate, experiment) | forgets(model, tokenizer, data.other), len(rows)


def validation(experiment: Settings, data: Material) -> Validation:
    """The probability of the choice on the validation part, by which the best epoch is chosen."""
    tokenizer = _tokenizer(experiment)
    collate = Pairs(tokenizer.pad_token_id)

    def score(model: Any) -> float:
        with delora.disabled(model):
            rows = referred(model, data.validation, collate, experiment)
        return judged(model, rows, collate, experiment)[METRIC]

    return validated(METRIC, score, tokenizer, data.other)
