"""Adapters in other people's programs: in trainers, with checkpoints without the base model and exact resume; in a server.

===============  =============================================================================
``checkpoints``  a checkpoint's manifest, what is wrong with it, and the newest whole one
``trainer``      `AdapterTrainer`, and `AdapterCheckpoints` over any Trainer of transformers or TRL
``fsdp``         FSDP2 under transformers' Trainer
``monitor``      `Monitor`: distance, bound used, lam and angles in the Trainer's own loggers
``hub``          `delora.push`, `delora.load` and `delora.card`: the Hugging Face Hub
``lightning``    `LightningAdapter`: the same checkpoints for Lightning
``engine``       the thread that owns a language model and writes texts with any adapters
``protocol``     requests of OpenAI's protocol, read
``serving``      a small server of both
===============  =============================================================================

Each name is imported when it is first asked for, so that Lightning is not needed for transformers, nor the other way round.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from delora.integrations.lightning import LightningAdapter as LightningAdapter
    from delora.integrations.monitor import Monitor as Monitor
    from delora.integrations.trainer import AdapterCheckpoints as AdapterCheckpoints
    from delora.integrations.trainer import AdapterTrainer as AdapterTrainer

WHERE = {"AdapterCheckpoints": "trainer", "AdapterTrainer": "trainer", "LightningAdapter": "lightning", "Monitor": "monitor"}

__all__ = ["AdapterCheckpoints", "AdapterTrainer", "LightningAdapter", "Monitor"]


def __getattr__(name: str) -> Any:
    if name not in WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{WHERE[name]}"), name)
