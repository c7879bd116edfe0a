"""An experiment as a value, read from TOML or JSON. It is checked strictly, and every error says where it is and what to do.

The adapter's method is one of `delora.METHODS` or of your own (``module:Class``); the method's dataclass checks its fields.
What is particular to a task is in the subclass of `Experiment` in the task's module.
"""

from __future__ import annotations

import dataclasses
import json
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_serializer,
    model_validator,
)

from delora import outside
from delora.errors import UserError, nearest, nearest_path
from delora.methods import METHODS
from delora.methods.base import one_of
from delora.recipes import shipped

__all__ = [
    "About",
    "AdapterSettings",
    "ConfigError",
    "Count",
    "Experiment",
    "Published",
    "Rate",
    "Share",
    "Strict",
    "Targets",
    "Train",
    "Variant",
    "assign",
    "differences",
    "keys_named",
    "load_file",
    "method_class",
    "parse",
    "slug",
    "validate",
]

Model = TypeVar("Model", bound=BaseModel)

# What transformers' TrainingArguments, TRL's configurations and PEFT's call the keys of a recipe: for hints.
ELSEWHERE = {
    "model": ("model_name_or_path", "base_model", "base_model_name_or_path"),
    "out": ("output_dir",),
    "log": ("report_to",),
    "data.source": ("dataset", "dataset_name", "train_file"),
    "data.max_tokens": ("max_length", "max_seq_length", "block_size"),
    "adapter.r": ("rank", "lora_r", "lora_rank"),
    "adapter.lam": ("delora_lambda",),
    "adapter.alpha": ("lora_alpha",),
    "adapter.rslora": ("use_rslora",),
    "adapter.dropout": ("lora_dropout", "module_dropout"),
    "adapter.targets": ("target_modules",),
    "adapter.exclude": ("exclude_modules",),
    "adapter.also_train": ("modules_to_save",),
    "train.lr": ("learning_rate",),
    "train.epochs": ("num_train_epochs", "num_epochs"),
    "train.steps": ("max_steps",),
    "train.batch_size": ("per_device_train_batch_size", "train_batch_size"),
    "train.accumulation": ("gradient_accumulation_steps",),
    "train.warmup": ("warmup_ratio", "warmup_steps"),
    "train.schedule": ("lr_scheduler_type",),
    "train.beta2": ("adam_beta2",),
    "train.clip": ("max_grad_norm",),
    "train.precision": ("bf16", "fp16"),
    "train.checkpointing": ("gradient_checkpointing",),
    "train.record_steps": ("logging_steps",),
}


class ConfigError(UserError, ValueError):
    """A recipe, or a change made to it on the command line, is not valid.

    >>> ConfigError.exit_code
    2
    """

    exit_code: ClassVar[int] = 2


class Strict(BaseModel):
    """A table of settings: unknown keys and values of another type are refused, and nothing changes later.

    >>> class Mine(Strict):
    ...     depth: int
    >>> validate({"dept": 3}, Mine, "mine.toml")
    Traceback (most recent call last):
        ...
    delora.training.config.ConfigError: mine.toml: depth: is missing
    mine.toml: dept: unknown key; did you mean depth?
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


def _patterns(value: Any) -> Any:
    if not isinstance(value, str) and not (isinstance(value, list) and all(isinstance(v, str) for v in value)):
        raise ValueError(f"must be a regular expression or a list of names, got {value!r}")
    return value


def _share_or_steps(value: float) -> float:
    if value >= 1 and value != int(value):
        raise ValueError(f"must be a share below 1 or a whole number of steps, got {value}")
    return value


Targets = Annotated[Any, BeforeValidator(_patterns)]
Share = Annotated[float, Field(ge=0, lt=1)]
Rate = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]


class AdapterSettings(Strict):
    """What is trained: the arguments of `delora.inject`, and beside them the method's own fields (``r``, ``lam`` ...).

    ``method`` is a name in `delora.METHODS`, or ``module:Class`` for one of your own.

    >>> AdapterSettings.model_validate({"method": "lora", "r": 4, "alpha": 8.0, "targets": ["query"]}).build()
    LoRA(r=4, alpha=8.0, rslora=False)
    """

    method: str = "delora"
    targets: Targets
    dropout: Share = 0.0
    also_train: Targets = []
    exclude: Targets = []
    overrides: dict[str, dict[str, Any]] = {}
    fields: dict[str, Any] = Field(default={}, exclude=True)

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, data: Any) -> Any:
        """Put all keys that are not settings of their own into ``fields``: they are the method's."""
        if not isinstance(data, dict):
            return data
        ours = {key: data[key] for key in data if key in cls.model_fields and key != "fields"}
        return ours | {"fields": {key: data[key] for key in data if key not in ours}}

    @model_validator(mode="after")
    def _checked(self) -> Self:
        if self.method not in METHODS and ":" not in self.method:
            hint = nearest(self.method, sorted(METHODS))
            raise ValueError(f"method = {self.method!r}: {hint}; one of your own is module:Class")
        try:
            known = [f.name for f in dataclasses.fields(method_class(self.method))]
        except outside.OutsideError as error:
            raise ValueError(f"method = {self.method!r}: {error}") from error
        for key in self.fields:
            if key not in known:
                every = [*known, *_keys(AdapterSettings)]
                called = [name for name in every if key in ELSEWHERE.get(f"adapter.{name}", ())]
                raise ValueError(f"{key}: unknown key; {nearest(called[0] if called else key, every)}")
        self.build()
        return self

    @model_serializer(mode="wrap")
    def _flat(self, handler: Any) -> dict[str, Any]:
        return handler(self) | self.fields

    @staticmethod
    def method_fields(method: str) -> list[str]:
        """The names of the fields of a method; none if there is no such method."""
        try:
            return [f.name for f in dataclasses.fields(method_class(method))]
        except (KeyError, outside.OutsideError):
            return []

    def build(self) -> Any:
        """The method, as a value such as ``DeLoRA(r=8, lam=12.0)``."""
        return method_class(self.method)(**self.fields)

    def fixes_lam(self) -> bool:
        """Whether the method could learn its strength and does so in no layer."""
        learned = [getattr(self.build(), "learn_lam", True), *(fields.get("learn_lam") for fields in self.overrides.values())]
        return not any(learned)

    def classes(self) -> tuple[type, ...]:
        """The method's class, as the ``methods`` of `delora.load`."""
        return (method_class(self.method),)

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of `delora.inject`."""
        return {key: getattr(self, key) for key in ("targets", "dropout", "also_train", "exclude", "overrides")}


def method_class(name: str) -> type:
    """The class of a method in `delora.METHODS`, or of one of your own.

    >>> method_class("lora").__name__, method_class("delora.methods:LoRA").__name__
    ('LoRA', 'LoRA')
    """
    return outside.method(name) if ":" in name else METHODS[name]


class Train(Strict):
    """How it is trained: AdamW with a learning-rate schedule and warm-up, for ``epochs``, or for ``steps`` if they are given.

    ``head_lr`` and ``lam_lr`` are the learning rates of the modules trained whole and of strengths, where the method learns
    them (default: ``lr``); ``lam_weight_decay`` is the weight decay of the latter. ``warmup`` is a share of all steps if below
    1, else a number of steps. ``clip`` is the largest gradient norm (0: no clipping). A step takes ``batch_size *
    accumulation`` examples. ``precision`` is that of the computation, ``weights`` that of the frozen model; trained parameters
    are in fp32. ``save_steps`` is the number of steps between checkpoints (default: an epoch), ``record_steps`` that between
    lines of metrics (default: a thousandth of all steps, at least one). ``record_layers``: adapted layers, by the ends of
    their names, of which each line has |W' - W|_F. With ``checkpointing`` the activations inside a block are computed again in
    the backward pass and not kept: less memory, about a third more time, the same result.

    >>> Train(lr=1e-2).lam_lr is None
    True
    """

    epochs: Count = 2
    steps: Count | None = None
    batch_size: Count = 32
    accumulation: Count = 1
    lr: Rate = 1e-3
    lam_lr: Rate | None = None
    head_lr: Rate | None = None
    weight_decay: Rate = 0.0
    lam_weight_decay: Rate = 0.0
    warmup: Annotated[float, Field(ge=0), AfterValidator(_share_or_steps)] = 0.06
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    beta2: Share = 0.999
    save_steps: Count | None = None
    record_steps: Count | None = None
    record_layers: list[str] = []
    weights: Literal["fp32", "bf16"] = "fp32"
    clip: Rate = 0.0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    checkpointing: bool = False


class About(Strict):
    """What ``delora recipes`` says about a recipe. ``prepare`` is a command that makes what it needs. No result depends on it.

    >>> About(takes="5 minutes on two CPU cores").takes
    '5 minutes on two CPU cores'
    """

    does: str = ""
    needs: str = ""
    takes: str = ""
    prepare: str | None = None


class Published(Strict):
    """Scores of the paper, in percent, shown beside ours if the model and the task are the same. ``scores``: by name.

    >>> Published(model="roberta-base", task="cola", test=64.8).test
    64.8
    """

    model: str
    task: str
    test: float
    deviation: float | None = None
    scores: dict[str, float] = {}

    def of(self, experiment: Experiment) -> bool:
        """Whether an experiment has this model (by the last part of its name), this task, and the task's own data."""
        same = experiment.model.rstrip("/").rpartition("/")[2] == self.model.rpartition("/")[2]
        return same and not experiment.other_data() and experiment.task == self.task


class Variant(Strict):
    """Other values for keys of the experiment. Of the variants that share a ``row``, a table shows the best by validation.

    >>> Variant.model_validate({"name": "LoRA 3e-3", "train": {"lr": 3e-3}}).changes()
    {'train': {'lr': 0.003}}
    """

    model_config = ConfigDict(extra="allow")

    name: Annotated[str, Field(min_length=1)]
    row: str | None = None

    def changes(self) -> dict[str, Any]:
        """The keys of the experiment that it sets."""
        return {key: value for key, value in (self.model_extra or {}).items() if value not in (None, {})}


class Experiment(Strict):
    """What every experiment has. A task's own settings are a subclass, with a table for what is particular to it.

    ``task`` names a module of `delora.tasks`, or one of your own; ``model`` a packaged model, a folder, or a model on the
    Hugging Face Hub. With ``seeds`` every variant runs once for each of them, and ``seed`` is not used. ``row`` is the line of
    a table for variants that name none. ``factor`` is what a sweep multiplied the rates by, for its report.
    ``parallel`` says how several processes, if torchrun started several, share the work: each has a part of every batch, and
    of the model's weights all ("ddp") or a part ("fsdp2"). ``log``: where else the lines of metrics go, such as "tensorboard".

    >>> adapter = AdapterSettings.model_validate({"targets": ["query"]})
    >>> mine = Experiment(task="mytasks.tickets", name="mine", out="runs/mine", model="bert", adapter=adapter, seeds=[0, 1])
    >>> [run.name for _, run in mine.runs()]
    ['mine, seed 0', 'mine, seed 1']
    """

    task: str
    name: Annotated[str, Field(min_length=1)]
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    seeds: list[Annotated[int, Field(ge=0, lt=2**32)]] = []
    row: str | None = None
    factor: Annotated[float, Field(gt=0)] | None = None
    out: Annotated[str, Field(min_length=1)]
    model: str
    parallel: Literal["none", "ddp", "fsdp2"] = "none"
    log: list[str] = []
    about: About = About()
    adapter: AdapterSettings
    train: Train = Train()
    published: Published | None = None
    variants: list[Variant] = []

    def other_data(self) -> bool:
        """Whether the data are not those that the task's name stands for. Then no published score is shown."""
        return False

    def runs(self) -> list[tuple[Variant, Experiment]]:
        """Each variant with the experiment that it makes, once for each seed. These have neither variants nor seeds.

        Without variants, the only one is the experiment itself.
        """
        return [(variant, seeded) for variant, run in self._varied() for seeded in run._seeded()]

    def _seeded(self) -> list[Experiment]:
        one: dict[str, Any] = {"seeds": [], "variants": []}
        runs: list[dict[str, Any]] = [{"name": f"{self.name}, seed {seed}", "seed": seed} for seed in self.seeds] or [{}]
        return [self.model_copy(update=one | run) for run in runs]

    def _varied(self) -> list[tuple[Variant, Experiment]]:
        plain = self.model_dump(exclude={"variants"})
        if not self.variants:
            return [(Variant(name=self.name), self)]
        runs = []
        for number, variant in enumerate(self.variants):
            changes, base = variant.changes(), plain
            if self.seeds and "seed" in changes:
                raise ConfigError(
                    f"variants[{number}] ({variant.name}): has a seed, but seeds = {self.seeds} is for all variants"
                )
            adapter = changes.get("adapter")
            method = adapter.get("method") if isinstance(adapter, dict) else None
            if isinstance(method, str):
                # Fields that the other method lacks (lam, for LoRA) are dropped; those that both have (r) are kept.
                kept = [*AdapterSettings.model_fields, *AdapterSettings.method_fields(method)]
                base = plain | {"adapter": {k: v for k, v in plain["adapter"].items() if k in kept}}
            if isinstance(adapter, dict):
                base = base | {"adapter": dict(base["adapter"])}
                _put_aside(base["adapter"], adapter)
            merged = _merge(base, {"name": variant.name, "row": variant.row or self.row, **changes})
            runs.append((variant, validate(merged, type(self), f"variants[{number}] ({variant.name})")))
        return runs


def slug(name: str) -> str:
    """A name as a folder's name.

    >>> slug("LoRA, 3e-3")
    'lora-3e-3'
    """
    return re.sub(r"[^\w.]+", "-", name.lower()).strip("-.") or "run"


# ---------------------------------------------------------------- reading


def parse(
    data: dict[str, Any], kind: Callable[[Any], type[Experiment]], overrides: Sequence[str] = (), where: str = "recipe"
) -> Experiment:
    """An experiment from the tables of a recipe, with ``key=value`` changes. ``kind`` returns a task's class of settings.

    Raises:
        ConfigError: a key or value is wrong; the message has its dotted path.

    >>> recipe = {"task": "mine", "name": "mine", "out": "runs/mine", "model": "bert", "adapter": {"targets": ["query"]}}
    >>> parse(recipe, lambda task: Experiment, ["train.lr=0.01"]).train.lr
    0.01
    """
    changed = [assign(data, override) for override in overrides]
    experiment = validate(data, kind(data.get("task")), where)
    settable = [key for key in _keys(type(experiment)) if key not in FIXED]
    for number, variant in enumerate(experiment.variants):
        for key in variant.model_extra or {}:
            if key not in settable:
                raise ConfigError(f"{where}: variants.{number}.{key}: unknown key; {nearest(key, settable)}")
    for key in changed:
        _refuse_hidden(experiment, key)
    folders: dict[str, str] = {}
    for _, run in experiment.runs():
        _refuse_idle(run, where)
        if (folder := slug(run.name)) in folders:
            raise ConfigError(f"{where}: variants: {folders[folder]!r} and {run.name!r} would have the same folder; rename one")
        folders[folder] = run.name
    return experiment


# These belong to the experiment as a whole: no variant can set them.
FIXED = ("name", "row", "seeds", "factor", "out", "parallel", "log", "about", "variants")


def load_file(recipe: Path) -> dict[str, Any]:
    """The tables of a TOML or JSON file.

    Raises:
        ConfigError: it cannot be read, or is not valid.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "mine.toml").write_text("seed = 3")
    ...     load_file(Path(folder, "mine.toml"))
    {'seed': 3}
    """
    try:
        text = recipe.read_text("utf-8")
        return json.loads(text) if recipe.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        names = [each.name for each in shipped()]
        hint = nearest_path(recipe, names) or f"; the shipped recipes are {', '.join(names)}"
        raise ConfigError(f"cannot read the recipe {recipe}: {error.strerror or error}{hint}") from error
    except ValueError as error:  # both decoders' errors, and that of bytes that are not UTF-8
        kind = "JSON" if recipe.suffix == ".json" else "TOML"
        raise ConfigError(f"{recipe} is not valid {kind}: {error}") from error


def assign(data: dict[str, Any], override: str) -> str:
    """Apply one change ``key=value`` to the tables; returns the key. A value that is not TOML is a string.

    >>> tables = {"train": {"lr": 0.001}}
    >>> assign(tables, "train.lr=0.01"), tables
    ('train.lr', {'train': {'lr': 0.01}})
    """
    key, equals, text = override.partition("=")
    *outer, last = parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"{override!r}: a change is written key=value, such as train.epochs=1")
    for part in outer:
        data = data.setdefault(part, {})
        if not isinstance(data, dict):
            raise ConfigError(f"{override!r}: {part} is a value, not a table with keys")
    if outer == ["adapter"]:
        _put_aside(data, [last])
    try:
        data[last] = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        data[last] = text.strip()
    return ".".join(parts)


def _put_aside(adapter: dict[str, Any], changed: Iterable[str]) -> None:
    """Take out what a changed field replaces: of lam and reach, for example, only one is given."""
    try:
        others = one_of(method_class(adapter.get("method", "delora")))
    except (LookupError, TypeError, outside.OutsideError):
        return  # what is wrong with the method is said when it is made
    changed = set(changed)
    for name in others:
        if changed & set(others) and name not in changed:
            adapter.pop(name, None)


def _refuse_hidden(experiment: Experiment, key: str) -> None:
    """Refuse a change that the variants or seeds would undo."""
    if key == "seed" and experiment.seeds:
        raise ConfigError(f"seed: the recipe has seeds = {experiment.seeds}, which take precedence; change seeds")
    hiding = [variant.name for variant in experiment.variants if _has(variant.changes(), key.split("."))]
    if hiding:
        raise ConfigError(
            f"{key}: these variants set it themselves: {', '.join(hiding)}; change it in the recipe, "
            "or add variants=[] to run the experiment without its variants"
        )


def _refuse_idle(run: Experiment, where: str) -> None:
    """Refuse a rate or a decay of strengths that are not learned."""
    for key in ("lam_lr", "lam_weight_decay"):
        if run.adapter.fixes_lam() and (value := getattr(run.train, key)):
            raise ConfigError(
                f"{where}: {run.name}: train.{key} = {value!r}: lam is not learned; leave it out, or set "
                "adapter.learn_lam = true"
            )


def _has(data: Any, parts: list[str]) -> bool:
    return not parts or (isinstance(data, dict) and parts[0] in data and _has(data[parts[0]], parts[1:]))


def _merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with changes. Tables are merged key by key, except ``overrides``, whose keys are patterns."""
    merged = dict(base)
    for key, value in changes.items():
        both_tables = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping) and key != "overrides"
        merged[key] = _merge(merged[key], value) if both_tables else value
    return merged


def differences(a: Any, b: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The dotted keys at which two configurations differ, with both values (None: missing).

    >>> list(differences({"seed": 0, "train": {"lr": 0.1}}, {"seed": 0, "train": {"lr": 0.2}}))
    [('train.lr', 0.1, 0.2)]
    """
    if isinstance(a, dict) and isinstance(b, dict):
        for key in [*a, *(k for k in b if k not in a)]:
            yield from differences(a.get(key), b.get(key), f"{path}.{key}" if path else key)
    elif a != b:
        yield path, a, b


# ---------------------------------------------------------------- errors


def validate(data: Any, kind: type[Model], where: str) -> Model:
    """The data as a value of ``kind``.

    Raises:
        ConfigError: one line for each mistake, with ``where`` and the key's dotted path.

    >>> validate({"batch_size": 0}, Train, "mine.toml")
    Traceback (most recent call last):
        ...
    delora.training.config.ConfigError: mine.toml: batch_size = 0: input should be greater than or equal to 1
    """
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        lines = dict.fromkeys(_explain(e, kind) for e in error.errors(include_url=False))
        raise ConfigError("\n".join(f"{where}: {line}" for line in lines)) from error


def _explain(error: Any, kind: type[BaseModel]) -> str:
    """One line for one error of pydantic: the dotted path, what is wrong, the nearest valid key."""
    location = error["loc"]
    if not location:  # an error of the whole, not of a key
        return str(error["ctx"]["error"]) if error["type"] == "value_error" else error["msg"]
    *outer, last = location
    path = ".".join(map(str, location))
    match error["type"]:
        case "extra_forbidden":
            elsewhere = keys_named(str(last), kind)
            hint = f"did you mean {' or '.join(elsewhere)}?" if elsewhere else nearest(str(last), _keys(_at(kind, outer)))
            return f"{path}: unknown key; {hint}"
        case "missing":
            return f"{path}: is missing"
        case "value_error":
            # The adapter's own check names the key itself.
            message = str(error["ctx"]["error"])
            return f"{path}.{message}" if last == "adapter" else f"{path}: {message}"
        case "model_type" | "dict_type":
            return f"{path} = {error['input']!r}: must be a table"
        case _:
            return f"{path} = {error['input']!r}: {error['msg'][0].lower()}{error['msg'][1:]}"


def _keys(kind: type[BaseModel]) -> list[str]:
    return [key for key in kind.model_fields if not (kind is AdapterSettings and key == "fields")]


def _at(kind: type[BaseModel], location: Sequence[str | int]) -> type[BaseModel]:
    """The class of the configuration at a place inside another."""
    for part in location:
        if isinstance(part, str):
            inner = kind.model_fields[part].annotation
            kind = next(t for t in (inner, *get_args(inner)) if isinstance(t, type) and issubclass(t, BaseModel))
    return kind


def keys_named(name: str, kind: type[BaseModel] | None = None) -> list[str]:
    """The dotted keys that end with a name or, if none does, those that other libraries call so.

    Of a class of settings; without one, of any recipe.

    >>> keys_named("lr"), keys_named("learning_rate"), keys_named("reach"), keys_named("depth")
    (['train.lr'], ['train.lr'], ['adapter.reach'], [])
    """
    known = _known(kind or Experiment)
    if "adapter" in known:
        known += [f"adapter.{field.name}" for method in METHODS.values() for field in dataclasses.fields(method)]
    found = [key for key in known if key.rpartition(".")[2] == name]
    called = [key for key, names in ELSEWHERE.items() if name in names and (kind is None or key in known)]
    return list(dict.fromkeys(found or called))


def _known(kind: type[BaseModel], prefix: str = "") -> list[str]:
    """The dotted keys of a configuration, without those inside lists and free tables."""
    known = []
    for key in _keys(kind):
        inner = kind.model_fields[key].annotation
        known.append(prefix + key)
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            known += _known(inner, f"{prefix}{key}.")
    return known
