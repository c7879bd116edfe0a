"""Reflections: the steps between ETHER+ and DeLoRA."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from delora.frozen import Frozen, takes_frozen
from delora.methods.base import kaiming, require_flags, require_positive, require_rank, unit
from delora.updates import NearIdentity, TwoSided

__all__ = ["Reflections"]


@dataclass(frozen=True)
class Reflections:
    """W' = W + (lam / r) W (V T V^T - U S U^T),  S_ii = 1 / |u_i|^2, T_ii = 1 / |v_i|^2      DeLoRA, Eq. 10-14

    The steps of the paper's derivation from ETHER+ to DeLoRA. ``U, V [r / 2, in]`` hold the vectors as rows; V = U at the
    start, so the terms cancel. With r = 2 and lam = 2 it is one-sided `EtherPlus`.

    Args:
        r: number of rank-one terms in all, even. 2: "controllable boundary"; more: "high rank".
        lam: strength at the start, above 0.
        relaxed: each of the two symmetric products becomes a product of two matrices,
            W' = W - (lam / r) W (B X A - D Y C)^T with ``A, C [r / 2, in]``, ``B, D [in, r / 2]``, all trained.
        learn_lam: train lam.

    Example:
        >>> method, W = Reflections(r=4), torch.ones(3, 6)
        >>> p = method.init(W)
        >>> {name: list(t.shape) for name, t in p.items()}
        {'U': [2, 6], 'V': [2, 6], 'lam': [1]}
        >>> torch.allclose(method.update(None, p).merge(W), W)
        True
    """

    r: int = 16
    lam: float = 2.0
    relaxed: bool = False
    learn_lam: bool = True

    has_dropout = False

    def __post_init__(self) -> None:
        require_rank(self.r)
        require_positive("lam", self.lam)
        require_flags(self)
        if self.r % 2:
            raise ValueError(f"r = {self.r}: the terms cancel in pairs, so r must be even")

    @takes_frozen
    def init(self, W: Frozen) -> dict[str, Tensor]:
        inp, half = W.shape[1], self.r // 2
        lam = W.new_full((1,), float(self.lam))
        A, B = kaiming(half, inp, W), kaiming(inp, half, W)
        start = {"A": A, "B": B, "C": A.clone(), "D": B.clone()} if self.relaxed else {"U": A, "V": A.clone()}
        return {key: nn.Parameter(t) for key, t in start.items()} | {"lam": nn.Parameter(lam) if self.learn_lam else lam}

    @takes_frozen
    def measure(self, W: Frozen) -> dict[str, Tensor]:
        return {"size": W.norm().reshape(1)}

    def update(self, W: Tensor | None, p: dict[str, Tensor]) -> TwoSided:
        if self.relaxed:
            a, b, c, d = unit(p["A"]), unit(p["B"].T), unit(p["C"]), unit(p["D"].T)  # [r / 2, in]
            rows, columns = torch.cat([-a, c]), torch.cat([b, d])
        else:
            u, v = unit(p["U"]), unit(p["V"])
            rows, columns = torch.cat([-u, v]), torch.cat([u, v])
        return TwoSided(right=NearIdentity((rows.T * (p["lam"] / self.r))[None], columns[None]))

    def bound(self, p: dict[str, Tensor]) -> Tensor:
        """lam |W|_F, shape [1]: each of the r terms has norm lam / r."""
        return p["lam"].abs() * p["size"]
