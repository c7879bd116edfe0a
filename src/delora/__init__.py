"""delora: Decoupled Low-rank Adaptation. `W' = W + (lam / r) B Xi A diag(|W|)`, direction and strength learned apart."""

from delora import diagnostics, export
from delora.checkpoint import load, save
from delora.diagnostics import distances
from delora.hosts import host
from delora.inject import activate, disabled, eject, inject, param_groups, strength, summary
from delora.layer import Adapted
from delora.merge import blend, merge, merged
from delora.methods import (
    ETHER,
    IA3,
    METHODS,
    OFT,
    RED,
    RUNGS,
    BitFit,
    Bottleneck,
    DeLoRA,
    DoRA,
    EtherPlus,
    Full,
    LoRA,
    LoReFT,
    Reflections,
)

__version__ = "0.1.0"

__all__ = [
    "ETHER",
    "IA3",
    "METHODS",
    "OFT",
    "RED",
    "RUNGS",
    "Adapted",
    "BitFit",
    "Bottleneck",
    "DeLoRA",
    "DoRA",
    "EtherPlus",
    "Full",
    "LoRA",
    "LoReFT",
    "Reflections",
    "activate",
    "blend",
    "diagnostics",
    "disabled",
    "distances",
    "eject",
    "export",
    "host",
    "inject",
    "load",
    "merge",
    "merged",
    "param_groups",
    "save",
    "strength",
    "summary",
]
