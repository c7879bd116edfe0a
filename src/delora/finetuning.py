"""``delora finetune``: from a model and a user's own data to a recipe, with the reason of each setting, and its run."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import delora
from delora import tasks
from delora.data import dreambooth, tables
from delora.data.examples import DataError
from delora.errors import UserError, nearest, nearest_path
from delora.formats.files import write_atomically
from delora.training import defaults, experiments, memory, parallel
from delora.training.config import ConfigError, Experiment, assign, method_class, slug
from delora.training.defaults import Setting, Sketch
from delora.training.runs import CONFIG, claim, discard, exclusive, place

__all__ = ["RECIPE", "Plan", "plan", "start", "toml", "write"]

T = TypeVar("T")

RECIPE = "recipe.toml"
# The task that trains on each kind of table.
TASKS = {kind: kind for kind in ("classification", "regression", "chat", "preference")} | {"completion": "chat", "text": "chat"}


@dataclass(frozen=True)
class Plan:
    """What will be run, and what there is to know before: the settings with their reasons, and sentences to print.

    >>> Plan({}, None, [], ["mine.csv: classification"], ["an example"]).told
    ['mine.csv: classification']
    """

    recipe: dict[str, Any]
    experiment: Any
    settings: list[Setting]
    told: list[str]
    before: list[str]

    def toml(self) -> str:
        """The recipe's text, with the reason beside each setting."""
        return toml(self.recipe, {setting.key: setting.why for setting in self.settings})


def plan(
    model: str,
    source: str,
    changes: Sequence[str] = (),
    *,
    out: str | None = None,
    kind: str | None = None,
    text: str | None = None,
    label: str | None = None,
    columns: str | None = None,
    group: str | None = None,
    word: str | None = None,
    sample: Sequence[str] = (),
    log: Sequence[str] = (),
) -> Plan:
    """Recognise the data, choose every setting, and check that a run is possible. Nothing is written.

    Args:
        model: a packaged model, a folder, or a name on the Hub.
        source: the data, as for `delora.data.tables.read`; so are kind, text, label and group.
        changes: ``key=value`` for any key of the recipe.
        out: the run's folder. Default: ``runs/`` and the data's name.
        columns: roles and columns, ``prompt=question,completion=answer``.
        word: what the photographs show, such as "mug", if the data are a folder of photographs.
        sample: questions that a chat model answers at every validation.
        log: where else the metrics go, such as "tensorboard". Default: trackio, where it is installed.

    Raises:
        UserError: the data are malformed or ambiguous, or a setting is impossible.
    """
    given = {"kind": kind, "text": text, "label": label, "columns": columns, "group": group}
    if _holds_pictures(Path(source)):
        others = [name for name, value in {**given, "sample": sample or None}.items() if value is not None]
        return _of_pictures(model, source, changes, out, word, others, log)
    if word is not None:
        path = Path(source)
        found = "is a file" if path.is_file() else "holds none" if path.is_dir() else f"is not there{nearest_path(source)}"
        raise DataError(f"--word is what photographs show, and {source} {found}: give a folder of photographs, as .jpg or .png")
    seed = _given(changes, "seed", 0)
    table = tables.read(source, kind=kind, text=text, label=label, columns=_roles(columns), group=group, seed=seed)
    task = _task(table, source)
    drawn: Sketch = _sketch(task)(model, table, _given(changes, "data", {}))
    method = str(_given(changes, "adapter.method", "delora"))
    named = Path(source).resolve().stem if Path(source).exists() else source.rpartition("/")[2]
    settings = [
        Setting("task", TASKS[table.kind], "as the columns say" if kind is None else "given"),
        Setting("name", slug(named), "of the data"),
        Setting("out", out or f"runs/{slug(named)}", "given" if out else "of the data"),
        Setting("model", model, "given"),
        *_logged(log),
        *([Setting("evaluate.sample", list(sample), "given")] if sample else []),
        Setting("data.source", source, "given"),
        *_data(table, kind, columns, group),
        defaults.longest(drawn),
        *defaults.adapter(method, _ranked(method), drawn.head),
        *defaults.training(method, len(table.parts["train"]), bool(drawn.head), table.kind == "preference"),
    ]
    recipe, experiment = _experiment(settings, changes)
    experiments.check(task, experiment)
    if not drawn.head and experiment.train.weights == "bf16":  # a classifier is loaded in float32
        drawn.model.to(torch.bfloat16)
    experiments.adapt(drawn.model, experiment)
    before, batch = _before(table, drawn, experiment), _batch(drawn, experiment)
    if batch is not None:
        needed, more = _estimated(drawn.model, batch, experiment, changes)
        settings, before = [*settings, *more], [*before, *needed]
        recipe, experiment = _experiment(settings, changes)
    return Plan(recipe, experiment, _shown(settings, recipe), list(table.told), before)


def _experiment(settings: Sequence[Setting], changes: Sequence[str]) -> tuple[dict[str, Any], Any]:
    """The recipe of the settings with the changes, and its experiment."""
    recipe: dict[str, Any] = {}
    for setting in settings:
        *outer, last = setting.key.split(".")
        (recipe.setdefault(outer[0], {}) if outer else recipe)[last] = setting.value
    experiment = tasks.parse(recipe, changes, "finetune")
    if experiment.variants or experiment.seeds:
        raise ConfigError("variants and seeds are for a recipe in a file: write one with --dry-run, and run delora train on it")
    place(experiment.out)
    for _, run in experiment.runs():
        experiments.require_sizes(run.model_dump(), run.name)
    return recipe, experiment


# ---------------------------------------------------------------- photographs


def _holds_pictures(source: Path) -> bool:
    """Whether a folder holds photographs, and no table.

    Raises:
        DataError: it is one picture.
    """
    if source.suffix.lower() in dreambooth.IMAGES and source.is_file():
        raise DataError(f"{source} is one picture: give the folder of the photographs, of one subject and nothing else")
    return bool(dreambooth.photographs(source))


def _of_pictures(
    model: str,
    source: str,
    changes: Sequence[str],
    out: str | None,
    word: str | None,
    others: Sequence[str],
    log: Sequence[str],
) -> Plan:
    """The plan for photographs of one's own: a text-to-image model learns what they show."""
    if others:
        raise ConfigError(f"--{others[0]} is for tables of texts, and {source} is a folder of photographs")
    word = _given(changes, "subject.word", word)
    if not isinstance(word, str) or not word.strip():
        raise ConfigError(f"{source} is a folder of photographs: say in a word what they show, such as --word mug")
    from delora.training import denoising  # it needs diffusers

    task: Any = importlib.import_module(tasks.find("subject").name)
    skeleton = denoising.skeleton(model)
    (subject,) = dreambooth.read(source, word=word)
    method = str(_given(changes, "adapter.method", "delora"))
    judged = any(_given(changes, f"subject.{key}", None) for key in ("judge", "dino", "clip", "classifier"))
    settings = [
        Setting("task", "subject", "the data are photographs"),
        Setting("name", slug(subject.name), "of the data"),
        Setting("out", out or f"runs/{slug(subject.name)}", "given" if out else "of the data"),
        Setting("model", model, "given"),
        *_logged(log),
        Setting("data.source", source, "given"),
        Setting("subject.word", word, "given"),
        *defaults.pictures(
            method, _ranked(method), len(subject.images), denoising.resolution(model), denoising.guidance(model), judged
        ),
    ]
    recipe, experiment = _experiment(settings, changes)
    experiments.check(task, experiment)
    skeleton.to(memory.DTYPES[experiment.train.weights])
    experiments.adapt(skeleton, experiment)
    summary, wanted = delora.summary(skeleton), experiment.subject
    kinds = 2 if wanted.class_images else 1
    denoiser, batch = denoising.dry(skeleton, wanted.resolution, denoising.latent(model), kinds)
    beside = denoising.others(model) * memory.DTYPES[experiment.train.weights].itemsize
    needed, more = _estimated(denoiser, batch(experiment.train.batch_size), experiment, changes, beside)
    settings += more
    recipe, experiment = _experiment(settings, changes)
    before = [
        f"{len(subject.images)} photographs of “{wanted.token} {wanted.word}”, in {wanted.resolution} x {wanted.resolution}",
        f"{summary.trainable:,} of {summary.base:,} parameters train ({summary.share:.2%}); {experiment.train.steps:,} steps",
        *needed,
        f"first the model draws {wanted.class_images} pictures of “a photo of {wanted.word}”, which it shall not forget",
    ]
    told = dreambooth.odd(subject, wanted.resolution)
    return Plan(recipe, experiment, _shown(settings, recipe), [], [*told, *before])


def _sketch(task: Any) -> Any:
    """A task's function that tells of a model and a table; None if it trains on none."""
    return getattr(importlib.import_module(task.name), "sketch", None)


def _task(table: tables.Table, source: str) -> Any:
    known = {kind: tasks.find(name) for kind, name in TASKS.items() if name in tasks.NAMES}
    known = {kind: task for kind, task in known.items() if _sketch(task) is not None}
    if table.kind not in known:
        raise DataError(
            f"{source} has rows of {table.kind}, which this command does not train on; it does on {', '.join(known)}"
        )
    return known[table.kind]


def _roles(columns: str | None) -> dict[str, str] | None:
    """The columns of ``--columns prompt=question,completion=answer``."""
    if columns is None:
        return None
    pairs = [pair.partition("=") for pair in columns.split(",")]
    if wrong := [pair for pair in pairs if not all(part.strip() for part in pair)]:
        raise ConfigError(f"--columns: {''.join(wrong[0])!r}: it is written ROLE=COLUMN,ROLE=COLUMN")
    return {role.strip(): column.strip() for role, _, column in pairs}


def _given(changes: Sequence[str], key: str, otherwise: Any) -> Any:
    """The value that the changes give a key, which others depend on."""
    tree: dict[str, Any] = {}
    for change in changes:
        assign(tree, change)
    for part in key.split("."):
        tree = tree.get(part, otherwise) if isinstance(tree, dict) else otherwise
    return tree


def _logged(log: Sequence[str]) -> list[Setting]:
    """The key ``log``; trackio writes to a folder of the user's own, so it needs no asking."""
    if log:
        return [Setting("log", list(log), "given")]
    return [Setting("log", ["trackio"], "it is installed; see it by: trackio show")] if find_spec("trackio") else []


def _ranked(method: str) -> bool:
    try:
        return "r" in method_class(method).__dataclass_fields__  # type: ignore[attr-defined]
    except KeyError as error:
        raise ConfigError(f"adapter.method = {method!r}: {nearest(method, sorted(delora.METHODS))}") from error


def _data(table: tables.Table, kind: str | None, columns: str | None, group: str | None) -> list[Setting]:
    """The keys of ``data`` that say which column is what."""
    settings = []
    if table.kind in ("classification", "regression"):
        texts = table.columns["text"]
        settings.append(Setting("data.text", texts if isinstance(texts, str) else ",".join(texts), "the column of the text"))
        settings.append(Setting("data.label", table.columns["label"], "the column of the label"))
    else:
        settings.append(Setting("data.kind", table.kind, "as the columns say" if kind is None else "given"))
        if columns is not None:
            settings.append(Setting("data.columns", _roles(columns), "given"))
    if group is not None:
        settings.append(Setting("data.group", group, "no group is in two parts"))
    return settings


def _shown(settings: Sequence[Setting], recipe: Mapping[str, Any]) -> list[Setting]:
    """The settings as the changes left them."""
    reasons = {setting.key: setting for setting in settings}
    shown = []
    for key, value in _flat(recipe):
        before = reasons.get(key)
        shown.append(before if before is not None and before.value == value else Setting(key, value, "given"))
    return shown


def _flat(recipe: Mapping[str, Any]) -> list[tuple[str, Any]]:
    flat = [(key, value) for key, value in recipe.items() if not isinstance(value, dict)]
    tables_ = [(key, value) for key, value in recipe.items() if isinstance(value, dict)]
    return flat + [(f"{key}.{inner}", each) for key, value in tables_ for inner, each in value.items()]


def _before(table: tables.Table, drawn: Sketch, experiment: Experiment) -> list[str]:
    """Sizes, lengths, an example and the cost."""
    most, train, lengths = experiment.data.max_tokens, experiment.train, drawn.lengths  # type: ignore[attr-defined]
    cut = sum(length > most for length in lengths)
    rows, summary = len(table.parts["train"]), delora.summary(drawn.model)
    steps = train.steps or train.epochs * -(-rows // (train.batch_size * train.accumulation))
    example = drawn.example if len(drawn.example) <= 600 else f"{drawn.example[:600]} ..."
    return [
        ", ".join(f"{part} {size:,}" for part, size in table.sizes().items()) + " rows",
        f"lengths in tokens: median {defaults.quantile(lengths, 0.5):,}, 95 % up to {defaults.quantile(lengths, 0.95):,}, "
        f"longest {max(lengths):,}; {cut:,} of {len(lengths):,} ({cut / len(lengths):.1%}) are cut at {most:,}",
        f"one example, as the model sees it: {example}",
        f"{summary.trainable:,} of {summary.base:,} parameters train ({summary.share:.2%}); {steps:,} steps",
    ]


def _batch(drawn: Sketch, experiment: Experiment) -> Mapping[str, Tensor] | None:
    """A batch of the largest shape that a process trains on; None if the task gives none."""
    if drawn.batch is None:
        return None
    data, train = experiment.data, experiment.train  # type: ignore[attr-defined]
    length = data.max_tokens if getattr(data, "packing", False) else min(data.max_tokens, max(drawn.lengths))
    return drawn.batch(-(-train.batch_size // parallel.processes()), length)


def _estimated(
    model: nn.Module, batch: Mapping[str, Tensor], experiment: Experiment, changes: Sequence[str], beside: int = 0
) -> tuple[list[str], list[Setting]]:
    """The memory of a step on a batch, beside what the device has; and the setting of checkpointing, if it is needed and the
    changes say nothing of it. ``beside``: the bytes of weights outside the model.
    """
    train, device = experiment.train, "cuda" if torch.cuda.is_available() else "cpu"
    left, settings = memory.available(device), []

    def found() -> memory.Memory:
        step = memory.estimate(model, batch, train.precision, device, train.accumulation)
        return replace(step, peak=step.peak + beside, weights=step.weights + beside)

    if again := train.checkpointing:
        memory.checkpoint(model)
    try:
        needed = found()
        if needed.peak > left and _given(changes, "train.checkpointing", None) is None and _checkpoints(model):
            without, needed, again = needed, found(), True
            why = f"a step takes {memory.size(without.peak)} without it, and the {device} has {memory.size(left)} left"
            settings.append(Setting("train.checkpointing", True, why))
    except Exception as error:  # the model's own code, which may ask for values that are not there
        reason = str(error).strip().partition("\n")[0]
        told = f"memory: not estimated, for the model could not be run without its values ({type(error).__name__}: {reason})"
        return [told], settings
    return memory.told(needed, left, device, again), settings


def _checkpoints(model: nn.Module) -> bool:
    """Have a model checkpoint, if it can."""
    try:
        memory.checkpoint(model)
    except ConfigError:
        return False
    return True


# ---------------------------------------------------------------- the recipe as a file


def toml(recipe: Mapping[str, Any], reasons: Mapping[str, str] | None = None) -> str:
    """A recipe's tables as TOML, with a reason behind the keys that have one.

    >>> print(toml({"seed": 0, "train": {"lr": 0.1}}, {"train.lr": "high"}), end="")
    seed = 0
    <BLANKLINE>
    [train]
    lr = 0.1  # high
    """
    reasons = reasons or {}

    def line(key: str, value: Any, path: str) -> str:
        why = " ".join(reasons.get(path, "").split())
        return f"{_key(key)} = {_value(value)}{f'  # {why}' if why else ''}"

    lines = [line(key, value, key) for key, value in recipe.items() if not isinstance(value, dict)]
    for key, value in recipe.items():
        if isinstance(value, dict):
            lines += ["", f"[{_key(key)}]", *(line(inner, each, f"{key}.{inner}") for inner, each in value.items())]
    return "\n".join(lines) + "\n"


def _key(key: str) -> str:
    return key if key.replace("_", "").replace("-", "").isalnum() and key.isascii() else _value(key)


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{_key(key)} = {_value(each)}" for key, each in value.items()) + " }"
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value).lower() if isinstance(value, bool) else repr(value)


def start(planned: Plan, run: Callable[[], T], fresh: bool = False) -> T:
    """Write the recipe into the run's folder, then ``run()`` it. A run that cannot start leaves no folder."""
    folder = Path(planned.experiment.out)
    with exclusive(folder):
        if fresh:
            discard(folder)
        new = not (folder / CONFIG).is_file()
        claim(folder, planned.experiment)
        write_atomically(folder / RECIPE, planned.toml().encode())
    try:
        return run()
    except ConfigError:
        if new and not any(folder.glob("variants/*/*")):
            discard(folder)
        raise


def write(planned: Plan, file: Path) -> None:
    """Write the recipe. A file that is there already is left alone.

    Raises:
        UserError: it is there, and is another recipe.
    """
    text = planned.toml().encode()
    if file.exists() and (not file.is_file() or file.read_bytes() != text):
        raise UserError(f"{file} exists and is another recipe: move it away")
    write_atomically(file, text)
