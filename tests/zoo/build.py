"""Tiny models of every type, with inputs that they run with: from configuration classes alone, without a list of cases."""

from __future__ import annotations

import importlib
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

from tests.zoo.configs import Tiny, given
from tests.zoo.inputs import NoInputs, at_most, find
from tests.zoo.timms import FAMILIES, timm
from tests.zoo.words import code, lines

__all__ = ["Built", "NotBuilt", "build", "lively", "types"]

LARGEST = 40_000_000  # parameters
TASKS = """
SEQ_TO_SEQ_CAUSAL_LM SPEECH_SEQ_2_SEQ CAUSAL_LM SEQUENCE_CLASSIFICATION MASKED_LM IMAGE_CLASSIFICATION CTC AUDIO_CLASSIFICATION
IMAGE_TEXT_TO_TEXT MULTIMODAL_LM VIDEO_CLASSIFICATION OBJECT_DETECTION SEMANTIC_SEGMENTATION UNIVERSAL_SEGMENTATION
DEPTH_ESTIMATION BASE PRETRAINING TIME_SERIES_PREDICTION MASK_GENERATION TEXT_TO_WAVEFORM TEXT_TO_SPECTROGRAM
KEYPOINT_DETECTION KEYPOINT_MATCHING IMAGE_TO_IMAGE RETRIEVAL TDT RNNT
"""


Recipe = Callable[[Tiny], nn.Module]  # makes a model of the size that a Tiny cuts


class NotBuilt(RuntimeError):
    """A type of which no tiny model runs; the text says what was tried and why each failed."""


@dataclass
class Built:
    """A tiny model, inputs that it runs with, and how they were found."""

    kind: str
    model: nn.Module
    inputs: dict[str, Any]
    tried: list[str] = field(default_factory=list)
    seconds: float = 0.0


def types() -> list[str]:
    """The names of all types: transformers' model types, ``diffusers:Class`` and ``timm:model``."""
    return [*CONFIG_MAPPING_NAMES, *diffusers_types(), *(f"timm:{name}" for name in FAMILIES)]


def diffusers_types() -> list[str]:
    """Diffusers' transformers, U-Nets and autoencoders: its models with a forward whose arguments all have defaults."""
    import diffusers

    found = []
    for name in dir(diffusers):
        if re.search(r"Transformer|UNet|Autoencoder|VQModel|DiT", name):
            cls = getattr(diffusers, name)
            if isinstance(cls, type) and issubclass(cls, diffusers.ModelMixin) and "forward" in vars(cls):
                found.append(f"diffusers:{name}")
    return found


def classes(kind: str) -> list[type[PreTrainedModel]]:
    """The model classes of a type, those of the commonest tasks first; its own module's where the tables name none."""
    names: list[str] = []
    for task in TASKS.split():
        table = (
            modeling_auto.MODEL_MAPPING_NAMES
            if task == "BASE"
            else getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES", {})
        )
        found = table.get(kind, ())
        names += [n for n in ([found] if isinstance(found, str) else found) if n not in names]
    listed = [c for n in names if (c := getattr(transformers, n, None)) is not None and isinstance(c, type)]
    config = CONFIG_MAPPING[kind]
    room = vars(importlib.import_module(config.__module__.replace("configuration_", "modeling_")))
    own = [c for c in room.values() if isinstance(c, type) and issubclass(c, PreTrainedModel) and c.config_class is config]
    own = [c for c in own if c.forward is not nn.Module.forward]
    part = room.get(config.__name__.removesuffix("Config"))  # a part of a model, which is no model of transformers by itself
    if isinstance(part, type) and issubclass(part, nn.Module) and part not in own and part.forward is not nn.Module.forward:
        own.append(part)
    own.sort(key=lambda c: (not c.__name__.endswith("Model"), c.__name__))
    return [c for c in listed if c.forward is not nn.Module.forward] + [c for c in own if c not in listed]


def lively(model: nn.Module) -> nn.Module:
    """Weights of a healthy size, and none that starts at zero (else much has no gradient); no dropout."""
    torch.manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            for name, p in module._parameters.items():
                if p is None or not p.is_floating_point():
                    continue
                if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) and p.ndim > 1:
                    p.normal_(0, p[0].numel() ** -0.5)
                elif isinstance(module, nn.Embedding) or (p.ndim > 2 and name != "weight"):
                    p.normal_(0, 0.3)
                elif not p.any():
                    p.normal_(0, 0.1)
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.p = 0.0
    return model.float().eval()


def _transformers(kind: str) -> list[tuple[str, Recipe]]:
    try:
        config, found = given(kind), classes(kind)
    except Exception as error:
        raise NotBuilt(f"its configuration has no defaults that hold together: {_short(error)}") from error
    if not found:
        raise NotBuilt("transformers has no model class with a forward for it")
    return [(cls.__name__, lambda tiny, cls=cls: _with_config(cls, tiny(_part(config, cls)))) for cls in found[:4]]


def _part(config: Any, cls: type[nn.Module]) -> Any:
    """The part of a configuration that a class takes, such as that of the text."""
    wanted = getattr(cls, "config_class", None)
    if wanted is None or isinstance(config, wanted):
        return config
    return next((part for part in vars(config).values() if isinstance(part, wanted)), config)


def _with_config(cls: type[nn.Module], config: Any) -> nn.Module:
    model = cls(config)
    model.config = getattr(model, "config", config)
    return model


def _diffusers(name: str) -> list[tuple[str, Recipe]]:
    import diffusers

    cls = getattr(diffusers, name)
    return [(name, lambda tiny: cls(**tiny.arguments(cls)))]


def _timm(name: str) -> list[tuple[str, Recipe]]:
    library = timm()
    if isinstance(library, str):
        raise NotBuilt(library)
    return [(name, lambda tiny: library.create_model(name, num_classes=5))]


def build(kind: str, seconds: float = 5.0, patience: float = 1.0) -> Built:
    """A tiny model of a type and inputs that it runs with. ``seconds`` are of computing, which differ less with the load of a
    machine than the clock's; ``patience`` multiplies them and all others, for what a slower machine shall find as well.

    Raises:
        NotBuilt: none was found within the time.
    """
    torch.manual_seed(0)
    start = time.process_time()
    library, _, name = kind.rpartition(":")
    recipes = {"diffusers": _diffusers, "timm": _timm}.get(library, _transformers)(name)
    search = _Search(start + patience * seconds, patience)
    for i, (words, recipe) in enumerate(recipes):
        for level in (0, 1, 2) if i == 0 else (0, 1):
            found = search.attempt(words, recipe, Tiny(level))
            if found is None and (i, level) == (0, 0):
                found = search.mended(3.0)
            if found:
                return Built(kind, *found, search.tried, time.process_time() - start)
    if found := search.mended():
        return Built(kind, *found, search.tried, time.process_time() - start)
    raise NotBuilt(" || ".join(dict.fromkeys(search.tried[:8])) or "no time was left")


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error)[:160]}"


def _parameters(recipe: Recipe, tiny: Tiny) -> int:
    """How many parameters a model would have, without memory for them (0 where this cannot be told)."""
    try:
        with torch.device("meta"):
            return sum(p.numel() for p in recipe(tiny).parameters())
    except Exception:
        return 0


class _Large(Exception):
    """The model has this many parameters, which are too many."""


class _Search:
    """Tries sizes of a model one after the other, until the time has passed, and keeps what came nearest."""

    def __init__(self, end: float, patience: float) -> None:
        self.end, self.patience = end, patience
        self.tried: list[str] = []
        self.best: tuple[tuple[int, ...], str, Recipe, Tiny, str, dict[str, Any] | None] | None = None

    def attempt(
        self, words: str, recipe: Recipe, tiny: Tiny, seconds: float = 1.5, near: dict[str, Any] | None = None
    ) -> tuple[nn.Module, dict[str, Any]] | None:
        """A model of this size with its inputs, or None; the reason is then in ``tried``."""
        left, seconds = self.end - time.process_time(), self.patience * seconds
        if left < 0:
            return None
        score: tuple[int, ...] = (0,)
        try:
            with at_most(seconds + 1.0):
                if (n := _parameters(recipe, tiny)) > LARGEST:
                    raise _Large(n)
                model = lively(recipe(tiny))
            return model, find(model, min(seconds, left), near).inputs
        except NoInputs as error:
            near = error.near  # type: ignore[attr-defined]
            score, reason = (1, *error.score), f"{error} {error.code}"  # type: ignore[attr-defined]
        except _Large as error:
            score, reason = (-1, -error.args[0]), f"{error.args[0]:,} parameters are not tiny"
        except Exception as error:
            score, reason = (0, *lines(error)), f"{_short(error)} {code(error)}"
        self.tried.append(f"{words}/{tiny}: {reason[:230]}")
        if tiny.level < 2 and (self.best is None or score > self.best[0]):
            self.best = score, words, recipe, tiny, reason, near
        return None

    def mended(self, seconds: float = 60.0) -> tuple[nn.Module, dict[str, Any]] | None:
        """Sizes that were cut are given back one by one, and fields that an error asks for are set."""
        end = min(self.end, time.process_time() + self.patience * seconds)
        while self.best is not None and time.process_time() < end:
            before = self.best
            _, words, recipe, tiny, reason, inputs = before
            if "ImportError" in reason:
                return None
            for near in tiny.near(reason):
                if found := self.attempt(words, recipe, near, 0.6, inputs):
                    return found
                if self.best is not before or time.process_time() > end:
                    break
            else:
                return None
        return None
