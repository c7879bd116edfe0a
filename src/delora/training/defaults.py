"""Settings that need no search: one place for the figures that `delora finetune` starts from, each with its reason.

Every one of them is overridden by ``key=value``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Setting", "Sketch", "adapter", "batch_size", "epochs", "longest", "pictures", "precision", "quantile", "training"]

# The reach of all linear layers, and of a text-to-image model's attention.
RANK, REACH, PICTURE_REACH, TARGETS = 8, 0.03, 0.1, "all-linear"
# The learning rates of DeLoRA (with a new head, on chats, on pairs), of other methods, and of modules trained whole.
RATE, CHAT_RATE, PAIR_RATE, OTHER_RATE, HEAD_RATE = 3e-2, 3e-3, 1e-3, 1e-3, 1e-3
# Of rows that a new head learns from, short as a rule, and of others.
LARGEST_BATCH_OF_HEAD, LARGEST_BATCH, STEPS_AN_EPOCH = 32, 8, 20
# Of a text-to-image model: where its adapter is, at which rate, how long for each photograph, and within which steps.
ATTENTION, PICTURE_RATE, EACH, LEAST_STEPS, MOST_STEPS = r".*attn[12]?\.(to_q|to_k|to_v|to_out\.0)", 2e-2, 200, 400, 1400
COVERED = 0.99  # of the rows that shall not be cut
# Up to so many rows to train on, so many epochs: of a model with a new head, which knows nothing yet, and of any other.
NEW_EPOCHS, EPOCHS = ((500, 10), (2_000, 6), (20_000, 3)), ((1_000, 3), (10_000, 2))


@dataclass(frozen=True)
class Setting:
    """A key of a recipe, its value, and why it has this value.

    >>> print(Setting("adapter.r", 8, "a small rank").key)
    adapter.r
    """

    key: str
    value: Any
    why: str


@dataclass(frozen=True)
class Sketch:
    """What a task tells of a model and a table before anything is trained.

    Args:
        model: the model on the meta device, without an adapter.
        head: the modules that must be trained whole, for the checkpoint lacks them.
        lengths: the number of tokens of each row to train on, uncut.
        limit: the most tokens that the model takes.
        example: one row as the model sees it.
        batch: a function of a number of rows and their length, which gives a batch of that shape to train on.

    >>> Sketch(nn.Linear(2, 2), [], [3, 5], 512, "[CLS] Hello. [SEP]").limit
    512
    """

    model: nn.Module
    head: list[str]
    lengths: list[int]
    limit: int
    example: str
    batch: Callable[[int, int], dict[str, Tensor]] | None = None


def quantile(lengths: Sequence[int], share: float) -> int:
    """The smallest of the lengths that at least this share of them do not exceed.

    >>> quantile([3, 1, 2, 10], 0.75)
    3
    """
    return sorted(lengths)[max(0, math.ceil(share * len(lengths)) - 1)]


def longest(sketch: Sketch) -> Setting:
    """``data.max_tokens``: what holds 99 % of the rows, in steps of eight, as far as the model goes.

    >>> longest(Sketch(nn.Linear(2, 2), [], [30] * 99 + [400], 512, "")).value
    32
    """
    needed = -(-quantile(sketch.lengths, COVERED) // 8) * 8
    if needed > sketch.limit:
        return Setting("data.max_tokens", sketch.limit, "the most that the model takes")
    return Setting(
        "data.max_tokens", max(8, needed), f"holds {COVERED:.0%} of the rows; the longest has {max(sketch.lengths):,}"
    )


def batch_size(rows: int, head: bool) -> Setting:
    """``train.batch_size``: a power of two that leaves an epoch twenty steps, from 4 to 32; of a language model to 8.

    >>> [batch_size(rows, head=True).value for rows in (20, 200, 5000)], batch_size(5000, head=False).value
    ([4, 8, 32], 8)
    """
    size, largest = 4, LARGEST_BATCH_OF_HEAD if head else LARGEST_BATCH
    while 2 * size <= largest and 2 * size * STEPS_AN_EPOCH <= rows:
        size *= 2
    return Setting("train.batch_size", size, f"{-(-rows // size):,} steps an epoch")


def epochs(rows: int, head: bool) -> Setting:
    """``train.epochs``: the more, the fewer rows there are.

    >>> [epochs(rows, head=True).value for rows in (100, 5000, 100_000)], epochs(100, head=False).value
    ([10, 3, 1], 3)
    """
    value = next((n for most, n in (NEW_EPOCHS if head else EPOCHS) if rows <= most), 1)
    return Setting("train.epochs", value, f"{rows:,} rows to train on; the best epoch by validation is kept")


def precision() -> Setting:
    """``train.precision``: bf16 where an accelerator computes in it, else fp32."""
    if torch.cuda.is_available() and torch.cuda.is_bf16_supported():
        return Setting("train.precision", "bf16", "this device computes in it; what trains is in fp32")
    return Setting("train.precision", "fp32", "right on every device")


def adapter(method: str, ranked: bool, head: Sequence[str], reach: float = REACH) -> list[Setting]:
    """The keys of ``adapter`` for a method; ``ranked``: it has a rank ``r``; ``reach`` is for DeLoRA.

    >>> [setting.key for setting in adapter("delora", True, ["classifier"])]
    ['adapter.method', 'adapter.r', 'adapter.reach', 'adapter.targets', 'adapter.also_train']
    """
    settings = [Setting("adapter.method", method, "the default" if method == "delora" else "given")]
    if ranked:
        settings.append(Setting("adapter.r", RANK, "a small rank; a higher one costs more and seldom helps on one task"))
    if method == "delora":
        settings.append(Setting("adapter.reach", reach, f"a layer changes by about {reach:.0%} of its weights' norm"))
    settings.append(Setting("adapter.targets", TARGETS, "every linear layer but the head"))
    if head:
        settings.append(Setting("adapter.also_train", list(head), "new, so trained whole"))
    return settings


def training(method: str, rows: int, head: bool, pairs: bool = False) -> list[Setting]:
    """The keys of ``train``. ``pairs``: it learns a preference.

    >>> [setting.value for setting in training("delora", 400, head=True) if setting.key == "train.lr"]
    [0.03]
    """
    settings = [epochs(rows, head), batch_size(rows, head)]
    if method == "delora" and pairs:
        settings.append(
            Setting(
                "train.lr", PAIR_RATE, "a preference is soon learned: of easy pairs in eight steps; no rate was searched for"
            )
        )
    elif method == "delora" and not head:
        settings.append(Setting("train.lr", CHAT_RATE, "the best of four for 40 chats and for 120; a higher one forgets more"))
    elif method == "delora":
        settings.append(
            Setting("train.lr", RATE, "the reach bounds the change: from 0.003 to 0.1 film reviews were learned much alike")
        )
    else:
        settings.append(Setting("train.lr", OTHER_RATE, "usual for adapters; it may need a search"))
    if head:
        settings.append(Setting("train.head_lr", HEAD_RATE, "usual for a new head"))
    return [*settings, precision()]


def pictures(method: str, ranked: bool, photographs: int, resolution: int, guidance: float, judged: bool) -> list[Setting]:
    """The keys of ``subject``, ``adapter`` and ``train`` for photographs of one's own.

    >>> settings = {setting.key: setting.value for setting in pictures("delora", True, 5, 512, 7.5, judged=False)}
    >>> settings["train.steps"], settings["subject.judge"]
    (1000, False)
    """
    steps = min(MOST_STEPS, max(LEAST_STEPS, EACH * photographs))
    judge = "given" if judged else "no other model is needed; subject.judge=true has DINO and CLIP score the pictures"
    method_settings = [
        Setting(each.key, ATTENTION, "the attention") if each.key == "adapter.targets" else each
        for each in adapter(method, ranked, [], PICTURE_REACH)
    ]
    rate = PICTURE_RATE if method == "delora" else OTHER_RATE / 10
    return [
        Setting("subject.judge", judged, judge),
        Setting("subject.resolution", resolution, "the size that the model draws"),
        Setting("subject.guidance", guidance, "with which diffusers draws with such a model"),
        Setting("subject.class_images", 100, "drawn by the model itself, so that it does not forget the class"),
        Setting("subject.crops", 40, "random ones of each photograph"),
        *method_settings,
        Setting("train.steps", steps, f"{EACH} for each photograph, at least {LEAST_STEPS}, at most {MOST_STEPS:,}"),
        Setting("train.batch_size", 1, "a photograph and a picture of the class"),
        Setting("train.lr", rate, "the paper's for pictures" if method == "delora" else "usual for adapters of pictures"),
        Setting("train.schedule", "constant", "so that training can be stopped, or go on, at any step"),
        Setting("train.warmup", 0.0, "as with a constant rate"),
        Setting("train.clip", 1.0, "single photographs have large gradients"),
        Setting("train.save_steps", 200, "as often as a sample picture is drawn"),
    ]
