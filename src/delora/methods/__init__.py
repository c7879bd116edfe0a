"""The methods, `METHODS`, the one table of them, and `RUNGS`, the ladder of the paper's Tables 1 and 2."""

from delora.methods.base import Method, name_of
from delora.methods.bitfit import BitFit
from delora.methods.bottleneck import Bottleneck
from delora.methods.delora import DeLoRA
from delora.methods.dora import DoRA
from delora.methods.ether import ETHER, EtherPlus
from delora.methods.full import Full
from delora.methods.ia3 import IA3
from delora.methods.lora import LoRA
from delora.methods.loreft import LoReFT
from delora.methods.oft import OFT
from delora.methods.red import RED
from delora.methods.reflections import Reflections

_ALL = (DeLoRA, Full, LoRA, DoRA, ETHER, EtherPlus, OFT, Reflections, BitFit, IA3, RED, LoReFT, Bottleneck)
METHODS: dict[str, type] = {name_of(method): method for method in _ALL}

# From LoRA (L0) and from ETHER+ (E0), one idea at a time, to DeLoRA, which is the last rung of both. The strengths, and a
# rate for them (`param_groups`), are to be tuned: the paper gives none for the rungs.
RUNGS: dict[str, Method] = {
    "L0": LoRA(r=16, alpha=32),
    "L1": DeLoRA(r=16, norm="none", start="copy"),  # + normalised, with a controllable boundary
    "L2": DeLoRA(r=16, start="copy"),  # + scaled by the weights: DeLoRA
    "E0": EtherPlus(two_sided=False),
    "E1": Reflections(r=2),  # + a controllable boundary
    "E2": Reflections(r=16),  # + high rank
    "E3": Reflections(r=16, relaxed=True),  # + relaxed: no longer symmetric
    "E4": DeLoRA(r=16, start="copy"),  # + additive: DeLoRA
}

__all__ = [
    "ETHER",
    "IA3",
    "METHODS",
    "OFT",
    "RED",
    "RUNGS",
    "BitFit",
    "Bottleneck",
    "DeLoRA",
    "DoRA",
    "EtherPlus",
    "Full",
    "LoRA",
    "LoReFT",
    "Method",
    "Reflections",
]
