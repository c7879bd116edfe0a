"""DPO from a base and its adapter alone: the reference is `delora.reference`, which shares the base's memory.

The loss of Rafailov et al. 2023 (arXiv:2305.18290, Eq. 7) in a plain loop, on a small random model; TRL's DPOTrainer takes the
same reference as ``ref_model=delora.reference(model)``. Run it: ``python examples/preferences.py``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import delora

BETA = 0.1


def log_likelihood(model: nn.Module, tokens: Tensor) -> Tensor:  # [batch, length] -> [batch]
    logits = model(tokens[:, :-1]).logits
    return logits.log_softmax(-1).gather(2, tokens[:, 1:, None]).sum((1, 2))


def main() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}
    model = LlamaForCausalLM(LlamaConfig(**sizes))
    delora.inject(model, delora.DeLoRA(r=4), ["q_proj", "v_proj"])
    print(delora.summary(model))
    reference = delora.reference(model)  # the model as it is now; a continued adapter is in it
    both = [*model.parameters(), *reference.parameters()]
    memory = sum({p.data_ptr(): p.nbytes for p in both}.values()) / sum(p.nbytes for p in model.parameters())
    print(f"memory of both models: {memory:.2f} of one")

    chosen, rejected = torch.randint(0, 25, (8, 12)), torch.randint(25, 50, (8, 12))
    optimizer = torch.optim.AdamW(delora.param_groups(model, lr=1e-2))
    for step in range(20):
        with torch.no_grad():
            before = log_likelihood(reference, chosen) - log_likelihood(reference, rejected)
        margin = log_likelihood(model, chosen) - log_likelihood(model, rejected) - before
        loss = -nn.functional.logsigmoid(BETA * margin).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 0:
            assert abs(loss.item() - math.log(2)) < 1e-6, "at the start model and reference agree"
    print(f"loss {math.log(2):.3f} -> {loss.item():.3f}, margin {margin.mean().item():.2f}")
    assert loss.item() < math.log(2)


if __name__ == "__main__":
    main()
