"""Where else a run's lines of metrics go: trackio, TensorBoard, wandb and the others that transformers knows."""

from __future__ import annotations

import os
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from delora.errors import nearest
from delora.training.config import ConfigError, Experiment

__all__ = ["FOLDER", "callbacks", "require"]

FOLDER = "tensorboard"  # in a run's folder


def require(experiment: Experiment) -> None:
    """Raises a `ConfigError` if one of ``log`` is no logger, or is not installed.

    >>> from delora.training.config import AdapterSettings
    >>> adapter = AdapterSettings.model_validate({"targets": ["query"]})
    >>> require(Experiment(task="cola", name="mine", out="runs/mine", model="bert", adapter=adapter, log=["tensorbord"]))
    Traceback (most recent call last):
    delora.training.config.ConfigError: mine: log = 'tensorbord': did you mean tensorboard?
    """
    for name in experiment.log:
        if name not in INTEGRATION_TO_CALLBACK:
            raise ConfigError(f"{experiment.name}: log = {name!r}: {nearest(name, sorted(INTEGRATION_TO_CALLBACK))}")
        if name not in get_available_reporting_integrations():
            raise ConfigError(f"{experiment.name}: log = {name!r}: it is not installed: pip install {name}")


def callbacks(experiment: Experiment, folder: Path) -> list[TrainerCallback]:
    """The callbacks of transformers for the experiment's ``log``, in its order.

    TensorBoard's files are in the run's folder. wandb is offline, unless ``WANDB_MODE`` says otherwise: nothing is sent away
    that nobody asked to send.
    """
    if "wandb" in experiment.log:
        os.environ.setdefault("WANDB_MODE", "offline")
        os.environ.setdefault("WANDB_DIR", str(folder))
    return [_callback(name, folder) for name in experiment.log]


def _callback(name: str, folder: Path) -> TrainerCallback:
    kind: Any = INTEGRATION_TO_CALLBACK[name]
    if name != "tensorboard":
        return kind()
    # transformers takes the other package that writes these files, too
    writer = import_module("torch.utils.tensorboard" if find_spec("tensorboard") else "tensorboardX")
    return kind(writer.SummaryWriter(str(folder / FOLDER)))
