"""A quantised layer of your own: tell its rows and how it is quantised anew, and every method trains beside it.

Here a weight is kept in int8, with one scale for each row. Run it: ``python examples/own_quantised.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import delora


class RowwiseInt8(nn.Module):
    """y = (diag(scale) codes) x + b, for codes [out, in] in int8."""

    def __init__(self, W: Tensor, b: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = W.shape
        self.register_buffer("scale", W.abs().amax(1, keepdim=True).clamp_min(1e-9) / 127)
        self.register_buffer("codes", (W / self.scale).round().to(torch.int8))
        self.register_buffer("bias", b)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.codes * self.scale.to(x.dtype), self.bias)


class RowwiseInt8Host(delora.hosts.Quantised):
    def rows(self, start: int, stop: int) -> Tensor:
        return self.layer.codes[start:stop] * self.layer.scale[start:stop]

    def requantised(self, W: Tensor, b: Tensor | None) -> nn.Module:
        return RowwiseInt8(W.to(self.dtype), b)


delora.host.register(RowwiseInt8, RowwiseInt8Host)


def main() -> None:
    torch.manual_seed(0)
    dense = nn.Linear(32, 32)
    model = nn.Sequential(RowwiseInt8(dense.weight.detach(), dense.bias.detach()), nn.Tanh(), nn.Linear(32, 3))
    x = torch.randn(256, 32)
    labels = x[:, :3].argmax(dim=1)

    delora.inject(model, delora.DeLoRA(r=4, lam=2.0), targets="all-linear", exclude=["2"], also_train=["2"])
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
    with delora.merged(model, requantise=True):
        assert type(model[0]) is RowwiseInt8
        print(f"quantised anew: off by {(model(x) - before).abs().max().item():.3f}")
    delora.merge(model)
    assert type(model[0]) is nn.Linear
    assert torch.allclose(model(x), before, atol=1e-5)
    print("merged: a dense layer, the same model")


if __name__ == "__main__":
    main()
