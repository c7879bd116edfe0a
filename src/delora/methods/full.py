from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Full:
    """W' = W + dW, every entry of dW trained: full finetuning of the layers that are named, of any type.

    A copy of the layer trains while the original stays as it was, so that `disabled`, `strength`, `eject` and several
    named adapters work as for every other method. ``also_train`` of `inject` means this.
    """
