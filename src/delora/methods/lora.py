from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn

from delora.methods.base import kaiming, require_flags, require_positive, require_rank
from delora.updates import LowRank


@dataclass(frozen=True)
class LoRA:
    """W' = W + (alpha / r) B A                                  Hu et al. 2022, arXiv:2106.09685, Eq. 3

    ``A [r, in]`` starts at Kaiming's uniform, ``B [out, r]`` at zero, so training starts at the base model exactly.

    Args:
        r: rank, at least 1.
        alpha: scale, above 0.
        rslora: divide alpha by sqrt(r) in place of r (rank-stabilised; Kalajdzievski 2023, arXiv:2312.03732, Eq. 4).
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
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)

    def init(self, W: Tensor) -> dict[str, Tensor]:
        out, inp = W.shape
        return {"A": nn.Parameter(kaiming(self.r, inp, W)), "B": nn.Parameter(W.new_zeros(out, self.r))}

    def update(self, W: Tensor | None, p: dict[str, Tensor]) -> LowRank:
        return LowRank(up=p["B"], down=p["A"] * self.scale)
