"""What adapters of experts cost, side by side: the changed factors beside the frozen weights, the changed weights, and PEFT.

python -m benchmarks.experts            # prints a table: ratios to PEFT's LoRA on the same parameters
python -m benchmarks.experts --experts 8 --hidden 256 --inner 1024

One mixture of transformers (Qwen3-MoE's experts) with random weights and a random router runs forward and backward, with every
adapter in turn, A B C A B C ..., in one process; a figure is the median over the rounds of the ratio in the same round. Memory
is the highest that a step needs above what it starts from, of a process of its own for each variant.
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import delora
import delora.parts
from delora import DeLoRA, LoRA

NAMES = ("gate_up_proj", "down_proj")


class Mixture(nn.Module):
    """The experts alone, with a router that is drawn once."""

    def __init__(self, sizes: argparse.Namespace, implementation: str) -> None:
        super().__init__()
        config = Qwen3MoeConfig(
            hidden_size=sizes.hidden,
            moe_intermediate_size=sizes.inner,
            num_experts=sizes.experts,
            num_experts_per_tok=sizes.top,
        )
        config._experts_implementation = implementation
        self.experts = Qwen3MoeExperts(config)
        scores = torch.randn(sizes.tokens, sizes.experts)
        self.weights, self.chosen = scores.softmax(-1).topk(sizes.top)
        with torch.no_grad():
            for p in self.experts.parameters():
                p.uniform_(-0.05, 0.05)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.experts(x, self.chosen, self.weights.to(x.dtype))
        return y


def frozen(model: nn.Module, r: int) -> nn.Module:
    return model.requires_grad_(False)


def by_peft(model: nn.Module, r: int) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(
            r=r,
            lora_alpha=r,
            target_modules=[],
            target_parameters=[f"experts.{name}" for name in NAMES],
            init_lora_weights=False,
        )
        return peft.get_peft_model(model, config)


def ours(method: Callable[[int], Any]) -> Callable[[nn.Module, int], nn.Module]:
    return lambda model, r: delora.inject(model, method(r), [f"experts.{name}" for name in NAMES])


VARIANTS: dict[str, tuple[Callable[[nn.Module, int], nn.Module], bool]] = {  # how to adapt, and whether factors may stay beside
    "frozen": (frozen, True),
    "PEFT LoRA": (by_peft, True),
    "LoRA": (ours(lambda r: LoRA(r=r)), True),
    "LoRA, changed weights": (ours(lambda r: LoRA(r=r)), False),
    "DeLoRA": (ours(lambda r: DeLoRA(r=r, start="subtract")), True),
    "DeLoRA, changed weights": (ours(lambda r: DeLoRA(r=r, start="subtract")), False),
}


def step(model: nn.Module, x: Tensor, beside: bool) -> float:
    can = delora.parts._can_factor
    if not beside:
        delora.parts._can_factor = lambda W, updates: False
    try:
        start = time.process_time()
        model(x).square().mean().backward()
        return time.process_time() - start
    finally:
        delora.parts._can_factor = can


def model_of(sizes: argparse.Namespace, implementation: str, variant: str, base: Mixture | None = None) -> nn.Module:
    torch.manual_seed(0)
    base = Mixture(sizes, implementation).to(getattr(torch, sizes.dtype)) if base is None else base
    shared = {id(p): p for p in base.parameters()}  # all variants compute with the same weights, which are there once
    model = copy.deepcopy(base, shared)
    return VARIANTS[variant][0](model.train(), sizes.r)


def peak(sizes: argparse.Namespace, implementation: str, variant: str) -> int:
    """Bytes that a step needs above what is there before, of this process."""
    model = model_of(sizes, implementation, variant)
    x = torch.randn(sizes.tokens, sizes.hidden).to(getattr(torch, sizes.dtype)).requires_grad_()
    gc.collect()
    with open("/proc/self/clear_refs", "w") as file:  # the highest is counted from here
        file.write("5")
    before = _highest()
    step(model, x, VARIANTS[variant][1])
    return _highest() - before


def _highest() -> int:
    """The most memory that this process has held, in bytes, as Linux counts it."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"experts": 64, "hidden": 2048, "inner": 768, "tokens": 512, "top": 8, "r": 8, "rounds": 7}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--implementations", nargs="+", default=["grouped_mm", "eager"])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS))
    parser.add_argument("--peak", nargs=2)
    sizes = parser.parse_args()
    torch.set_num_threads(1)
    if sizes.peak:
        print(peak(sizes, *sizes.peak))
        return
    given = sys.argv[1:]
    for implementation in sizes.implementations:
        torch.manual_seed(0)
        base = Mixture(sizes, implementation).to(getattr(torch, sizes.dtype))
        models = {variant: model_of(sizes, implementation, variant, base) for variant in sizes.variants}
        x = torch.randn(sizes.tokens, sizes.hidden).to(getattr(torch, sizes.dtype)).requires_grad_()
        times: dict[str, list[float]] = {variant: [] for variant in models}
        for _ in range(1 + sizes.rounds):
            for variant, model in models.items():
                times[variant].append(step(model, x, VARIANTS[variant][1]))
                for p in (x, *model.parameters()):
                    p.grad = None
        shape = f"{sizes.experts} experts of {sizes.hidden} x {sizes.inner}, {sizes.tokens} tokens for {sizes.top} each"
        print(f"\n{implementation}, {sizes.dtype}, {shape}, r {sizes.r}")
        print(f"{'':26} step / PEFT's   seconds   peak of a step (MiB)")
        for variant in models:
            ratio = statistics.median(a / b for a, b in zip(times[variant][1:], times["PEFT LoRA"][1:], strict=True))
            run = [sys.executable, "-m", "benchmarks.experts", *given, "--peak", implementation, variant]
            high = int(subprocess.run(run, check=True, capture_output=True, text=True).stdout.split()[-1])
            print(f"{variant:26} {ratio:13.2f} {statistics.median(times[variant][1:]):9.2f} {high / 2**20:12,.0f}")


if __name__ == "__main__":
    main()
