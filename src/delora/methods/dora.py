"""DoRA: LoRA with rows rescaled to a learned norm."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from delora.frozen import Frozen, takes_frozen
from delora.methods.base import TINY, require_flags
from delora.methods.lora import LoRA
from delora.updates import LowRank, Rescaled

__all__ = ["DoRA"]


@dataclass(frozen=True)
class DoRA:
    """W' = diag(m / n) (W + s B A),  n_i = |row i of W + s B A|      Liu et al. 2024, arXiv:2402.09353, Eq. 5

    ``m [out]`` starts at the norms of W's rows, ``s B A`` is LoRA's. n is held constant in the gradient (Sec. 4.3), and it
    is computed from the factors: W + s B A is never built. A row belongs to an output feature; the authors and PEFT call it
    a column.

    Args:
        r: as in `LoRA`.
        alpha: as in `LoRA`.
        rslora: as in `LoRA`.
        fixed_magnitude: m stays at the norms of the frozen W (DeLoRA's Appendix C): only directions are learned.

    Example:
        >>> import delora
        >>> model = delora.inject(nn.Sequential(nn.Linear(4, 3)), DoRA(r=2, fixed_magnitude=True), ["0"])
        >>> _ = nn.init.normal_(model[0].adapter.B)
        >>> W, new = model[0].base.weight, delora.merge(model)[0].weight
        >>> torch.allclose(new.norm(dim=1), W.norm(dim=1), atol=1e-6), torch.equal(new, W)
        (True, False)
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

    @takes_frozen
    def init(self, W: Frozen) -> dict[str, Tensor]:
        return self.lora.init(W) | self._magnitudes(W)

    @takes_frozen
    def init_lookup(self, W: Frozen) -> dict[str, Tensor]:
        return self.lora.init_lookup(W) | self._magnitudes(W)

    def _magnitudes(self, W: Frozen) -> dict[str, Tensor]:
        return {} if self.fixed_magnitude else {"m": nn.Parameter(self.measure(W)["squares"].sqrt())}

    @takes_frozen
    def measure(self, W: Frozen) -> dict[str, Tensor]:
        return {"squares": W.row_norms().square()}  # [out]

    @takes_frozen
    def update(self, W: Frozen | None, p: dict[str, Tensor]) -> Rescaled:
        assert W is not None
        change = self.lora.update(None, p)
        m = p["squares"].sqrt() if self.fixed_magnitude else p["m"]
        with torch.no_grad():
            norms = self._row_norms(W, p["squares"], change)
        return Rescaled(m / norms, change)

    def _row_norms(self, W: Frozen, squares: Tensor, change: LowRank) -> Tensor:
        """The norm of each row of W + B A, [out]: sqrt of the row sums of W^2 (``squares``) + 2 (W A^T) * B + (B A A^T) * B."""
        if W.dtype == torch.float16:
            change = change.evened()
        A, B = change.down, change.up
        cross = W.times(A.T.to(W.dtype)).to(B.dtype)  # [out, r]
        return (squares + ((2 * cross + B @ (A @ A.T)) * B).sum(dim=1)).clamp_min(TINY**2).sqrt()
