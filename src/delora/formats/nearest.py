"""The factors that an export writes: of a bounded rank, in a narrower dtype; and what each layer loses by that."""

from __future__ import annotations

import json
import warnings

import torch
from torch import Tensor

from delora.methods.base import require_count
from delora.updates import LowRank

__all__ = ["HEADER", "Approximation"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HEADER = "delora.approximation"  # the key in a file's header


class Approximation:
    """Low-rank changes as an export writes them: as they are, or the nearest ones of a rank, in a dtype.

    The nearest change of a rank has the largest singular values (Eckart & Young 1936); they are computed from the factors.
    What is written is then ``up = U sqrt(S)`` and ``down = sqrt(S) V'``, whose terms are orthogonal: a dtype rounds the change
    by at most its own precision, also where the two halves of a residual start nearly cancel.

    ``errors`` holds |written - change|_F / |change|_F for every layer whose factors are not written as they are.

    Args:
        rank: the highest rank to write; None for each layer's own.
        dtype: the dtype to write, float32, float16 or bfloat16; None for the factors' own.

    Raises:
        ValueError: there is no such rank, or files hold no such dtype.

    >>> nearest = Approximation(rank=1)
    >>> nearest.of("q", LowRank(torch.eye(2), torch.diag(torch.tensor([4.0, 3.0])))).down.round(decimals=4)
    tensor([[2., 0.]])
    >>> {layer: round(error, 4) for layer, error in nearest.errors.items()}  # 3 / 5
    {'q': 0.6}
    """

    def __init__(self, rank: int | None = None, dtype: torch.dtype | None = None) -> None:
        if rank is not None:
            require_count("rank", rank, "the rank of an export")
        if dtype is not None and dtype not in DTYPES:
            known = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
            raise ValueError(f"dtype = {dtype}: an export is written in {known}, or with None in the adapter's own")
        self.rank, self.dtype = rank, dtype
        self.errors: dict[str, float] = {}
        self._count = 0
        self._lossy: list[str] = []  # layers that lose more than rounding

    @torch.no_grad()
    def of(self, layer: str, factors: LowRank) -> LowRank:
        """The factors to write for a layer, not yet `cast`."""
        self._count += 1
        k = factors.down.shape[-2]
        rank = k if self.rank is None else min(self.rank, k)
        if rank == k and self.cast(factors.down).dtype == factors.down.dtype:
            return factors
        if not (torch.isfinite(factors.up).all() and torch.isfinite(factors.down).all()):
            raise ValueError(f"{layer} holds NaN or infinity: nothing was written")
        U, s, V = factors.svd()
        root = s[:rank].sqrt()
        new = LowRank((U[:, :rank] * root).to(factors.up), (root[:, None] * V[:rank]).to(factors.down))
        up, down = (self.cast(t).cpu().double() for t in (new.up, new.down))
        lost = torch.linalg.vector_norm(LowRank(torch.cat([up, -U * s], 1), torch.cat([down, V])).svd()[1]).item()
        size = torch.linalg.vector_norm(s).item()
        # Of a change that nearly cancels, the factors themselves know no more than their own rounding.
        terms = torch.linalg.vector_norm(factors.up.norm(dim=0) * factors.down.norm(dim=1)).item()
        rounding = torch.finfo(down.dtype if self.dtype is None else self.dtype).eps * size
        rounding += torch.finfo(factors.down.dtype).eps * terms
        self.errors[layer] = lost / size if size else 0.0
        if lost > 2 * rounding:
            self._lossy.append(layer)
        return new

    def cast(self, t: Tensor) -> Tensor:
        """A tensor in the dtype to write."""
        return t.to(self.dtype) if self.dtype is not None and t.is_floating_point() else t

    def header(self) -> dict[str, str]:
        """What a file says of itself, as JSON: rank, dtype and errors; nothing if all factors are written as they are."""
        if not self.errors:
            return {}
        dtype = None if self.dtype is None else str(self.dtype).removeprefix("torch.")
        errors = {layer: float(f"{error:.3g}") for layer, error in self.errors.items()}
        return {HEADER: json.dumps({"rank": self.rank, "dtype": dtype, "errors": errors})}

    def tell(self, stacklevel: int) -> None:
        """One warning, if any layer loses more than rounding."""
        if not self._lossy:
            return
        worst = max(self._lossy, key=self.errors.__getitem__)
        mean = sum(self.errors[layer] for layer in self._lossy) / len(self._lossy)
        asked = [f"{key} = {value}" for key, value in (("rank", self.rank), ("dtype", self.dtype)) if value is not None]
        warnings.warn(
            f"{', '.join(asked)}: of {len(self._lossy)} of {self._count} layers the nearest change of this form is written: "
            f"|error| / |change| is {mean:.2g} on average and {self.errors[worst]:.2g} at most ({worst}); the file's header "
            f"has that of each layer ({HEADER})",
            stacklevel=stacklevel + 1,
        )
