"""The paper's equations as slow loops in float64. Imports nothing of the library."""

from __future__ import annotations

import torch
from torch import Tensor


def norms(W: Tensor, kind: str) -> Tensor:
    """c as a matrix [out, in] by which every entry of the update is multiplied."""
    c = torch.ones_like(W)
    for i in range(W.shape[0]):
        for j in range(W.shape[1]):
            if kind == "columns":
                c[i, j] = sum(W[k, j] ** 2 for k in range(W.shape[0])) ** 0.5
            elif kind == "rows":
                c[i, j] = sum(W[i, k] ** 2 for k in range(W.shape[1])) ** 0.5
            elif kind == "matrix":
                c[i, j] = sum(w**2 for w in W.flatten()) ** 0.5
    return c


def term(a: Tensor, b: Tensor, start: str, softness: float) -> Tensor:
    """One rank-one term b a' of norm one (or under one, for the starts that have B = 0)."""
    length_a, length_b = a.square().sum().sqrt(), b.square().sum().sqrt()
    if start == "soft":
        length_b = (length_b**2 + softness**2 * len(b)).sqrt()
    if start == "zero":
        length_a, length_b = torch.clamp(length_a, min=1e-4), torch.clamp(length_b, min=1e-4)
    return torch.outer(b, a) / (length_a * length_b)


def delora(W: Tensor, p: dict[str, Tensor], norm: str, start: str, softness: float) -> Tensor:
    """W' by Eq. 8 and 9, one rank-one term after the other."""
    r = len(p["A"])
    change = torch.zeros_like(W)
    for i in range(r):
        change = change + p["lam"] / r * term(p["A"][i], p["B"][:, i], start, softness)
        if start in ("subtract", "copy"):
            lam0 = p["lam0"] if start == "subtract" else p["lam"]
            change = change - lam0 / r * term(p["A0"][i], p["B0"][:, i], start, softness)
    return W + change * norms(W.detach(), norm)


def lora(W: Tensor, p: dict[str, Tensor], scale: float) -> Tensor:
    """W' of LoRA's Eq. 3, one rank-one term after the other."""
    new = W
    for i in range(len(p["A"])):
        new = new + scale * torch.outer(p["B"][:, i], p["A"][i])
    return new


def authors_delora(W: Tensor, p: dict[str, Tensor]) -> Tensor:
    """W' as the authors' code computes it: S = lam / r / (|a_i| |b_i|) of both pairs with the live lam, column norms."""
    r = len(p["A"])
    S = torch.diag(p["lam"] / r / (p["A"].norm(dim=1) * p["B"].norm(dim=0)))
    S0 = torch.diag(p["lam"] / r / (p["A0"].norm(dim=1) * p["B0"].norm(dim=0)))
    return W + (p["B"] @ S @ p["A"] - p["B0"] @ S0 @ p["A0"]) * W.norm(dim=0)[None, :]
