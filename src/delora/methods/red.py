from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from delora.updates import Affine


@dataclass(frozen=True)
class RED:
    """y' = l * y + d                                               Wu et al. 2024, arXiv:2402.15179

    Representation editing: ``l [out]`` starts at one, ``d [out]`` at zero. The target is the feed-forward block's last
    linear layer (before residual and norm), the norm, or the module that holds both; the first two can be merged.
    """

    edits_output = True
    has_dropout = False

    def init(self, W: Tensor) -> dict[str, Tensor]:
        return {"l": nn.Parameter(W.new_ones(len(W))), "d": nn.Parameter(W.new_zeros(len(W)))}

    def update(self, W: Tensor | None, p: dict[str, Tensor]) -> Affine:
        return Affine(p["l"], p["d"])
