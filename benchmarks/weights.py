"""What it costs to inject, save, load, measure and merge, where all of it is reading the weights: a Llama of 1.1 billion.

python -m benchmarks.weights               # 11 of its 22 layers, two minutes; the last section of docs/performance.md
python -m benchmarks.weights --layers 22   # all of it

Every variant runs in a process of its own. A time is the processor's, divided by that of reading all adapted weights once
(``amax``) in the same process: machines drift, and so does the time of a busy one. Memory is the peak above what was held.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
TITLE = "## Injecting, saving, loading, merging: what reading the weights costs"
VARIANTS = ("DeLoRA subtract", "DeLoRA soft", "LoRA", "PEFT LoRA")
VERBS = ("inject", "distances", "save", "load", "merge")


def _memory(key: str) -> float:
    """A line of this process's memory, in GB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e6 for line in lines if line.startswith(key))


def run(variant: str, layers: int, r: int) -> dict[str, tuple[float, float, float]]:
    """For each verb its time, its time in readings of the weights, and its memory."""
    import peft
    import torch
    from torch import nn
    from transformers import LlamaConfig, LlamaForCausalLM

    import delora

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    shape = {"vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": layers}
    config = LlamaConfig(**shape, num_attention_heads=32, num_key_value_heads=4, tie_word_embeddings=False)

    def fresh() -> nn.Module:
        torch.manual_seed(0)
        with torch.device("meta"):
            model = LlamaForCausalLM(config).to(torch.bfloat16)
        model = model.to_empty(device="cpu")
        numbers = torch.empty(2**22, dtype=torch.bfloat16).normal_(0, 0.02)
        for p in model.parameters():
            for part in p.data.view(-1).split(len(numbers)):
                part.copy_(numbers[: len(part)])
        return model

    def reading(model: nn.Module) -> float:
        weights = [m.weight for m in model.modules() if isinstance(m, nn.Linear) and m is not model.lm_head]
        times = []
        for _ in range(5):
            start = time.process_time()
            for W in weights:
                W.amax()
            times.append(time.process_time() - start)
        return statistics.median(times)

    model, told = fresh(), {}
    once = reading(model)

    def timed(verb: str, act: Callable[[], Any]) -> Any:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before, start = _memory("VmRSS"), time.process_time()
        result = act()
        seconds = time.process_time() - start
        told[verb] = (seconds, seconds / once, _memory("VmHWM") - before)
        return result

    methods = {
        "DeLoRA subtract": delora.DeLoRA(r=r, start="subtract"),
        "DeLoRA soft": delora.DeLoRA(r=r, start="soft"),
        "LoRA": delora.LoRA(r=r),
    }
    with tempfile.TemporaryDirectory() as folder:
        if variant in methods:
            timed("inject", lambda: delora.inject(model, methods[variant], "all-linear"))
            shake(model)
            timed("distances", lambda: delora.distances(model))
            timed("save", lambda: delora.save(model, folder))
            timed("merge", lambda: delora.merge(model))
            model = fresh()
            timed("load", lambda: delora.load(model, folder))
        else:
            lora = peft.LoraConfig(r=r, target_modules="all-linear")
            adapted = timed("inject", lambda: peft.get_peft_model(model, lora))
            shake(adapted)
            timed("save", lambda: adapted.save_pretrained(folder))
            timed("merge", adapted.merge_and_unload)
            model = fresh()
            timed("load", lambda: peft.PeftModel.from_pretrained(model, folder))
    return told


def shake(model: Any) -> None:
    """Move what trains, as training does."""
    for p in model.parameters():
        if p.requires_grad and p.numel() > 1:
            p.data.add_(1e-3 * p.data.new_empty(p.shape).normal_())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=11)
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.variant:
        print(json.dumps(run(options.variant, options.layers, options.r)))
        return
    import peft
    import torch

    lines = [
        TITLE,
        "",
        f"Written by `python -m benchmarks.weights`: a Llama shape of {options.layers} layers (d 2048; 22 are 1.1 billion",
        f"parameters), bfloat16, all linear layers, r {options.r}, one core of a {platform.machine()} machine",
        f"of {os.cpu_count()} cores at a load of {os.getloadavg()[0]:.0f}; torch {torch.__version__}, peft {peft.__version__}.",
        "A cell holds seconds of the processor, the same in readings of all adapted weights (`amax`), and the peak of memory",
        "above what was held before, in GB.",
        "",
        "| | " + " | ".join(VERBS) + " |",
        "|" + "---|" * (len(VERBS) + 1),
    ]
    for variant in VARIANTS:
        command = [sys.executable, "-m", "benchmarks.weights", "--variant", variant, "--layers", str(options.layers)]
        done = subprocess.run([*command, "--r", str(options.r)], check=True, capture_output=True, text=True)
        told = json.loads(done.stdout.splitlines()[-1])
        cells = [f"{told[v][0]:.2f} s, {told[v][1]:.1f}, +{told[v][2]:.2f}" if v in told else "" for v in VERBS]
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
        print(lines[-1])
    rest = PAGE.read_text("utf-8").partition(TITLE)[0].rstrip()
    PAGE.write_text("\n".join([rest, "", *lines]) + "\n", "utf-8")


if __name__ == "__main__":
    main()
