"""accelerate: inject first, then prepare. ``accelerate launch examples/with_accelerate.py`` runs it on what there is.

``save_state`` holds the whole model; `delora.save` of the unwrapped one, the adapter alone. Run it alone:
``python examples/with_accelerate.py``.
"""

from __future__ import annotations

import tempfile

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import delora


def main() -> None:
    torch.manual_seed(0)
    accelerator = Accelerator()
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))
    base = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))
    base.load_state_dict(model.state_dict())
    delora.inject(model, delora.DeLoRA(r=4), ["0"], also_train=["2"])  # a model that is wrapped for processes takes none
    accelerator.print(delora.summary(model))
    optimizer = torch.optim.AdamW(delora.param_groups(model, lr=1e-2))
    x = torch.randn(64, 16)
    loader = DataLoader(TensorDataset(x, x[:, :4].argmax(1)), batch_size=8)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for _ in range(5):
        for inputs, labels in loader:
            loss = nn.functional.cross_entropy(model(inputs), labels)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    accelerator.print(f"loss {loss.item():.3f}")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        trained = accelerator.unwrap_model(model)
        with tempfile.TemporaryDirectory() as folder:
            again = delora.load(base, delora.save(trained, folder))
        torch.testing.assert_close(again(x), trained(x.to(accelerator.device)).cpu())


if __name__ == "__main__":
    main()
