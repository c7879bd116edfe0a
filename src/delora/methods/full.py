"""Full finetuning of the layers that are named."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Full"]


@dataclass(frozen=True)
class Full:
    """W' = W + dW, every entry of dW trained: full finetuning of the layers that are named, of any type.

    A copy of the layer trains while the original stays fixed, so that `disabled`, `strength`, `eject` and several named
    adapters work as for every other method. ``also_train`` of `inject` uses it.

    Example:
        >>> import delora
        >>> from torch import nn
        >>> model = delora.inject(nn.Sequential(nn.Linear(4, 3)), Full(), ["0"])
        >>> sum(p.numel() for p in model.parameters() if p.requires_grad)
        15
    """
