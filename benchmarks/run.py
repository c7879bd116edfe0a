"""What a method costs, side by side with Hugging Face PEFT's: time, memory, files.

python -m benchmarks.run            # five minutes; writes benchmarks/results.csv and docs/performance.md
python -m benchmarks.run --full     # all shapes, types and methods

Every time is a ratio: the variants run in turn, A B C A B C ..., in one process, and a figure is the median over the rounds of
the ratio to PEFT's LoRA in the same round. Machines drift; ratios within a round do not.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import datetime
import gc
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import peft
import torch
import transformers
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import LlamaConfig, LlamaModel, RobertaConfig, RobertaModel

import delora
from benchmarks.weights import TITLE
from delora import OFT, DeLoRA, DoRA, EtherPlus, LoRA

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results.csv", HERE.parent / "docs" / "performance.md"
PICTURE = PAGE.with_suffix(".png")
REFERENCE = "PEFT LoRA"

# ---------------------------------------------------------------- what is measured


@dataclass(frozen=True)
class Shape:
    """A model with random weights, what goes in, and which layers are adapted."""

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[torch.dtype], dict[str, Tensor]]
    targets: tuple[str, ...]


def hidden(batch: int, tokens: int, d: int) -> Callable[[torch.dtype], dict[str, Tensor]]:
    return lambda dtype: {"inputs_embeds": torch.randn(batch, tokens, d, dtype=dtype)}


class Chain(nn.Module):
    """Many small layers: what counts is the number of operations, as on a GPU with little to do."""

    def __init__(self, depth: int, d: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(d, d) for _ in range(depth)])

    def forward(self, inputs_embeds: Tensor) -> Tensor:
        x = inputs_embeds
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


def llama(layers: int = 4, d: int = 768) -> nn.Module:
    config = LlamaConfig(
        vocab_size=64, hidden_size=d, intermediate_size=8 * d // 3, num_hidden_layers=layers, num_attention_heads=12
    )
    return LlamaModel(config)


def roberta() -> nn.Module:
    config = RobertaConfig(vocab_size=64, num_hidden_layers=4, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return RobertaModel(config, add_pooling_layer=False)


ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CHAIN = tuple(f"layers.{i}" for i in range(100))
LLAMA = Shape("Llama shape (d 768, 4 layers), all linears, 512 tokens", llama, hidden(1, 512, 768), ALL)
ROBERTA = Shape("RoBERTa shape (d 768, 4 layers), q and v, 256 tokens", roberta, hidden(1, 256, 768), ("query", "value"))
STARTS: tuple[Any, ...] = ("subtract", "soft")
TINY = Shape("chain of 100 layers (d 64), 16 tokens", lambda: Chain(100, 64), hidden(1, 16, 64), CHAIN)
LAYER = Shape("one layer (d 768), 2048 tokens", lambda: Chain(1, 768), hidden(1, 2048, 768), ("layers.0",))


def peft_model(config: Any) -> Callable[[nn.Module, list[str], float], nn.Module]:
    def build(model: nn.Module, targets: list[str], dropout: float) -> nn.Module:
        each = copy.copy(config)
        each.target_modules = set(targets)
        key = {"DELORA": "module_dropout", "OFT": "module_dropout"}.get(str(each.peft_type.value), "lora_dropout")
        setattr(each, key, dropout)
        return peft.get_peft_model(model, each)

    return build


def ours(method: Any) -> Callable[[nn.Module, list[str], float], nn.Module]:
    return lambda model, targets, dropout: delora.inject(model, method, targets, dropout=dropout)


def frozen(model: nn.Module, targets: list[str], dropout: float) -> nn.Module:
    """The floor: forward, and backward through activations alone."""
    return model.requires_grad_(False)


class Dense(nn.Module):
    """The paper's formula as it is printed: the change is built, [out, in], in every forward."""

    def __init__(self, base: nn.Linear, r: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.A = nn.Parameter(torch.randn(r, base.in_features))
        self.B = nn.Parameter(torch.randn(base.out_features, r))
        self.lam = nn.Parameter(torch.ones(1))
        self.register_buffer("A0", self.A.detach().clone())
        self.register_buffer("B0", self.B.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        scale = self.lam / len(self.A) / self.A.norm(dim=1) / self.B.norm(dim=0)
        scale0 = self.lam / len(self.A) / self.A0.norm(dim=1) / self.B0.norm(dim=0)
        change = (self.B * scale @ self.A - self.B0 * scale0 @ self.A0) * self.base.weight.float().norm(dim=0)
        return self.base(x) + nn.functional.linear(x, change.to(x.dtype))


def dense(r: int) -> Callable[[nn.Module, list[str], float], nn.Module]:
    def build(model: nn.Module, targets: list[str], dropout: float) -> nn.Module:
        model.requires_grad_(False)
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and name.endswith(tuple(targets)):
                parent, _, key = name.rpartition(".")
                setattr(model.get_submodule(parent), key, Dense(module, r))
        return model

    return build


def variants(r: int) -> dict[str, Callable[[nn.Module, list[str], float], nn.Module]]:
    return {
        REFERENCE: peft_model(peft.LoraConfig(r=r, lora_alpha=2 * r)),
        "frozen": frozen,
        "LoRA": ours(LoRA(r=r)),
        "DeLoRA soft": ours(DeLoRA(r=r, start="soft")),
        "DeLoRA subtract": ours(DeLoRA(r=r, start="subtract")),
        "PEFT DeLoRA": peft_model(peft.DeloraConfig(r=r)),
        "paper's formula": dense(r),
        "DoRA": ours(DoRA(r=r)),
        "PEFT DoRA": peft_model(peft.LoraConfig(r=r, lora_alpha=2 * r, use_dora=True)),
        "ETHER+": ours(EtherPlus(blocks=32)),
        "OFT": ours(OFT(blocks=32)),
        "PEFT OFT": peft_model(peft.OFTConfig(r=32, oft_block_size=0, use_cayley_neumann=False)),
    }


@dataclass(frozen=True)
class Row:
    what: str
    where: str
    variant: str
    ratio: float  # to PEFT LoRA
    low: float
    high: float  # quartiles over the rounds
    rounds: int


# ---------------------------------------------------------------- how


def built(shape: Shape, names: list[str], r: int, dtype: torch.dtype, dropout: float) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    base = shape.make().to(dtype)
    models = {}
    for name in names:
        drops = dropout if name not in ("ETHER+", "OFT") else 0.0
        models[name] = variants(r)[name](copy.deepcopy(base), list(shape.targets), drops).train()
    return models


def tokens(count: int) -> Shape:
    """The Llama shape with another number of tokens."""
    return replace(LLAMA, name=LLAMA.name.replace("512", str(count)), inputs=hidden(1, count, 768))


def output(model: nn.Module, x: dict[str, Tensor]) -> Tensor:
    y = model(**x)
    return y if isinstance(y, Tensor) else y.last_hidden_state


def step(model: nn.Module, x: dict[str, Tensor], fused: bool = False) -> Callable[[], None]:
    """Forward, backward, AdamW. The input asks for a gradient, as a block's does inside a larger model."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=fused) if trained else None
    x = {key: t.clone().requires_grad_() for key, t in x.items()}

    def run() -> None:
        output(model, x).float().square().mean().backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return run


def interleaved(what: str, where: str, runs: dict[str, Callable[[], Any]], seconds: float) -> list[Row]:
    """The median over rounds of each one's time by the reference's in the same round."""
    for run in runs.values():
        run()
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    gc.collect()
    gc.disable()
    start = time.perf_counter()
    while len(times[REFERENCE]) < 5 or time.perf_counter() - start < seconds:
        for name, run in runs.items():
            before = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - before)
    gc.enable()
    rows = []
    for name, own in times.items():
        ratios = [a / b for a, b in zip(own, times[REFERENCE], strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4)
        rows.append(Row(what, where, name, median, low, high, len(ratios)))
    return rows


def steps(
    shape: Shape,
    names: list[str],
    seconds: float,
    r: int = 8,
    dtype: torch.dtype = torch.float32,
    dropout: float = 0.0,
    fused: bool = False,
    checkpointed: bool = False,
) -> list[Row]:
    x = shape.inputs(dtype)
    models = built(shape, names, r, dtype, dropout)
    if checkpointed:
        for model in models.values():
            model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    place = where(shape, r, dtype, dropout) + ", fused AdamW" * fused + ", gradient checkpointing" * checkpointed
    return interleaved("training step", place, {name: step(m, x, fused) for name, m in models.items()}, seconds)


def where(shape: Shape, r: int, dtype: torch.dtype, dropout: float) -> str:
    return f"{shape.name}, r {r}, {str(dtype).removeprefix('torch.')}" + (f", dropout {dropout}" if dropout else "")


def saved(shape: Shape, names: list[str], r: int = 8, dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> list[Row]:
    """Bytes kept for backward beyond the frozen model's; each storage once, parameters not counted."""
    x = {key: t.requires_grad_() for key, t in shape.inputs(dtype).items()}
    sizes = {}
    for name, model in built(shape, ["frozen", *names], r, dtype, dropout).items():
        own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        kept: dict[int, int] = {}

        def pack(t: Tensor, own: set[int] = own, kept: dict[int, int] = kept) -> Tensor:
            storage = t.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return t

        with saved_tensors_hooks(pack, lambda t: t):
            y = output(model, x)
        sizes[name] = sum(kept.values())
        del y
    extra = {name: size - sizes["frozen"] for name, size in sizes.items() if name != "frozen"}
    place = where(shape, r, dtype, dropout)
    return [
        Row("saved for backward", place, name, size / extra[REFERENCE], *[size / extra[REFERENCE]] * 2, 1)
        for name, size in extra.items()
    ]


def one_token(seconds: float, dtype: torch.dtype = torch.float32) -> list[Row]:
    names = [REFERENCE, "frozen", "LoRA", "DeLoRA subtract", "DeLoRA soft", "PEFT DeLoRA"]
    models = {name: model.eval() for name, model in built(LLAMA, names, 8, dtype, 0.0).items()}
    x = hidden(1, 1, 768)(dtype)
    served = {f"{name} in delora.serving": copy.deepcopy(models[name]) for name in ("DeLoRA subtract", "DeLoRA soft")}
    merged = delora.merge(copy.deepcopy(models["DeLoRA soft"]))

    def run(model: nn.Module) -> Callable[[], None]:
        def forward() -> None:
            with torch.no_grad():
                output(model, x)

        return forward

    with contextlib.ExitStack() as stack:
        for model in served.values():
            stack.enter_context(delora.serving(model))
        forwards = {name: run(model) for name, model in (models | served | {"DeLoRA merged": merged}).items()}
        place = f"Llama shape (d 768), all linears, r 8, {str(dtype).removeprefix('torch.')}"
        return interleaved("one token, no gradient", place, forwards, seconds)


def mixed(seconds: float, tokens: int) -> list[Row]:
    """A batch of 32 rows with 16 adapters, through one layer."""
    base, names = Chain(1, 768), [f"a{i}" for i in range(16)]
    x = {"inputs_embeds": torch.randn(32, tokens, 768)}
    config = peft.LoraConfig(r=8, target_modules=["layers.0"], init_lora_weights=False)
    theirs = peft.get_peft_model(copy.deepcopy(base), config, adapter_name=names[0])
    own = copy.deepcopy(base)
    for name in names:
        if name != names[0]:
            theirs.add_adapter(name, config)
        delora.inject(own, DeLoRA(r=8, start="subtract"), ["layers.0"], name=name)
    rows = [names[i % 16] for i in range(32)]

    def run(model: nn.Module, **more: Any) -> Callable[[], None]:
        def forward() -> None:
            with torch.no_grad():
                model(**x, **more)

        return forward

    with delora.routed(own.eval(), rows):
        forwards = {
            REFERENCE: run(theirs.eval(), adapter_names=rows),
            "frozen": run(base.eval()),
            "DeLoRA subtract in delora.routed": run(own),
        }
        return interleaved("32 rows, 16 adapters", f"one layer (d 768), r 8, {tokens} tokens a row", forwards, seconds)


def handling(seconds: float) -> list[Row]:
    """Injecting, loading and merging; the base is made anew outside the clock."""
    wide = Shape("", lambda: nn.Sequential(nn.Linear(4096, 4096)), hidden(1, 1, 1), ("0",))

    def clock(prepare: Callable[[], Any], act: Callable[[Any], Any]) -> Callable[[], float]:
        def run() -> float:
            made = prepare()
            start = time.perf_counter()
            act(made)
            return time.perf_counter() - start

        return run

    thousand = Chain(1000, 64)
    every = [f"layers.{i}" for i in range(1000)]
    big = peft.LoraConfig(r=8, target_modules=every)
    folder = Path(tempfile.mkdtemp())
    peft.get_peft_model(copy.deepcopy(thousand), big).save_pretrained(str(folder / "peft"))
    for start in STARTS:
        delora.save(delora.inject(copy.deepcopy(thousand), DeLoRA(r=8, start=start), every), folder / start)
    pairs = {
        "inject into 1,000 layers": (
            clock(lambda: copy.deepcopy(thousand), lambda m: peft.get_peft_model(m, big)),
            lambda start: clock(lambda: copy.deepcopy(thousand), lambda m: delora.inject(m, DeLoRA(r=8, start=start), every)),
        ),
        "load into 1,000 layers": (
            clock(lambda: copy.deepcopy(thousand), lambda m: peft.PeftModel.from_pretrained(m, str(folder / "peft"))),
            lambda start: clock(lambda: copy.deepcopy(thousand), lambda m: delora.load(m, folder / start)),
        ),
        "merge 4096 x 4096": (
            clock(
                lambda: peft.get_peft_model(wide.make(), peft.LoraConfig(r=8, target_modules=["0"])),
                lambda m: m.merge_and_unload(),
            ),
            lambda start: clock(lambda: delora.inject(wide.make(), DeLoRA(r=8, start=start), ["0"]), delora.merge),
        ),
    }
    rows = []
    for what, (theirs, own) in pairs.items():
        runs = {start: own(start) for start in STARTS}
        theirs(), *(run() for run in runs.values())
        ratios: dict[str, list[float]] = {start: [] for start in STARTS}
        begin = time.perf_counter()
        while len(ratios[STARTS[0]]) < 3 or time.perf_counter() - begin < seconds:
            reference = theirs()
            for start, run in runs.items():
                ratios[start].append(run() / reference)
        for start, each in ratios.items():
            low, median, high = statistics.quantiles(each, n=4)
            rows.append(Row(what, "", f"DeLoRA {start}", median, low, high, len(each)))
    sizes = {name: sum(f.stat().st_size for f in (folder / name).glob("*.safetensors")) for name in ("peft", *STARTS)}
    for start in STARTS:
        ratio = sizes[start] / sizes["peft"]
        rows.append(Row("adapter file, r 8", "tensors alone", f"DeLoRA {start}", ratio, ratio, ratio, 1))
    return rows


def import_time() -> float:
    """Milliseconds that importing delora takes beyond torch and safetensors."""
    code = "import time, torch, safetensors.torch; t = time.perf_counter(); import delora; print(time.perf_counter() - t)"
    runs = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout) for _ in range(5)
    ]
    return 1000 * statistics.median(runs)


# ---------------------------------------------------------------- all of it


def measure(full: bool, seconds: float) -> list[Row]:
    names = list(variants(8))
    main = [REFERENCE, "frozen", "LoRA", "DeLoRA soft", "DeLoRA subtract", "PEFT DeLoRA"]
    rows = []
    rows += steps(LLAMA, names, 2 * seconds)
    rows += steps(LLAMA, main, seconds, dtype=torch.bfloat16)
    rows += steps(LLAMA, main, seconds, dropout=0.1)
    for r in (64, 256):
        rows += steps(LLAMA, main, seconds, r=r)
    rows += steps(LLAMA, main, seconds, r=64, dtype=torch.bfloat16)
    rows += steps(tokens(128), names, seconds, dtype=torch.bfloat16)
    rows += steps(LLAMA, main, seconds, checkpointed=True)
    rows += steps(ROBERTA, main, seconds)
    rows += steps(LAYER, main, seconds)
    rows += steps(TINY, main, seconds)
    rows += steps(TINY, main, seconds, fused=True)
    if full:
        for count in (256, 1024, 4096):
            rows += steps(tokens(count), main, seconds)
        for depth in (10, 400):
            name, every = f"chain of {depth} layers (d 64), 16 tokens", tuple(f"layers.{i}" for i in range(depth))
            rows += steps(replace(TINY, name=name, make=partial(Chain, depth, 64), targets=every), main, seconds)
        for r in (16, 128):
            rows += steps(LLAMA, main, seconds, r=r)
        for r in (16, 64):
            rows += steps(LAYER, main, seconds, r=r)
    rest = [name for name in names if name != "frozen"]
    rows += saved(LLAMA, rest)
    rows += saved(LLAMA, [n for n in main if n != "frozen"], dtype=torch.bfloat16)
    rows += saved(LLAMA, [n for n in main if n != "frozen"], dropout=0.1)
    for count in (1, 16, 64):
        rows += mixed(seconds, count)
    rows += one_token(seconds) + one_token(seconds, torch.bfloat16)
    return rows + handling(seconds)


def page(rows: list[Row], milliseconds: float, machine: dict[str, str]) -> str:
    lines = [
        "# What it costs",
        "",
        "Written by `python -m benchmarks.run`. Ratios to PEFT's LoRA of the same rank, measured in turn in one process: the",
        "median over the rounds, and its quartiles. Random weights, CPU: "
        + ", ".join(f"{k} {v}" for k, v in machine.items())
        + ".",
        "",
        "PEFT keeps adapters in float32 on a bf16 base, as delora does. ETHER+ and OFT have 32 blocks and no dropout. “Paper's",
        "formula” builds the whole change in every forward.",
        "",
        "![the tables as bars](performance.png)",
    ]
    seen: list[tuple[str, str]] = []
    for row in rows:
        if (row.what, row.where) not in seen:
            seen.append((row.what, row.where))
            title = f"{row.what[0].upper()}{row.what[1:]}" + (f": {row.where}" if row.where else "")
            lines += ["", f"## {title}", "", "| | ratio | quartiles | rounds |", "|---|---|---|---|"]
        lines.append(f"| {row.variant} | {row.ratio:.2f} | {row.low:.2f} to {row.high:.2f} | {row.rounds} |")
    lines += ["", "## Import", "", f"`import delora` takes {milliseconds:.0f} ms beyond torch and safetensors."]
    return "\n".join(lines) + "\n"


def picture(rows: list[Row]) -> None:
    """Every table of more than one row as bars, with the quartiles."""
    tables: dict[str, list[Row]] = {}
    for row in rows:
        if row.where and row.what != "adapter file, r 8":
            tables.setdefault(f"{row.what}: {row.where}", []).append(row)
    heights = [len(each) + 2 for each in tables.values()]
    figure, axes = plt.subplots(len(tables), figsize=(8, 0.26 * sum(heights)), height_ratios=heights, layout="constrained")
    for axis, (title, each) in zip(np.atleast_1d(axes), tables.items(), strict=True):
        values = [row.ratio for row in each]
        spread = [[max(row.ratio - row.low, 0) for row in each], [max(row.high - row.ratio, 0) for row in each]]
        colors = ["0.7" if "PEFT" in row.variant or row.variant in ("frozen", "paper's formula") else "C0" for row in each]
        axis.barh([row.variant for row in each], values, xerr=spread, color=colors, height=0.7)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.invert_yaxis()
        axis.set_title(title, fontsize=9, loc="left")
        axis.tick_params(labelsize=8)
    np.atleast_1d(axes)[-1].set_xlabel("ratio to PEFT's LoRA (blue: delora)", fontsize=8)
    figure.savefig(PICTURE, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--seconds", type=float, default=None, help="per table")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    rows = measure(options.full, options.seconds or (60 if options.full else 20))
    machine = {
        "machine": platform.machine(),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "delora": delora.__version__,
        "date": datetime.date.today().isoformat(),
    }
    with RESULTS.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["what", "where", "variant", "ratio", "low", "high", "rounds", *machine])
        for row in rows:
            writer.writerow(
                [
                    row.what,
                    row.where,
                    row.variant,
                    *(f"{v:.4f}" for v in (row.ratio, row.low, row.high)),
                    row.rounds,
                    *machine.values(),
                ]
            )
    picture(rows)
    kept = PAGE.read_text("utf-8").partition(TITLE) if PAGE.exists() else ("", "", "")
    rest = f"\n{kept[1]}{kept[2]}" if kept[1] else ""  # what benchmarks.weights wrote
    PAGE.write_text(page(rows, import_time(), machine) + rest, "utf-8")


if __name__ == "__main__":
    main()
