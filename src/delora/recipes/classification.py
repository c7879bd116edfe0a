"""Language understanding, GLUE or rated sentences: methods, rates and seeds on one task; the best run is delivered.

Delivered are the adapter, the merged model and the PEFT LoRA, each read back and compared with what was trained.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import platform
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from rich.console import Console
from torch.utils.data import Dataset
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, TrainingArguments, set_seed

import delora
from delora.data import glue, sentences
from delora.data.tasks import Example, Splits, Task
from delora.diagnostics import Recorder
from delora.evaluation import text
from delora.files import read_json, write_atomically
from delora.inject import adapters
from delora.layer import Adapter, Copy
from delora.training.config import ConfigError, Experiment, slug
from delora.training.models import classifier, drawn, is_adapter, loading, save_merged, skeleton
from delora.training.progress import Bar
from delora.training.runs import METRICS, Result, RunError, claim, discard, exclusive, write_json
from delora.training.trainer import AdapterTrainer, Diverged, Metrics, last_checkpoint

SUMMARY, PREDICTIONS = "summary.json", "predictions.json"


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


def run(experiment: Experiment, folder: Path, row: str, setting: str, splits: Splits, console: Console) -> Result:
    """Model, inject, data, train, evaluate. A run that was stopped goes on from its last checkpoint to the same numbers."""
    task, max_tokens = task_of(experiment), experiment.data.max_tokens
    finished = Result.read(folder)
    if finished is not None:
        return finished
    claim(folder, experiment)

    set_seed(experiment.seed)
    model, tokenizer = classifier(experiment.model, task.labels)
    inject(model, experiment)

    bar = Bar(experiment.name, console)
    trainer = AdapterTrainer(
        model,
        arguments(experiment, folder / "checkpoints", len(splits.train)),
        train_dataset=Encoded(splits.train, tokenizer, max_tokens, task),
        eval_dataset=Encoded(splits.validation, tokenizer, max_tokens, task),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda seen: text.scores(
            text.decided(torch.from_numpy(seen.predictions), task), splits.validation, task
        ),
        callbacks=[Metrics(folder / METRICS), bar],
        lam_lr=experiment.train.lam_lr,
        head_lr=experiment.train.head_lr,
        lam_weight_decay=experiment.train.lam_weight_decay,
    )
    scores: dict[str, Any]
    try:
        with bar.progress:
            trainer.train(resume_from_checkpoint=last_checkpoint(folder / "checkpoints"))
    except Diverged as error:
        scores = {"diverged": error.step}
    else:
        delora.save(model, folder / "adapter")
        predicted = text.predict(model, tokenizer, splits.test, task, max_tokens)
        write_json(folder / PREDICTIONS, predicted.tolist())
        reached = Recorder(model).record()
        found = text.scores(predicted, splits.test, task)
        scores = {
            "validation": trainer.state.best_metric,
            "test": found[task.reported],
            "scores": found,
            "best_epoch": trainer.best_epoch(),
            "adapter_bytes": sum(file.stat().st_size for file in (folder / "adapter").iterdir()),
            "distance": reached.get("distance"),
            "bound_used": reached.get("bound_used"),
        }
    result = Result(
        name=experiment.name,
        row=row,
        setting=setting,
        folder=folder.name,
        seed=experiment.seed,
        method=str(experiment.adapter.build()),
        metric=task.metrics[0],
        reported=task.reported,
        trainable=delora.summary(model).trainable,
        seconds=trainer.state.log_history[-1]["seconds"],
        **scores,
    )
    result.write(folder)
    return result


def inject(model: torch.nn.Module, experiment: Experiment) -> None:
    try:
        delora.inject(model, experiment.adapter.build(), **experiment.adapter.arguments())
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{experiment.name}: adapter: {error}") from error


def arguments(experiment: Experiment, folder: Path, examples: int) -> TrainingArguments:
    """Every step of up to 2,000 is recorded, and a thousand or more of a longer run."""
    train = experiment.train
    return TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=train.epochs,
        per_device_train_batch_size=train.batch_size,
        per_device_eval_batch_size=64,
        gradient_accumulation_steps=train.accumulation,
        learning_rate=train.lr,
        weight_decay=train.weight_decay,
        warmup_steps=train.warmup,  # below 1: a share
        lr_scheduler_type="linear",
        max_grad_norm=train.clip,
        bf16=train.precision == "bf16",
        fp16=train.precision == "fp16",
        seed=experiment.seed,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model=task_of(experiment).metrics[0],
        greater_is_better=True,
        logging_steps=max(1, train.epochs * -(-examples // (train.batch_size * train.accumulation)) // 1000),
        logging_nan_inf_filter=False,  # a loss that is no number must be seen
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        report_to="none",
    )


@dataclass(frozen=True)
class Encoded(Dataset[Any]):
    """Examples as the model takes them; tokenised when asked for, as MNLI's 393,000 would fill the memory."""

    part: Sequence[Example]
    tokenizer: Any
    max_tokens: int
    task: Task

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self.part[index]
        encoded = text.encode(self.tokenizer, [example], self.max_tokens)
        label = float(example.label) if self.task.regression else int(example.label)
        return {key: values[0] for key, values in encoded.items()} | {"labels": label}


def task_of(experiment: Experiment) -> Task:
    data = experiment.data
    return sentences.TASKS[data.task] if data.rated else glue.TASKS[data.task]


def read_splits(experiment: Experiment) -> Splits:
    data, seed = experiment.data, experiment.seed
    if not data.rated:
        return glue.splits(data.task, data.source, seed)
    sizes = cast(list[int], [data.train, data.validation, data.test])
    return sentences.splits(data.task, cast(str, data.domain), data.source, seed, sizes)


# ---------------------------------------------------------------- all runs, and what is delivered


def train(experiment: Experiment, console: Console, fresh: bool = False) -> Summary:
    """Every run of the experiment, then the best one as files. What is finished is not done again.

    Raises:
        ConfigError: a run cannot be made, found before any is started.
        RunError: the folder is another experiment's, or what was delivered does not predict as what was trained.
    """
    out = Path(experiment.out)
    runs = experiment.runs()
    with exclusive(out):
        splits = [check(each) for _, each in runs]
        if fresh:
            discard(out)
        claim(out, experiment)
        results = []
        for (variant, each), parts in zip(runs, splits, strict=True):
            folder = out / "variants" / slug(each.name)
            results.append(run(each, folder, variant.row or variant.name, variant.name, parts, console))
            gather(out, results)
        if not (out / SUMMARY).is_file():
            best = choose(experiment, [each for _, each in runs], results)
            console.print(f"Saving, merging and exporting {results[best].name}", markup=False)
            agreement = deliver(runs[best][1], out / "variants" / results[best].folder, splits[best].test, out)
            test = len(splits[best].test)
            summary = Summary(experiment.name, results, test, results[best].name, agreement, environment())
            write_json(out / SUMMARY, dataclasses.asdict(summary))
    return Summary.read(out)


def check(experiment: Experiment) -> Splits:
    """Everything that can be wrong with a run, found in seconds; its data."""
    labels = task_of(experiment).labels
    model = skeleton(experiment.model, labels)
    inject(model, experiment)
    whole = [name for name, adapter in adapters(model).items() if isinstance(adapter, Copy)]
    for key in drawn(experiment.model, labels):
        if not any(key.startswith(name + ".") for name in whole):
            head = key.rpartition(".")[0]
            raise ConfigError(
                f"{experiment.name}: the checkpoint of {experiment.model} has no {key}, which would stay at random values: "
                f'train it with adapter.also_train=["{head}"]'
            )
    return read_splits(experiment)


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


def deliver(experiment: Experiment, run: Path, test: Sequence[Example], out: Path) -> dict[str, int]:
    """Write ``adapter``, ``merged`` and ``peft``, read each back into a fresh model, count the equal predictions.

    Equal is the class; of a regression, half of float32's digits.
    """
    task = task_of(experiment)
    trained = torch.tensor(json.loads((run / PREDICTIONS).read_text()))
    close = torch.finfo(torch.float32).eps ** 0.5 if task.regression else 0.0

    def equal(model: torch.nn.Module) -> int:
        predicted = text.predict(model, tokenizer, test, task, experiment.data.max_tokens)
        return int(torch.isclose(predicted, trained, rtol=close, atol=close).sum())

    # Another seed than the run's: what the head starts from must not matter.
    set_seed(experiment.seed + 1)
    model, tokenizer = classifier(experiment.model, task.labels)
    delora.load(model, run / "adapter")
    delora.save(model, out / "adapter")
    model.config.architectures = [type(model).__name__]  # which model the adapter is for, beyond the base's name
    model.config.save_pretrained(out / "adapter")
    agreement = {"adapter": equal(model)}
    parts = [a for a in adapters(model).values() if isinstance(a, Adapter)]
    if parts and all(a.low_rank() is not None for a in parts):
        delora.export.peft(model, out / "peft")
        agreement["peft"] = equal(read_peft(classifier(experiment.model, task.labels)[0], out / "peft"))
    if all(a.mergeable() for a in parts):
        save_merged(model, out / "merged")
        agreement["merged"] = equal(loading(AutoModelForSequenceClassification, str(out / "merged")))
    for kind, same in agreement.items():
        if same != len(test):
            raise RunError(f"{out / kind} gives {len(test) - same} of {len(test)} other predictions than the trained model")
    return agreement


def read_peft(model: Any, folder: Path) -> torch.nn.Module:
    """Through PEFT itself where it is installed, else through our own reader."""
    if importlib.util.find_spec("peft") is None:
        return delora.load(model, folder)
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT reads an attribute that transformers has renamed
        return PeftModel.from_pretrained(model, folder)


def evaluate(experiment: Experiment, folder: Path) -> tuple[dict[str, float], int]:
    """The scores of an adapter, or of a whole model, on the experiment's test examples, and their number."""
    task = task_of(experiment)
    if is_adapter(folder):
        model, tokenizer = classifier(experiment.model, task.labels)
        delora.load(model, folder)
    elif folder.is_dir():
        model, tokenizer = classifier(str(folder), task.labels)
        if untrained := drawn(str(folder), task.labels):
            raise RunError(f"{folder} is no finetuned classifier: it has no {untrained[0]}")
    else:
        raise RunError(f"there is no folder {folder}")
    test = read_splits(experiment).test
    return text.scores(text.predict(model, tokenizer, test, task, experiment.data.max_tokens), test, task), len(test)


def environment() -> dict[str, str]:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    return {
        "delora": delora.__version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "device": device,
    }
