from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from delora.lowrank import traced
from delora.methods.base import TINY, kaiming, require_flags, require_positive, require_rank
from delora.updates import LowRank

# The clamp of Hugging Face PEFT's DeLoRA (tuners/delora/layer.py), for start="zero".
PEFT_CLAMP = 1e-4


@dataclass(frozen=True)
class DeLoRA:
    """W' = W + (lam / r) B Xi A diag(c),  Xi_ii = 1 / (|b_i| |a_i|)      Bini et al. 2025, arXiv:2503.18225, Eq. 8

    ``a_i`` is row i of ``A [r, in]``, ``b_i`` column i of ``B [out, r]``: their directions are learned, their lengths do
    not matter. ``lam [1]`` is the strength. Every term has norm one before c, so |W' - W| is bounded whatever the
    learning rate (see `bound`).

    Args:
        r: rank of the update, at least 1.
        lam: strength at the start, above 0.
        norm: what c takes from the frozen W: the norm of each input column ("columns", as the authors' code does and all
            published strengths assume), of the whole ("matrix", Eq. 8 to the letter), of each output row ("rows"), or 1
            ("none", the ablation of Table 1).
        start: how training starts at the base model.
            "subtract": a frozen copy (lam0, A0, B0) of the start is subtracted (Eq. 9).
            "copy": the same, but the copy is scaled by the current lam (the authors' code).
            "paired": b_2k = b_2k-1 and a_2k = -a_2k-1, so that the terms cancel; even r; no frozen copy.
            "soft": B = 0 and Xi_ii = 1 / (|a_i| sqrt(|b_i|^2 + softness^2 out)); the base model bit for bit.
            "zero": B = 0 with norms clamped at 1e-4 (the PEFT library). The first step jumps to the full strength at any
            learning rate: here to read that library's files and to compare.
        softness: for "soft", the root mean square of b_i's entries at which a term reaches 71 % of its bound.
        learn_lam: train lam (Appendix D).
    """

    r: int = 8
    lam: float = 8.0
    norm: Literal["columns", "matrix", "rows", "none"] = "columns"
    start: Literal["subtract", "copy", "paired", "soft", "zero"] = "subtract"
    softness: float = 0.03
    learn_lam: bool = True

    stacks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_rank(self.r)
        require_positive("lam", self.lam)
        require_positive("softness", self.softness)
        require_flags(self)
        if self.start == "paired" and self.r % 2:
            raise ValueError(f"r = {self.r} with start='paired': the terms cancel in pairs, so r must be even")

    def init(self, W: Tensor) -> dict[str, Tensor]:
        out, inp = W.shape
        A, B = kaiming(self.r, inp, W), kaiming(out, self.r, W)
        if self.start == "paired":
            A[1::2], B[:, 1::2] = -A[::2], B[:, ::2]
        if self.start in ("soft", "zero"):
            B.zero_()
        lam = W.new_full((1,), float(self.lam))
        p = {"A": nn.Parameter(A), "B": nn.Parameter(B), "lam": nn.Parameter(lam) if self.learn_lam else lam}
        # Copies of their own: sharing storage with what trains would keep the difference at zero for ever.
        if self.start in ("subtract", "copy"):
            p |= {"A0": A.clone(), "B0": B.clone()}
        if self.start == "subtract":
            p["lam0"] = lam.clone()
        return p

    def measure(self, W: Tensor) -> dict[str, Tensor]:
        match self.norm:
            case "columns":
                return {"c": torch.linalg.vector_norm(W, dim=0)}  # [in]
            case "rows":
                return {"c": torch.linalg.vector_norm(W, dim=1)}  # [out]
            case "matrix":
                return {"c": torch.linalg.vector_norm(W).reshape(1)}
            case "none":
                return {"c": W.new_ones(1)}

    def update(self, W: Tensor | None, p: dict[str, Tensor]) -> LowRank:
        columns = p["c"] if self.norm != "rows" else None
        up, down = p["B"], self._fold(p["lam"], p["A"], p["B"], columns)
        if self.start in ("subtract", "copy"):
            lam0 = p["lam0"] if self.start == "subtract" else p["lam"]
            up = torch.cat([up, p["B0"]], dim=-1)  # [out, 2r]
            down = torch.cat([down, -self._fold(lam0, p["A0"], p["B0"], columns)], dim=-2)  # [2r, in]
        return LowRank(up if columns is not None else p["c"][..., None] * up, down)

    def _fold(self, lam: Tensor, A: Tensor, B: Tensor, c: Tensor | None) -> Tensor:
        """(lam / r) Xi A diag(c), shape [r, in]: all that scales goes into the small factor, so the layer runs like LoRA."""
        shortest = PEFT_CLAMP if self.start == "zero" else TINY
        slack = self.softness**2 * B.shape[-2] if self.start == "soft" else 0.0
        if traced():
            return folded(lam, A, B, c, shortest, slack)[0]
        return _Fold.apply(lam, A, B, c, shortest, slack)

    def bound(self, p: dict[str, Tensor]) -> Tensor:
        """An upper bound [1] of |W' - W|_F that holds for any values of A and B.

        lam max(c) for "paired", "soft" and "zero", (lam + lam0) max(c) for "subtract", 2 lam max(c) for "copy".
        """
        lam = p["lam"].abs()
        lam = lam + {"subtract": p.get("lam0", lam), "copy": lam}.get(self.start, torch.zeros_like(lam))
        return lam * p["c"].max()

    def reachable(self, p: dict[str, Tensor]) -> Tensor:
        """|W' - W|_F [1] to expect when no two terms have anything in common, with each other, the start or W's columns.

        rms(c) lam / sqrt(r), for "subtract" rms(c) sqrt((lam^2 + lam0^2) / r), for "copy" rms(c) lam sqrt(2 / r).
        """
        lam = p["lam"].abs()
        other = {"subtract": p.get("lam0", lam), "copy": lam}.get(self.start, torch.zeros_like(lam))
        return p["c"].square().mean().sqrt() * torch.hypot(lam, other) / self.r**0.5


def folded(
    lam: Tensor, A: Tensor, B: Tensor, c: Tensor | None, shortest: float, slack: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """lam / r / (|a_i| sqrt(|b_i|^2 + slack)) a_i * c, shape [r, in]; that factor without lam [r]; both lengths [r]."""
    a = torch.linalg.vector_norm(A, dim=-1).clamp_min(shortest)
    b = torch.linalg.vector_norm(B, dim=-2)
    b = (b.square() + slack).sqrt() if slack else b.clamp_min(shortest)
    # Two divisions: the product |a| |b| would overflow long before either does.
    scale = 1 / A.shape[-2] / a / b
    down = A * (lam * scale)[..., None]
    return (down if c is None else down * c[..., None, :]), scale, a, b


class _Fold(torch.autograd.Function):
    """`folded` with its gradient in closed form: a third of the operations that autograd would record."""

    @staticmethod
    def forward(ctx: Any, lam: Tensor, A: Tensor, B: Tensor, c: Tensor | None, shortest: float, slack: float) -> Tensor:
        down, scale, a, b = folded(lam, A, B, c, shortest, slack)
        ctx.save_for_backward(lam, A, B, c, scale, a, b)
        ctx.shortest, ctx.soft = shortest, slack > 0
        return down

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        lam, A, B, c, scale, a, b = ctx.saved_tensors
        grad = grad if c is None else grad * c[..., None, :]
        along = (grad * A).sum(dim=-1) * scale  # [r], how a term's strength changes the loss
        pull = lam * along
        # A vector that counts as longer than it is has no length to change.
        pull_a = torch.where(a > ctx.shortest, pull / a / a, 0)
        pull_b = pull / b / b if ctx.soft else torch.where(b > ctx.shortest, pull / b / b, 0)
        grad_A = torch.addcmul(-(pull_a[..., None] * A), (lam * scale)[..., None], grad)
        return along.sum(dim=-1, keepdim=True), grad_A, -pull_b[..., None, :] * B, None, None, None
