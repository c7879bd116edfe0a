"""LoReFT: edits hidden features within a low-dimensional subspace."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from delora.frozen import Frozen, takes_frozen
from delora.methods.base import kaiming, require_count, require_rank
from delora.updates import Edited

__all__ = ["LoReFT"]


@dataclass(frozen=True)
class LoReFT:
    """h' = h + R^T (W h + b - R h),  R R^T = I                     Wu et al. 2024, arXiv:2404.03592, Eq. 2

    It edits the output h of a whole block at some positions: in the subspace that the rows of ``R [r, d]`` span, the
    coordinates of h are replaced by ``W h + b``. W starts random, so training does not start at the base model. R is stored
    as any matrix and made orthonormal (QR) when it is used. No weight of the block can express this: it cannot be merged.

    Args:
        r: rank, at least 1.
        first: how many of the first positions of an output [batch, positions, d] are edited. Padding counts as positions. In
            generation with a cache, every call counts its positions from 0, so ``first`` suits encoders.
        last: how many of the last positions are edited. If both are 0, all positions are, of an output of any shape.

    Example:
        >>> import delora
        >>> model = delora.inject(nn.Sequential(nn.Linear(4, 4)), LoReFT(r=2, last=1), ["0"])
        >>> x = torch.ones(1, 3, 4)
        >>> (model(x) != model[0].base(x)).any(dim=2)
        tensor([[False, False,  True]])
    """

    r: int = 1
    first: int = 0
    last: int = 0

    edits_output = True
    starts_at_base = False

    def __post_init__(self) -> None:
        require_rank(self.r)
        for name in ("first", "last"):
            if getattr(self, name) != 0 or type(getattr(self, name)) is not int:
                require_count(name, getattr(self, name), "the number of positions, if not 0,")

    @takes_frozen
    def init(self, W: Frozen) -> dict[str, Tensor]:
        d = len(W)
        R = nn.init.orthogonal_(W.new_empty(self.r, d))
        return {
            "R": nn.Parameter(R),
            "W": nn.Parameter(kaiming(self.r, d, W)),
            "b": nn.Parameter(kaiming(self.r, d, W)[:, 0].clone()),
        }

    def update(self, W: Tensor | None, p: dict[str, Tensor]) -> Edited:
        q, triangle = torch.linalg.qr(p["R"].T)  # [d, r]
        R = (q * torch.where(triangle.diagonal() < 0, -1.0, 1.0)).T  # the sign that leaves an R with orthonormal rows unchanged

        def edit(h: Tensor, dropout: float) -> Tensor:
            Q, V, b = R.to(h.dtype), p["W"].to(h.dtype), p["b"].to(h.dtype)
            new = h + (F.linear(h, V, b) - F.linear(h, Q)) @ Q
            new = F.dropout(new, dropout) if dropout else new
            return torch.where(self._chosen(h), new, h) if self.first or self.last else new

        return Edited(edit)

    def _chosen(self, h: Tensor) -> Tensor:
        """Which positions are edited: a mask [positions, 1]."""
        if h.ndim != 3:
            raise ValueError(f"{self} edits positions of an output [batch, positions, channels], got shape {list(h.shape)}")
        position = torch.arange(h.shape[1], device=h.device)
        return ((position < self.first) | (position >= h.shape[1] - self.last))[:, None]
