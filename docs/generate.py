"""Write docs/methods.md from the methods' docstrings, the facts below and the counts that the tests check.

python -m docs.generate
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import torch
from torch import nn

from delora.layer import Placed, attach
from delora.methods import METHODS, RUNGS

FILE = Path(__file__).with_name("methods.md")

# name: parameters of one layer, places, how the update runs and what can be done with it, a first rate, when to choose it
FACTS = {
    "delora": (
        "r (in + out), and 1 with `learn_lam`",
        "query and value projections (paper); any layer",
        "low-rank: runs like LoRA, merges, exports as a LoRA of rank r (2r for `subtract` and `copy`)",
        "3e-2 to 3e-1 at reach 0.1; 1e-3 to 3e-2 (Table 9), a learned strength the same",
        "The learning rate cannot be tuned, training is long, or how far the weights may move has to be bounded.",
    ),
    "full": (
        "as many as the layer has",
        "anything",
        "the layer's copy trains; merges; no export",
        "1e-5 to 5e-5 of a whole model, 1e-3 of a head",
        "There is memory for it and data enough; or for a new head (`also_train`).",
    ),
    "lora": (
        "r (in + out)",
        "query and value projections; any layer",
        "low-rank: merges, exports",
        "1e-4 to 6e-4 (Appendix B)",
        "The baseline, and what everything serves. Tune its rate: at ten times the best it is lost.",
    ),
    "dora": (
        "r (in + out) + out; r (in + out) with `fixed_magnitude`",
        "as LoRA",
        "LoRA with rescaled rows; reads W (one product with A in every forward); merges; not low-rank",
        "LoRA's",
        "LoRA at a small rank falls short and its cost matters little.",
    ),
    "nblora": (
        "r (in + out)",
        "as LoRA",
        "low-rank: runs like LoRA, after the inverse of an [r, r] matrix in float64; merges, exports as a LoRA of rank r",
        "5e-3 to 1e-2 (turned digits)",
        "Every singular value of the change has to be bounded, not only its size.",
    ),
    "ether": (
        "in (or out), whatever the number of blocks",
        "as LoRA",
        "transforms the layer's input or output, W is not read; merges; exports as a LoRA of rank `blocks`",
        "1e-3 to 1e-2",
        "As few parameters as can be, and a rate that cannot be wrong. It does not start at the base model.",
    ),
    "etherplus": (
        "2 in + 2 out; 2 in (or 2 out) one-sided",
        "as LoRA",
        "transforms input and output, W is not read; merges; exports as a LoRA of rank 4 `blocks` (2 one-sided)",
        "6e-3 (Figure 2), 1e-3 (LLaMA)",
        "As ETHER, from the base model on.",
    ),
    "oft": (
        "n s (s - 1) / 2, s = in / n",
        "attention projections",
        "transforms the input, W is not read; a linear system of every block is solved in every forward; merges; not low-rank",
        "6e-5 (the authors' images), more for short runs",
        "The angles between the neurons should stay as they are.",
    ),
    "hra": (
        "r in",
        "as LoRA",
        "transforms the input, W is not read; merges; exports as a LoRA of rank r",
        "5e-3 to 2e-2 (turned digits)",
        "The angles between the neurons should stay as they are, at LoRA's cost.",
    ),
    "reflections": (
        "r in + 1; 2 r in + 1 with `relaxed`",
        "as LoRA",
        "transforms the input, W is not read; merges; exports as a LoRA of rank r",
        "ETHER+'s, its strength the same",
        "To repeat the paper's ablation: it is what lies between ETHER+ and DeLoRA.",
    ),
    "bitfit": (
        "out",
        "all linear layers and norms of an encoder",
        "adds to the output; merges into the bias (a layer without one gets one); no export",
        "1e-4 to 1e-3",
        "A few numbers a layer, no cost in a forward.",
    ),
    "ia3": (
        "out, or in",
        "keys and values (output), the second feed-forward layer (input)",
        "scales the output or the input, W is not read; merges; no export",
        "3e-3",
        "Very few examples: the paper's setting.",
    ),
    "red": (
        "2 out",
        "the feed-forward output of every layer, before residual and norm (`output.dense`) or after (`output`)",
        "scales and shifts the output; merges on a layer or a norm, not on a block; no export",
        "1e-3",
        "As BitFit, on one place a block.",
    ),
    "loreft": (
        "r (2 d + 1)",
        "the output of every block (`encoder.layer.N.output` of RoBERTa), at its first or last positions",
        "edits the output; cannot be merged or exported",
        "4e-4 to 1e-3",
        "Tasks that read a few positions, with next to no parameters.",
    ),
    "bottleneck": (
        "2 d m + m + d",
        "Houlsby: `attention.output.dense` and `output.dense`; Pfeiffer: `output.dense` alone",
        "edits the output; cannot be merged or exported, and makes the model slower for good",
        "1e-4 to 1e-3",
        "The classical baseline.",
    ),
}
LABELS = ("Parameters of a layer", "Where", "How it runs", "A rate to begin with (AdamW)", "When to choose it")

HEAD = """# The methods

Every method that the DeLoRA paper names, and two of its closest rivals (HRA, NB-LoRA), behind one interface: `delora.inject(model, METHOD, targets)`. W is [out, in], as in
`nn.Linear`. All of them save, load, and work with `disabled`, `strength`, several named adapters, `torch.compile`, gradient
checkpointing and half precision; what differs is said below. Rates are those of the papers where they say one; tune them.

`strength` scales the change: W + s (W' - W), or y + s (y' - y) for what edits an output. Where the update is not low-rank, a strength
other than 0 and 1 costs a second forward of the layer. Distances are computed from the small factors where a change is low-rank,
from the whole matrices where it is not, and do not exist where no weight changes.

On a convolution or an embedding, whose input is not one vector, methods that transform the input (ETHER, ETHER+, OFT, HRA,
`Reflections`, `IA3(side="input")`) build the merged matrix in every forward: right, but slower.

This file is made from the docstrings by `python -m docs.generate`.
"""


def section(name: str) -> str:
    method = METHODS[name]
    text, _, _ = inspect.getdoc(method).partition("\nExample:\n")  # type: ignore[union-attr]
    first, _, body = text.partition("\n")
    equation, *source = re.split(r"\s{4,}", first)
    lines = [f"## {method.__name__}", "", f"    {equation}", ""]
    lines += [f"{source[0]}.", ""] if source else []
    lines += _markdown(body)
    lines += [f"- {label}: {fact}" for label, fact in zip(LABELS, FACTS.get(name, ()), strict=False)]
    lines += [f"- {fact}" for fact in derived(method)]
    return "\n".join(lines) + "\n"


def derived(method: type) -> list[str]:
    """What follows from the class itself, at its default settings on a layer of 768 x 768."""
    torch.manual_seed(0)
    layer = nn.Linear(768, 768)
    adapter = Placed(attach(method(), layer), layer)
    count = sum(p.numel() for p in adapter.parameters())
    lines = [f"Trains {count:,} numbers in a layer of 768 x 768 at its default settings."]
    if adapter.whole:
        return lines
    factors = adapter.low_rank()
    if factors is not None:
        return [*lines, f"Its change is low-rank: it merges, and exports as a LoRA of rank {len(factors.down)} there."]
    way = "it merges, and is exported no other way" if adapter.mergeable() else "it can be neither merged nor exported"
    return [*lines, f"Its change is not low-rank: {way}."]


def _markdown(body: str) -> list[str]:
    """A docstring's paragraphs and its Args as Markdown."""
    text, _, args = body.partition("\nArgs:\n")
    lines = [text.strip().replace("``", "`"), ""] if text.strip() else []
    items: list[str] = []
    for line in args.rstrip().splitlines():
        depth, words = (len(line) - len(line.lstrip())) // 4, line.strip()
        if depth == 1:
            fields, _, meaning = words.partition(": ")
            items.append("- " + ", ".join(f"`{field}`" for field in fields.split(", ")) + f": {meaning}")
        elif depth == 2 and words.startswith('"') and words.partition(": ")[0].count('"') == 2 and ":" in words:
            items.append("  - " + words)
        else:
            items[-1] += " " + words
    return [*lines, *(item.replace("``", "`") for item in items), *([""] if items else [])]


def rungs() -> str:
    rows = "\n".join(f"| {name} | `{method}` |" for name, method in RUNGS.items())
    return f"""## The ladder of Tables 1 and 2

From LoRA (L0) and from one-sided ETHER+ (E0), one idea at a time, to DeLoRA: `delora.RUNGS`. Their strengths are to be tuned, with a
rate of their own (`param_groups(lam_lr=...)`). L1 is normalised, L2 scaled by the weights; E1 has a controllable boundary, E2 a high
rank, E3 is relaxed, E4 additive. Eq. 10 divides lam by two, Tables 1 and 2 do not: we divide by r, so that lam bounds |W' - W| / |W|.

| rung | method |
|---|---|
{rows}
"""


def counts() -> str:
    from tests.test_counts import ROWS

    rows = "\n".join(f"| {row.model} | {row.name} | {row.paper or '–'} | {row.count:,} |" for row in ROWS)
    return f"""## How many parameters train

On the real shapes, heads not counted; every figure is a test. The model is built from its configuration, without weights.

| model | method | paper | delora |
|---|---|---|---|
{rows}

- DoRA: the paper's figures leave out the magnitudes, 99,840 for Stable Diffusion and 262,144 for LLaMA-2.
- DeLoRA: LoRA's, and with `learn_lam=True`, as the paper counts, one strength for each matrix (24, 128, 64).
- ETHER+ on LLaMA-2: the paper cuts 1.0486M off.
- The sizes of the bottleneck adapters are not given: 10 and 16 are those that fit the paper's figures.
- OFT: the entries that are free, of which a program may store twice as many.
"""


# What `delora train methods` gave: to be replaced by hand when it is run again.
MEASURED = """## On real sentences

`delora train methods`: a pretrained encoder (MiniLM, 6 layers), 2,000 sentences rated by people, two epochs, one CPU
core. Of three rates, a factor of three apart, the best by validation; the accuracy on 1,500 test sentences and its standard error.
One seed: what is closer than two standard errors is not told apart.

| | rate | test [%] | validation [%] | trainable, with the head | \\|dW\\|/\\|W\\| |
|---|---|---|---|---|---|
| DeLoRA | 1e-2 | 80.9 ± 1.0 | 84.3 | 222,350 | 0.25 |
| LoRA | 3e-3 | 81.7 ± 1.0 | 81.9 | 222,338 | 0.12 |
| DoRA | 3e-3 | 81.5 ± 1.0 | 82.0 | 226,946 | 0.12 |
| ETHER | 1e-2 | 80.4 ± 1.0 | 80.9 | 153,218 | 0.23 |
| ETHER+ | 1e-2 | 80.9 ± 1.0 | 82.4 | 167,042 | 0.22 |
| E2 | 1e-2 | 81.5 ± 1.0 | 81.8 | 185,486 | 0.08 |
| E3 | 3e-2 | 81.8 ± 1.0 | 82.4 | 222,350 | 0.12 |
| OFT | 1e-3 | 83.2 ± 1.0 | 82.2 | 367,490 | 0.18 |
| (IA)^3 | 3e-2 | 79.1 ± 1.1 | 82.1 | 162,434 | 0.23 |
| BitFit | 3e-3 | 77.7 ± 1.1 | 79.7 | 173,954 | 0.02 |
| RED | 1e-2 | 77.3 ± 1.1 | 77.9 | 153,218 | 0.12 |
| Full finetuning | 1e-4 | 83.6 ± 1.0 | 84.2 | 22,713,986 | – |

The paper's rates are for longer runs: in these 126 steps (IA)^3, RED and OFT want three to twenty times theirs. For E3,
(IA)^3 and RED the highest rate tried was the best: a higher one may be better still.
"""


def page() -> str:
    links = ", ".join(f"[{method.__name__}](#{method.__name__.lower()})" for method in METHODS.values())
    return "\n".join([HEAD, links + ".\n", *(section(name) for name in METHODS), rungs(), MEASURED, counts()]).rstrip() + "\n"


if __name__ == "__main__":
    FILE.write_text(page(), "utf-8")
