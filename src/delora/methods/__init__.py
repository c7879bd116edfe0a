"""The methods, and `METHODS`, the one table of them."""

from delora.methods.base import Method, name_of
from delora.methods.delora import DeLoRA
from delora.methods.full import Full
from delora.methods.lora import LoRA

METHODS: dict[str, type] = {name_of(method): method for method in (DeLoRA, Full, LoRA)}

__all__ = ["METHODS", "DeLoRA", "Full", "LoRA", "Method"]
