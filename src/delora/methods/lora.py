"""LoRA: a product of two small matrices, added to W."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn

from delora.frozen import Frozen, takes_frozen
from delora.methods.base import kaiming, require_flags, require_positive, require_rank
from delora.updates import LowRank

__all__ = ["LoRA"]


@dataclass(frozen=True)
class LoRA:
    """W' = W + (alpha / r) B A                                  Hu et al. 2022, arXiv:2106.09685, Eq. 3

    ``A [r, in]`` is drawn from Kaiming's uniform distribution, ``B [out, r]`` starts at zero: training starts at the base
    model exactly. On an embedding A starts at zero and B is drawn from N(0, 1), as in PEFT.

    Args:
        r: rank, at least 1.
        alpha: scale, above 0.
        rslora: divide alpha by sqrt(r) instead of r (rank-stabilised; Kalajdzievski 2023, arXiv:2312.03732, Eq. 4).

    Example:
        >>> import delora
        >>> model = delora.inject(nn.Sequential(nn.Linear(4, 3)), LoRA(r=2), ["0"])
        >>> {name: list(t.shape) for name, t in model[0].adapter.tensors().items()}
        {'A': [2, 4], 'B': [3, 2]}
    """

    r: int = 8
    alpha: float = 16.0
    rslora: bool = False

    def __post_init__(self) -> None:
        require_rank(self.r)
        require_positive("alpha", self.alpha)
        require_flags(self)

    @property
    def scale(self) -> float:
        """alpha / r, or alpha / sqrt(r) with ``rslora``."""
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)

    @takes_frozen
    def init(self, W: Frozen) -> dict[str, Tensor]:
        out, inp = W.shape
        return {"A": nn.Parameter(kaiming(self.r, inp, W)), "B": nn.Parameter(W.new_zeros(out, self.r))}

    @takes_frozen
    def init_lookup(self, W: Frozen) -> dict[str, Tensor]:
        """The start on a layer that looks up columns of W, an embedding: A is zero and B is drawn from N(0, 1), as in PEFT.

        A step moves the columns of A that were looked up, along vectors of B of size one; from a small A and B = 0 the same
        step moves the vectors much less.

        >>> p = LoRA(r=2).init_lookup(nn.Embedding(9, 4).weight.T)
        >>> p["A"].shape, p["A"].any().item(), p["B"].shape
        (torch.Size([2, 9]), False, torch.Size([4, 2]))
        """
        out, inp = W.shape
        return {"A": nn.Parameter(W.new_zeros(self.r, inp)), "B": nn.Parameter(W.new_empty(out, self.r).normal_())}

    def update(self, W: Tensor | None, p: dict[str, Tensor]) -> LowRank:
        return LowRank(up=p["B"], down=p["A"] * self.scale)
