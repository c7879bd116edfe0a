"""Finds inputs that a model runs with: plausible ones by the names in its forward, mended by what its errors say.

A set of inputs is better than another if the forward gets further with it: more modules inside the model return before an
error, or later lines are reached. From several first sets the search climbs by small moves: another of the plausible values
of a name, another size where an error names two, another number of dimensions or dtype, one more or one less of the optional
names, as many placeholders in a text as there are features of its images.
"""

from __future__ import annotations

import inspect
import re
import signal
import threading
import time
import types
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice, product
from typing import Any

import torch
from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig

from tests.zoo.configs import SPECIAL, peek, seek
from tests.zoo.words import code, lines, mismatches

__all__ = ["Found", "NoInputs", "at_most", "find", "flat", "run"]

Inputs = dict[str, Any]
B, T, FRAMES, BOXES = 2, 12, 4, 3  # batch, tokens, pictures of a video, what is asked in a picture


class NoInputs(RuntimeError):
    """No inputs were found with which the model runs."""


def flat(out: Any) -> Tensor:
    """All floating tensors of an output as one vector, without caches and losses."""
    found: list[Tensor] = []

    def visit(value: Any, key: str = "") -> None:
        if isinstance(value, Tensor):
            if value.is_floating_point() or value.is_complex():
                found.append(torch.view_as_real(value).flatten() if value.is_complex() else value.flatten().float())
        elif isinstance(value, dict):
            for k, v in value.items():
                if not re.search("past_key|cache|loss|mems|state_dict", str(k)):
                    visit(v, str(k))
        elif isinstance(value, (list, tuple)):
            for v in value:
                visit(v)
        elif isinstance(inner := getattr(value, "sample", None), Tensor):
            visit(inner)
        elif isinstance(inner, types.MethodType) and hasattr(value, "mode"):  # a distribution: where it has its peak
            visit(value.mode())

    visit(out)
    return torch.cat(found) if found else torch.empty(0)


def run(model: nn.Module, inputs: Inputs) -> Tensor:
    """The model's output on fresh copies of the inputs, with the same random numbers every time."""
    torch.manual_seed(0)
    return flat(model(**{k: v.clone() if isinstance(v, Tensor) else v for k, v in inputs.items()}))


# ---------------------------------------------------------------- plausible values by name


class Sizes:
    """What a configuration says of the sizes of inputs."""

    def __init__(self, config: Any) -> None:
        def number(names: list[str], default: int) -> int:
            value = seek(config, names, default)
            value = value[-1] if isinstance(value, (list, tuple)) else value
            return value if isinstance(value, int) else default

        size = seek(config, ["image_size", "img_size", "sample_size"], 32)
        self.H, self.W = (size, size) if isinstance(size, int) else (tuple(size)[-2:] if len(size) > 1 else (size[0],) * 2)
        self.p = number(["patch_size"], 8)
        self.C = number(["num_channels", "in_channels", "in_chans"], 3)
        self.tp = number(["temporal_patch_size"], 1)
        self.merge = number(["spatial_merge_size", "downsample_factor"], 1)
        self.frames = number(["num_frames", "frames"], FRAMES)
        self.mel = number(["num_mel_bins", "feature_size", "input_feat_per_channel", "input_dim", "num_mels"], 80)
        self.hidden = number(["hidden_size", "d_model", "n_embd", "dim"], 64)
        self.sound = 2 * number(["max_source_positions"], 32)
        self.vocab = number(["vocab_size"], 128)
        self.codes = number(["num_codebooks", "num_code_groups", "n_codes_total"], 0)
        self.seek = number
        self.grid = 2 * self.merge
        self.time = peek(config, "num_time_features") or 0
        self.pictures = not isinstance(config, PreTrainedConfig)

    def ids(self, *shape: int) -> Tensor:
        high = max(2, min(96, self.vocab))
        return torch.randint(min(8, high - 1), high, shape)


def values(name: str, s: Sizes) -> list[Any]:
    """Plausible values of an argument of a forward, the likeliest first; None for leaving it out."""
    R, ones = torch.randn, torch.ones
    C, H, W, p, n, hid, mel = s.C, s.H, s.W, s.p, s.grid, s.hidden, s.mel
    long = torch.long
    picture = [R(B, C, H, W), R(B * n * n, C * s.tp * p * p), R(B, 1, C, H, W), R(B, s.frames, C, H, W), R(B, 16, C * p * p)]
    picture += [R(B * n * n, C, p, p), R(B, C, s.frames, H, W), R(B, C, 64, 64), R(B, C, 128, 128), R(B, C, 224, 224)]
    picture += [R(B, 2, C, H, W), R(B, C, 256, 256), R(B, 1, H, W), R(B, 1, 3, 3, H, W)]
    length = s.seek(["context_length"], 24)
    lags = s.seek(["lags_sequence"], 0)
    states = [R(B, 16, hid), R(B * n * n, C * s.tp * p * p), R(B * 16, hid), R(B, hid, 8, 8), R(16, hid)]
    if s.pictures:  # of diffusers: what is denoised
        states = [R(B, C, 8, 8), R(B, 16, C), R(B, C, s.frames, 8, 8), R(B, s.frames, C, 8, 8), R(B, C, 16)]
        picture = [R(B, C, H, W), R(B, C, 5, H, W), R(B, s.frames, C, H, W), R(B, C, 256)]
    known: dict[str, list[Any]] = {
        "input_ids": [s.ids(B, T), *(s.ids(B, *d) % 60 for d in ([(s.codes, T), (T, s.codes)] if s.codes else []))],
        "inputs": [s.ids(B, T), R(B, T, hid), R(B, C, H, W)],
        "decoder_input_ids": [s.ids(B, 7), None],
        "labels": [s.ids(B, T), s.ids(B, 7)],
        "bbox": [torch.sort(torch.randint(0, 99, (B, T, 4)))[0]],
        "pixel_values": picture,
        "pixel_values_videos": [None, R(B, s.frames, C, H, W), R(B, s.frames, C, 64, 64), R(B * n * n, C * s.tp * p * p)],
        "input_features": [
            *(R(B, mel, s.sound), R(B, 1, 64, mel), R(B, 1, 1001, 64), R(B, 64, mel), R(B, 64, 2 * mel), R(B, mel, 100)),
            *(R(B, mel, 3000), R(B, mel, 64), R(B, 64, 160)),
        ],
        "input_values": [
            *(R(B, 4000), R(B, 1, 4000), R(B, 64, mel), R(B, s.seek(["max_length"], 64), mel), R(B, 64, 128)),
            *(R(B, 1, 64000), R(B, 2, 4000), R(B, 16000)),
        ],
        "hidden_states": states,
        "pooled_projections": [R(B, s.seek(["pooled_projection_dim"], 64))],
        "img_ids": [torch.zeros(16, 3), torch.zeros(16, 4), torch.zeros(B, 16, 3), torch.zeros(B, 16, 4)],
        "txt_ids": [torch.zeros(9, 3), torch.zeros(9, 4), torch.zeros(B, 9, 3), torch.zeros(B, 9, 4)],
        "guidance": [ones(B)],
        "img_shapes": [[(1, 4, 4)] * B, [[(1, 4, 4)]] * B],
        "txt_seq_lens": [[9] * B],
        "encoder_attention_mask": [ones(B, 9, dtype=long), ones(B, 9)],
        "encoder_hidden_states_mask": [ones(B, 9, dtype=long), ones(B, 9)],
        "added_cond_kwargs": [{"resolution": None, "aspect_ratio": None}, {"text_embeds": R(B, 32), "time_ids": R(B, 6)}],
        "encoder_hidden_states": [R(B, 9, s.seek(TEXT_WIDTHS, 64))] if s.pictures else [None, R(B, 9, hid)],
        "inputs_embeds": [None, R(B, T, hid)],
        "past_values": [R(B, length + lags), R(B, length, s.seek(["num_input_channels"], 1)), R(B, length), R(B, 40)],
        "past_time_features": [R(B, length + lags, s.time), R(B, length + lags, 1)],
        "past_observed_mask": [ones(B, length + lags)],
        "future_values": [R(B, s.seek(["prediction_length"], 6))],
        "future_time_features": [R(B, s.seek(["prediction_length"], 6), s.time), R(B, s.seek(["prediction_length"], 6), 1)],
        "pixel_attention_mask": [None, ones(B, 16), ones(B, H, W), ones(B, 1, H, W)],
        "flattened_patches": [torch.cat([ones(B, 9, 2), R(B, 9, C * p * p)], -1)],
        "image_sizes": [torch.tensor([[H, W]] * B), [(H, W)] * B],
        "spectrogram": [R(B, 20, mel)],
        "audio_values": [R(B, 1, 2000), R(B, 1, 16 * 32)],
        "sample": picture,
        "states": [R(B, 3, s.seek(["state_dim"], 17))],
        "actions": [R(B, 3, s.seek(["act_dim"], 4))],
        "rewards": [R(B, 3, 1)],
        "returns_to_go": [R(B, 3, 1)],
        "timesteps": [torch.arange(3).repeat(B, 1), torch.tensor([3, 7])],
        "timestep": [torch.tensor([3, 7]), torch.tensor([3.0, 7.0])],
        "audio_codes": [s.ids(B, 2, T) % 60, s.ids(B, s.codes or 2, T) % 60, s.ids(1, B, s.codes or 2, T) % 60],
        "visual_embeds": [R(B, 4, s.seek(["visual_embedding_dim"], 64))],
        "visual_feats": [R(B, 4, s.seek(["visual_feat_dim"], 2048))],
        "visual_pos": [torch.rand(B, 4, 4)],
        "image": [torch.rand(B, C, 64, 64)],
        "qformer_input_ids": [s.ids(B, 6)],
        "x": [R(B, C, H, W), R(B, T, hid), R(B, C, 224, 224), R(B, C, 256, 256)],
        "features": [R(B, 16, hid)],
        "query_embeds": [R(B, 8, hid), R(1, 8, hid)],
        "input_points": [torch.rand(B, 1, BOXES, 2) * min(H, W)],
        "input_boxes": [None, torch.rand(B, BOXES, 4) * min(H, W)],
        "grid_hw": [torch.tensor([[n, n]] * B)],
        "cu_seqlens": [torch.arange(B + 1) * n * n],
        "spatial_shapes": [torch.tensor([[4, 4]] * B)],
        "input_features_mask": [ones(B, s.sound, dtype=long)],
        "feature_lens": [torch.tensor([s.sound] * B)],
        "return_loss": [False],
        "use_cache": [False],
        "num_patches": [16],
        "height": [4 if s.pictures else n],
        "width": [4 if s.pictures else n],
        "num_frames": [1, 4],
        "attention_mask": [ones(B, T, dtype=long), None],
        "mm_token_type_ids": [torch.zeros(B, T, dtype=long)],
        "token_type_ids": [torch.zeros(B, T, dtype=long)],
        "position_ids": [torch.arange(T).repeat(B, 1)],
        "cache_position": [torch.arange(T)],
        "task_inputs": [s.ids(B, T)],
        "patch_lengths": [torch.full((B, 4), 3)],
        "langs": [torch.zeros(B, T, dtype=long)],
    }
    if name in known:
        return known[name]
    kinds: list[tuple[str, list[Any]]] = [
        (r"(.*_)?grid(_thw|s)?", [torch.tensor([[1, n, n]] * B), torch.tensor([[n, n]] * B)]),
        (r".*(pixel|image|picture|frame|video)s?(_values?)?(_\w+)?", picture),
        (r".*(lengths?|lens|sizes)", [torch.tensor([T] * B), torch.tensor([[H, W]] * B)]),
        (r".*masks?", [ones(B, T, dtype=long), ones(B, T, dtype=torch.bool), ones(B, T), ones(B, s.sound, dtype=long)]),
        (r".*position_embeddings", [(R(T, 16), R(T, 16)), (R(B, T, 16), R(B, T, 16)), R(B, T, hid)]),
        (r".*(_ids|tokens|labels|index|indices|codes)", [s.ids(B, T), s.ids(B, 7), torch.zeros(B, T, dtype=long), s.ids(B)]),
        (r".*(audio|wave|speech|sound)\w*", [R(B, 4000), R(B, 1, 4000), R(B, mel, s.sound), R(B, T, hid)]),
        (r".*(num_|_size$|step).*", [2, 4, torch.tensor([3, 7])]),
        (r".*", [R(B, T, hid), R(B, hid), R(B, C, H, W), R(B, hid, 8, 8), s.ids(B, T)]),
    ]
    return next(v for pattern, v in kinds if re.fullmatch(pattern, name))


TEXT_WIDTHS = ["caption_channels", "joint_attention_dim", "text_embed_dim", "text_dim", "cross_attention_dim", "cap_feat_dim"]
DENOISED = ["hidden_states", "encoder_hidden_states", "timestep", "pooled_projections", "img_ids", "txt_ids", "guidance"]
DENOISED += ["encoder_attention_mask", "encoder_hidden_states_mask", "img_shapes", "txt_seq_lens", "sample"]
TEXT = ["input_ids", "decoder_input_ids", "bbox", "attention_mask", "use_cache", "inputs"]
MEDIA = [
    *("input_ids", "inputs", "decoder_input_ids", "bbox", "pixel_values", "pixel_values_videos", "input_features"),
    *("input_values", "past_values", "pixel_attention_mask", "flattened_patches", "image_sizes", "spectrogram", "audio_values"),
    *("sample", "states", "audio_codes", "visual_embeds", "visual_feats", "visual_pos", "image", "qformer_input_ids", "x"),
    "features",
]
BESIDE = ["use_cache", "mm_token_type_ids", "attention_mask", "image_grid_thw", "grid_thw", "spatial_shapes", "return_loss"]
BESIDE += ["past_time_features", "past_observed_mask", "future_values", "future_time_features"]


def _signature(model: nn.Module) -> tuple[list[str], set[str]]:
    """The names that a forward takes, and those that it has to be given."""
    parameters = inspect.signature(model.forward).parameters.values()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return [p.name for p in named], {p.name for p in named if p.default is p.empty}


def _starts(model: nn.Module, sizes: Sizes, many: int) -> Iterator[Inputs]:
    """First sets of inputs, the richest first: every product of the values of the names that are given."""
    names, needed = _signature(model)
    media, tight = set(MEDIA), needed | {getattr(model, "main_input_name", "input_ids")}
    sets = [media, media - {"image_sizes"}, tight | {"decoder_input_ids"}, tight, needed | set(TEXT)]
    seen: set[tuple[str, ...]] = set()
    if sizes.pictures:
        usual = needed | set(DENOISED)
        sets = [usual - {"guidance"}, usual, usual - {"guidance"} | {"num_frames", "height", "width"}, needed]
    for wanted in [*sets, needed | {"inputs_embeds"}, needed | media | {"hidden_states", "encoder_hidden_states"}]:
        main = [k for k in names if k in wanted | needed and k not in BESIDE]
        beside = [k for k in names if k in BESIDE and (k in needed or _goes_with(k, main))]
        if (key := (*main, *beside)) in seen:
            continue
        seen.add(key)
        rest = {k: v for k in beside if (v := values(k, sizes)[0]) is not None}
        options = {k: [v for v in values(k, sizes) if v is not None or k not in needed] for k in main}
        order = sorted(main, key=lambda k: len(options[k]))  # that of the most forms changes fastest
        for chosen in islice(product(*(options[k] for k in order)), many):
            yield rest | {k: v for k, v in zip(order, chosen, strict=True) if v is not None}


def _goes_with(name: str, main: list[str]) -> bool:
    if name in ("attention_mask", "mm_token_type_ids"):
        return "input_ids" in main
    return "pixel_values" in main if "grid" in name or "spatial" in name else True


# ---------------------------------------------------------------- trying


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise a TimeoutError in the block when it has computed for so long (in the main thread, where signals arrive)."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"more than {seconds:g} seconds")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    old, begun = signal.signal(signal.SIGPROF, late), time.process_time()
    outer = signal.setitimer(signal.ITIMER_PROF, seconds)[0]
    try:
        yield
    finally:  # the block around this one goes on with what is left of its time
        signal.setitimer(signal.ITIMER_PROF, max(0.01, outer - (time.process_time() - begun)) if outer else 0)
        signal.signal(signal.SIGPROF, old)


class Tried:
    """One call: the output, or the error and how far it got."""

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        self.inputs, self.error, done = inputs, None, [0]

        def count(*_: Any) -> None:
            done[0] += 1

        hook = nn.modules.module.register_module_forward_hook(count)
        self.score: tuple[int, ...] = ()
        try:
            with torch.no_grad(), at_most(2.0):
                y = run(model, inputs)
            good = y.numel() > 0 and bool(y.isfinite().any()) and y[y.isfinite()].abs().max() > 0
            if not good:
                self.error = ValueError("its output is empty, zero or not finite")
                self.score = (done[0],)
        except Exception as error:
            self.error = error
            self.score = (done[0], *lines(error))
        finally:
            hook.remove()

    def words(self) -> str:
        return f"{type(self.error).__name__}: {str(self.error)[:150]}"


class Found:
    """Inputs that a model runs with, and what the first tries said."""

    def __init__(self, inputs: Inputs, errors: list[str]) -> None:
        self.inputs, self.errors = inputs, errors


def find(model: nn.Module, seconds: float = 4.0, near: Inputs | None = None) -> Found:
    """Inputs with which the model gives a finite output that is not zero. ``near`` are some to begin with.

    Raises:
        NoInputs: there are none within this time; its ``score`` says how far the best got.
    """
    torch.manual_seed(0)
    sizes, end, errors = Sizes(getattr(model, "config", None)), time.process_time() + seconds, []
    names = set(_signature(model)[0])
    best: dict[tuple[str, ...], Tried] = {}
    runs: Tried | None = None
    if near is not None and (found := _climb(model, Tried(model, near), sizes, time.process_time() + seconds / 2)):
        if found.error is None:
            return Found(found.inputs, errors)
        best[tuple(found.inputs)] = found
    for inputs in _starts(model, sizes, 24) if near is None else ():
        for _ in range(5):
            tried = Tried(model, inputs)
            if tried.error is None:
                runs = tried
                break
            errors.append(tried.words())
            if tried.score > (b.score if (b := best.get(key := tuple(inputs))) else ()):
                best[key] = tried
            if (more := _placeholders(tried.error, inputs, peek(model, "config"))) is None:
                break
            inputs = more
        if runs or time.process_time() > end - seconds / 2:
            break
    richer = [t for t in best.values() if runs is None or _media(names, t.inputs) > _media(names, runs.inputs)]
    for start in sorted(richer, key=lambda t: t.score, reverse=True)[:4]:
        found = _climb(model, start, sizes, end, least=_media(names, start.inputs) if runs else 0)
        if found.error is None:
            return Found(found.inputs, errors[:1])
        best[tuple(found.inputs)] = found
        errors.append(found.words())
    if runs:  # not all that it can take, but it runs
        return Found(runs.inputs, errors[:1])
    last = max(best.values(), key=lambda t: t.score, default=None)
    words = " / ".join(dict.fromkeys([*errors[:2], *([last.words()] if last else [])]))
    failure = NoInputs(f"no inputs found: {words}")
    failure.score = last.score if last else ()  # type: ignore[attr-defined]
    failure.near, failure.code = (last.inputs, code(last.error)) if last else (None, "")  # type: ignore[attr-defined]
    raise failure


def _media(names: set[str], inputs: Inputs) -> int:
    """How many pictures, sounds and texts a set of inputs has of those that the forward takes."""
    return sum(
        k in inputs for k in names & {"input_ids", "pixel_values", "input_features", "input_values", "decoder_input_ids"}
    )


def _climb(model: nn.Module, start: Tried, sizes: Sizes, end: float, least: int = 0) -> Tried:
    """From a set of inputs by moves that get further, until it runs or none gets further; never to fewer media than these."""
    here, names = start, set(_signature(model)[0])
    while here.error is not None:
        for inputs in _moves(model, here, sizes):
            if time.process_time() > end:
                return here
            if _media(names, inputs) < least:
                continue
            tried = Tried(model, inputs)
            if tried.error is None:
                return tried
            if tried.score > here.score:
                here = tried
                break
        else:
            return here
    return here


# ---------------------------------------------------------------- moves


def _moves(model: nn.Module, tried: Tried, sizes: Sizes) -> Iterator[Inputs]:
    """Sets of inputs near this one that are not large, the likeliest to get further first."""
    for inputs in _changes(model, tried, sizes):
        if all(v.numel() <= 2_000_000 for v in inputs.values() if isinstance(v, Tensor)):
            yield inputs


def _changes(model: nn.Module, tried: Tried, sizes: Sizes) -> Iterator[Inputs]:
    inputs, text = tried.inputs, str(tried.error)
    names, needed = _signature(model)
    if more := _placeholders(tried.error, inputs, peek(model, "config")):
        yield more
    for name in re.findall(r"'(\w+)'", text):
        if name in names and name not in inputs:
            for value in values(name, sizes):
                yield inputs | {name: value}
    asked = re.findall(r"\w+", code(tried.error)) if "None" in text else []
    for name in dict.fromkeys(n for n in asked if n in names and n not in inputs):
        for value in values(name, sizes):
            if value is not None:
                yield inputs | {name: value}
    numbers = list(dict.fromkeys(int(x) for x in re.findall(r"(?<![\w.])\d+(?![\w.])|(?<=\d[x*])\d+|\d+(?=[x*]\d)", text)))[:6]
    for old, new in dict.fromkeys([*mismatches(text), *product(numbers, numbers)]):
        if old != new and 0 < new <= 4096:
            for name, value in inputs.items():
                if isinstance(value, Tensor) and old in value.shape:
                    yield inputs | {name: _resized(value, [new if d == old else d for d in value.shape])}
                    for i, d in enumerate(value.shape):
                        if d == old and i and list(value.shape).count(old) > 1:
                            yield inputs | {name: _resized(value, [*value.shape[:i], new, *value.shape[i + 1 :]])}
    for i in range(4):  # those that are of one form change together
        together = {k: v[i] for k in inputs if k.endswith("_ids") and len(v := values(k, sizes)) > i}
        if len(together) > 1:
            yield inputs | together
    for name in dict.fromkeys([*inputs, *needed]):
        for value in values(name, sizes):
            if value is None:
                yield {k: v for k, v in inputs.items() if k != name}
            elif not _same(value, inputs.get(name)):
                yield inputs | {name: value}
    for name in names:
        if name not in inputs and not re.match("output_|return_|past_key|labels|.*cache|kwargs|interpolate", name):
            for value in values(name, sizes):
                if value is not None:
                    yield inputs | {name: value}
        elif name in inputs and name not in needed:
            yield {k: v for k, v in inputs.items() if k != name}
    for name, value in inputs.items():
        if not isinstance(value, Tensor):
            continue
        if not value.is_floating_point():
            yield inputs | {name: value % 4}
            yield inputs | {name: value.bool()}
            yield inputs | {name: value.float()}
        if value.ndim < 5 and not name.endswith("input_ids"):
            yield inputs | {name: value.unsqueeze(1)}
            yield inputs | {name: value.unsqueeze(-1)}
        if value.ndim > 2:
            yield inputs | {name: value.flatten(0, 1)}
            yield inputs | {name: value.transpose(1, 2).contiguous()}
            yield inputs | {name: value[:, 0]}
        yield inputs | {name: [*value]}
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.ndim > 1:
            for factor, last in product((2, 4, 8, 0.5), (1, 2)):
                new = [int(d * factor) if i >= value.ndim - last else d for i, d in enumerate(value.shape)]
                if value.ndim > last and min(new) > 0 and max(new) <= 1024:
                    yield inputs | {name: _resized(value, new)}


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and not isinstance(a, Tensor) and a == b


def _resized(t: Tensor, shape: list[int]) -> Tensor:
    if t.is_floating_point():
        return torch.randn(shape)
    source = t.flatten()
    count = torch.Size(shape).numel()
    return source.repeat(-(-count // max(1, len(source))))[:count].reshape(shape)


def _kinds(ids: Tensor) -> Tensor:
    return (ids == SPECIAL["image"]).long() + 2 * (ids == SPECIAL["video"]).long()


def _placeholders(error: BaseException | None, inputs: Inputs, config: Any) -> Inputs | None:
    """As many image (video, audio) tokens in the text as the failed call had features, read from its frames."""
    ids = inputs.get("input_ids")
    if (
        not isinstance(ids, Tensor)
        or ids.ndim != 2
        or not re.search("tokens|placeholder|shape mismatch|masked", str(error), re.I)
    ):
        return None
    tb = error.__traceback__ if error else None
    while tb:
        f = tb.tb_frame.f_locals
        for what in ("image", "video", "audio"):
            keys = (f"{what}_features", f"{what}_embeds", f"{what}_hidden_states", f"{what}_embeddings", f"{what}_outputs")
            features = next((f[k] for k in keys if isinstance(f.get(k), Tensor)), None)
            token = seek(config, [f"{what}_token_id", f"{what}_token_index", f"{what}_soft_token_id"])
            token = peek(config, f"{what}_token_id") if token is None else token
            if features is None or not isinstance(token, int):
                continue
            embeds = f.get("inputs_embeds")
            width = embeds.shape[-1] if isinstance(embeds, Tensor) else features.shape[-1]
            each = -(-features.numel() // width // len(ids))
            if 0 < each < 600 and (ids == token).sum() != each * len(ids):
                new = torch.cat([ids[:, :2], torch.full((len(ids), each), token), ids[:, -6:]], 1)
                like = {"attention_mask": torch.ones_like(new), "mm_token_type_ids": _kinds(new)}
                like |= {"token_type_ids": torch.zeros_like(new)}
                return inputs | {"input_ids": new} | {k: v for k, v in like.items() if k in inputs}
        tb = tb.tb_next
    return None
