"""One file for each kind of experiment; each reads top to bottom: model, inject, data, train, evaluate."""

from __future__ import annotations

import importlib
from typing import cast

from delora.training.config import Experiment
from delora.training.experiments import Recipe


def of(experiment: Experiment) -> Recipe:
    """The recipe for an experiment's task."""
    own = {"instructions": "instruction", "subject": "subject", "semantic_map": "semantic_map"}
    name = own.get(experiment.data.task, "classification")
    return cast(Recipe, importlib.import_module(f"delora.recipes.{name}"))
