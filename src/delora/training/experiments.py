"""What all tasks share: an experiment's runs one after the other, the steps of one run, and the delivery of the best one."""

from __future__ import annotations

import dataclasses
import json
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from pydantic import TypeAdapter, ValidationError
from rich.console import Console
from torch import nn
from transformers import TrainerCallback, TrainingArguments, set_seed

import delora
from delora.diagnostics import Recorder, changing
from delora.errors import UserError, nearest_path
from delora.formats.cards import CARD
from delora.formats.files import beyond_float32, get, read_json, write_atomically
from delora.integrations.checkpoints import last_checkpoint
from delora.methods.base import fields_of
from delora.training import loggers, memory, parallel
from delora.training.config import ConfigError, Experiment, slug
from delora.training.progress import progress
from delora.training.runs import (
    ADAPTER,
    CONFIG,
    METRICS,
    Result,
    RunContext,
    RunError,
    claim,
    discard,
    exclusive,
    place,
    read_metrics,
    refuse_unfinished,
    resumable,
    write_json,
)
from delora.training.task import Task
from delora.training.trainer import Diverged, Metrics, RunTrainer, SavedAfterValidation, Stopping

__all__ = [
    "Outcome",
    "adapt",
    "arguments",
    "begin",
    "check",
    "choose",
    "conclude",
    "cost",
    "delivered",
    "environment",
    "finish",
    "fit",
    "folder_of",
    "gather",
    "reached",
    "require_sizes",
    "train",
]

OUTCOME = "summary.json"


@dataclass(frozen=True)
class Outcome:
    """What came of an experiment.

    ``delivered`` is the run whose adapter was saved, merged and exported; ``agreement`` says how many of the ``test``
    predictions of each of these equal those of the trained model.

    >>> Outcome("mine", [], 100, "DeLoRA 3e-3", {"adapter": 100, "merged": 100}, {}).agreement["merged"]
    100
    """

    name: str
    results: list[Result]
    test: int
    delivered: str
    agreement: dict[str, int]
    environment: dict[str, str]

    @classmethod
    def read(cls, folder: Path) -> Outcome:
        """The outcome in a finished experiment's folder.

        Raises:
            RunError: the file is damaged, or of another version.
        """
        file = folder / OUTCOME
        data = read_json(file)
        results = [Result.of(result, file) for result in get(data, "results", list, file)]
        try:
            made = dataclasses.asdict(cls(**data | {"results": results}))
            return TypeAdapter(cls).validate_json(json.dumps(made), strict=True)
        except (TypeError, ValidationError) as error:
            raise RunError(f"{file} is damaged, or of another version of delora: {error}; delete it and run again") from error


# ---------------------------------------------------------------- one run


def adapt(model: nn.Module, experiment: Experiment) -> None:
    """Inject the experiment's adapter.

    Raises:
        ConfigError: the adapter does not fit the model, which is left unchanged.

    >>> from delora.training.config import AdapterSettings
    >>> settings = AdapterSettings.model_validate({"method": "lora", "r": 2, "targets": ["0"]})
    >>> model = nn.Sequential(nn.Linear(4, 4))
    >>> adapt(model, Experiment(task="mine", name="mine", out="runs/mine", model="bert", adapter=settings))
    >>> type(model[0]).__name__
    'Adapted'
    """
    method = experiment.adapter.build()
    try:
        for fields in (fields_of(method), *experiment.adapter.overrides.values()):
            if (large := beyond_float32(fields)) is not None:
                raise ValueError(f"{large} is beyond float32's numbers")
        for pattern in experiment.adapter.overrides:
            re.compile(pattern)
        delora.inject(model, method, **experiment.adapter.arguments())
        try:
            changing(model, experiment.train.record_layers)
        except ValueError:
            delora.eject(model)
            raise
    except re.error as error:
        raise ConfigError(
            f"{experiment.name}: adapter: overrides: {error.pattern!r} is not a regular expression: {error}"
        ) from error
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise ConfigError(f"{experiment.name}: adapter: {error}") from error


def begin(experiment: Experiment, context: RunContext) -> None:
    """Claim the run's folder and seed all random generators."""
    if parallel.first():
        claim(context.folder, experiment)
    parallel.wait()
    set_seed(experiment.seed)


def fit(
    experiment: Experiment,
    context: RunContext,
    model: Any,
    metric: str | None,
    watch: Sequence[TrainerCallback] = (),
    tokens: bool = False,
    trainer_class: Callable[..., RunTrainer] = RunTrainer,
    **data: Any,
) -> RunTrainer:
    """Train in the run's folder, from its last checkpoint if there is one.

    ``tokens``: the loss is the mean over the tokens of a batch that have labels, not over its examples. ``trainer_class``: of a
    task whose loss is not the model's own; it validates in batches of the training's size.

    With a ``metric``, every epoch is validated and the best one is kept; without, the last one. The Trainer's ``diverged`` is
    the step at which the loss was no longer finite, or None.
    """
    train, folder, say = experiment.train, context.folder, partial(context.console.print, markup=False)
    if train.checkpointing:
        memory.checkpoint(model)
    shown, stopping = progress(experiment.name, context.console), Stopping(say)
    few = tokens or trainer_class is not RunTrainer
    trainer = trainer_class(
        model,
        arguments(experiment, folder / "checkpoints", len(data["train_dataset"]), metric, "eval_dataset" in data, tokens, few),
        callbacks=[
            stopping,
            SavedAfterValidation(),
            Metrics(folder / METRICS, train.record_layers),
            *loggers.callbacks(experiment, folder),
            shown,
            *watch,
        ],
        lam_lr=train.lam_lr,
        head_lr=train.head_lr,
        lam_weight_decay=train.lam_weight_decay,
        tokens=tokens,
        **data,
    )
    checkpoint = last_checkpoint(folder / "checkpoints", say, metric is not None)
    if checkpoint is not None and checkpoint.endswith(f"-{train.steps}"):
        trainer.finished(checkpoint)
        return trainer
    try:
        with shown.live(), stopping.listening():
            trainer.train(resume_from_checkpoint=checkpoint)
    except Diverged as error:
        trainer.diverged = error.step
    return trainer


def arguments(
    experiment: Experiment,
    folder: Path,
    examples: int,
    metric: str | None,
    validate: bool,
    tokens: bool = False,
    few: bool = False,
) -> TrainingArguments:
    """The arguments of transformers' Trainer. ``few``: validation takes no more examples at a time than training does.

    Raises:
        ConfigError: they do not go together.
    """
    train = experiment.train
    if metric and train.save_steps is not None:
        raise ConfigError(
            f"{experiment.name}: train.save_steps = {train.save_steps}: this task keeps its best epoch and writes a "
            "checkpoint after each epoch; leave save_steps out"
        )
    n = parallel.processes()
    steps = train.steps or train.epochs * -(-examples // (train.batch_size * train.accumulation))
    best: dict[str, Any] = {"load_best_model_at_end": True, "metric_for_best_model": metric, "greater_is_better": True}
    return TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=train.epochs,
        per_device_train_batch_size=train.batch_size,
        per_device_eval_batch_size=-(-64 // n) * n if metric and not few else train.batch_size,
        gradient_accumulation_steps=train.accumulation,
        optim="adamw_torch",
        learning_rate=train.lr,
        weight_decay=train.weight_decay,
        adam_beta2=train.beta2,
        warmup_steps=train.warmup,  # below 1: a share
        lr_scheduler_type=train.schedule,
        max_grad_norm=train.clip,
        use_cpu=not torch.accelerator.is_available(),  # without it, bfloat16 is refused on a CPU
        bf16=train.precision == "bf16",
        fp16=train.precision == "fp16",
        seed=experiment.seed,
        max_steps=train.steps or -1,
        eval_strategy="epoch" if validate else "no",
        save_strategy="epoch" if train.save_steps is None else "steps",
        save_steps=train.save_steps or 500,
        save_total_limit=2,
        **(best if metric else {}),
        logging_steps=train.record_steps or max(1, steps // 1000),
        logging_nan_inf_filter=False,  # Metrics must see a loss that is not finite
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        report_to="none",  # the loggers are callbacks of our own making
        run_name=experiment.name,
        project=slug(Path(experiment.out).name),
        **parallel.arguments(experiment, tokens),
    )


def reached(model: nn.Module, adapter: Path) -> dict[str, Any]:
    """The fields of a `Result` that describe the adapter: its size in bytes, its distance, and the share of its bound."""
    last = Recorder(model).record()
    size = sum(file.stat().st_size for file in adapter.iterdir() if file.name != CARD)
    return {"adapter_bytes": size, "distance": last.get("distance"), "bound_used": last.get("bound_used")}


def finish(experiment: Experiment, context: RunContext, metric: str, reported: str, **figures: Any) -> Result:
    """Write the run's result into its folder, which marks the run as finished."""
    result = Result(
        name=experiment.name,
        row=context.row,
        setting=context.setting,
        folder=context.folder.name,
        seed=experiment.seed,
        task=experiment.task,
        method=str(experiment.adapter.build()),
        metric=metric,
        reported=reported,
        **figures,
    )
    if parallel.first():
        result.write(context.folder)
    return result


def conclude(
    experiment: Experiment,
    context: RunContext,
    model: nn.Module,
    trainer: RunTrainer,
    metric: str,
    reported: str,
    score: Callable[[], dict[str, Any]],
) -> Result:
    """The end of a run: save the adapter, score it, write the result. A run that diverged has no scores.

    ``score()`` returns ``validation``, ``test`` and ``scores`` of a `Result`; where there are such, ``best_epoch`` and
    ``baseline`` too.
    """
    figures: dict[str, Any] = {"diverged": trainer.diverged}
    if trainer.diverged is None:
        if parallel.first() or experiment.parallel == "fsdp2":  # all hold a part; the first writes
            delora.save(model, context.folder / ADAPTER)
        parallel.wait()
        figures |= score() | reached(model, context.folder / ADAPTER)
    return finish(experiment, context, metric, reported, **cost(model, trainer), **figures)


def cost(model: nn.Module, trainer: RunTrainer) -> dict[str, Any]:
    """The fields of a `Result` for the number of trainable parameters and the seconds of training."""
    return {"trainable": delora.summary(model).trainable, "seconds": trainer.state.log_history[-1]["seconds"]}


# ---------------------------------------------------------------- all runs, and what is delivered


def train(task: Task, experiment: Experiment, console: Console, fresh: bool = False) -> Outcome:
    """Every run of the experiment, then the best one as files. What is finished is not done again.

    Of several processes the first one delivers; the others' outcome has the results alone.

    Raises:
        UserError: a run is impossible (all are checked before the first starts); the folder belongs to another experiment; or a
            delivered file does not predict what the trained model does; or the disk is full.
        Interrupted: the user pressed Ctrl-C; the same call goes on.
    """
    out = place(experiment.out)
    runs = experiment.runs()
    for _, each in runs:
        require_sizes(each.model_dump(), each.name)
    parallel.join(experiment, getattr(task, "PARALLEL", False))  # a bare module, too, need not say it
    with resumable(out), parallel.together(), exclusive(out) if parallel.first() else nullcontext():
        data = [check(task, each) for _, each in runs]
        if fresh and parallel.first():
            discard(out)
        new = not (out / CONFIG).is_file()
        if parallel.first():
            claim(out, experiment)
        results: list[Result] = []
        for (variant, each), material in zip(runs, data, strict=True):
            folder = out / "variants" / slug(each.name)
            context = RunContext(folder, out, each.row or variant.name, variant.name, console)
            try:
                results.append(parallel.agreed(Result.read(folder)) or task.run(each, context, material))
            except ConfigError:
                if new and not results:  # nothing was trained: the folder is free for the recipe that is set right
                    discard(out)
                raise
            if parallel.first():
                gather(out, results)
        if not parallel.first():
            return Outcome(experiment.name, results, 0, "", {}, {})  # the first process delivers
        if not (out / OUTCOME).is_file():
            best = choose(experiment, [each for _, each in runs], results)
            console.print(f"Saving, merging and exporting {results[best].name}", markup=False)
            agreement, test = task.deliver(runs[best][1], out / "variants" / results[best].folder, data[best], out)
            outcome = Outcome(experiment.name, results, test, results[best].name, agreement, environment())
            write_json(out / OUTCOME, dataclasses.asdict(outcome))
    return Outcome.read(out)


def require_sizes(settings: Mapping[str, Any], where: str) -> None:
    """Refuse whole numbers that no machine counts to, and others beyond float32, wherever they stand in a configuration.

    Raises:
        ConfigError: names the key.

    >>> require_sizes({"train": {"batch_size": 2**70}}, "mine")
    Traceback (most recent call last):
    delora.training.config.ConfigError: mine: train.batch_size = 1180591620717411303424: must be below 2,147,483,648
    """
    for key, value in settings.items():
        if isinstance(value, dict):
            require_sizes({f"{key}.{inner}": each for inner, each in value.items()}, where)
        elif type(value) is int and abs(value) >= (largest := 2**32 - 1 if key == "seed" else 2**31):
            raise ConfigError(f"{where}: {key} = {value}: must be below {largest:,}")
        elif type(value) is float and (large := beyond_float32({key: value})) is not None:
            raise ConfigError(f"{where}: {large} is beyond float32's numbers")


def check(task: Task, experiment: Experiment) -> Any:
    """The task's own check. If something is missing, the error also has the command that makes it, if the recipe names one."""
    loggers.require(experiment)
    try:
        return task.check(experiment)
    except (UserError, ImportError) as error:
        command = experiment.about.prepare
        if command is None or isinstance(error, (ConfigError, ImportError)):
            raise
        raise RunError(f"{error}\nWhat this recipe needs is made by:\n    {command}") from error


def gather(out: Path, results: Sequence[Result]) -> None:
    """Write the metrics of all runs into one ``metrics.jsonl``, each line with the name of its run."""
    lines: list[str] = []
    for result in results:
        rows = read_metrics(out / "variants" / result.folder / METRICS)
        lines += [json.dumps({"run": result.name, **row}) for row in rows]
    write_atomically(out / METRICS, "".join(line + "\n" for line in lines).encode())


def choose(experiment: Experiment, runs: Sequence[Experiment], results: Sequence[Result]) -> int:
    """The index of the best run by validation: among those of the experiment's own method, or among all if there is none.

    Raises:
        RunError: every run diverged.
    """
    finite = [i for i, result in enumerate(results) if result.validation is not None]
    of_the_method = [i for i in finite if runs[i].adapter.method == experiment.adapter.method]
    if not finite:
        raise RunError("every run diverged: there is nothing to deliver; lower train.lr")
    return max(of_the_method or finite, key=lambda i: cast(float, results[i].validation))


def folder_of(place: Path) -> Path:
    """The folder of the finished experiment that a folder is, or that it stands in, such as ``adapter`` or ``adapter/boot``.

    Raises:
        ConfigError: it is none.

    >>> folder_of(Path("a/b"))
    Traceback (most recent call last):
    delora.training.config.ConfigError: a/b is no folder of a finished experiment, nor in one: give its recipe with --recipe
    """
    for folder in (place, place.parent, *([place.parent.parent] if place.parent.name == ADAPTER else [])):
        if (folder / OUTCOME).is_file() and (folder / CONFIG).is_file():
            return folder
    refuse_unfinished(place)
    near = nearest_path(place)
    raise ConfigError(f"{place}{near} is no folder of a finished experiment, nor in one: give its recipe with --recipe")


def delivered(experiment: Experiment, out: Path) -> Experiment:
    """Of an experiment's runs the one that was delivered into ``out``.

    Raises:
        RunError: the experiment is not finished, or it has no such run.
    """
    refuse_unfinished(out)
    if not (out / OUTCOME).is_file():
        raise RunError(f"{out} is no folder of a finished experiment, which has a {OUTCOME}: delora train makes one")
    name = Outcome.read(out).delivered
    each = next((run for _, run in experiment.runs() if run.name == name), None)
    if each is None:
        raise RunError(f"{out / OUTCOME} names the run {name!r}, which its recipe does not have: train it anew")
    return each


def environment() -> dict[str, str]:
    """The versions of the libraries, and the device.

    >>> sorted(environment())
    ['delora', 'device', 'python', 'torch', 'transformers']
    """
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    return {
        "delora": delora.__version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "device": device,
    }
