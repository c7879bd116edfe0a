"""RED: scales and shifts the output of a module."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from delora.frozen import Frozen, takes_frozen
from delora.updates import Affine

__all__ = ["RED"]


@dataclass(frozen=True)
class RED:
    """y' = l * y + d                                               Wu et al. 2024, arXiv:2402.15179

    Representation editing: ``l [out]`` starts at one, ``d [out]`` at zero. The target is the last linear layer of the
    feed-forward block (before residual and norm), the norm, or the module that holds both; the first two can be merged.

    Example:
        >>> import delora
        >>> model = delora.inject(nn.Sequential(nn.Linear(4, 3)), RED(), ["0"])
        >>> sum(p.numel() for p in model.parameters() if p.requires_grad)
        6
    """

    edits_output = True
    has_dropout = False

    @takes_frozen
    def init(self, W: Frozen) -> dict[str, Tensor]:
        return {"l": nn.Parameter(W.new_ones(len(W))), "d": nn.Parameter(W.new_zeros(len(W)))}

    def update(self, W: Tensor | None, p: dict[str, Tensor]) -> Affine:
        return Affine(p["l"], p["d"])
