"""One training step (forward, backward, AdamW), side by side with PEFT: `make bench`.

The contenders take turns, A B C A B C ..., in one process; what is shown is the median over the rounds of each one's time
divided by PEFT LoRA's in the same round. Writes `runs/bench/step.csv`.
"""

from __future__ import annotations

import argparse
import copy
import csv
import datetime
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import peft
import torch
import transformers
from transformers import BertConfig, BertModel

import delora
from delora import DeLoRA, LoRA

TARGETS = ["query", "value"]


def base(layers: int) -> torch.nn.Module:
    """The shape of RoBERTa-base (width 768, 12 heads), random weights."""
    torch.manual_seed(0)
    config = BertConfig(num_hidden_layers=layers, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return BertModel(config, add_pooling_layer=False)


def contenders(layers: int, r: int) -> dict[str, torch.nn.Module]:
    model = base(layers)

    def theirs(config: peft.PeftConfig) -> torch.nn.Module:
        return peft.get_peft_model(copy.deepcopy(model), config)

    def ours(method: LoRA | DeLoRA) -> torch.nn.Module:
        return delora.inject(copy.deepcopy(model), method, TARGETS)

    return {
        "PEFT LoRA": theirs(peft.LoraConfig(r=r, target_modules=TARGETS)),
        "PEFT DeLoRA": theirs(peft.DeloraConfig(r=r, target_modules=TARGETS)),
        "LoRA": ours(LoRA(r)),
        "DeLoRA soft": ours(DeLoRA(r, start="soft")),
        "DeLoRA subtract": ours(DeLoRA(r)),
    }


def stepper(model: torch.nn.Module, x: torch.Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        model(inputs_embeds=x).last_hidden_state.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=25)
    arguments = parser.parse_args()
    x = torch.randn(arguments.tokens // 64, 64, 768)
    steps = {name: stepper(model, x) for name, model in contenders(arguments.layers, arguments.rank).items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(arguments.rounds + 2):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if turn >= 2:  # the first rounds warm up
                seconds[name].append(time.perf_counter() - start)
    rows = []
    for name, times in seconds.items():
        ratios = [t / reference for t, reference in zip(times, seconds["PEFT LoRA"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if name != "PEFT LoRA" else (1.0, 1.0, 1.0)
        rows.append({"contender": name, "ratio": f"{middle:.3f}", "quartile_1": f"{low:.3f}", "quartile_3": f"{high:.3f}"})
        print(f"{name:<16} {middle:.2f} of PEFT LoRA's time (quartiles {low:.2f} to {high:.2f})")
    about = {
        **vars(arguments),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "delora": delora.__version__,
        "date": datetime.date.today().isoformat(),
    }
    file = Path("runs/bench/step.csv")
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as out:
        writer = csv.DictWriter(out, [*rows[0], *about])
        writer.writeheader()
        writer.writerows(row | about for row in rows)
    print(f"written to {file}")


if __name__ == "__main__":
    main()
