"""OFT: multiplication by an orthogonal matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from delora.frozen import Frozen, takes_frozen
from delora.methods.base import TINY, block_size, require_count, require_positive
from delora.updates import BlockDiagonal, TwoSided

__all__ = ["OFT"]


@dataclass(frozen=True)
class OFT:
    """W' = W R^T,  R = blockdiag((I - Q_i) (I + Q_i)^-1),  Q_i^T = -Q_i      Qiu et al. 2023, arXiv:2306.07280

    Orthogonal finetuning by Cayley's transform. The parameters ``Q [blocks, s (s - 1) / 2]`` are the entries above the
    diagonal of the skew-symmetric Q_i [s, s], s = in / blocks; they start at zero, where R = I.

    Args:
        blocks: number n of blocks, which must divide the size of the layer's input.
        radius: for COFT, above 0: each Q_i whose Frobenius norm is larger is scaled down to it. None: no bound.

    Example:
        >>> W = torch.randn(3, 4)
        >>> new = OFT(blocks=1).update(None, {"Q": torch.ones(1, 6)}).merge(W)
        >>> torch.allclose(new @ new.T, W @ W.T, atol=1e-5)  # lengths and angles of the rows
        True
    """

    blocks: int = 4
    radius: float | None = None

    has_dropout = False

    def __post_init__(self) -> None:
        require_count("blocks", self.blocks)
        if self.radius is not None:
            require_positive("radius", self.radius)

    @takes_frozen
    def init(self, W: Frozen) -> dict[str, Tensor]:
        s = block_size(W.shape[1], self.blocks, "input")
        if s == 1:
            raise ValueError(f"blocks = {self.blocks}: blocks of size 1 cannot turn; the input has size {W.shape[1]}")
        return {"Q": nn.Parameter(W.new_zeros(self.blocks, s * (s - 1) // 2))}

    def update(self, W: Tensor | None, p: dict[str, Tensor]) -> TwoSided:
        free = p["Q"]
        n, count = free.shape
        s = round((1 + (1 + 8 * count) ** 0.5) / 2)
        if self.radius is not None:
            length = 2**0.5 * torch.linalg.vector_norm(free, dim=1, keepdim=True)  # each entry occurs twice in Q_i
            free = free * (self.radius / length.clamp_min(TINY)).clamp_max(1)
        row, column = torch.triu_indices(s, s, 1, device=free.device)
        upper = free.new_zeros(n, s, s).index_put((torch.arange(n, device=free.device)[:, None], row, column), free)
        Q = upper - upper.mT
        eye = torch.eye(s, dtype=free.dtype, device=free.device)
        # (I + Q)^-1 (I - Q). No singular value of I + Q is below 1; the gradient of an inverse needs products alone.
        R = 2 * torch.linalg.inv(eye + Q) - eye
        return TwoSided(right=BlockDiagonal(R.mT))
