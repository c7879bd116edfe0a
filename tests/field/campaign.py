"""Kills of savers and mutated files, by the hundreds and thousands: ``python -m tests.field.campaign [KILLS] [MUTANTS]``.

What `tests/field/test_files.py` tests a few times, at length. Prints what came of it; exits with 1 if a law was broken.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

import delora
from delora import DeLoRA
from delora.evaluation.adapters import describe
from delora.formats.files import AdapterError
from delora.formats.native import seal
from tests.cases import Net, ids, shake

SECONDS, MEGABYTES = 1.0, 1024  # what reading one folder may take of the processor, and of memory beyond what there was


def two_adapters() -> tuple[nn.Module, list[nn.Module]]:
    """A base, and two models with different adapters of it."""
    torch.manual_seed(0)
    base = Net().eval()
    models = []
    for r in (2, 3):
        model = copy.deepcopy(base)
        delora.inject(model, DeLoRA(r=r), ["q", "v"], also_train=["classifier"])
        models.append(shake(model))
    return base, models


def which(base: nn.Module, outputs: list[Tensor], x: Tensor, folder: Path) -> int | None:
    """Which of the adapters a folder holds; None if neither."""
    out = delora.load(copy.deepcopy(base), folder)(x)
    return next((i for i, expected in enumerate(outputs) if torch.equal(out, expected)), None)


def in_a_process(work: Callable[[], None]) -> int:
    """Start a process that does this; its id."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return process


def saves_for_ever(models: list[nn.Module], folder: Path) -> None:
    while True:
        for model in models:
            delora.save(model, folder)


def killed(models: list[nn.Module], folder: Path, savers: int, draw: random.Random) -> None:
    """Some savers at once in one folder, killed at a random moment each."""
    orders = [models, models[::-1]]
    processes = [in_a_process(partial(saves_for_ever, orders[i % 2], folder)) for i in range(savers)]
    for process in draw.sample(processes, savers):
        time.sleep(draw.uniform(0, 0.05))
        os.kill(process, signal.SIGKILL)
    for process in processes:
        os.waitpid(process, 0)


def kills(count: int, folder: Path, savers: int = 2) -> Counter[str]:
    """What the folder held after each kill, and what was left over after the next save."""
    base, models = two_adapters()
    x = ids()
    outputs = [model(x) for model in models]
    draw, seen = random.Random(0), Counter[str]()
    delora.save(models[0], folder)
    for _ in range(count):
        killed(models, folder, savers, draw)
        try:
            number = which(base, outputs, x, folder)
            seen["neither" if number is None else "whole"] += 1
        except AdapterError as error:
            seen[f"refused: {error}"] += 1
        seen["files that a killed process left"] += len(list(folder.iterdir())) - 3
        delora.save(models[0], folder)
        seen["files too many after the next save"] += len(list(folder.iterdir())) - 3
    return seen


# ---------------------------------------------------------------- mutated files

WORDS: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    2**31,
    2**63,
    10**39,
    1e-320,
    1e308,
    "",
    "q",
    "\x1b[2J",
    "a" * 5000,
    ".".join("a" * 300),
    [],
    {},
    [[]],
    {"": {}},
    ["q"],
    (0,) * 100,
]
TEXTS = ["1e400", "-1e999", "9" * 400, "9" * 5000, "NaN", "-Infinity", "[" * 5000, '{"a":' * 3000, '"\\ud800"', "\u202e", "{,}"]


def mutated_bytes(data: bytes, draw: random.Random) -> bytes:
    """Bits flipped, pieces cut out, doubled, or put elsewhere."""
    new = bytearray(data)
    for _ in range(draw.choice([1, 1, 1, 2, 5])):
        at, size = draw.randrange(len(new) + 1), draw.choice([1, 2, 8, 50])
        match draw.randrange(5):
            case 0 if new:
                new[min(at, len(new) - 1)] ^= 1 << draw.randrange(8)
            case 1:
                del new[at : at + size]
            case 2:
                new[at:at] = new[at : at + size]
            case 3:
                new[at:at] = draw.randbytes(size)
            case _:
                del new[at:]
    return bytes(new)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values in a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, each in inner for place in places(each, (*path, key)))]


def mutated_json(data: dict[str, Any], draw: random.Random) -> str:
    """A value replaced, a key renamed, dropped or added, a text that is no JSON put in a value's place; with a new checksum."""
    data, raw = copy.deepcopy(data), None
    for _ in range(draw.choice([1, 1, 2])):
        *outer, last = draw.choice([place for place in places(data) if place])
        holder: Any = data
        for key in outer:
            holder = holder[key]
        match draw.randrange(5):
            case 0:
                holder[last] = draw.choice(WORDS)
            case 1 if isinstance(holder, dict):
                holder[draw.choice([str(w) for w in WORDS])] = holder.pop(last)
            case 2:
                del holder[last]
            case 3 if isinstance(holder, dict):
                holder[str(draw.choice(WORDS))] = draw.choice(WORDS)
            case _:
                raw = draw.choice(TEXTS)
                holder[last] = "RAW"
    if "schema" in data and draw.random() < 0.9:
        data["checksum"] = seal(data)
    text = json.dumps(data)
    return text if raw is None else text.replace('"RAW"', raw)


def mutated_tensors(tensors: dict[str, Tensor], draw: random.Random) -> dict[str, Tensor]:
    """A tensor of another dtype, shape or name, with other numbers, gone, or more."""
    tensors = dict(tensors)
    key = draw.choice(list(tensors))
    t = tensors[key]
    dtypes = [torch.float64, torch.float16, torch.int64, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16]
    match draw.randrange(6):
        case 0:
            tensors[key] = t.to(draw.choice(dtypes))
        case 1:
            tensors[key] = torch.full(t.shape, draw.choice([1e300, -1e300, 1e-300]), dtype=torch.float64)
        case 2:
            tensors[key] = torch.full(t.shape, draw.choice([float("nan"), float("inf")]))
        case 3:
            tensors[key] = torch.zeros(draw.choice([(), (0,), (2, 0), (1,) * 40, (100, 100)]))
        case 4:
            tensors[draw.choice([f"{key}.x", ".", "", "q", "." * 5000, "\x1b[2J"])] = tensors.pop(key)
        case _:
            del tensors[key]
    return tensors


def mutate(source: Path, folder: Path, draw: random.Random) -> None:
    """A copy of an adapter's folder, ours or PEFT's, with one of its files changed."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)
    (description,) = folder.glob("*.json")
    (tensor_file,) = folder.glob("*.safetensors")
    data = json.loads(description.read_text())
    ours = description.name == "adapter.json"
    kind = draw.randrange(4)
    if kind == 0:
        file = draw.choice([description, tensor_file])
        file.write_bytes(mutated_bytes(file.read_bytes(), draw))
    elif kind == 1:
        description.write_text(mutated_json(data, draw), encoding="utf-8", errors="surrogatepass")
    else:
        raw = tensor_file.read_bytes()
        if kind == 2:
            from safetensors.torch import load

            raw = to_bytes(mutated_tensors(load(raw), draw))
        else:
            size = int.from_bytes(raw[:8], "little")
            header = mutated_json(json.loads(raw[8 : 8 + size]), draw).encode("utf-8", "surrogatepass")
            raw = len(header).to_bytes(8, "little") + header + raw[8 + size :]
        tensor_file.write_bytes(raw)
        if ours:  # with a JSON that vouches for it
            data["tensors"] |= {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
            data["checksum"] = seal(data)
            description.write_text(json.dumps(data))


def memory() -> float:
    """The most memory that this process has had, in megabytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def judged(base: nn.Module, folder: Path) -> str:
    """What reading a folder comes to: the law that it broke, "read", or "refused"."""
    memory_before, verdict = memory(), "read"
    for act in (lambda: delora.load(base, folder), lambda: describe(folder)):
        for _ in range(3):  # the best of three: a collection of the whole process's garbage may fall into one
            before = time.process_time()
            try:
                act()
            except AdapterError as error:
                verdict = "refused" if str(error).replace("\n", "").isprintable() else f"not printable: {error!r}"
            except Exception as error:
                return f"{type(error).__name__}: {str(error)[:200]}"
            if time.process_time() - before <= SECONDS:
                break
        else:
            return f"took over {SECONDS} s"
    return f"took over {MEGABYTES} MB" if memory() - memory_before > MEGABYTES else verdict


def mutants(count: int, place: Path, seed: int = 0) -> Counter[str]:
    """What came of so many mutated folders; an entry for each law that was broken."""
    base, (model, _) = two_adapters()
    sources = [delora.save(model, place / "ours"), delora.export.peft(model, place / "peft")]
    draw, seen = random.Random(seed), Counter[str]()
    for number in range(count):
        mutate(sources[number % 2], place / "mutant", draw)
        verdict = judged(copy.deepcopy(base), place / "mutant")
        if verdict not in ("read", "refused"):
            shutil.copytree(place / "mutant", place / f"broken-{number}")
            verdict = f"{verdict} (number {number})"
        seen[verdict] += 1
    return seen


def main() -> None:
    count, mutant_count = (int(a) for a in (*sys.argv[1:], "200", "10000")[:2])
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        started = time.monotonic()
        after_kills = kills(count, place / "kills")
        print(f"{count} kills of two savers, {time.monotonic() - started:.0f} s: {dict(after_kills)}")
        started = time.monotonic()
        outcome = mutants(mutant_count, place)
        print(f"{mutant_count} mutated folders, {time.monotonic() - started:.0f} s: {dict(outcome.most_common())}")
        print(f"the most memory of this process: {memory():.0f} MB")
    right = after_kills["whole"] == count and not after_kills["files too many after the next save"]
    sys.exit(0 if right and set(outcome) <= {"read", "refused"} else 1)


if __name__ == "__main__":
    main()
