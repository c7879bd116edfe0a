"""Adapters as PEFT's own methods, which `delora.load` reads back as they were and PEFT goes on training.

The other way to write an adapter for PEFT is as the LoRA that any low-rank change is (``peft.as_lora``).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from delora.formats.patterns import Patterns
from delora.hosts import Conv1D, Convolution, Embedding, Slot
from delora.layer import Placed
from delora.methods import IA3, OFT, DeLoRA, DoRA, LoRA
from delora.parts import Slices

__all__ = ["as_delora", "as_itself", "beyond_peft", "by_pattern", "feedforward", "groups_of", "lora_factors"]

Parts = tuple[dict[str, Any], dict[str, Tensor]]  # a configuration of PEFT, and the tensors by name


def as_itself(layers: dict[str, Placed]) -> Parts:
    """PEFT's configuration and the tensors by name, for adapters of a method that PEFT has as well.

    Raises:
        ValueError: PEFT has no such method, or it computes something else.

    >>> from delora.layer import attach
    >>> config, tensors = as_itself({"query": Placed(attach(DoRA(r=2, alpha=8), nn.Linear(4, 3)), nn.Linear(4, 3))})
    >>> config["use_dora"], config["lora_alpha"], list(tensors)
    (True, 8, ['query.lora_A.weight', 'query.lora_B.weight', 'query.lora_magnitude_vector'])
    """
    kinds = {type(a.method) for a in layers.values()}
    if len(kinds) > 1 or next(iter(kinds)) not in _WRITERS:
        names = " and ".join(sorted(kind.__name__ for kind in kinds))
        raise ValueError(
            f"PEFT has no adapter that is {names}: {', '.join(kind.__name__ for kind in _WRITERS)} are written as themselves; "
            "kind='lora' writes any low-rank change as an exact LoRA"
        )
    for layer, adapter in layers.items():
        if isinstance(adapter.adapter, Slices):
            raise ValueError(
                f"{layer} has adapters of single slices, of which PEFT's own adapters know nothing: kind='lora' writes their "
                "changes as one exact LoRA of the layer"
            )
        if type(adapter.method) in (LoRA, DoRA) and groups_of(adapter) > 1:
            raise ValueError(
                f"{layer}: PEFT's adapter of a convolution with groups mixes their inputs, which is no change of the weight; "
                "kind='lora' writes any low-rank change as an exact LoRA"
            )
        if isinstance(adapter.base, Slot):
            raise ValueError(
                f"{layer} is a matrix in a parameter of a {type(adapter.base.owner).__name__}, which is not written in this "
                "format; delora.merge writes it into the weights"
            )
    return _WRITERS[kinds.pop()](layers)


def lora_factors(layer: str, adapter: Placed, up: Tensor, down: Tensor) -> dict[str, Tensor]:
    """The two factors of a layer under the names and in the shapes that PEFT gives them.

    >>> from delora.layer import attach
    >>> table = nn.Embedding(9, 3)
    >>> {k: list(t.shape) for k, t in lora_factors("emb", Placed(attach(LoRA(r=2), table), table), *2 * [table.weight]).items()}
    {'emb.lora_embedding_A': [9, 3], 'emb.lora_embedding_B': [9, 3]}
    """
    host = adapter.host
    if isinstance(host, Embedding):
        return {f"{layer}.lora_embedding_A": down, f"{layer}.lora_embedding_B": up}
    if isinstance(host, Convolution):
        if (why := beyond_peft(host.layer)) is not None:
            raise ValueError(f"{layer}: {why}; delora.merge writes its change into the weights")
        down = _for_groups(down.reshape(-1, *host.layer.weight.shape[1:]), host.layer.groups)
        up = up.reshape(*up.shape, *(1,) * host.dims)
    return {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}


def beyond_peft(layer: Any) -> str | None:
    """Why PEFT's LoRA of a convolution computes something else than a change of its weight, or None.

    >>> beyond_peft(nn.Conv1d(2, 2, 3)), beyond_peft(nn.Conv1d(2, 2, 3, dilation=2))
    (None, 'PEFT runs its factors without the dilation (2,) of this Conv1d')
    """
    if any(d != 1 for d in layer.dilation):
        return f"PEFT runs its factors without the dilation {tuple(layer.dilation)} of this {type(layer).__name__}"
    if layer.padding_mode != "zeros":
        return f"PEFT pads with zeros where this {type(layer).__name__} pads by {layer.padding_mode!r}"
    return None


def groups_of(adapter: Placed) -> int:
    """How often PEFT needs the rank of a change: for every group of a convolution.

    >>> from delora.layer import attach
    >>> layer = nn.Conv1d(4, 4, 3, groups=2)
    >>> groups_of(Placed(attach(LoRA(r=2), layer), layer))
    2
    """
    host = adapter.host
    return int(host.layer.groups) if isinstance(host, Convolution) else 1


def _for_groups(down: Tensor, groups: int) -> Tensor:
    """A kernel [k, in / groups, ...] that all groups share, as one [groups * k, in, ...] for the inputs of all groups.

    PEFT gives each group its share of the features: here those that only its own inputs make.
    """
    if groups == 1:
        return down
    k, inp = down.shape[:2]
    wide = down.new_zeros(groups, k, groups, inp, *down.shape[2:])
    for g in range(groups):
        wide[g, :, g] = down
    return wide.flatten(0, 1).flatten(1, 2)


def by_pattern(values: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The commonest value, and the others by pattern: by the layers' names, unless PEFT takes one of these for another's.

    >>> by_pattern({"z.q": 2, "q": 3, "a": 4, "b": 4}), by_pattern({"enc.q": 2, "q": 3, "a": 4, "b": 4})
    ((4, {'^z\\\\.q': 2, '^q': 3}), (4, {'enc.q': 2, 'q': 3}))
    """
    common = Counter(values.values()).most_common(1)[0][0]
    others = {layer: value for layer, value in values.items() if value != common}
    read = Patterns(dict(sorted(others.items())), "rank_pattern")  # the file has them sorted, and the first that fits counts
    if any(read.get(layer, common) != value for layer, value in values.items()):
        others = {f"^{re.escape(layer)}": value for layer, value in others.items()}
    return common, others


def feedforward(targets: list[str] | str, inputs: list[str], outputs: list[str]) -> list[str] | str:
    """What tells PEFT's (IA)^3 of which layers it scales the input: names out of the targets, or one expression.

    >>> feedforward(["k", "wo"], ["0.wo", "1.wo"], ["0.k", "1.k"]), feedforward(["k", "wo"], ["0.wo"], ["1.wo", "0.k"])
    (['wo'], '0\\\\.wo')
    """
    if not isinstance(targets, str):
        names = sorted({t for t in targets if any(f".{layer}".endswith(f".{t}") for layer in inputs)})
        if not any(layer.endswith(tuple(names)) for layer in outputs):
            return names
    return "|".join(map(re.escape, inputs))


# ---------------------------------------------------------------- one method each


def _lora(layers: dict[str, Placed]) -> Parts:
    tensors: dict[str, Tensor] = {}
    for layer, adapter in layers.items():
        p = adapter.numbers()
        tensors |= lora_factors(layer, adapter, p["B"], p["A"])
    alphas = {layer: _times(a.method.alpha, a.strength) for layer, a in layers.items()}
    return _lora_config(layers, alphas), tensors


def _dora(layers: dict[str, Placed]) -> Parts:
    tensors: dict[str, Tensor] = {}
    for layer, adapter in layers.items():
        if adapter.method.fixed_magnitude:
            raise ValueError(f"{layer}: PEFT's DoRA always trains the magnitude, this is {adapter.method}")
        _require_full_strength(layer, adapter)
        p, host = adapter.numbers(), adapter.host
        tensors |= lora_factors(layer, adapter, p["B"], p["A"])
        m = p["m"].reshape(1, -1, *(1,) * host.dims) if isinstance(host, Convolution) else p["m"]
        tensors[f"{layer}.lora_magnitude_vector"] = m
    return {**_lora_config(layers, {layer: a.method.alpha for layer, a in layers.items()}), "use_dora": True}, tensors


def _lora_config(layers: dict[str, Placed], alphas: dict[str, float]) -> dict[str, Any]:
    r, rank_pattern = by_pattern({layer: a.method.r for layer, a in layers.items()})
    alpha, alpha_pattern = by_pattern(alphas)
    return {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "use_rslora": _one(layers, "use_rslora", lambda a: a.method.rslora),
        "lora_dropout": _one(layers, "lora_dropout", lambda a: a.dropout),
        "fan_in_fan_out": any(isinstance(a.host, Conv1D) for a in layers.values()),
    }


def as_delora(layers: dict[str, Placed]) -> Parts:
    """`as_itself` for adapters that must be DeLoRA's.

    >>> from delora.layer import attach
    >>> layer = nn.Linear(4, 3)
    >>> as_delora({"q": Placed(attach(DeLoRA(r=2, lam=3.0, start="zero"), layer), layer)})[0]["delora_lambda"]
    3.0
    """
    tensors: dict[str, Tensor] = {}
    for layer, adapter in layers.items():
        m = adapter.method
        fits = type(adapter.base) is nn.Linear and not isinstance(adapter.adapter, Slices)
        if not (isinstance(m, DeLoRA) and m.start == "zero" and m.norm == "columns" and fits):
            raise ValueError(
                f"{layer}: PEFT's DELORA is DeLoRA(start='zero', norm='columns') on nn.Linear, this is {m} on a "
                f"{type(adapter.base).__name__}; kind='lora' writes it as an exact LoRA"
            )
        p = adapter.numbers()
        tensors |= {
            f"{layer}.delora_A": p["A"],
            f"{layer}.delora_B": p["B"],
            f"{layer}.delora_lambda": p["lam"] * adapter.strength,
            f"{layer}.delora_w_norm": p["c"],
        }
    r, rank_pattern = by_pattern({layer: a.method.r for layer, a in layers.items()})
    strengths = {layer: a.method.lam or round(a.numbers()["lam"].item(), 4) for layer, a in layers.items()}  # of a new start
    lam, lambda_pattern = by_pattern(strengths)
    config = {
        "peft_type": "DELORA",
        "r": r,
        "delora_lambda": lam,
        "rank_pattern": rank_pattern,
        "lambda_pattern": lambda_pattern,
        "module_dropout": _one(layers, "module_dropout", lambda a: a.dropout),
        "init_weights": True,
    }
    return config, tensors


def _ia3(layers: dict[str, Placed]) -> Parts:
    tensors: dict[str, Tensor] = {}
    for layer, adapter in layers.items():
        _require_full_strength(layer, adapter)
        scale, side = adapter.numbers()["l"], adapter.method.side
        base: Any = adapter.base
        if type(base) is nn.Linear or isinstance(adapter.host, Conv1D):
            shape: tuple[int, ...] = (-1, 1) if side == "output" else (1, -1)
        elif type(base) in (nn.Conv2d, nn.Conv3d) and side == "output":
            shape = (1, -1, *(1,) * (base.weight.ndim - 2))
        else:
            raise ValueError(f"{layer}: PEFT has no IA3 of the {side} of a {type(base).__name__}")
        tensors[f"{layer}.ia3_l"] = scale.reshape(shape)
    return {
        "peft_type": "IA3",
        "feedforward_modules": [layer for layer, a in layers.items() if a.method.side == "input"],
        "fan_in_fan_out": any(isinstance(a.host, Conv1D) for a in layers.values()),
        "init_ia3_weights": True,
    }, tensors


def _oft(layers: dict[str, Placed]) -> Parts:
    tensors: dict[str, Tensor] = {}
    for layer, adapter in layers.items():
        _require_full_strength(layer, adapter)
        if type(adapter.base) is not nn.Linear:
            raise ValueError(f"{layer}: OFT is written for nn.Linear, this is a {type(adapter.base).__name__}")
        tensors[f"{layer}.oft_R.weight"] = adapter.numbers()["Q"]
    blocks = _one(layers, "r", lambda a: a.method.blocks)
    radius = _one(layers, "eps", lambda a: a.method.radius)
    return {
        "peft_type": "OFT",
        "r": blocks,
        "oft_block_size": 0,
        "coft": radius is not None,
        "eps": 6e-5 if radius is None else radius * math.sqrt(blocks),
        "use_cayley_neumann": False,
        "init_weights": True,
    }, tensors


_WRITERS: dict[type, Callable[[dict[str, Placed]], Parts]] = {LoRA: _lora, DoRA: _dora, DeLoRA: as_delora, IA3: _ia3, OFT: _oft}


def _times(value: float, strength: float) -> float:
    return value if strength == 1 else value * strength


def _one(layers: dict[str, Placed], field: str, of: Callable[[Placed], Any]) -> Any:
    """What PEFT has one of for all layers."""
    values = {of(adapter): layer for layer, adapter in layers.items()}
    if len(values) > 1:
        (one, first), (other, second), *_ = values.items()
        raise ValueError(f"PEFT has one {field} for all layers: {one!r} at {first} and {other!r} at {second} cannot be written")
    return next(iter(values))


def _require_full_strength(layer: str, adapter: Placed) -> None:
    if adapter.strength != 1:
        name = type(adapter.method).__name__
        raise ValueError(f"{layer}: PEFT has no {name} of strength {adapter.strength}: set it to 1, or use delora.merge")
