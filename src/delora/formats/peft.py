"""Hugging Face PEFT's format: any low-rank adapter can be written; adapters of type LORA and DELORA can be read.

PeftModel, vLLM, diffusers and most servers read a LoRA in this format.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from delora.ambient import apart
from delora.formats.files import AdapterError, Saved, SavedLayer, TensorFile, get, read_json, write_atomically
from delora.hosts import Conv1D, Convolution, Embedding
from delora.layer import Placed
from delora.methods import DeLoRA, Full, LoRA
from delora.models import active_adapter, adapted_layers, adapters, unwrapped, walk

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."

__all__ = ["CONFIG", "as_lora", "read", "write"]


# ---------------------------------------------------------------- writing


@apart
@torch.no_grad()
def write(
    model: nn.Module, folder: str | os.PathLike[str], name: str | None = None, kind: Literal["lora", "delora"] = "lora"
) -> Path:
    """Write an adapter, at its current strength, to a folder in PEFT's format.

    Args:
        model: a model with an adapter.
        folder: where to write; it is created if it does not exist.
        name: the adapter's name; the active one if None.
        kind: "lora" writes the exact factors of any low-rank change as a LoRA, each layer with its own rank, and modules
            trained whole as ``modules_to_save``. "delora" writes a ``DeLoRA(start="zero", norm="columns")`` on linear
            layers as PEFT's DELORA, whose training can be continued with PEFT.

    Raises:
        ValueError: the change is not low-rank, or PEFT's DELORA cannot express it; nothing is written then.

    >>> import delora, tempfile
    >>> model = delora.inject(nn.Sequential(nn.Linear(4, 4)), delora.DeLoRA(r=2), ["0"])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     sorted(file.name for file in delora.export.peft(model, folder).iterdir())
    ['adapter_config.json', 'adapter_model.safetensors']
    """
    if kind not in ("lora", "delora"):
        raise ValueError(f"kind = {kind!r}: must be 'lora' or 'delora'")
    name = active_adapter(model) if name is None else name
    chosen = adapters(model, name)
    weights = {layer: a for layer, a in chosen.items() if not a.whole}
    whole = {layer: a for layer, a in chosen.items() if a.whole}
    if not weights:
        raise ValueError("this adapter trains whole modules only: there is no low-rank change to export; use delora.merge")
    config, tensors = as_lora(weights) if kind == "lora" else _as_delora(weights)
    for layer, copy in whole.items():
        tensors |= {f"{layer}.{key}": t for key, t in copy.at_strength().items()}
    for key, t in tensors.items():
        if not torch.isfinite(t).all():
            raise ValueError(f"{key} holds NaN or infinity: nothing was written to {folder}")
    root = unwrapped(model)
    config |= {
        "base_model_name_or_path": getattr(getattr(root, "config", None), "_name_or_path", None) or None,
        "target_modules": _target_names(root, list(weights)),
        "modules_to_save": list(whole) or None,
        "task_type": _task_type(root),
        "bias": "none",
        "inference_mode": True,
    }
    data = to_bytes({PREFIX + key: t.detach().cpu().clone().contiguous() for key, t in tensors.items()}, {"format": "pt"})
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / TENSORS, data)
    write_atomically(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True).encode())
    return folder


def as_lora(layers: dict[str, Placed]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """PEFT's configuration of type LORA and the tensors by name, for low-rank adapters by layer.

    >>> from delora.layer import attach
    >>> config, tensors = as_lora({"query": attach(LoRA(r=2), nn.Linear(4, 3))})
    >>> config["r"], list(tensors)
    (2, ['query.lora_A.weight', 'query.lora_B.weight'])
    """
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for layer, adapter in layers.items():
        factors = adapter.low_rank()
        if factors is None:
            way_out = "; delora.merge writes it into the weights" if adapter.mergeable() else ""
            raise ValueError(f"{layer}: {adapter.method} is not a low-rank change{way_out}")
        ranks[layer] = len(factors.down)
        host, up, down = adapter.host, factors.up, factors.down
        if isinstance(host, Embedding):
            tensors |= {f"{layer}.lora_embedding_A": down, f"{layer}.lora_embedding_B": up}
            continue
        if isinstance(host, Convolution):
            down = down.reshape(-1, *host.layer.weight.shape[1:])
            up = up.reshape(*up.shape, *(1,) * host.dims)
        tensors |= {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}
    common = Counter(ranks.values()).most_common(1)[0][0]
    others = {layer: r for layer, r in ranks.items() if r != common}
    config = {
        "peft_type": "LORA",
        "r": common,
        "lora_alpha": common,  # the scale is in the factors: alpha / r = 1
        "rank_pattern": others,
        "alpha_pattern": others,
        "lora_dropout": next(iter(layers.values())).dropout,
        "fan_in_fan_out": any(isinstance(a.host, Conv1D) for a in layers.values()),
    }
    return config, tensors


def _as_delora(layers: dict[str, Placed]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    lams: dict[str, float] = {}
    for layer, adapter in layers.items():
        m = adapter.method
        if not (isinstance(m, DeLoRA) and m.start == "zero" and m.norm == "columns" and type(adapter.base) is nn.Linear):
            raise ValueError(
                f"{layer}: PEFT's DELORA is DeLoRA(start='zero', norm='columns') on nn.Linear, this is {m} on a "
                f"{type(adapter.base).__name__}; kind='lora' writes it as an exact LoRA"
            )
        p = adapter.tensors()
        ranks[layer], lams[layer] = m.r, float(m.lam)
        tensors |= {
            f"{layer}.delora_A": p["A"],
            f"{layer}.delora_B": p["B"],
            f"{layer}.delora_lambda": p["lam"] * adapter.strength,
            f"{layer}.delora_w_norm": p["c"],
        }
    r, lam = Counter(ranks.values()).most_common(1)[0][0], Counter(lams.values()).most_common(1)[0][0]
    config = {
        "peft_type": "DELORA",
        "r": r,
        "delora_lambda": lam,
        "rank_pattern": {layer: n for layer, n in ranks.items() if n != r},
        "lambda_pattern": {layer: n for layer, n in lams.items() if n != lam},
        "module_dropout": next(iter(layers.values())).dropout,
        "init_weights": True,
    }
    return config, tensors


def _target_names(model: nn.Module, layers: list[str]) -> list[str]:
    """The last parts of the layers' names, which servers expect, if they select no other layer; else the whole names."""
    short = {layer.rpartition(".")[2] for layer in layers}
    adapted = {id(module) for module in adapted_layers(model).values()}
    same = [n for n, m in walk(model) if n.rpartition(".")[2] in short and (id(m) not in adapted or n not in layers)]
    return sorted(short) if not same else layers


def _task_type(model: nn.Module) -> str | None:
    """PEFT's task type, from the ending of a transformers class name. Reading the files does not depend on it."""
    names = {"ForCausalLM": "CAUSAL_LM", "ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS"}
    return next((task for end, task in names.items() if type(model).__name__.endswith(end)), None)


# ---------------------------------------------------------------- reading


def read(folder: Path) -> Saved:
    """Read a PEFT folder of type LORA (plain, rank-stabilised, with patterns) or DELORA. Nothing is unpickled.

    >>> import delora, tempfile
    >>> model = delora.inject(nn.Sequential(nn.Linear(4, 4)), delora.LoRA(r=2), ["0"])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     read(delora.export.peft(model, folder)).layers["0"].method.r
    2
    """
    where = folder / CONFIG
    config = read_json(where)
    kind = get(config, "peft_type", str, where)
    if kind not in ("LORA", "DELORA"):
        raise AdapterError(f"{where}: cannot read adapters of type {kind!r}: known types are LORA, DELORA")
    plain: dict[str, Any] = {"bias": "none", "layer_replication": None, "target_parameters": None, "lora_bias": False}
    plain |= {"use_dora": False, "use_qalora": False, "use_bdlora": None, "alora_invocation_tokens": None}
    plain |= {"trainable_token_indices": None, "arrow_config": None, "kasa_config": None}
    for key, value in plain.items():
        if config.get(key, value) not in (value, None, False):
            raise AdapterError(
                f"{where}: {key} = {config[key]!r} is not a plain {kind}; merge it with PEFT and adapt the result"
            )
    if not (folder / TENSORS).is_file():
        pickled = " (adapter_model.bin is a pickle and is never opened)" if (folder / "adapter_model.bin").exists() else ""
        raise AdapterError(f"{folder} has no {TENSORS}{pickled}")
    file = TensorFile(folder / TENSORS)
    layers = _layers(config, file, kind, where)
    return Saved(folder, file, layers, get(config, "base_model_name_or_path", str, where, None))


_NAMES = {
    "LORA": {"lora_A.weight": "A", "lora_B.weight": "B", "lora_embedding_A": "A", "lora_embedding_B": "B"},
    "DELORA": {"delora_A": "A", "delora_B": "B", "delora_lambda": "lam", "delora_w_norm": "c"},
}


def _layers(config: dict[str, Any], file: TensorFile, kind: str, where: Path) -> dict[str, SavedLayer]:
    by_layer: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {}
    rest: dict[str, tuple[int, ...]] = {}
    for key, shape in file.shapes.items():
        name = key.removeprefix(PREFIX)
        ending = next((end for end in _NAMES[kind] if name.endswith("." + end)), None)
        if not key.startswith(PREFIX):
            raise AdapterError(f"{file.path}: {key!r} does not start with {PREFIX!r}")
        if ending is None:
            rest[key] = shape
        else:
            flat = (shape[0], int(torch.Size(shape[1:]).numel())) if len(shape) > 1 else shape  # convolutions: one matrix
            by_layer.setdefault(name[: -len(ending) - 1], {})[_NAMES[kind][ending]] = (key, flat)
    layers = {}
    for layer, tensors in by_layer.items():
        norms = tensors.pop("c", None)
        base = None if norms is None else {"columns": norms[0]}
        layers[layer] = SavedLayer(_method(config, kind, layer, where), _dropout(config, where), base=base, tensors=tensors)
    for pattern in get(config, "modules_to_save", list, where, None) or []:
        # Each name stands for all modules whose name ends with it; the keys of the tensors tell which these are.
        for key in list(rest):
            match = re.match(rf"((?:.*\.)?{re.escape(str(pattern))})\.(.+)$", key.removeprefix(PREFIX))
            if match:
                layers.setdefault(match[1], SavedLayer(Full())).tensors[match[2]] = (key, rest.pop(key))
    if rest:
        raise AdapterError(
            f"{file.path}: {sorted(rest)[0]!r} belongs to no adapter of type {kind} and to no module in modules_to_save"
        )
    if not by_layer:
        raise AdapterError(f"{file.path} holds no tensor of type {kind}")
    return layers


def _dropout(config: dict[str, Any], where: Path) -> float:
    value = config.get("lora_dropout", config.get("module_dropout", 0.0))
    if type(value) not in (int, float) or not 0 <= value < 1:
        raise AdapterError(f"{where}: dropout {value!r} must be at least 0 and below 1")
    return float(value)


def _method(config: dict[str, Any], kind: str, layer: str, where: Path) -> LoRA | DeLoRA:
    def value(field: str, pattern_field: str) -> Any:
        for pattern, special in (get(config, pattern_field, dict, where, None) or {}).items():
            try:
                if re.match(rf"(.*\.)?({pattern})$", layer):
                    return special
            except re.error as error:
                raise AdapterError(f"{where}: {pattern_field} has {pattern!r}, no regular expression: {error}") from error
        return get(config, field, (int, float), where)

    try:
        if kind == "LORA":
            rslora = get(config, "use_rslora", bool, where, False)
            return LoRA(r=value("r", "rank_pattern"), alpha=value("lora_alpha", "alpha_pattern"), rslora=rslora)
        return DeLoRA(r=value("r", "rank_pattern"), lam=value("delora_lambda", "lambda_pattern"), start="zero")
    except ValueError as error:
        raise AdapterError(f"{where}, {layer}: {error}") from error
