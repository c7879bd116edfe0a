"""The best run of an experiment as files: the adapter, the merged model, the PEFT LoRA, each read back and compared."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import set_seed

import delora
from delora.models import adapters
from delora.training.config import Experiment
from delora.training.models import loading, save_merged, write_template
from delora.training.runs import RunError

__all__ = ["deliver", "equal_tokens", "read_peft"]


def deliver(
    experiment: Experiment,
    run: Path,
    out: Path,
    fresh: Callable[[], Any],
    auto: Any,
    same: Callable[[str, Any], int],
    template: str | None = None,
) -> dict[str, int]:
    """Write ``adapter``, ``merged`` and ``peft`` into ``out``, those that the method can be; read each back and compare.

    Args:
        run: the folder of the run that is delivered.
        fresh: a function that returns the frozen base model, newly loaded.
        auto: transformers' auto class that reads the merged model.
        same: a function of the name of what was written and the model it was read into; it returns how many predictions equal
            those of the run.
        template: the chat template that was trained with, which goes into each folder; "" for none. Default: the base model's.

    Returns:
        What ``same`` returned for each.
    """
    set_seed((experiment.seed + 1) % 2**32)  # not the run's seed: the values that a fresh head starts from must not matter
    model: Any = delora.load(fresh(), run / "adapter", methods=experiment.adapter.classes())
    delora.save(model, out / "adapter")
    model.config.architectures = [type(model).__name__]  # which model the adapter is for, beyond the base's name
    model.config.save_pretrained(out / "adapter")
    write_template(out / "adapter", template)
    agreement = {"adapter": same("adapter", model)}
    changed = [a for a in adapters(model).values() if not a.whole]
    if changed and all(a.low_rank() is not None for a in changed):
        delora.export.peft(model, out / "peft")
        write_template(out / "peft", template)
        agreement["peft"] = same("peft", read_peft(fresh(), out / "peft"))
    if all(a.mergeable() for a in changed):
        save_merged(model, out / "merged", template)
        agreement["merged"] = same("merged", loading(auto, str(out / "merged"), dtype="auto"))
    return agreement


def equal_tokens(folder: Path, again: dict[str, Any], trained: dict[str, Any], exact: bool) -> int:
    """How many next tokens of a language model that was read from ``folder`` equal the trained one's (`language.predicted`).

    Raises:
        RunError: in float32, ``exact``, one differs; or the loss differs by more than bfloat16's rounding, 0.8 % of it or, of a
            loss below 1, of 1.

    >>> equal_tokens(Path("out/merged"), {"tokens": [1, 2], "loss": 0.0040}, {"tokens": [1, 3], "loss": 0.0037}, exact=False)
    1
    """
    count = len(trained["tokens"])
    equal = sum(a == b for a, b in zip(again["tokens"], trained["tokens"], strict=True))
    off = abs(again["loss"] - trained["loss"])
    if off > torch.finfo(torch.bfloat16).eps * max(1.0, trained["loss"]) or (exact and equal < count):
        raise RunError(
            f"{folder} is not what was trained: its loss is {again['loss']:.4f}, not {trained['loss']:.4f}, and its prediction "
            f"another in {count - equal} of {count} tokens"
        )
    return equal


def read_peft(model: Any, folder: Path) -> nn.Module:
    """A model with a PEFT folder's adapter, read by PEFT if it is installed, else by our own reader."""
    if importlib.util.find_spec("peft") is None:
        return delora.load(model, folder)
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT reads an attribute that transformers has renamed
        return PeftModel.from_pretrained(model, folder)
