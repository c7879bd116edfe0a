from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from delora.methods.base import TINY, require_flags
from delora.methods.lora import LoRA
from delora.updates import LowRank, Rescaled


@dataclass(frozen=True)
class DoRA:
    """W' = diag(m / n) (W + s B A),  n_i = |row i of W + s B A|      Liu et al. 2024, arXiv:2402.09353, Eq. 5

    ``m [out]`` starts at the norms of W's rows, ``s B A`` is LoRA's. n is held constant in the gradient (Sec. 4.3), and it
    is computed from the factors: W + s B A is never built. Of each output feature, what authors and library call a column.

    Args:
        r, alpha, rslora: as in `LoRA`.
        fixed_magnitude: m stays at the norms of the frozen W (DeLoRA's Appendix C): only directions are learned.
    """

    r: int = 8
    alpha: float = 16.0
    rslora: bool = False
    fixed_magnitude: bool = False

    reads_weight = True

    def __post_init__(self) -> None:
        require_flags(self)
        _ = self.lora  # checks the other fields

    @cached_property
    def lora(self) -> LoRA:
        return LoRA(self.r, self.alpha, self.rslora)

    def init(self, W: Tensor) -> dict[str, Tensor]:
        m = {} if self.fixed_magnitude else {"m": nn.Parameter(self.measure(W)["squares"].sqrt())}
        return self.lora.init(W) | m

    def measure(self, W: Tensor) -> dict[str, Tensor]:
        return {"squares": W.square().sum(dim=1)}  # [out]

    def update(self, W: Tensor | None, p: dict[str, Tensor]) -> Rescaled:
        assert W is not None
        change = self.lora.update(None, p)
        m = p["squares"].sqrt() if self.fixed_magnitude else p["m"]
        with torch.no_grad():
            norms = self._row_norms(W, p["squares"], change)
        return Rescaled(m / norms, change)

    def _row_norms(self, W: Tensor, squares: Tensor, change: LowRank) -> Tensor:
        """|W + B A| of each row [out]: rowsum(W^2) + 2 rowsum((W A') * B) + rowsum((B (A A')) * B), the first term kept."""
        A, B = change.down, change.up
        cross = (W @ A.T.to(W.dtype)).to(B.dtype)  # [out, r]
        return (squares + ((2 * cross + B @ (A @ A.T)) * B).sum(dim=1)).clamp_min(TINY**2).sqrt()
