"""BitFit: trains biases alone."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from delora.frozen import Frozen, takes_frozen
from delora.updates import Affine

__all__ = ["BitFit"]


@dataclass(frozen=True)
class BitFit:
    """b' = b + d                                      Ben Zaken et al. 2022, arXiv:2106.10199

    ``d [out]`` starts at zero; to train it is to train the bias. A layer without a bias gets one, also when merged. The
    targets are the linear layers and the norms.

    Example:
        >>> import delora
        >>> model = delora.inject(nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)), BitFit(), ["0", "1"])
        >>> [layer.adapter.d.shape for layer in model]
        [torch.Size([3]), torch.Size([3])]
    """

    edits_output = True
    has_dropout = False

    @takes_frozen
    def init(self, W: Frozen) -> dict[str, Tensor]:
        return {"d": nn.Parameter(W.new_zeros(len(W)))}

    def update(self, W: Tensor | None, p: dict[str, Tensor]) -> Affine:
        return Affine(shift=p["d"])
