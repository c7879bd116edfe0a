"""What every recipe shares: an experiment's runs one after the other, their Trainer, and the delivery of the best one."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import platform
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
import transformers
from rich.console import Console
from torch import nn
from transformers import TrainerCallback, TrainingArguments, set_seed

import delora
from delora.diagnostics import Recorder
from delora.files import read_json, write_atomically
from delora.training.config import ConfigError, Experiment, slug
from delora.training.progress import Bar
from delora.training.runs import METRICS, Result, RunError, claim, discard, exclusive, write_json
from delora.training.trainer import AdapterTrainer, Diverged, Metrics, last_checkpoint

SUMMARY = "summary.json"


class Recipe(Protocol):
    """A kind of experiment: a module with these functions. ``data`` is what its own `check` gave."""

    def check(self, experiment: Experiment) -> Any:
        """Everything that can be wrong with a run, found before any is started; its data.

        Raises:
            ConfigError, DataError, ModelError: in words.
        """

    def base(self, experiment: Experiment) -> nn.Module:
        """The frozen model in which the adapter's targets are."""

    def run(self, experiment: Experiment, folder: Path, row: str, setting: str, data: Any, console: Console) -> Result:
        """One run, from the model to its scores; one that was stopped goes on, one that is finished is only read."""

    def deliver(self, experiment: Experiment, run: Path, data: Any, out: Path) -> tuple[dict[str, int], int]:
        """The run's adapter, merged model and PEFT folder; how many of the test's predictions each shares with the run."""

    def evaluate(self, experiment: Experiment, folder: Path) -> tuple[dict[str, float], int]:
        """The scores of an adapter's or a whole model's folder, and the number of test examples."""


@dataclass(frozen=True)
class Summary:
    """What an experiment gave. ``delivered`` is the run whose adapter was saved, merged and exported; ``agreement`` says
    how many of the ``test`` predictions each of these three shares with the model that was trained."""

    name: str
    results: list[Result]
    test: int
    delivered: str
    agreement: dict[str, int]
    environment: dict[str, str]

    @classmethod
    def read(cls, folder: Path) -> Summary:
        data = read_json(folder / SUMMARY)
        return cls(**data | {"results": [Result.of(result, folder) for result in data["results"]]})


# ---------------------------------------------------------------- one run


def inject(model: nn.Module, experiment: Experiment) -> None:
    try:
        delora.inject(model, experiment.adapter.build(), **experiment.adapter.arguments())
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{experiment.name}: adapter: {error}") from error


def begin(experiment: Experiment, folder: Path) -> None:
    """The folder is the run's, and every generator is seeded."""
    claim(folder, experiment)
    set_seed(experiment.seed)


def fit(
    experiment: Experiment,
    folder: Path,
    model: Any,
    console: Console,
    metric: str | None,
    watch: Sequence[TrainerCallback] = (),
    **data: Any,
) -> AdapterTrainer:
    """Train in the run's folder, from its last checkpoint if there is one.

    With a ``metric`` every epoch is validated and the best one kept; else the last state stays. The Trainer's ``diverged``
    is the step at which the loss was seen to be no number.
    """
    train, bar = experiment.train, Bar(experiment.name, console)
    trainer = AdapterTrainer(
        model,
        arguments(experiment, folder / "checkpoints", len(data["train_dataset"]), metric, "eval_dataset" in data),
        callbacks=[Metrics(folder / METRICS), bar, *watch],
        lam_lr=train.lam_lr,
        head_lr=train.head_lr,
        lam_weight_decay=train.lam_weight_decay,
        **data,
    )
    checkpoint = last_checkpoint(folder / "checkpoints")
    if checkpoint is not None and checkpoint.endswith(f"-{train.steps}"):
        trainer.finished(checkpoint)
        return trainer
    try:
        with bar.progress:
            trainer.train(resume_from_checkpoint=checkpoint)
    except Diverged as error:
        trainer.diverged = error.step
    return trainer


def arguments(experiment: Experiment, folder: Path, examples: int, metric: str | None, validate: bool) -> TrainingArguments:
    """What the Trainer is told."""
    train = experiment.train
    steps = train.steps or train.epochs * -(-examples // (train.batch_size * train.accumulation))
    best: dict[str, Any] = {"load_best_model_at_end": True, "metric_for_best_model": metric, "greater_is_better": True}
    return TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=train.epochs,
        per_device_train_batch_size=train.batch_size,
        per_device_eval_batch_size=64 if metric else train.batch_size,
        gradient_accumulation_steps=train.accumulation,
        learning_rate=train.lr,
        weight_decay=train.weight_decay,
        adam_beta2=train.beta2,
        warmup_steps=train.warmup,  # below 1: a share
        lr_scheduler_type=train.schedule,
        max_grad_norm=train.clip,
        use_cpu=not torch.accelerator.is_available(),  # else bfloat16 is refused on a CPU
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
        logging_nan_inf_filter=False,  # a loss that is no number must be seen
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        report_to="none",
    )


def reached(model: nn.Module, adapter: Path) -> dict[str, Any]:
    """What a `Result` says of the adapter itself."""
    last = Recorder(model).record()
    size = sum(file.stat().st_size for file in adapter.iterdir())
    return {"adapter_bytes": size, "distance": last.get("distance"), "bound_used": last.get("bound_used")}


def finish(experiment: Experiment, folder: Path, row: str, setting: str, metric: str, reported: str, **found: Any) -> Result:
    """The run's result, written into its folder: from here on the run is finished."""
    result = Result(
        name=experiment.name,
        row=row,
        setting=setting,
        folder=folder.name,
        seed=experiment.seed,
        task=experiment.data.task,
        method=str(experiment.adapter.build()),
        metric=metric,
        reported=reported,
        **found,
    )
    result.write(folder)
    return result


def cost(model: nn.Module, trainer: AdapterTrainer) -> dict[str, Any]:
    """How much was trained, and how long."""
    return {"trainable": delora.summary(model).trainable, "seconds": trainer.state.log_history[-1]["seconds"]}


# ---------------------------------------------------------------- all runs, and what is delivered


def train(recipe: Recipe, experiment: Experiment, console: Console, fresh: bool = False) -> Summary:
    """Every run of the experiment, then the best one as files. What is finished is not done again.

    Raises:
        ConfigError: a run cannot be made, found before any is started.
        RunError: the folder is another experiment's, or what was delivered does not predict as what was trained.
    """
    out = Path(experiment.out)
    runs = experiment.runs()
    with exclusive(out):
        data = [recipe.check(each) for _, each in runs]
        if fresh:
            discard(out)
        claim(out, experiment)
        results = []
        for (variant, each), own in zip(runs, data, strict=True):
            folder = out / "variants" / slug(each.name)
            done = Result.read(folder)
            results.append(done or recipe.run(each, folder, each.row or variant.name, variant.name, own, console))
            gather(out, results)
        if not (out / SUMMARY).is_file():
            best = choose(experiment, [each for _, each in runs], results)
            console.print(f"Saving, merging and exporting {results[best].name}", markup=False)
            agreement, test = recipe.deliver(runs[best][1], out / "variants" / results[best].folder, data[best], out)
            summary = Summary(experiment.name, results, test, results[best].name, agreement, environment())
            write_json(out / SUMMARY, dataclasses.asdict(summary))
    return Summary.read(out)


def gather(out: Path, results: Sequence[Result]) -> None:
    """All runs' steps in one ``metrics.jsonl``, each with the name of its run."""
    lines = []
    for result in results:
        file = out / "variants" / result.folder / METRICS
        rows = file.read_text().splitlines() if file.is_file() else []
        lines += [json.dumps({"run": result.name, **json.loads(row)}) for row in rows]
    write_atomically(out / METRICS, "".join(line + "\n" for line in lines).encode())


def choose(experiment: Experiment, runs: Sequence[Experiment], results: Sequence[Result]) -> int:
    """The best run by validation of the experiment's own method; of all, if it has no such run."""
    alive = [i for i, result in enumerate(results) if result.validation is not None]
    own = [i for i in alive if runs[i].adapter.method == experiment.adapter.method]
    if not alive:
        raise RunError("every run diverged: there is nothing to deliver; lower train.lr")
    return max(own or alive, key=lambda i: cast(float, results[i].validation))


def read_peft(model: Any, folder: Path) -> nn.Module:
    """Through PEFT itself where it is installed, else through our own reader."""
    if importlib.util.find_spec("peft") is None:
        return delora.load(model, folder)
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT reads an attribute that transformers has renamed
        return PeftModel.from_pretrained(model, folder)


def environment() -> dict[str, str]:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    return {
        "delora": delora.__version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "device": device,
    }
