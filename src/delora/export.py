"""Writes adapters for other programs.

`delora.export.peft(model, folder)`, `delora.export.diffusers(pipe, folder)`, `delora.export.gguf(model, folder)`,
`delora.export.vllm(model, folder)`.
"""

from __future__ import annotations

from delora.formats.diffusers import write as diffusers
from delora.formats.gguf import write as gguf
from delora.formats.peft import write as peft
from delora.formats.vllm import write as vllm

__all__ = ["diffusers", "gguf", "peft", "vllm"]
