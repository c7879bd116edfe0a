from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from delora.updates import Affine


@dataclass(frozen=True)
class BitFit:
    """b' = b + d                                      Ben Zaken et al. 2022, arXiv:2106.10199

    ``d [out]`` starts at zero: training it is training the bias. A layer without a bias gets one; merged, it has one. The
    targets are the linear layers and the norms.
    """

    edits_output = True
    has_dropout = False

    def init(self, W: Tensor) -> dict[str, Tensor]:
        return {"d": nn.Parameter(W.new_zeros(len(W)))}

    def update(self, W: Tensor | None, p: dict[str, Tensor]) -> Affine:
        return Affine(shift=p["d"])
