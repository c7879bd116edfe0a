"""A layer of your own: tell how its weight is a matrix, and every method adapts it.

Attention in some libraries keeps one projection for each head in a single tensor [heads, in, size], which no tool that
looks for ``nn.Linear`` finds. Run it: ``python examples/own_layer.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import delora


class HeadwiseLinear(nn.Module):
    """y_h = x W_h + b_h for every head h, put side by side: [..., in] to [..., heads * size]."""

    def __init__(self, inp: int, heads: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(heads, inp, size) / inp**0.5)
        self.bias = nn.Parameter(torch.zeros(heads * size))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...i,his->...hs", x, self.weight).flatten(-2) + self.bias


class HeadwiseHost(delora.hosts.Linear):
    """How x is projected and how a change is added is `nn.Linear`'s; only the weight is laid out differently."""

    def matrix(self) -> Tensor:
        return self.layer.weight.mT.flatten(0, 1)  # [heads * size, in]

    def as_weight(self, W: Tensor) -> Tensor:
        return W.unflatten(0, (len(self.layer.weight), -1)).mT  # [heads, in, size]


delora.host.register(HeadwiseLinear, HeadwiseHost)


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(HeadwiseLinear(32, heads=4, size=8), nn.Tanh(), nn.Linear(32, 3))
    x = torch.randn(256, 32)
    labels = x[:, :3].argmax(dim=1)

    delora.inject(model, delora.DeLoRA(r=4, lam=2.0), targets="all-linear", also_train=["2"])
    print(delora.summary(model))
    optimizer = torch.optim.AdamW(delora.param_groups(model, lr=1e-2))
    for step in range(101):
        loss = nn.functional.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step:3}  loss {loss.item():.3f}  |dW|/|W| {delora.distances(model)['0']:.3f}")

    before = model(x)
    delora.merge(model)
    assert type(model[0]) is HeadwiseLinear
    assert torch.allclose(model(x), before, atol=1e-5)
    print("merged: the same model, with no trace of delora")


if __name__ == "__main__":
    main()
