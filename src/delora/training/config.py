"""An experiment as a value, read from TOML or JSON: strict, and every error says where and what to do.

The adapter's method is looked up in `delora.METHODS`, and its fields are checked by the method's own dataclass.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, cast, get_args

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

from delora.methods import METHODS

Model = TypeVar("Model", bound=BaseModel)


class ConfigError(ValueError):
    """A recipe, or a change made to it on the command line, is not valid."""


class Strict(BaseModel):
    """No unknown key, no silent conversion, no change after it was made."""

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


class Data(Strict):
    """Which task, and its examples. ``source``: a packaged data set, a folder, or a name on the Hugging Face Hub.

    ``task`` is "sentiment" or "rating", over the rated sentences of a ``domain`` and as many as are asked for, or one of
    GLUE's, whose parts follow from `delora.data.glue.divide`. "instructions" are Alpaca's, ``test`` of them held out, or are
    made of the rated sentences if a ``domain`` is given; the loss is on all tokens, or with ``response_only`` on the
    response. Texts of more than ``max_tokens`` are cut.
    """

    task: Literal[
        "sentiment",
        "rating",
        "mnli",
        "sst2",
        "mrpc",
        "cola",
        "qnli",
        "qqp",
        "rte",
        "stsb",
        "instructions",
        "subject",
        "semantic_map",
    ] = "sentiment"
    source: str
    domain: Literal["movie", "product", "newspaper", "tweet"] | None = None
    train: Count | None = None
    validation: Count | None = None
    test: Count | None = None
    max_tokens: Annotated[int, Field(ge=3)]
    response_only: bool = False

    @model_validator(mode="before")
    @classmethod
    def _of_the_task(cls, data: Any) -> Any:
        """What the task decides where the recipe is silent."""
        if not isinstance(data, dict):
            return data
        sizes = {"train": 2000, "validation": 1000, "test": 1500}
        silent: dict[str, Any]
        match data.get("task", "sentiment"), data.get("domain"):
            case (("sentiment" | "rating"), _):
                silent = {"source": "vaderSentiment", "domain": "movie", **sizes, "max_tokens": 32}
            case "subject", _:
                silent = {"source": "dreambooth/dataset", "max_tokens": 77}
            case "semantic_map", _:
                silent = {"source": "ade20k", "max_tokens": 77}
            case "instructions", None:
                silent = {"source": "alpaca_data_cleaned_archive.json", "test": 2000, "max_tokens": 256}
            case "instructions", _:
                silent = {"source": "vaderSentiment", **sizes, "max_tokens": 256}
            case _:
                silent = {"source": "nyu-mll/glue", "max_tokens": 256}
        return silent | data

    @model_validator(mode="after")
    def _sizes(self) -> Self:
        unused: tuple[str, ...] = ("domain", "train", "validation", "test")
        why = f"the parts of {self.task} are GLUE's own"
        if self.rated:
            unused = ()
        elif self.task in ("subject", "semantic_map"):
            why = "this task has pictures"
        elif self.task == "instructions":
            unused, why = ("train", "validation"), "Alpaca's are all that test leaves"
        for key in unused:
            if getattr(self, key) is not None:
                raise ValueError(f"data.{key} is for the rated sentences; {why}")
        if self.response_only and self.task != "instructions":
            raise ValueError("data.response_only is for instructions")
        return self

    @property
    def rated(self) -> bool:
        """Whether the examples are the rated sentences."""
        return self.task in ("sentiment", "rating") or self.domain is not None

    def sizes(self) -> tuple[int, int, int]:
        """Of the rated sentences: how many train, validate and test."""
        return cast(tuple[int, int, int], (self.train, self.validation, self.test))


class Adapter(Strict):
    """What is trained: the arguments of `delora.inject`. The method's own fields stand beside them (``r``, ``lam`` ...)."""

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
        """All keys that are not ours are the method's."""
        if not isinstance(data, dict):
            return data
        own = {key: data[key] for key in data if key in cls.model_fields and key != "fields"}
        return own | {"fields": {key: data[key] for key in data if key not in own}}

    @model_validator(mode="after")
    def _checked(self) -> Self:
        if self.method not in METHODS:
            raise ValueError(f"method = {self.method!r}: {_nearest(self.method, sorted(METHODS))}")
        known = self.method_fields(self.method)
        for key in self.fields:
            if key not in known:
                raise ValueError(f"{key}: unknown key; {_nearest(key, [*known, *_keys(Adapter)])}")
        self.build()
        return self

    @model_serializer(mode="wrap")
    def _flat(self, handler: Any) -> dict[str, Any]:
        return handler(self) | self.fields

    @staticmethod
    def method_fields(method: str) -> list[str]:
        return [f.name for f in dataclasses.fields(METHODS[method])] if method in METHODS else []

    def build(self) -> Any:
        """The method, as a value such as ``DeLoRA(r=8, lam=12.0)``."""
        return METHODS[self.method](**self.fields)

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of `delora.inject`."""
        return {key: getattr(self, key) for key in ("targets", "dropout", "also_train", "exclude", "overrides")}


class Train(Strict):
    """How it is trained: AdamW, a schedule with warm-up, for ``epochs``, or for ``steps`` if these are given.

    ``lam_lr`` and ``head_lr`` are the rates of the strengths and of the modules trained whole (``lr`` if not given);
    ``lam_weight_decay`` is the decay of the strengths; ``warmup`` is a share of all steps or, from 1, their number; ``clip``
    the largest gradient norm (0: no clipping); a step takes ``batch_size * accumulation`` examples. ``precision`` is of the
    computation, ``weights`` of the frozen model; what trains is in fp32. ``save_steps``: from one checkpoint to the next (an
    epoch if not given); ``record_steps``: from one line of metrics to the next (so that there are a thousand or more, or every
    step).
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
    weights: Literal["fp32", "bf16"] = "fp32"
    clip: Rate = 0.0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"


class Evaluate(Strict):
    """How a language model is scored: ``tasks`` of lm-evaluation-harness ("sentiment" and "rating": of the test sentences)
    with ``shots`` examples before each question, and the perplexity on a ``text``, a file or 200 sentences of a domain.
    ``before``: the same of the model as it was.
    """

    tasks: list[str] = []
    shots: Annotated[int, Field(ge=0)] = 0
    batch_size: Count = 8
    text: str | None = None
    before: bool = True


class Subject(Strict):
    """How a text-to-image model learns a subject, and how that is judged.

    ``names``: the subjects of google/dreambooth (all if empty). For photographs of your own: ``word``, the class, and
    ``prompts`` with ``{}`` in the subject's place. ``class_images`` preserve the prior, with ``prior_weight`` in the loss.
    ``images`` are made for each prompt in ``steps`` of the solver with ``guidance``; ``snapshots``: the steps of training
    from one sample picture to the next (0: none). ``dino`` and ``clip`` judge, the first CLIP for the table; ``classifier``
    is a model whose labels are words, for the share of the prompts' words that it sees in the pictures.
    """

    names: list[str] = []
    word: str | None = None
    prompts: list[str] = []
    token: Annotated[str, Field(min_length=1)] = "qwe"
    resolution: Annotated[int, Field(ge=8)] = 512
    class_images: Annotated[int, Field(ge=0)] = 200
    prior_weight: Rate = 1.0
    images: Count = 4
    steps: Count = 25
    guidance: Rate = 7.5
    snapshots: Annotated[int, Field(ge=0)] = 200
    dino: str = "facebook/dino-vits16"
    clip: list[str] = ["openai/clip-vit-large-patch14", "openai/clip-vit-base-patch32"]
    classifier: str | None = None


class SemanticMap(Strict):
    """How a text-to-image model learns to follow label maps, and how that is judged.

    ``hint``: a ControlNet whose hint encoder is taken (a fresh one if not given); it trains if ``adapter.also_train`` has
    "conv_in.encoder". ``maps``: how many of the validation maps are drawn (all if not given), each in ``steps`` of DDIM with
    ``guidance``. ``segmenter`` of transformers with ``classes``; ``fid``: "inception", or a vision model for the features.
    """

    hint: str | None = None
    resolution: Annotated[int, Field(ge=8)] = 512
    maps: Annotated[int, Field(ge=2)] | None = None
    steps: Count = 50
    guidance: Rate = 9.0
    segmenter: str = "openmmlab/upernet-convnext-small"
    classes: Count = 150
    fid: str = "inception"


class Published(Strict):
    """Figures of the paper, in percent, shown beside ours only where the model and the task are these. ``scores``: by task."""

    model: str
    task: str
    test: float
    deviation: float | None = None
    scores: dict[str, float] = {}

    def of(self, experiment: Experiment) -> bool:
        """Whether an experiment is on this model (by its own name, wherever it lies) and task, and not on other data."""
        same = experiment.model.rstrip("/").rpartition("/")[2] == self.model.rpartition("/")[2]
        other = experiment.data.domain is not None or experiment.subject.word is not None
        return same and not other and experiment.data.task == self.task


class Variant(Strict):
    """Some keys of the experiment with other values. Of the variants with one ``row``, a table shows the best by validation."""

    name: Annotated[str, Field(min_length=1)]
    row: str | None = None
    seed: int | None = None
    model: str | None = None
    data: dict[str, Any] = {}
    adapter: dict[str, Any] = {}
    train: dict[str, Any] = {}
    evaluate: dict[str, Any] = {}
    subject: dict[str, Any] = {}
    semantic_map: dict[str, Any] = {}
    published: dict[str, Any] = {}

    def changes(self) -> dict[str, Any]:
        return {key: value for key, value in self if key not in ("name", "row") and value not in (None, {})}


class Experiment(Strict):
    """Everything that decides a run's numbers. ``model``: a packaged model, a folder, or a name on the Hugging Face Hub.

    With ``seeds`` every variant is run once for each of them, in place of ``seed``. ``row`` is the line of a table to which
    variants without one belong. ``factor`` is what a sweep multiplied the rates by, for its report.
    """

    name: Annotated[str, Field(min_length=1)]
    seed: Annotated[int, Field(ge=0)] = 0
    seeds: list[Annotated[int, Field(ge=0)]] = []
    row: str | None = None
    factor: Annotated[float, Field(gt=0)] | None = None
    out: Annotated[str, Field(min_length=1)]
    model: str
    data: Data = Data.model_validate({})
    adapter: Adapter
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    subject: Subject = Subject()
    semantic_map: SemanticMap = SemanticMap()
    published: Published | None = None
    variants: list[Variant] = []

    @model_validator(mode="after")
    def _has_what_it_names(self) -> Self:
        if self.data.task != "instructions" and self.evaluate != Evaluate():
            raise ValueError("evaluate is for a language model, with data.task = 'instructions'")
        if self.data.task != "subject" and self.subject != Subject():
            raise ValueError("subject is for a text-to-image model, with data.task = 'subject'")
        if self.data.task != "semantic_map" and self.semantic_map != SemanticMap():
            raise ValueError("semantic_map is for a text-to-image model, with data.task = 'semantic_map'")
        return self

    def runs(self) -> list[tuple[Variant, Experiment]]:
        """Each variant, and for each seed, with the experiment it stands for, which has neither variants nor seeds.

        Without variants it is the experiment itself.
        """
        return [(variant, seeded) for variant, run in self._varied() for seeded in run._seeded()]

    def _seeded(self) -> list[Experiment]:
        one: dict[str, Any] = {"seeds": [], "variants": []}
        runs: list[dict[str, Any]] = [{"name": f"{self.name}, seed {seed}", "seed": seed} for seed in self.seeds] or [{}]
        return [self.model_copy(update=one | run) for run in runs]

    def _varied(self) -> list[tuple[Variant, Experiment]]:
        own = self.model_dump(exclude={"variants"})
        if not self.variants:
            return [(Variant(name=self.name), self)]
        runs = []
        for number, variant in enumerate(self.variants):
            if self.seeds and variant.seed is not None:
                raise ConfigError(
                    f"variants[{number}] ({variant.name}): has a seed, but seeds = {self.seeds} is for all variants"
                )
            changes = variant.changes()
            base = own
            method = changes.get("adapter", {}).get("method")
            if method is not None:
                # Fields that another method does not have (lam, for LoRA) end here; those it shares (r) go over.
                kept = [*Adapter.model_fields, *Adapter.method_fields(method)]
                base = own | {"adapter": {k: v for k, v in own["adapter"].items() if k in kept}}
            merged = _merge(base, {"name": variant.name, "row": variant.row or self.row, **changes})
            runs.append((variant, validate(merged, Experiment, f"variants[{number}] ({variant.name})")))
        return runs


def slug(name: str) -> str:
    """A name as a folder's name: ``LoRA, 3e-3`` becomes ``lora-3e-3``."""
    return re.sub(r"[^\w.]+", "-", name.lower()).strip("-.") or "run"


# ---------------------------------------------------------------- reading


def read(recipe: Path, overrides: Sequence[str] = ()) -> Experiment:
    """The experiment of a TOML or JSON file, with ``key=value`` changes (dotted keys; a TOML value, else a string).

    Raises:
        ConfigError: in words, with the key's dotted path.
    """
    return parse(load_file(recipe), overrides, str(recipe))


def parse(data: dict[str, Any], overrides: Sequence[str] = (), where: str = "recipe") -> Experiment:
    changed = [assign(data, override) for override in overrides]
    experiment = validate(data, Experiment, where)
    for key in changed:
        _refuse_hidden(experiment, key)
    folders: dict[str, str] = {}
    for _, run in experiment.runs():
        if (folder := slug(run.name)) in folders:
            raise ConfigError(f"{where}: variants: {folders[folder]!r} and {run.name!r} would have the same folder; rename one")
        folders[folder] = run.name
    return experiment


def load_file(recipe: Path) -> dict[str, Any]:
    try:
        text = recipe.read_text("utf-8")
        return json.loads(text) if recipe.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"cannot read the recipe {recipe}: {error.strerror or error}") from error
    except ValueError as error:  # both decoders' errors, and that of bytes that are no text
        kind = "JSON" if recipe.suffix == ".json" else "TOML"
        raise ConfigError(f"{recipe} is not valid {kind}: {error}") from error


def assign(data: dict[str, Any], override: str) -> str:
    """Apply one ``key=value``; the key is returned."""
    key, equals, text = override.partition("=")
    *outer, last = parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"{override!r}: a change is written key=value, such as train.epochs=1")
    for part in outer:
        data = data.setdefault(part, {})
        if not isinstance(data, dict):
            raise ConfigError(f"{override!r}: {part} is a value, not a table with keys")
    try:
        data[last] = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        data[last] = text.strip()
    return ".".join(parts)


def _refuse_hidden(experiment: Experiment, key: str) -> None:
    """A change that variants undo would be silently without effect."""
    if key == "seed" and experiment.seeds:
        raise ConfigError(f"seed: the recipe has seeds = {experiment.seeds}, which come before it; change seeds")
    hiding = [variant.name for variant in experiment.variants if _has(variant.changes(), key.split("."))]
    if hiding:
        raise ConfigError(
            f"{key}: these variants set it themselves: {', '.join(hiding)}; change it in the recipe, "
            "or add variants=[] to run the experiment without its variants"
        )


def _has(data: Any, parts: list[str]) -> bool:
    return not parts or (isinstance(data, dict) and parts[0] in data and _has(data[parts[0]], parts[1:]))


def _merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with changes; tables are merged key by key, but for ``overrides``, whose keys are patterns."""
    merged = dict(base)
    for key, value in changes.items():
        both_tables = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping) and key != "overrides"
        merged[key] = _merge(merged[key], value) if both_tables else value
    return merged


def differences(a: Any, b: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The dotted keys at which two configurations differ, with both values (None: not there)."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in [*a, *(k for k in b if k not in a)]:
            yield from differences(a.get(key), b.get(key), f"{path}.{key}" if path else key)
    elif a != b:
        yield path, a, b


# ---------------------------------------------------------------- errors


def validate(data: Any, kind: type[Model], where: str) -> Model:
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        lines = dict.fromkeys(_explain(e, kind) for e in error.errors(include_url=False))
        raise ConfigError("\n".join(f"{where}: {line}" for line in lines)) from error


def _explain(error: Any, kind: type[BaseModel]) -> str:
    """One line for one error of pydantic: the dotted path, what is wrong, the nearest valid key."""
    location = error["loc"]
    if not location:  # of the whole
        return str(error["ctx"]["error"]) if error["type"] == "value_error" else error["msg"]
    *outer, last = location
    path = ".".join(map(str, location))
    match error["type"]:
        case "extra_forbidden":
            elsewhere = [key for key in _known(kind) if key.rpartition(".")[2] == last]
            hint = f"did you mean {' or '.join(elsewhere)}?" if elsewhere else _nearest(str(last), _keys(_at(kind, outer)))
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
    return [key for key in kind.model_fields if not (kind is Adapter and key == "fields")]


def _at(kind: type[BaseModel], location: Sequence[str | int]) -> type[BaseModel]:
    """The configuration at a place inside another."""
    for part in location:
        if isinstance(part, str):
            inner = kind.model_fields[part].annotation
            kind = next(t for t in (inner, *get_args(inner)) if isinstance(t, type) and issubclass(t, BaseModel))
    return kind


def _known(kind: type[BaseModel], prefix: str = "") -> list[str]:
    """The dotted keys of a configuration, the lists and free tables in it not entered."""
    known = []
    for key in _keys(kind):
        inner = kind.model_fields[key].annotation
        known.append(prefix + key)
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            known += _known(inner, f"{prefix}{key}.")
    return known


def _nearest(key: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    return f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"
