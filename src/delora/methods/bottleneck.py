"""Bottleneck adapters: a small network with a residual connection after a layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from delora.frozen import Frozen, takes_frozen
from delora.methods.base import require_count, require_flags, require_positive
from delora.updates import Edited

__all__ = ["Bottleneck"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu, "tanh": F.tanh}


@dataclass(frozen=True)
class Bottleneck:
    """h' = h + U s(D h + b) + c                                    Houlsby et al. 2019, arXiv:1902.00751, Sec. 2.1

    ``D [size, d]`` and ``U [d, size]`` are matrices, b and c biases, s the activation. Houlsby et al. put one adapter after
    the output layer of the attention and one after that of the feed-forward block, before residual and norm; Pfeiffer et
    al. 2021 (arXiv:2005.00247) only the second. It is not linear and cannot be merged.

    Args:
        size: width of the bottleneck, at least 1.
        activation: s.
        start: "near-zero", D and U normal with standard deviation ``std``, truncated at two of them (Houlsby); or "zero",
            U = 0, the base model exactly.
        std: the standard deviation at the start.

    Example:
        >>> import delora
        >>> model = delora.inject(nn.Sequential(nn.Linear(4, 6)), Bottleneck(size=2), ["0"])
        >>> {name: list(t.shape) for name, t in model[0].adapter.tensors().items()}
        {'D': [2, 6], 'U': [6, 2], 'b': [2], 'c': [6]}
    """

    size: int = 16
    activation: Literal["gelu", "relu", "silu", "tanh"] = "gelu"
    start: Literal["near-zero", "zero"] = "near-zero"
    std: float = 0.01

    edits_output = True
    has_dropout = False

    def __post_init__(self) -> None:
        require_count("size", self.size)
        require_flags(self)
        require_positive("std", self.std)

    @property
    def starts_at_base(self) -> bool:
        return self.start == "zero"

    @takes_frozen
    def init(self, W: Frozen) -> dict[str, Tensor]:
        d = len(W)
        D, U = W.new_empty(self.size, d), W.new_zeros(d, self.size)
        for matrix in (D, U) if self.start == "near-zero" else (D,):
            nn.init.trunc_normal_(matrix, std=self.std, a=-2 * self.std, b=2 * self.std)
        start = {"D": D, "U": U, "b": W.new_zeros(self.size), "c": W.new_zeros(d)}
        return {key: nn.Parameter(tensor) for key, tensor in start.items()}

    def update(self, W: Tensor | None, p: dict[str, Tensor]) -> Edited:
        def edit(h: Tensor, dropout: float) -> Tensor:
            D, b, U, c = (p[key].to(h.dtype) for key in ("D", "b", "U", "c"))
            return h + F.linear(ACTIVATIONS[self.activation](F.linear(h, D, b)), U, c)

        return Edited(edit)
