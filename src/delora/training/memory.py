"""The memory of a training step, found before anything is loaded: one step is run on tensors that have shapes and no memory.

    peak = W + 2 G + max(G, max over the step's moments of (S(t) + G(t)))

W: the bytes of the model's weights; G: of what trains, of which AdamW keeps two moments; S(t) and G(t): of the activations, and
of the gradients made so far, that live at the moment t.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any, cast

import psutil
import torch
from accelerate.utils import convert_to_fp32
from torch import Tensor, nn

from delora import torch_private
from delora.training.config import ConfigError

__all__ = ["Memory", "available", "checkpoint", "estimate", "size", "told"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BLOCKS = (1, 2)  # of many equal blocks so many are run, twice; what one more takes is known then


@dataclass(frozen=True)
class Memory:
    """The bytes of a training step: ``peak``, the most at any moment, and what it is made of.

    ``weights``: the model's; ``trained``: the gradients and AdamW's two moments; ``saved``: what the forward pass leaves for
    the backward pass; ``operation``: the most that is needed beside these, as for the logits and their softmax.

    >>> print(Memory(peak=4_100_000_000, weights=10**9, trained=10**8, saved=2 * 10**9, operation=10**9))
    4.1 GB (weights 1.0 GB, gradients and moments 100 MB, saved for the backward pass 2.0 GB, the largest operation 1.0 GB)
    """

    peak: int
    weights: int
    trained: int
    saved: int
    operation: int

    def __str__(self) -> str:
        parts = {
            "weights": self.weights,
            "gradients and moments": self.trained,
            "saved for the backward pass": self.saved,
            "the largest operation": self.operation,
        }
        return f"{size(self.peak)} ({', '.join(f'{name} {size(part)}' for name, part in parts.items())})"


def size(n: int) -> str:
    """A number of bytes as a text, in powers of 1000.

    >>> size(12_345_678), size(4_100_000_000)
    ('12 MB', '4.1 GB')
    """
    return f"{n / 1e9:,.1f} GB" if n >= 1e9 else f"{n / 1e6:.0f} MB" if n >= 1e6 else f"{n / 1e3:.0f} kB"


def estimate(
    model: nn.Module, batch: Mapping[str, Tensor], precision: str = "fp32", device: str = "cpu", accumulation: int = 1
) -> Memory:
    """The memory of one training step, as this module's equation says, without the memory itself.

    ``model(**batch)["loss"]`` is what is trained. A model of many equal blocks is run with one and with two of them; each
    further one takes what the second took.

    Args:
        model: with its adapter, on the meta device as a rule; its tensors are left as they are.
        batch: tensors of the shapes and dtypes of a step's; their values are not looked at.
        precision: "fp32", or "bf16" or "fp16" of autocast.
        device: where it will be trained; its kind decides which kernels save what.
        accumulation: of how many backward passes a step consists.

    Raises:
        RuntimeError: what the model does depends on the values, not on the shapes alone. Other errors are the model's own.

    >>> class Net(nn.Linear):
    ...     def forward(self, x):
    ...         return {"loss": super().forward(x).square().mean()}
    >>> found = estimate(Net(100, 100, bias=False), {"x": torch.zeros(50, 100)})
    >>> found.weights, found.trained
    (40000, 120000)
    """
    weights = _bytes([*model.parameters(), *model.buffers()])
    gradients = _bytes([p for p in model.parameters() if p.requires_grad])
    stack = _stack(model)
    if stack is None:
        saved, most = _step(model, batch, precision, device)
    else:
        (few, more), n = BLOCKS, len(stack.equal)
        with stack.shortened(few):
            one = _step(model, batch, precision, device)
        with stack.shortened(more):
            two = _step(model, batch, precision, device)
        saved, most = (b + (b - a) * (n - more) // (more - few) for a, b in zip(one, two, strict=True))
    kept = gradients if accumulation > 1 else 0  # of the earlier passes
    update = 2 * gradients if torch.device(device).type == "cuda" else gradients  # there AdamW takes all parameters at once
    peak = weights + 2 * gradients + max(update, most + kept)
    return Memory(peak, weights, 3 * gradients, saved, max(0, peak - weights - 3 * gradients - saved))


def checkpoint(model: nn.Module) -> None:
    """Have a model of transformers or diffusers, or one inside the model, keep the inputs of its blocks alone for the backward
    pass, which computes the rest again. In evaluation nothing changes.

    Raises:
        ConfigError: none of them offers that.
    """
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")  # of newer and older versions of transformers
    for module in model.modules():
        offered: Any = module
        try:
            if (name := next((name for name in names if hasattr(module, name)), None)) is not None:
                return getattr(offered, name)({"use_reentrant": False})
            if hasattr(module, "enable_gradient_checkpointing"):  # of diffusers
                return offered.enable_gradient_checkpointing()
        except ValueError as error:
            raise ConfigError(f"train.checkpointing = true: {error}") from error
    raise ConfigError(f"train.checkpointing = true: a {type(model).__name__} does not offer it")


def available(device: str = "cpu") -> int:
    """The bytes that a device, such as "cuda" or "cpu", has left for this process.

    >>> available() > 0
    True
    """
    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def told(found: Memory, left: int, device: str, checkpointing: bool = False) -> list[str]:
    """An estimate beside what a device has left, and what to do if that is less; ``checkpointing``: it is on already.

    >>> told(Memory(3 * 10**9, 10**9, 0, 2 * 10**9, 0), 2 * 10**9, "cpu")[1].partition(":")[0]
    'WARNING'
    """
    lines = [f"memory, estimated: {found} of {size(left)} that the {device} has left"]
    if found.peak > left:
        least = found.weights + found.trained
        again = "" if checkpointing else "train.checkpointing=true, or "
        do = (
            f"{again}lower train.batch_size (with train.accumulation raised as much, a step stays the same), or take fewer "
            "tokens or smaller pictures"
            if least < left
            else "its weights alone do not fit: choose a smaller model, or train.weights=bf16 for a language or picture model"
        )
        lines.append(f"WARNING: that is {size(found.peak - left)} too much, and the run may end without a word: {do}")
    return lines


# ---------------------------------------------------------------- one step without memory


class _Living:
    """How many bytes the tensors take that live now, and the most so far; one memory of several tensors counts once."""

    def __init__(self) -> None:
        self.held: dict[int, Any] = {}
        self.now = self.most = 0

    def see(self, t: Tensor) -> None:
        memory = t.untyped_storage()
        key, size = memory._cdata, memory.nbytes()
        if key not in self.held:
            self.held[key] = weakref.ref(memory, lambda _: self._freed(key, size))
            self.now += size
            self.most = max(self.most, self.now)

    def _freed(self, key: int, size: int) -> None:
        del self.held[key]
        self.now -= size


def _step(model: nn.Module, batch: Mapping[str, Tensor], precision: str, device: str) -> tuple[int, int]:
    """The bytes beside the weights that live after the forward pass, and the most at any moment of a step."""
    living, kind = _Living(), torch.device(device).type
    with torch_private.without_memory(living.see), _moved(model, device), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what there is to warn of in a real step is said there
        given = {key: torch.empty(t.shape, dtype=t.dtype, device=device) for key, t in batch.items()}
        before = living.now
        with torch.autocast(kind, DTYPES[precision], enabled=precision != "fp32"):
            loss = convert_to_fp32(model(**given))["loss"]
        saved = living.now - before
        loss.backward()
    return saved, living.most - before


@contextmanager
def _moved(model: nn.Module, device: str) -> Iterator[None]:
    """A context in which the model's tensors are others, empty ones, on this device, and the model trains."""
    was: list[tuple[dict[str, Any], str, Tensor]] = []
    new: dict[int, Tensor] = {}
    both: Any = [(module._parameters, module._buffers) for module in model.modules()]
    registries = cast(list[dict[str, Any]], [registry for pair in both for registry in pair])
    training = model.training
    for registry in registries:
        for key, t in registry.items():
            if t is not None:
                if id(t) not in new:  # tied weights stay tied
                    empty = torch.empty(t.shape, dtype=t.dtype, device=device)
                    new[id(t)] = nn.Parameter(empty, t.requires_grad) if isinstance(t, nn.Parameter) else empty
                was.append((registry, key, t))
                registry[key] = new[id(t)]
    try:
        model.train()
        yield
    finally:
        model.train(training)
        for registry, key, t in was:
            registry[key] = t


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum({id(t): t.numel() * t.element_size() for t in tensors}.values())


# ---------------------------------------------------------------- many equal blocks


@dataclass(frozen=True)
class _Stack:
    """The longest run of blocks of one shape in a model: ``equal`` are their places in the list ``owner._modules[name]``."""

    owner: nn.Module
    name: str
    equal: list[int]

    @contextmanager
    def shortened(self, n: int) -> Iterator[None]:
        """A context in which only ``n`` of the blocks are there."""
        blocks = self.owner._modules[self.name]
        left_out = set(self.equal[n:])
        self.owner._modules[self.name] = nn.ModuleList(b for i, b in enumerate(blocks) if i not in left_out)  # type: ignore
        try:
            yield
        finally:
            self.owner._modules[self.name] = blocks


def _stack(model: nn.Module) -> _Stack | None:
    found = None
    for owner in model.modules():
        for name, blocks in owner._modules.items():
            if type(blocks) is nn.ModuleList:
                for _, run in groupby(range(len(blocks)), key=lambda i: _shape(blocks[i])):
                    equal = list(run)
                    if len(equal) > max(BLOCKS) and (found is None or len(equal) > len(found.equal)):
                        found = _Stack(owner, name, equal)
    return found


def _shape(block: nn.Module) -> list[Any]:
    return [type(block), *((name, p.shape, p.dtype, p.requires_grad) for name, p in block.named_parameters())]
