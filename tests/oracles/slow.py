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


def matrix(rows: list[list[Tensor]]) -> Tensor:
    return torch.stack([torch.stack(row) for row in rows])


def dora(W: Tensor, p: dict[str, Tensor], scale: float) -> Tensor:
    """W' of DoRA's Eq. 5, entry by entry; the norm is a constant in the gradient (Sec. 4.3)."""
    V = lora(W, p, scale)
    rows = []
    for i in range(len(W)):
        norm = sum(v**2 for v in V[i]) ** 0.5
        m = p["m"][i] if "m" in p else sum(w**2 for w in W[i]) ** 0.5
        rows.append([m * v / norm.detach() for v in V[i]])
    return matrix(rows)


def in_blocks(blocks: list[Tensor]) -> Tensor:
    """A dense block-diagonal matrix."""
    size = sum(len(b) for b in blocks)
    whole, at = torch.zeros(size, size, dtype=blocks[0].dtype), 0
    for b in blocks:
        whole = whole + torch.nn.functional.pad(b, (at, size - at - len(b), at, size - at - len(b)))
        at += len(b)
    return whole


def projector(u: Tensor) -> Tensor:
    return torch.outer(u, u) / (u @ u)


def ether_matrix(u: Tensor, v: Tensor | None = None) -> Tensor:
    """H of ETHER (v is None) or H+ of ETHER+, dense; u and v [blocks, size]."""
    blocks = []
    for k in range(len(u)):
        eye = torch.eye(u.shape[1], dtype=u.dtype)
        blocks.append(eye - 2 * projector(u[k]) if v is None else eye - projector(u[k]) + projector(v[k]))
    return in_blocks(blocks)


def ether_released(W: Tensor, H: list[Tensor]) -> Tensor:
    """W' as ETHER's released code multiplies the input side: groups of rows, each with one block for all its columns."""
    n, (out, inp) = len(H), W.shape
    return torch.einsum("rfm,rmn->rfn", W.reshape(n, out, inp // n), torch.stack(H)).reshape(out, inp)


def reflections(W: Tensor, p: dict[str, Tensor]) -> Tensor:
    """W' of rungs E1 and E2: (lam / r) W (V T V' - U S U'), r vectors in all."""
    r = 2 * len(p["U"])
    new = W
    for u, v in zip(p["U"], p["V"], strict=True):
        new = new + p["lam"] / r * W @ (projector(v) - projector(u))
    return new


def relaxed(W: Tensor, p: dict[str, Tensor]) -> Tensor:
    """W' of rung E3: -(lam / r) W (B X A - D Y C)'."""
    r = 2 * len(p["A"])
    new = W
    for i in range(r // 2):
        one, other = term(p["A"][i], p["B"][:, i], "", 0.0), term(p["C"][i], p["D"][:, i], "", 0.0)
        new = new - p["lam"] / r * W @ (one - other).T
    return new


def oft(W: Tensor, free: Tensor, size: int, radius: float | None) -> Tensor:
    """W' = W R' with R of (I - Q)(I + Q)^-1 in every block; ``free [blocks, size (size - 1) / 2]`` above the diagonal."""
    blocks = []
    for k in range(len(free)):
        entries, rows = iter(free[k]), [[free.new_zeros(()) for _ in range(size)] for _ in range(size)]
        for i in range(size):
            for j in range(i + 1, size):
                rows[i][j] = next(entries)
                rows[j][i] = -rows[i][j]
        Q = matrix(rows)
        length = sum(q**2 for q in Q.flatten()) ** 0.5
        if radius is not None and length > radius:
            Q = Q * radius / length
        eye = torch.eye(size, dtype=W.dtype)
        blocks.append((eye - Q) @ torch.linalg.inv(eye + Q))
    return W @ in_blocks(blocks).T


def hra(W: Tensor, U: Tensor, orthogonal: bool) -> Tensor:
    """W' = W H_1 H_2 ... H_r, one dense reflection after the other; ``U [r, in]``, made orthogonal first or not."""
    for u in orthonormal_rows(U) if orthogonal else U:
        W = W @ (torch.eye(len(u), dtype=W.dtype) - 2 * projector(u))
    return W


def cayley(G: Tensor) -> Tensor:
    """A matrix with orthonormal columns for any G = [X; Y] [n, r]: [(I - Z) M; -2 Y M], Z = X - X' + Y'Y, M = (I + Z)^-1."""
    r = G.shape[1]
    Z = [[G[i, j] - G[j, i] + sum(y[i] * y[j] for y in G[r:]) for j in range(r)] for i in range(r)]
    eye = torch.eye(r, dtype=G.dtype)
    M = torch.linalg.inv(eye + matrix(Z))
    return torch.stack([(eye[i] - torch.stack(Z[i])) @ M if i < r else -2 * G[i] @ M for i in range(len(G))])


def nblora(W: Tensor, p: dict[str, Tensor]) -> Tensor:
    """W' = W + 2 sigma Q_B Q_A', one rank-one term after the other."""
    r, inp = p["A"].shape
    Q = cayley(torch.cat([p["A"].T, p["B"]]))
    new = W
    for k in range(r):
        new = new + 2 * p["sigma"] * torch.outer(Q[inp:, k], Q[:inp, k])
    return new


def orthonormal_rows(R: Tensor) -> Tensor:
    """Gram and Schmidt, row by row."""
    rows: list[Tensor] = []
    for v in R:
        for q in rows:
            v = v - (q @ v) * q
        rows.append(v / (v @ v) ** 0.5)
    return torch.stack(rows)


def loreft(h: Tensor, p: dict[str, Tensor]) -> Tensor:
    """h + R'(W h + b - R h) for one vector h."""
    R = orthonormal_rows(p["R"])
    new = h
    for i in range(len(R)):
        new = new + R[i] * (p["W"][i] @ h + p["b"][i] - R[i] @ h)
    return new


def bottleneck(h: Tensor, p: dict[str, Tensor]) -> Tensor:
    """h + U gelu(D h + b) + c for one vector h."""
    new = h + p["c"]
    for i in range(len(p["D"])):
        a = p["D"][i] @ h + p["b"][i]
        new = new + p["U"][:, i] * a * (1 + torch.erf(a / 2**0.5)) / 2
    return new
