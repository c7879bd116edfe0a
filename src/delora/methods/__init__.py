"""The methods, one file each. A method is in `METHODS` by its line in this file, and everything else follows from the table.

``base`` says what a method is.
"""

# ruff: noqa: I001 (the order of these lines is that of the table)

from __future__ import annotations

from dataclasses import is_dataclass as _is_dataclass
from typing import TYPE_CHECKING

from delora.methods.base import Method as Method, name_of as _name_of

from delora.methods.delora import DeLoRA as DeLoRA
from delora.methods.full import Full as Full
from delora.methods.lora import LoRA as LoRA
from delora.methods.dora import DoRA as DoRA
from delora.methods.nblora import NBLoRA as NBLoRA
from delora.methods.ether import ETHER as ETHER, EtherPlus as EtherPlus
from delora.methods.oft import OFT as OFT
from delora.methods.hra import HRA as HRA
from delora.methods.reflections import Reflections as Reflections
from delora.methods.bitfit import BitFit as BitFit
from delora.methods.ia3 import IA3 as IA3
from delora.methods.red import RED as RED
from delora.methods.loreft import LoReFT as LoReFT
from delora.methods.bottleneck import Bottleneck as Bottleneck

# Every dataclass above, by its name in files and recipes.
METHODS: dict[str, type] = {
    _name_of(value): value for value in list(globals().values()) if isinstance(value, type) and _is_dataclass(value)
}

# The paper's Tables 1 and 2: from LoRA (L0) and from ETHER+ (E0), one idea at a time, to DeLoRA, the last rung of both. The
# strengths, and a rate for them (`param_groups`), are to be tuned: the paper gives none for the rungs.
RUNGS: dict[str, Method] = {
    "L0": LoRA(r=16, alpha=32),
    "L1": DeLoRA(r=16, norm="none", start="copy", learn_lam=True),  # + normalised, with a controllable boundary
    "L2": DeLoRA(r=16, start="copy", learn_lam=True),  # + scaled by the weights: DeLoRA
    "E0": EtherPlus(two_sided=False),
    "E1": Reflections(r=2),  # + a controllable boundary
    "E2": Reflections(r=16),  # + high rank
    "E3": Reflections(r=16, relaxed=True),  # + relaxed: no longer symmetric
    "E4": DeLoRA(r=16, start="copy", learn_lam=True),  # + additive: DeLoRA
}

if not TYPE_CHECKING:  # type checkers read the names from the lines above
    __all__ = ["METHODS", "RUNGS", "Method", *(method.__name__ for method in METHODS.values())]
