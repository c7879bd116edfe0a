"""(IA)^3: scales the output or the input of a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from delora.frozen import Frozen, takes_frozen
from delora.methods.base import require_flags
from delora.updates import Affine, Diagonal, TwoSided, Update

__all__ = ["IA3"]


@dataclass(frozen=True)
class IA3:
    """y' = l * y, or W' = W diag(l)                                Liu et al. 2022, arXiv:2205.05638, Sec. 3.3

    ``l`` starts at one. The paper scales keys and values (``side="output"`` of those layers, bias included) and the hidden
    features of the feed-forward block (``side="input"`` of its second layer):
    ``inject(model, IA3(), ["key", "value", "intermediate_out"], overrides={"intermediate_out": {"side": "input"}})``.

    Args:
        side: what is scaled: the layer's "output" or its "input".

    Example:
        >>> import delora
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 4))
        >>> model = delora.inject(model, IA3(), ["0", "1"], overrides={"1": {"side": "input"}})
        >>> [layer.adapter.l.shape for layer in model]
        [torch.Size([3]), torch.Size([3])]
    """

    side: Literal["output", "input"] = "output"

    has_dropout = False

    def __post_init__(self) -> None:
        require_flags(self)

    @property
    def edits_output(self) -> bool:
        return self.side == "output"

    @takes_frozen
    def init(self, W: Frozen) -> dict[str, Tensor]:
        return {"l": nn.Parameter(W.new_ones(W.shape[0 if self.side == "output" else 1]))}

    def update(self, W: Tensor | None, p: dict[str, Tensor]) -> Update:
        return Affine(scale=p["l"]) if self.side == "output" else TwoSided(right=Diagonal(p["l"]))
