"""Instruction tuning of a causal language model, on Alpaca or on questions about rated sentences.

Scored by multiple choice through lm-evaluation-harness, by the probability of held-out tokens, and by the perplexity on other
text, before and after.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import torch
from rich.console import Console
from torch import nn
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, set_seed

import delora
from delora.checkpoint import is_adapter
from delora.data import alpaca, sentences
from delora.data.alpaca import Instruction
from delora.data.sentences import QUESTIONS, Question
from delora.data.tasks import DataError
from delora.evaluation import harness
from delora.evaluation.language import perplexity
from delora.files import read_json
from delora.inject import adapters
from delora.layer import Adapter
from delora.training.config import ConfigError, Experiment
from delora.training.experiments import begin, cost, finish, fit, inject, reached, read_peft
from delora.training.models import language_model, language_skeleton, loading, save_merged
from delora.training.runs import Result, RunError, write_json

NEXT = "next.json"
METRIC = "likelihood"
OTHER = 200  # sentences of a domain for the perplexity
COMPARED = 64  # held-out instructions on which what is delivered is compared with what was trained


@dataclass(frozen=True)
class Material:
    """``questions``: the test sentences, by the kind of task of ours; ``other``: the text for the perplexity."""

    train: list[Instruction]
    held_out: list[Instruction]
    questions: dict[str, list[Question]]
    other: str | None


def run(experiment: Experiment, folder: Path, row: str, setting: str, data: Material, console: Console) -> Result:
    """Model, inject, data, train, evaluate. A run that was stopped goes on from its last checkpoint to the same numbers."""
    before = scores_before(experiment, data)
    begin(experiment, folder)
    model, tokenizer = language_model(experiment.model, experiment.train.weights)
    inject(model, experiment)
    trainer = fit(
        experiment,
        folder,
        model,
        console,
        metric=None,
        train_dataset=Encoded(data.train, tokenizer, experiment),
        eval_dataset=Encoded(data.held_out, tokenizer, experiment),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )
    found: dict[str, Any] = {"diverged": trainer.diverged}
    if trainer.diverged is None:
        delora.save(model, folder / "adapter")
        write_json(folder / NEXT, predicted(model, tokenizer, data.held_out[:COMPARED], experiment))
        loss = next(line["eval_loss"] for line in reversed(trainer.state.log_history) if "eval_loss" in line)
        likelihood = math.exp(-loss)
        scores = {METRIC: likelihood} | scored(model, tokenizer, experiment, data)
        found |= {"validation": likelihood, "test": scores[reported(experiment)]}
        found |= {"scores": scores | {f"{name} before": value for name, value in before.items()}}
        found |= {"best_epoch": experiment.train.epochs} | reached(model, folder / "adapter")
    return finish(experiment, folder, row, setting, METRIC, reported(experiment), **cost(model, trainer), **found)


@dataclass(frozen=True)
class Encoded(Dataset[Any]):
    """Instructions as tokens with labels, made when asked for."""

    part: Sequence[Instruction]
    tokenizer: Any
    experiment: Experiment

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        data = self.experiment.data
        return alpaca.encode(self.part[index], self.tokenizer, data.max_tokens, data.response_only)


def material(experiment: Experiment) -> Material:
    data, text = experiment.data, experiment.evaluate.text
    other = None
    if text in sentences.DOMAINS:
        other = "\n".join(s.text for s in sentences.read(text, neutral=True)[:OTHER])
    elif text is not None:
        if not Path(text).is_file():
            raise DataError(
                f"evaluate.text = {text!r}: there is no such file, and no such domain ({', '.join(sentences.DOMAINS)})"
            )
        other = Path(text).read_text("utf-8")
    if not data.rated:
        train, held_out = alpaca.split(alpaca.read(data.source), 42, cast(int, data.test))
        return Material(train, held_out, {}, other)
    parts = sentences.split(sentences.read(cast(str, data.domain), data.source, neutral=True), experiment.seed, *data.sizes())

    def every(part: list[sentences.Sentence]) -> list[Instruction]:
        return [question for kind in QUESTIONS for question in sentences.questions(kind, part)]

    asked = {kind: sentences.questions(kind, parts.test) for kind in QUESTIONS if kind in experiment.evaluate.tasks}
    return Material(every(parts.train), every(parts.validation), asked, other)


# ---------------------------------------------------------------- scores


def reported(experiment: Experiment) -> str:
    """What the table shows: the mean over the tasks; with none, the probability of a held-out token."""
    return "average" if experiment.evaluate.tasks else METRIC


def scored(model: Any, tokenizer: Any, experiment: Experiment, data: Material) -> dict[str, float]:
    """The tasks' scores as shares, their mean, and the perplexity on the other text."""
    asked, found = experiment.evaluate, {}
    if asked.tasks:
        model.eval()
        with tempfile.TemporaryDirectory() as folder:
            tasks = [
                harness.own(name, data.questions[name], Path(folder)) if name in data.questions else name
                for name in asked.tasks
            ]
            seen = harness.score(model, tokenizer, tasks, asked.batch_size, asked.shots)
        # The paper's MMLU is the mean over subjects.
        found = {name: seen[name].get("acc_macro", seen[name]["acc"]) for name in asked.tasks}
        found["average"] = fmean(found.values())
    if data.other is not None:
        found["perplexity"] = perplexity(model, tokenizer, data.other)
    return found


_BEFORE: dict[str, dict[str, float]] = {}


def scores_before(experiment: Experiment, data: Material) -> dict[str, float]:
    """`scored` of the model as it was, once for all runs for which it is the same."""
    same = experiment.model_dump_json(include={"model", "data", "evaluate", "seed"})
    key = f"{same} {experiment.train.weights}"
    if key not in _BEFORE:
        _BEFORE[key] = {}
        if experiment.evaluate.before and (experiment.evaluate.tasks or data.other is not None):
            _BEFORE[key] = scored(*language_model(experiment.model, experiment.train.weights), experiment, data)
    return _BEFORE[key]


@torch.no_grad()
def predicted(model: Any, tokenizer: Any, part: Sequence[Instruction], experiment: Experiment) -> dict[str, Any]:
    """The most probable next token at every position of the instructions, and the mean loss."""
    model.eval()
    device = next(model.parameters()).device
    tokens: list[int] = []
    losses = []
    for encoded in map(Encoded(part, tokenizer, experiment).__getitem__, range(len(part))):
        ids, labels = (torch.tensor([encoded[key]], device=device) for key in ("input_ids", "labels"))
        seen = model(input_ids=ids, labels=labels)
        tokens += seen.logits[0].argmax(-1).tolist()
        losses.append(seen.loss.item())
    return {"tokens": tokens, "loss": fmean(losses)}


# ---------------------------------------------------------------- before all runs, and after


def check(experiment: Experiment) -> Material:
    """Everything that can be wrong with a run, found before any is started; its data, the benchmarks' as well."""
    model = language_skeleton(experiment.model)
    inject(model, experiment)
    _tasks(experiment)
    data = material(experiment)
    harness_tasks = [name for name in experiment.evaluate.tasks if name not in data.questions]
    if harness_tasks:
        harness.load(harness_tasks)
    return data


def _tasks(experiment: Experiment) -> None:
    for name in experiment.evaluate.tasks:
        if name in QUESTIONS and not experiment.data.rated:
            raise ConfigError(f"{experiment.name}: evaluate.tasks: {name} is about the rated sentences: give data.domain")


def base(experiment: Experiment) -> nn.Module:
    return language_model(experiment.model, experiment.train.weights)[0]


def deliver(experiment: Experiment, run: Path, data: Material, out: Path) -> tuple[dict[str, int], int]:
    """Write ``adapter``, ``merged`` and ``peft``, read each back into a fresh model, count the equal next tokens.

    In float32 all must be equal. In bfloat16, where merging rounds the weights, the mean loss must be, to one unit of it.
    """
    trained, part = read_json(run / NEXT), data.held_out[:COMPARED]
    weights = experiment.train.weights
    agreement: dict[str, int] = {}

    def compare(kind: str, model: Any) -> None:
        seen = predicted(model, tokenizer, part, experiment)
        agreement[kind] = sum(a == b for a, b in zip(seen["tokens"], trained["tokens"], strict=True))
        off = abs(seen["loss"] / trained["loss"] - 1)
        if off > torch.finfo(torch.bfloat16).eps or (weights == "fp32" and agreement[kind] < len(trained["tokens"])):
            raise RunError(
                f"{out / kind} is not what was trained: its loss is off by {100 * off:.1f} %, "
                f"{len(trained['tokens']) - agreement[kind]} of {len(trained['tokens'])} tokens are predicted otherwise"
            )

    set_seed(experiment.seed + 1)  # another than the run's
    model, tokenizer = language_model(experiment.model, weights)
    delora.load(model, run / "adapter")
    delora.save(model, out / "adapter")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(out / "adapter")
    compare("adapter", model)
    parts = [a for a in adapters(model).values() if isinstance(a, Adapter)]
    if parts and all(a.low_rank() is not None for a in parts):
        delora.export.peft(model, out / "peft")
        compare("peft", read_peft(language_model(experiment.model, weights)[0], out / "peft"))
    if all(a.mergeable() for a in parts):
        save_merged(model, out / "merged")
        compare("merged", loading(AutoModelForCausalLM, str(out / "merged"), dtype="auto"))
    return agreement, len(trained["tokens"])


def evaluate(experiment: Experiment, folder: Path) -> tuple[dict[str, float], int]:
    """The scores of an adapter, or of a whole model, and the number of held-out instructions."""
    data, weights = check(experiment), experiment.train.weights
    if is_adapter(folder):
        model, tokenizer = language_model(experiment.model, weights)
        delora.load(model, folder)
    elif folder.is_dir():
        model, tokenizer = language_model(str(folder), weights)
    else:
        raise RunError(f"there is no folder {folder}")
    return scored(model, tokenizer, experiment, data), len(data.held_out)
