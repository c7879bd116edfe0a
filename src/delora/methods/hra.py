"""HRA: multiplication by a chain of reflections."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from delora.frozen import Frozen, takes_frozen
from delora.methods.base import kaiming, require_flags, require_rank, unit
from delora.updates import NearIdentity, TwoSided

__all__ = ["HRA"]


@dataclass(frozen=True)
class HRA:
    """W' = W H_1 H_2 ... H_r,  H_i = I - 2 u_i u_i^T / |u_i|^2          Yuan et al. 2024, arXiv:2405.17484

    Householder reflection adaptation. ``U [r, in]`` holds the vectors as rows. The product is a rotation, of rank r apart from
    the identity, so that lengths and angles of W's rows stay as they are. At the start the vectors are equal in pairs, and two
    equal reflections cancel: training starts at the base model, up to rounding.

    Args:
        r: number of reflections, at least 1, and even unless ``orthogonal``.
        orthogonal: the vectors are made orthogonal by Gram and Schmidt's process, so that the product is I - 2 Q Q^T with Q an
            orthonormal basis of their span. It reflects r directions whatever the vectors are and is never the identity:
            training does not start at the base model.

    Example:
        >>> method, W = HRA(r=4), torch.randn(3, 6)
        >>> torch.allclose(method.update(None, method.init(W)).merge(W), W, atol=1e-5)
        True
        >>> new = method.update(None, {"U": torch.randn(4, 6)}).merge(W)
        >>> torch.allclose(new @ new.T, W @ W.T, atol=1e-4)  # lengths and angles of the rows
        True
    """

    r: int = 8
    orthogonal: bool = False

    has_dropout = False

    def __post_init__(self) -> None:
        require_rank(self.r)
        require_flags(self)
        if self.r % 2 and not self.orthogonal:
            raise ValueError(f"r = {self.r}: the reflections cancel in pairs, so r must be even")

    @property
    def starts_at_base(self) -> bool:
        return not self.orthogonal

    @takes_frozen
    def init(self, W: Frozen) -> dict[str, Tensor]:
        copies = 1 if self.orthogonal else 2
        U = kaiming(W.shape[1], self.r // copies, W).T.repeat_interleave(copies, dim=0)
        return {"U": nn.Parameter(U.contiguous())}

    @takes_frozen
    def measure(self, W: Frozen) -> dict[str, Tensor]:
        return {"size": W.norm().reshape(1)}

    def update(self, W: Tensor | None, p: dict[str, Tensor]) -> TwoSided:
        if self.orthogonal:
            q, _ = torch.linalg.qr(p["U"].T)  # [in, r]
            return TwoSided(right=NearIdentity(-2 * q[None], q.T[None]))
        U = unit(p["U"])
        # H_1 ... H_r = I - U^T T U. T [r, r] is triangular, and its inverse can be written down: Gram's matrix above the
        # diagonal, and half of it on the diagonal (the WY form; Schreiber & Van Loan 1989, Puglisi 1992).
        inverse = (U @ U.T).triu(1) + 0.5 * torch.eye(len(U), dtype=U.dtype, device=U.device)
        TU = torch.linalg.solve_triangular(inverse, U, upper=True)  # [r, in]
        return TwoSided(right=NearIdentity(-U.T[None], TU[None]))

    def bound(self, p: dict[str, Tensor]) -> Tensor:
        """2 |W|_F, shape [1]: the spectral norm of an orthogonal matrix less the identity is at most 2."""
        return 2 * p["size"]
