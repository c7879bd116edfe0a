"""DeLoRA: a low-rank update whose directions are learned apart from its strength."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from delora.frozen import Frozen, takes_frozen
from delora.lowrank import traced
from delora.methods.base import TINY, fields_of, kaiming, require_flags, require_positive, require_rank
from delora.updates import LowRank

__all__ = ["DeLoRA", "folded"]

# The smallest length in Hugging Face PEFT's DeLoRA (tuners/delora/layer.py), for start="zero".
PEFT_CLAMP = 1e-4


@dataclass(frozen=True)
class DeLoRA:
    """W' = W + (lam / r) B Xi A diag(c),  Xi_ii = 1 / (|b_i| |a_i|)      Bini et al. 2025, arXiv:2503.18225, Eq. 8

    ``a_i`` is row i of ``A [r, in]``, ``b_i`` column i of ``B [out, r]``: their directions are learned, their lengths do
    not matter. ``lam [1]`` is the strength. Each of the r terms has norm one before c, so the change stays in a ball of
    radius lam max(c), where c are the norms of W's columns by default; a copy of the start that is subtracted adds its own
    radius (see `bound`). It holds whatever the learning rate; only with ``learn_lam`` is the radius learned, too.

    Args:
        r: rank of the update, at least 1.
        lam: strength, above 0, the same for all layers; 8 if ``reach`` is not given either. What it comes to depends on a
            layer's width and on r: published strengths are for their models.
        reach: in place of ``lam``, the share of |W|_F that the change of a layer comes to when its directions have nothing
            left in common with those at the start, above 0. The strength of each layer follows from it, r and the norms of W,
            whatever ``start`` and ``norm`` are: lam = reach |W| sqrt(r) / rms(c), for a start that is subtracted or copied
            smaller by sqrt(2).
        norm: the scales c, from the frozen W: the norm of each input column ("columns", as in the authors' code and
            assumed by all published strengths), of the whole matrix ("matrix", Eq. 8 to the letter), of each output row
            ("rows"), or 1 ("none", the ablation of Table 1).
        start: how training starts at the base model.
            "subtract": a frozen copy (lam0, A0, B0) of the start is subtracted (Eq. 9).
            "copy": the same, but the copy is scaled by the current lam (the authors' code).
            "paired": b_2k = b_2k-1 and a_2k = -a_2k-1, so that the terms cancel; even r; no frozen copy.
            "soft": B = 0 and Xi_ii = 1 / (|a_i| sqrt(|b_i|^2 + softness^2 out)); the base model bit for bit.
            "zero": B = 0 with norms clamped at 1e-4 (the PEFT library). The first step jumps to the full strength at any
            learning rate: meant for reading that library's files and for comparisons.
        softness: for "soft", the root mean square of b_i's entries at which a term reaches 71 % of its bound.
        learn_lam: train lam, as the paper does (Appendix D). Then a higher rate also widens the bound: on a small data set of
            digits, the bound at the end of training grew from 1.6 to 8.0 as the rate went from 1e-3 to 1. Without it the bound
            is a law at any rate, and on digits and film reviews nothing measurable was lost.

    Example:
        >>> import delora
        >>> model = nn.Sequential(nn.Linear(16, 4))
        >>> model = delora.inject(model, DeLoRA(r=2, lam=1.0, start="paired"), ["0"])
        >>> _ = nn.init.normal_(model[0].adapter.A, std=1000.0)  # as after a far too large step
        >>> report = delora.diagnostics.inspect(model)["0"]
        >>> report.distance < report.bound
        True
    """

    r: int = 8
    lam: float | None = None
    reach: float | None = None
    norm: Literal["columns", "matrix", "rows", "none"] = "columns"
    start: Literal["subtract", "copy", "paired", "soft", "zero"] = "subtract"
    softness: float = 0.03
    learn_lam: bool = False

    stacks: ClassVar[bool] = True
    one_of: ClassVar[tuple[str, ...]] = ("lam", "reach")
    unsaid: ClassVar[dict[str, Any]] = {"learn_lam": True}  # of a file that lacks the field: it was the default

    def __post_init__(self) -> None:
        require_rank(self.r)
        if self.lam is not None and self.reach is not None:
            raise ValueError(
                f"lam = {self.lam!r} and reach = {self.reach!r}: both say how strong the change is; give one of them (lam=None)"
            )
        if self.reach is None and self.lam is None:
            object.__setattr__(self, "lam", 8.0)
        require_positive(*(("lam", self.lam) if self.reach is None else ("reach", self.reach)))
        require_positive("softness", self.softness)
        require_flags(self)
        if self.start == "paired" and self.r % 2:
            raise ValueError(f"r = {self.r} with start='paired': the terms cancel in pairs, so r must be even")

    @takes_frozen
    def init(self, W: Frozen) -> dict[str, Tensor]:
        out, inp = W.shape
        A, B = kaiming(self.r, inp, W), kaiming(out, self.r, W)
        if self.start == "paired":
            A[1::2], B[:, 1::2] = -A[::2], B[:, ::2]
        if self.start in ("soft", "zero"):
            B.zero_()
        lam = W.new_full((1,), float(self.lam)) if self.lam is not None else self._strength(W).to(A.dtype)
        p = {"A": nn.Parameter(A), "B": nn.Parameter(B), "lam": nn.Parameter(lam) if self.learn_lam else lam}
        # Copies: tensors that share memory with the trained ones would keep the difference at zero.
        if self.start in ("subtract", "copy"):
            p |= {"A0": A.clone(), "B0": B.clone()}
        if self.start == "subtract":
            p["lam0"] = lam.clone()
        return p

    def __repr__(self) -> str:
        given = {name: value for name, value in fields_of(self).items() if value is not None}
        return f"DeLoRA({', '.join(f'{name}={value!r}' for name, value in given.items())})"

    def _strength(self, W: Frozen) -> Tensor:
        """The lam [1] at which `reachable` is ``reach`` |W|_F."""
        one = W.new_ones(1)
        lam = cast(float, self.reach) * W.norm().reshape(1) / self.reachable(self.measure(W) | {"lam": one, "lam0": one})
        if not lam.is_meta and not (lam.isfinite().all() and lam > 0):
            raise ValueError(f"reach = {self.reach!r}: W is zero, so no strength is a share of it; give lam")
        return lam

    @takes_frozen
    def measure(self, W: Frozen) -> dict[str, Tensor]:
        match self.norm:
            case "columns":
                return {"c": W.column_norms()}  # [in]
            case "rows":
                return {"c": W.row_norms()}  # [out]
            case "matrix":
                return {"c": W.norm().reshape(1)}
            case "none":
                return {"c": W.new_ones(1)}

    def update(self, W: Tensor | None, p: dict[str, Tensor]) -> LowRank:
        columns = p["c"] if self.norm != "rows" else None
        up, down = p["B"], self._fold(p["lam"], p["A"], p["B"], columns)
        if self.start in ("subtract", "copy"):
            lam0 = p["lam0"] if self.start == "subtract" else p["lam"]
            up = torch.cat([up, p["B0"]], dim=-1)  # [out, 2r]
            down = torch.cat([down, -self._fold(lam0, p["A0"], p["B0"], columns)], dim=-2)  # [2r, in]
        fixed = self.start == "subtract" and not any(p[name].requires_grad for name in ("lam0", "A0", "B0"))
        constant = self.r if fixed else 0  # a start that is a copy is scaled by what trains
        return LowRank(up if columns is not None else p["c"][..., None] * up, down, constant)

    def _fold(self, lam: Tensor, A: Tensor, B: Tensor, c: Tensor | None) -> Tensor:
        """(lam / r) Xi A diag(c), shape [r, in]: all scales go into the small factor, so the layer runs like LoRA."""
        shortest = PEFT_CLAMP if self.start == "zero" else TINY
        slack = self.softness**2 * B.shape[-2] if self.start == "soft" else 0.0
        if traced():
            return folded(lam, A, B, c, shortest, slack)[0]
        return _Fold.apply(lam, A, B, c, shortest, slack)

    def bound(self, p: dict[str, Tensor]) -> Tensor:
        """An upper bound [1] of |W' - W|_F for the current lam; it holds for any values of A and B.

        lam max(c) for "paired", "soft" and "zero", (lam + lam0) max(c) for "subtract", 2 lam max(c) for "copy".
        """
        lam = p["lam"].abs()
        lam = lam + {"subtract": p.get("lam0", lam), "copy": lam}.get(self.start, torch.zeros_like(lam))
        return lam * p["c"].max()

    def reachable(self, p: dict[str, Tensor]) -> Tensor:
        """|W' - W|_F [1] if all terms are orthogonal, those of the start included, and independent of the column norms of W.

        rms(c) lam / sqrt(r), for "subtract" rms(c) sqrt((lam^2 + lam0^2) / r), for "copy" rms(c) lam sqrt(2 / r).
        """
        lam = p["lam"].abs()
        other = {"subtract": p.get("lam0", lam), "copy": lam}.get(self.start, torch.zeros_like(lam))
        rms: Tensor = p["c"].square().mean().sqrt()
        return rms * torch.hypot(lam, other) / self.r**0.5


def folded(
    lam: Tensor, A: Tensor, B: Tensor, c: Tensor | None, shortest: float, slack: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The rows lam / (r |a_i| sqrt(|b_i|^2 + slack)) a_i * c, shape [r, in]; their factors without lam, |a_i| and |b_i|.

    Each of the last three has shape [r]; the last contains the slack. Lengths count as at least ``shortest``.

    >>> lam, A, B = torch.tensor([6.0]), torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0], [0.0]])
    >>> down, scale, a, b = folded(lam, A, B, c=None, shortest=1e-12, slack=0.0)
    >>> down, a, b
    (tensor([[3.6000, 4.8000]]), tensor([5.]), tensor([1.]))
    """
    a = torch.linalg.vector_norm(A, dim=-1).clamp_min(shortest)
    b = torch.linalg.vector_norm(B, dim=-2)
    b = (b.square() + slack).sqrt() if slack else b.clamp_min(shortest)
    # Two divisions, because the product |a| |b| overflows long before either factor.
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
        along = (grad * A).sum(dim=-1) * scale  # [r], the gradient of each term's strength
        pull = lam * along
        # The length of a clamped vector is constant: it has no gradient.
        pull_a = torch.where(a > ctx.shortest, pull / a / a, 0)
        pull_b = pull / b / b if ctx.soft else torch.where(b > ctx.shortest, pull / b / b, 0)
        grad_A = torch.addcmul(-(pull_a[..., None] * A), (lam * scale)[..., None], grad)
        return along.sum(dim=-1, keepdim=True), grad_A, -pull_b[..., None, :] * B, None, None, None
