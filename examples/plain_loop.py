"""A plain loop with a learning-rate schedule, checkpoints of the adapter alone, and exact resume.

Run it: ``python examples/plain_loop.py``.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

import delora


def fresh() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 4))
    return delora.inject(model, delora.DeLoRA(r=4), ["0", "2"], dropout=0.1, also_train=["4"])


def train(model: nn.Module, steps: int, folder: Path, resume: Path | None = None) -> list[Tensor]:
    optimizer = torch.optim.AdamW(delora.param_groups(model, lr=1e-2, weight_decay=0.01))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    generator, first = torch.Generator().manual_seed(1), 0
    if resume is not None:
        delora.load(model, resume)  # into the adapter that is there, whose tensors the optimizer has
        state = torch.load(resume / "state.pt")
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        generator.set_state(state["data"])
        torch.set_rng_state(state["random"])
        first = state["step"]
    for step in range(first, steps):
        x = torch.randn(8, 16, generator=generator)
        nn.functional.cross_entropy(model(x), x[:, :4].argmax(1)).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step + 1 == 10:
            checkpoint = delora.save(model, folder / "step-10")
            state = {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(), "step": step + 1}
            torch.save(state | {"data": generator.get_state(), "random": torch.get_rng_state()}, checkpoint / "state.pt")
    return [p.detach() for p in model.parameters()]


def main() -> None:
    print(delora.summary(fresh()))
    with tempfile.TemporaryDirectory() as name:
        whole = train(fresh(), 20, Path(name))
        again = train(fresh(), 20, Path(name), resume=Path(name) / "step-10")
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    print("resumed to the same numbers")


if __name__ == "__main__":
    main()
