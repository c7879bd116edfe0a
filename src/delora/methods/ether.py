"""ETHER and ETHER+: multiplication by reflections, whose norms do not depend on the learning rate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from delora.frozen import Frozen, takes_frozen
from delora.methods.base import block_size, kaiming, require_count, require_flags, unit
from delora.updates import NearIdentity, TwoSided

__all__ = ["ETHER", "EtherPlus", "on_side", "swapped", "vectors"]


@dataclass(frozen=True)
class ETHER:
    """W' = W H,  H = blockdiag(I - 2 u_i u_i^T / |u_i|^2)          Bini et al. 2024, arXiv:2405.20271

    ``u [blocks, in / blocks]`` is drawn from Kaiming's uniform distribution. H is always a reflection and never the
    identity: training does not start at the base model.

    Args:
        blocks: number n of blocks, which must divide the side's size; the number of parameters does not depend on it.
        side: "input", W H (the authors' plain layers); "output", H W (their fused attention layers).

    Example:
        >>> W = torch.eye(2)
        >>> ETHER().update(None, {"u": torch.tensor([[5.0, 0.0]])}).merge(W)
        tensor([[-1.,  0.],
                [ 0.,  1.]])
    """

    blocks: int = 1
    side: Literal["input", "output"] = "input"

    starts_at_base = False
    has_dropout = False

    def __post_init__(self) -> None:
        require_count("blocks", self.blocks)
        require_flags(self)

    @takes_frozen
    def init(self, W: Frozen) -> dict[str, Tensor]:
        return {"u": nn.Parameter(vectors(W, self.blocks, self.side))}

    @takes_frozen
    def measure(self, W: Frozen) -> dict[str, Tensor]:
        return {"size": W.norm().reshape(1)}

    def update(self, W: Tensor | None, p: dict[str, Tensor]) -> TwoSided:
        u = unit(p["u"])
        return on_side(self.side, NearIdentity(-2 * u[:, :, None], u[:, None, :]))

    def bound(self, p: dict[str, Tensor]) -> Tensor:
        """2 |W|_F, shape [1]: the spectral norm of H - I is 2."""
        return 2 * p["size"]


@dataclass(frozen=True)
class EtherPlus:
    """W' = H2 W H1,  H = blockdiag(I - u_i u_i^T / |u_i|^2 + v_i v_i^T / |v_i|^2)    Bini et al. 2024, arXiv:2405.20271

    H1 has the vectors ``u, v [blocks, in / blocks]``, H2 ``u_out, v_out [blocks, out / blocks]``; v = -u at the start, so
    H = I.

    Args:
        blocks: number n of blocks, which must divide the sizes; the number of parameters does not depend on it. The blocks
            are those of a block-diagonal matrix; the authors' code multiplies other parts of W when n > 1.
        two_sided: H2 and H1 (Tables 3 and 5 of the DeLoRA paper); False: only the one of ``side`` (its Tables 1 and 2).
        side: for one-sided, "input" (W H) or "output" (H W).

    Example:
        >>> method, W = EtherPlus(blocks=2), torch.ones(4, 6)
        >>> p = method.init(W)
        >>> {name: list(t.shape) for name, t in p.items()}
        {'u': [2, 3], 'v': [2, 3], 'u_out': [2, 2], 'v_out': [2, 2]}
        >>> torch.allclose(method.update(None, p).merge(W), W)
        True
    """

    blocks: int = 1
    two_sided: bool = True
    side: Literal["input", "output"] = "input"

    has_dropout = False

    def __post_init__(self) -> None:
        require_count("blocks", self.blocks)
        require_flags(self)

    @takes_frozen
    def init(self, W: Frozen) -> dict[str, Tensor]:
        u = vectors(W, self.blocks, "input" if self.two_sided else self.side)
        start = {"u": u, "v": -u}
        if self.two_sided:
            u = vectors(W, self.blocks, "output")
            start |= {"u_out": u, "v_out": -u}
        return {key: nn.Parameter(tensor) for key, tensor in start.items()}

    @takes_frozen
    def measure(self, W: Frozen) -> dict[str, Tensor]:
        return {"size": W.norm().reshape(1)}

    def update(self, W: Tensor | None, p: dict[str, Tensor]) -> TwoSided:
        first = swapped(p["u"], p["v"])
        if self.two_sided:
            return TwoSided(left=swapped(p["u_out"], p["v_out"]), right=first)
        return on_side(self.side, first)

    def bound(self, p: dict[str, Tensor]) -> Tensor:
        """|W|_F, shape [1], one-sided: the spectral norm of H - I is at most 1. 3 |W|_F two-sided: that of H is at most 2."""
        return 3 * p["size"] if self.two_sided else p["size"]


def vectors(W: Tensor | Frozen, blocks: int, side: str) -> Tensor:
    """A random vector for each block of a side of W [out, in].

    >>> vectors(torch.ones(4, 6), blocks=2, side="input").shape
    torch.Size([2, 3])
    """
    return kaiming(blocks, block_size(W.shape[0 if side == "output" else 1], blocks, side), W)


def swapped(u: Tensor, v: Tensor) -> NearIdentity:
    """I - u u^T / |u|^2 + v v^T / |v|^2 in every block, for ``u, v [blocks, size]``.

    >>> swapped(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])).apply(torch.ones(2))
    tensor([0., 2.])
    """
    u, v = unit(u), unit(v)
    return NearIdentity(torch.stack([-u, v], dim=2), torch.stack([u, v], dim=1))


def on_side(side: str, S: NearIdentity) -> TwoSided:
    """W' = S W for side "output", else W S.

    >>> S = swapped(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
    >>> on_side("output", S).left is S
    True
    """
    return TwoSided(left=S) if side == "output" else TwoSided(right=S)
