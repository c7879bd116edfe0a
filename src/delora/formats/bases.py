"""How a file knows the weights that an adapter was trained on: by the two numbers of `delora.frozen.Frozen.fingerprint`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from delora.frozen import Frozen
from delora.hosts import LayerSlice, Quantised

__all__ = ["entry", "is_same", "name_of"]


def name_of(dtype: torch.dtype) -> str:
    """The name of a dtype in files.

    >>> name_of(torch.bfloat16)
    'bfloat16'
    """
    return str(dtype).removeprefix("torch.")


def entry(W: Frozen) -> dict[str, Any]:
    """What a file says of a weight; of a quantised one also its kind, because dequantised it can be as near as a rounded copy.

    >>> entry(Frozen(torch.zeros(2, 2)))
    {'dtype': 'float32', 'norm': 0.0, 'probe': 0.0}
    """
    norm, probe = W.fingerprint()
    matrix = W.matrix.of if isinstance(W.matrix, LayerSlice) else W.matrix
    kind = {"kind": matrix.kind} if isinstance(matrix, Quantised) else {}
    return {"dtype": name_of(W.dtype), "norm": norm, "probe": probe, **kind}


def is_same(saved: Mapping[str, Any], W: Frozen) -> bool:
    """Whether W agrees with what a file says of a weight, to within rounding.

    Rounding to a coarser dtype changes |W| by at most eps |W|, and p' W q by about eps |W|. The second may differ by eight
    times that, since rounding errors are not independent.

    >>> W = torch.eye(2)
    >>> is_same(entry(Frozen(W)), Frozen(W.bfloat16())), is_same(entry(Frozen(W)), Frozen(-W))
    (True, False)
    """
    here = entry(W)
    if saved.get("kind") != here.get("kind"):
        return False
    dtypes = (saved["dtype"], here["dtype"])
    eps = max(torch.finfo(getattr(torch, name)).eps for name in dtypes) if dtypes[0] != dtypes[1] else 1e-5
    near = abs(here["norm"] - saved["norm"]) <= eps * here["norm"]
    return near and abs(here["probe"] - saved["probe"]) <= 8 * eps * here["norm"]
