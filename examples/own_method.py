"""A method of your own: one frozen dataclass with two functions. It is registered nowhere.

VeRA (Kopiczko et al. 2024, arXiv:2310.11454) keeps two random matrices and learns only how much of each row and column
counts, r + out numbers a layer. Run it: ``python examples/own_method.py``.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import delora
from delora.methods.base import kaiming, require_rank
from delora.updates import LowRank


@dataclass(frozen=True)
class VeRA:
    """W' = W + diag(b) B diag(d) A,  A and B random and frozen."""

    r: int = 16
    d0: float = 0.1

    def __post_init__(self) -> None:
        require_rank(self.r)

    def init(self, W: Tensor) -> dict[str, Tensor]:  # W [out, in]
        out, inp = W.shape
        return {
            "A": kaiming(self.r, inp, W),  # a plain tensor is kept and saved
            "B": kaiming(out, self.r, W),
            "d": nn.Parameter(W.new_full((self.r,), self.d0)),  # a Parameter trains
            "b": nn.Parameter(W.new_zeros(out)),  # zero, so that training starts at the base model
        }

    def update(self, W: Tensor | None, p: dict[str, Tensor]) -> LowRank:
        return LowRank(up=p["b"][:, None] * p["B"], down=p["d"][:, None] * p["A"])


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32))
    x = torch.randn(256, 32)
    wished = torch.roll(x, 1, dims=1)
    base = {key: t.clone() for key, t in model.state_dict().items()}

    delora.inject(model, VeRA(), targets="all-linear")
    print(delora.summary(model))
    optimizer = torch.optim.AdamW(delora.param_groups(model, lr=2e-2))
    for step in range(201):
        loss = (model(x) - wished).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            print(f"step {step:3}  loss {loss.item():.3f}")

    with tempfile.TemporaryDirectory() as folder:
        delora.save(model, folder)
        fresh = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32))
        fresh.load_state_dict(base)
        delora.load(fresh, folder, methods=[VeRA])  # a reader has to know the class
    assert torch.equal(fresh(x), model(x))
    assert torch.allclose(delora.merge(fresh)(x), model(x), atol=1e-5)
    print("saved, loaded and merged: the same model")


if __name__ == "__main__":
    main()
