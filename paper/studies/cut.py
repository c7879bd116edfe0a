"""What an export of a lower rank costs in score: a trained adapter, exported at several ranks, and each export scored."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn

import delora
from delora.formats.nearest import HEADER
from delora.models import adapters

SEEDS, FACTORS, RANKS = (70, 71, 72, 73, 74), (1.0, 4.0), (8, 4, 2, 0)  # 0: without the change, as trained modules are


def exported(model: nn.Module, folder: Path, ranks: Iterable[int], score: Callable[[Path], float]) -> dict[str, Any]:
    """The score of a model's adapter as a LoRA of each rank, and the mean over the layers of the error that was told.

    Rank 0 has no change of a weight, but the modules that were trained whole: what the change is worth at all.
    """
    scores: dict[str, float] = {}
    errors: dict[str, float] = {}
    for rank in ranks:
        if rank == 0:
            for placed in adapters(model).values():
                placed.adapter.strength = float(placed.whole)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            delora.export.peft(model, folder / str(rank), rank=rank or None)
        scores[str(rank)] = score(folder / str(rank))
        with safe_open(folder / str(rank) / "adapter_model.safetensors", "pt") as file:
            told = json.loads((file.metadata() or {}).get(HEADER, '{"errors": {}}'))["errors"]
        errors[str(rank)] = sum(told.values()) / max(1, len(told))
    return {"exported": scores, "errors": errors}
