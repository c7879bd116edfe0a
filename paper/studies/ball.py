"""DeLoRA whose learned strength stays in a fixed ball: one of the modes that ``knobs.strength_mode`` compares."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from delora import DeLoRA
from delora.frozen import Frozen, takes_frozen
from delora.updates import LowRank

__all__ = ["InBall"]


@dataclass(frozen=True)
class InBall(DeLoRA):
    """DeLoRA with lam = 2 lam0 sigmoid(s): s [1] is learned, from 0, so that lam never exceeds 2 lam0.

    s is the tensor that is called ``lam``, and so has lam's rate. A step changes lam's share of lam0 by the same amount at
    every width.

    >>> method = InBall(r=2, lam=3.0, start="paired")
    >>> p = method.init(torch.eye(4)) | {"lam": torch.tensor([100.0])}
    >>> method.inside(p)["lam"]
    tensor([6.])
    """

    @takes_frozen
    def init(self, W: Frozen) -> dict[str, Tensor]:
        p = super().init(W)
        return p | {"most": 2 * p["lam"].detach(), "lam": nn.Parameter(torch.zeros_like(p["lam"]))}

    def inside(self, p: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors as DeLoRA takes them."""
        return p | {"lam": p["most"] * p["lam"].sigmoid()}

    def update(self, W: Tensor | None, p: dict[str, Tensor]) -> LowRank:
        return super().update(W, self.inside(p))

    def bound(self, p: dict[str, Tensor]) -> Tensor:
        return super().bound(self.inside(p))

    def reachable(self, p: dict[str, Tensor]) -> Tensor:
        return super().reachable(self.inside(p) if "most" in p else p)
