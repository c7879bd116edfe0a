"""Adapters for other programs."""

from delora.export.peft import peft

__all__ = ["peft"]
