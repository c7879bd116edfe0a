"""NB-LoRA: a low-rank update whose singular values are bounded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from delora.frozen import Frozen, takes_frozen
from delora.methods.base import require_positive, require_rank
from delora.updates import LowRank

__all__ = ["NBLoRA"]


@dataclass(frozen=True)
class NBLoRA:
    """W' = W + 2 sigma Q_B Q_A^T,  [Q_A; Q_B] = Cayley([A^T; B])          Wang, Dvijotham & Manchester 2025, arXiv:2501.19050

    Norm-bounded low-rank adaptation. ``A [r, in]`` and ``B [out, r]`` are free. Cayley's transform of G = [A^T; B], with X its
    first r rows and Y the others, has orthonormal columns: with Z = X - X^T + Y^T Y it is [(I - Z) M; -2 Y M], M = (I + Z)^-1.
    Hence no singular value of the change is above sigma, whatever the learning rate, and every matrix of rank r with such
    singular values is reached. B starts at zero, and so does the change.

    The construction is from these properties, which the paper's abstract states, and from the authors' earlier layers (Wang &
    Manchester 2023, arXiv:2301.11526); it has not been compared with their code, and the start of A is ours.

    Args:
        r: rank of the update, at least 1.
        sigma: the largest singular value that the change can have, above 0, the same for all layers.
        reach: in place of ``sigma``, the share of |W|_F that the change of a layer can come to at most, above 0: sigma is
            reach |W|_F / sqrt(r). 0.1 if ``sigma`` is not given either.

    Example:
        >>> W = torch.randn(6, 8)
        >>> p = {"A": 1e3 * torch.randn(2, 8), "B": 1e3 * torch.randn(6, 2), "sigma": torch.tensor([0.5])}
        >>> change = NBLoRA(r=2, sigma=0.5).update(None, p).merge(W) - W
        >>> bool(torch.linalg.matrix_norm(change, 2) < 0.501)
        True
    """

    r: int = 8
    sigma: float | None = None
    reach: float | None = None

    stacks: ClassVar[bool] = True
    one_of: ClassVar[tuple[str, ...]] = ("sigma", "reach")

    def __post_init__(self) -> None:
        require_rank(self.r)
        if self.sigma is not None and self.reach is not None:
            raise ValueError(
                f"sigma = {self.sigma!r} and reach = {self.reach!r}: both say how large the change can be; give one of them "
                "(sigma=None)"
            )
        if self.sigma is None and self.reach is None:
            object.__setattr__(self, "reach", 0.1)
        require_positive(*(("sigma", self.sigma) if self.reach is None else ("reach", self.reach)))

    @takes_frozen
    def init(self, W: Frozen) -> dict[str, Tensor]:
        out, inp = W.shape
        # Rows of length about one: then Q_A is about -A^T, and its first r rows, of another formula, are like the others.
        A = W.new_empty(self.r, inp).normal_(std=inp**-0.5)
        return {"A": nn.Parameter(A), "B": nn.Parameter(W.new_zeros(out, self.r)), "sigma": self._sigma(W)}

    def _sigma(self, W: Frozen) -> Tensor:
        """sigma [1] of a layer."""
        if self.reach is None:
            assert self.sigma is not None
            return W.new_full((1,), float(self.sigma))
        sigma = self.reach * W.norm().reshape(1) / self.r**0.5
        if not sigma.is_meta and not (sigma.isfinite().all() and sigma > 0):
            raise ValueError(f"reach = {self.reach!r}: W is zero, so no change is a share of it; give sigma")
        return sigma

    def update(self, W: Tensor | None, p: dict[str, Tensor]) -> LowRank:
        # In float64, where the device has it: in float32, large A and B with nearly parallel vectors would break the bound.
        dtype, exact = p["A"].dtype, torch.float32 if p["A"].device.type == "mps" else torch.float64
        A, B = p["A"].to(exact), p["B"].to(exact)
        X, Y = A[..., : self.r], A[..., self.r :]  # of G's rows from A, transposed: [r, r] and [r, in - r]
        eye = torch.eye(self.r, dtype=exact, device=A.device)
        # No singular value of I + Z is below 1; the gradient of an inverse needs products alone.
        M = torch.linalg.inv(eye + X.mT - X + Y @ Y.mT + B.mT @ B)
        down = torch.cat([(2 * M - eye).mT, -2 * M.mT @ Y], dim=-1)  # Q_A^T [r, in]
        return LowRank(up=(-2 * B @ M).to(dtype) * (2 * p["sigma"][..., None]), down=down.to(dtype))

    def bound(self, p: dict[str, Tensor]) -> Tensor:
        """sigma sqrt(r), shape [1]: an upper bound of |W' - W|_F, reached where all r singular values are sigma."""
        return p["sigma"] * self.r**0.5
