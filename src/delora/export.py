"""Adapters for other programs."""

from delora.export.diffusers import diffusers
from delora.export.peft import peft

__all__ = ["diffusers", "peft"]
