"""Two numbers by which a file knows the weights that an adapter was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["fingerprint", "same_base"]


def fingerprint(W: Tensor) -> tuple[float, float]:
    """|W|_F and p' W q with p_i = cos(i), q_j = sin(j): two numbers that another dtype changes only by its rounding.

    Other signs or another order of the entries change the second, but not the first.

    >>> norm, probe = fingerprint(torch.eye(2))
    >>> round(norm, 4), round(probe, 4)  # probe: cos 1 sin 1 + cos 2 sin 2
    (1.4142, 0.0762)
    """
    i, j = (torch.arange(1, n + 1, dtype=torch.float64) for n in W.shape)
    p, q = torch.cos(i).to(W.device, W.dtype), torch.sin(j).to(W.device, W.dtype)
    return torch.linalg.vector_norm(W).item(), (p @ (W @ q)).item()


def same_base(saved: Mapping[str, Any], W: Tensor, dtype: str) -> bool:
    """Whether W agrees with a saved fingerprint to within rounding.

    Rounding to a coarser dtype changes |W| by at most eps |W|, and p' W q by about eps |W|. The second may differ by eight
    times that, since rounding errors are not independent.

    >>> norm, probe = fingerprint(torch.eye(2))
    >>> same_base({"dtype": "float32", "norm": norm, "probe": probe}, torch.eye(2), "float32")
    True
    """
    eps = max(torch.finfo(getattr(torch, name)).eps for name in (saved["dtype"], dtype)) if saved["dtype"] != dtype else 1e-5
    norm, probe = fingerprint(W)
    return abs(norm - saved["norm"]) <= eps * norm and abs(probe - saved["probe"]) <= 8 * eps * norm
