"""Hugging Face PEFT's format: any low-rank adapter can be written; adapters of type LORA, DELORA, IA3 and OFT can be read.

PeftModel, vLLM, diffusers and most servers read a LoRA in this format.
"""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from delora import sharded
from delora.formats.bases import entry
from delora.formats.files import AdapterError, Saved, SavedLayer, TensorFile, get, read_json, shown, write_atomically
from delora.formats.nearest import Approximation
from delora.formats.patterns import LONGEST, Pattern, Patterns, Steps
from delora.formats.peft_config import method_of, parameters_of, texts
from delora.formats.peft_experts import Stacked, by_wrapper, one_by_one
from delora.formats.peft_fields import KINDS, require_known, require_same_base
from delora.formats.peft_names import experts as taken_for_experts
from delora.formats.peft_names import read_by_parent, renamed
from delora.formats.peft_own import as_delora, as_itself, by_pattern, feedforward, groups_of, lora_factors
from delora.frozen import Frozen
from delora.hosts import Conv1D, Slot
from delora.layer import Placed
from delora.meeting import collective, writes
from delora.methods import Full
from delora.methods.base import Method
from delora.models import active_adapter, by_layer, unwrapped, walk

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."

__all__ = ["CONFIG", "as_lora", "read", "write"]


# ---------------------------------------------------------------- writing


@collective
@torch.no_grad()
def write(
    model: nn.Module,
    folder: str | os.PathLike[str],
    name: str | None = None,
    kind: Literal["lora", "own", "delora"] = "lora",
    rank: int | None = None,
    dtype: torch.dtype | None = None,
    experts: Literal["together", "each"] = "together",
) -> Path:
    """Write an adapter, at its current strength, to a folder in PEFT's format.

    What PEFT would read as something else is refused, or written in the way that it reads right.

    Args:
        model: a model with an adapter.
        folder: where to write; it is created if it does not exist.
        name: the adapter's name; the active one if None.
        kind: "lora" writes the exact factors of any low-rank change as a LoRA, each layer with its own rank, and modules
            trained whole as ``modules_to_save``. "own" writes LoRA, DoRA, IA3, OFT, and a ``DeLoRA(start="zero",
            norm="columns")`` on linear layers, as PEFT's own adapter of that method, whose training PEFT can continue. "delora"
            is "own" for a DeLoRA alone.
        rank: the highest rank to write, with kind="lora": a change of a higher one is written as the nearest of this rank,
            which is told. None writes each exactly. A DeLoRA that starts by "subtract" or "copy" has rank 2r.
        dtype: the dtype of all numbers in the file, with kind="lora": float32, float16 or bfloat16; None for the adapter's own.
        experts: "together" writes those of one parameter as PEFT's ``target_parameters``, "each" under the names that
            checkpoints give to the weights of each expert, which vLLM reads of most mixtures.

    Raises:
        ValueError: the change is not low-rank, or PEFT cannot read it right; nothing is written then.

    Warns:
        UserWarning: layers are not exact beyond rounding; ``delora.approximation`` in the header of the file has their errors.

    >>> import delora, tempfile
    >>> model = delora.inject(nn.Sequential(nn.Linear(4, 4)), delora.DeLoRA(r=2), ["0"])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     sorted(file.name for file in delora.export.peft(model, folder).iterdir())
    ['adapter_config.json', 'adapter_model.safetensors']
    """
    if kind not in ("lora", "own", "delora"):
        raise ValueError(f"kind = {kind!r}: must be 'lora', 'own' or 'delora'")
    if kind != "lora" and (rank, dtype) != (None, None):
        raise ValueError(f"kind={kind!r} writes the trained tensors as they are: rank and dtype are for kind='lora'")
    form = Approximation(rank, dtype)
    name = active_adapter(model) if name is None else name
    chosen = by_layer(model, name)
    weights = {layer: a for layer, a in chosen.items() if not a.whole}
    whole = {layer: a for layer, a in chosen.items() if a.whole}
    if not weights:
        raise ValueError("this adapter trains whole modules only: there is no low-rank change to export; use delora.merge")
    root = unwrapped(model)
    own = {layer: a for layer, a in weights.items() if isinstance(a.base, Slot)}
    layers = {layer: a for layer, a in weights.items() if layer not in own}
    apart = experts == "each"
    stacked = {} if kind != "lora" else one_by_one(root, own, form) if apart else by_wrapper(own, form)
    moved = renamed(root, layers if apart else [*layers, *stacked])
    taken = [layer for layer in layers if layer.rpartition(".")[2] in taken_for_experts(root)]
    parameters = taken if kind == "lora" else []
    if kind == "lora":
        config, tensors = as_lora(layers, parameters, form, stacked)
    else:
        config, tensors = as_delora(weights) if kind == "delora" else as_itself(weights)
    if moved and config["peft_type"] == "LORA":  # PEFT renames nothing of other types
        layer = next(iter(moved))
        raise ValueError(
            f"PEFT renames the tensors of a {type(root).__name__} and would look for {layer} at {moved[layer]} (so for "
            f"{len(moved)} of {len(weights)} layers), where nothing is: leave these layers out, or use delora.merge"
        )
    if taken and not parameters and config["peft_type"] == "LORA":
        raise ValueError(
            f"PEFT would take {taken[0]} for an expert (so {len(taken)} of {len(weights)} layers): use kind='lora'"
        )
    if read := read_by_parent(root, layers):
        layer = next(iter(read))
        warnings.warn(
            f"{read[layer]} can compute with the weight of {layer} itself (so for {len(read)} of {len(weights)} layers): where "
            "it does, PEFT's model is without the change of this layer; delora.merge puts it into the weight",
            stacklevel=3,
        )
    for layer, copy in whole.items():
        tensors |= {f"{layer}.{key}": t for key, t in copy.at_strength().items()}
    for layer, module in _also_taken(root, weights, whole).items():
        tensors |= {f"{layer}.{key}": t for key, t in module.state_dict(keep_vars=True).items()}
    tensors = {key: form.cast(sharded.numbers(t)) for key, t in tensors.items()}
    for key, t in tensors.items():
        if not torch.isfinite(t).all():
            raise ValueError(f"{key} holds NaN or infinity: nothing was written to {folder}")
    by_parameter = [f"{layer}.weight" for layer in parameters]
    by_parameter += [] if apart else [each.parameter for each in stacked.values()]
    if by_parameter and config["lora_dropout"]:
        warnings.warn(
            f"PEFT has no dropout on {by_parameter[0]}, which it is told of by the name of a parameter: "
            f"lora_dropout is written as 0, not {config['lora_dropout']}",
            stacklevel=3,
        )
        config["lora_dropout"] = 0.0
    named = _target_names(root, [layer for layer in layers if layer not in parameters], bool(taken_for_experts(root)))
    if apart and stacked:
        named = sorted({layer.rpartition(".")[2] for layer in (*layers, *stacked)})
    config |= {
        "base_model_name_or_path": getattr(getattr(root, "config", None), "_name_or_path", None) or None,
        "target_modules": named,
        "modules_to_save": list(whole) or None,
        "task_type": _task_type(root, whole),
        "inference_mode": True,
    }
    if config["peft_type"] == "IA3":
        inputs = config["feedforward_modules"]
        config["feedforward_modules"] = feedforward(config["target_modules"], inputs, [n for n in weights if n not in inputs])
    else:
        config["bias"] = "none"
    if by_parameter:
        config["target_parameters"] = by_parameter
    form.tell(stacklevel=4)
    header = {"format": "pt", **form.header()}
    data = to_bytes({PREFIX + key: t.detach().cpu().clone().contiguous() for key, t in tensors.items()}, header)
    folder = Path(folder)
    if not writes():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / TENSORS, data)
    write_atomically(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True).encode())
    return folder


def as_lora(
    layers: dict[str, Placed],
    parameters: Collection[str] = (),
    form: Approximation | None = None,
    stacked: Mapping[str, Stacked] | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """PEFT's configuration of type LORA and the tensors by name, for low-rank adapters by layer.

    ``parameters``: the layers that PEFT is told of by the name of their weight. ``form``: of which rank they are, if not exact.
    ``stacked``: the factors of experts.

    >>> from delora.layer import attach
    >>> from delora.methods import LoRA
    >>> config, tensors = as_lora({"query": Placed(attach(LoRA(r=2), nn.Linear(4, 3)), nn.Linear(4, 3))})
    >>> config["r"], list(tensors)
    (2, ['query.lora_A.weight', 'query.lora_B.weight'])
    """
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for layer, adapter in layers.items():
        if isinstance(adapter.base, Slot):
            raise ValueError(
                f"{layer} is a matrix in a parameter of a {type(adapter.base.owner).__name__}, which is not written in this "
                "format; delora.merge writes it into the weights"
            )
        factors = adapter.low_rank()
        if factors is None:
            way_out = "; delora.merge writes it into the weights" if adapter.mergeable() else ""
            raise ValueError(f"{layer}: {adapter.method} is not a low-rank change{way_out}")
        factors = factors if form is None else form.of(layer, factors)
        written = lora_factors(layer, adapter, factors.up, factors.down)
        ranks[f"{layer}.weight" if layer in parameters else layer] = len(factors.down) * groups_of(adapter)
        tensors |= written
    for wrapper, each in (stacked or {}).items():
        ranks[each.parameter] = each.rank
        tensors |= {f"{wrapper}.lora_A.weight": each.down, f"{wrapper}.lora_B.weight": each.up}
    common, others = by_pattern(ranks)
    config = {
        "peft_type": "LORA",
        "r": common,
        "lora_alpha": common,  # the scale is in the factors: alpha / r = 1
        "rank_pattern": others,
        "alpha_pattern": others,
        "lora_dropout": next((a.dropout for a in layers.values()), 0.0),
        "fan_in_fan_out": any(isinstance(a.host, Conv1D) for a in layers.values()),
    }
    return config, tensors


def _target_names(model: nn.Module, layers: list[str], as_list: bool) -> list[str] | str:
    """What makes PEFT choose these layers and no other.

    The last parts of their names, which servers expect; if these also end other layers' names, the whole names; and if even
    one of these ends another's name, one regular expression, unless it must be a list.
    """
    others = {name for name, _ in walk(model)} - set(layers)
    short = {layer.rpartition(".")[2] for layer in layers}
    if not any(name.rpartition(".")[2] in short for name in others):
        return sorted(short)
    endings = {name[i + 1 :] for name in others for i, c in enumerate(name) if c == "."}
    return layers if as_list or not endings & set(layers) else "|".join(map(re.escape, layers))


def _also_taken(model: nn.Module, weights: Mapping[str, Any], whole: Mapping[str, Any]) -> dict[str, nn.Module]:
    """The modules that PEFT trains whole as well, because their names end as that of one that is: their own tensors go along.

    Raises:
        ValueError: PEFT cannot be told what this adapter is.
    """
    names, taken = tuple(whole), {}
    for layer in weights:
        for name in names:
            if f".{name}." in f".{layer}.":
                raise ValueError(
                    f"PEFT takes no adapter on {layer}: {name}, which is trained whole, is in its name; rename one of them, or "
                    "use delora.merge"
                )
    for name, module in walk(model):
        if name not in whole and name.endswith(names):
            if any(f"{other}.".startswith(f"{name}.") or name.startswith(f"{other}.") for other in (*weights, *whole)):
                raise ValueError(
                    f"PEFT trains {name} whole, too: its name ends as one of {list(names)}; rename one, or use delora.merge"
                )
            taken[name] = module
    return taken


HEADS = ("classifier", "score")  # what PEFT expects in a file of these tasks


def _task_type(model: nn.Module, whole: Collection[str]) -> str | None:
    """PEFT's task type, from the ending of a transformers class name; of a task with a head only if the head is in the file."""
    names = {"ForCausalLM": "CAUSAL_LM", "ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS"}
    task = next((task for end, task in names.items() if type(model).__name__.endswith(end)), None)
    heads = [name for name, _ in walk(model) if name.endswith(HEADS)]
    return task if task in (None, "CAUSAL_LM") or (heads and set(heads) <= set(whole)) else None


# ---------------------------------------------------------------- reading


def read(folder: Path) -> Saved:
    """Read a PEFT folder of type LORA (plain, rank-stabilised, DoRA, with patterns), DELORA, IA3 or OFT. Nothing is unpickled.

    >>> import delora, tempfile
    >>> model = delora.inject(nn.Sequential(nn.Linear(4, 4)), delora.LoRA(r=2), ["0"])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     read(delora.export.peft(model, folder)).layers["0"].method.r
    2
    """
    where = folder / CONFIG
    config = read_json(where)
    kind = get(config, "peft_type", str, where)
    if kind not in KINDS:
        raise AdapterError(f"{where}: cannot read adapters of type {kind!r}: known types are {', '.join(KINDS)}")
    require_known(config, kind, where)
    if kind == "LORA":
        require_same_base(config.get("init_lora_weights"), where)
    if not (folder / TENSORS).is_file():
        pickled = " (adapter_model.bin is a pickle and is never opened)" if (folder / "adapter_model.bin").exists() else ""
        raise AdapterError(f"{folder} has no {TENSORS}{pickled}")
    file = TensorFile(folder / TENSORS)
    layers = _layers(config, file, kind, where)
    return Saved(folder, file, layers, get(config, "base_model_name_or_path", str, where, None))


_NAMES = {
    "LORA": {
        "lora_A.weight": "A",
        "lora_B.weight": "B",
        "lora_embedding_A": "A",
        "lora_embedding_B": "B",
        "lora_magnitude_vector": "m",
        "lora_magnitude_vector.weight": "m",
    },
    "DELORA": {"delora_A": "A", "delora_B": "B", "delora_lambda": "lam", "delora_w_norm": "c"},
    "IA3": {"ia3_l": "l"},
    "OFT": {"oft_R.weight": "Q"},
}
_PARTS = ("lora_", "delora_", "ia3_", "oft_", "token_adapter")  # of names that are no base model's

Tensors = dict[str, tuple[str, tuple[int, ...]]]  # keys in the file and shapes, by name


def _layers(config: dict[str, Any], file: TensorFile, kind: str, where: Path) -> dict[str, SavedLayer]:
    adapted: dict[str, Tensors] = {}
    bases: dict[str, str] = {}  # the keys of weights that lie under an adapter
    rest: Tensors = {}
    for key, shape in file.shapes.items():
        name = key.removeprefix(PREFIX)
        if name == key:
            raise AdapterError(f"{file.path}: {shown(key)} does not start with {PREFIX!r}")
        if len(name) > LONGEST:
            raise AdapterError(f"{file.path}: no tensor has a name of {len(name):,} characters; at most {LONGEST:,} are read")
        ending = next((end for end in _NAMES[kind] if name.endswith(f".{end}")), None)
        if ending is not None:
            tensors = adapted.setdefault(name[: -len(ending) - 1], {})
            if (tensor := _NAMES[kind][ending]) in tensors:
                raise AdapterError(f"{file.path}: {key!r} and {tensors[tensor][0]!r} are the same tensor")
            tensors[tensor] = (key, shape)
        elif name.endswith(".base_layer.weight"):
            bases[name.removesuffix(".base_layer.weight")] = key
        else:
            rest[name] = (key, shape)
    if not adapted:
        raise AdapterError(f"{file.path} holds no tensor of type {kind}")
    for layer in bases:
        rest.pop(f"{layer}.base_layer.bias", None)  # goes with the weight, which tells whether the base is the same
    if strange := sorted(bases.keys() - adapted.keys()):
        raise AdapterError(f"{file.path}: {bases[strange[0]]!r} is the weight under an adapter that is not in the file")
    methods = _Methods(config, kind, where)
    layers = {}
    for layer, tensors in adapted.items():
        method = methods.of(layer, tensors)
        norms = tensors.pop("c", None)
        base = {"columns": norms[0]} if norms is not None else _base(file, bases.get(layer), tensors)
        flat = {tensor: (key, _flat(tensor, shape)) for tensor, (key, shape) in tensors.items()}
        layers[layer] = SavedLayer(method, methods.dropout, base=base, peft=kind, tensors=flat)
    for module, tensors in _whole(config, rest, file, kind, where).items():
        if module in layers:
            raise AdapterError(f"{file.path}: {module} is both adapted and trained whole")
        layers[module] = SavedLayer(Full(), tensors=tensors)
    if config.get("ensure_weight_tying") and any(key.endswith(".lora_embedding_A") for key in file.shapes):
        warnings.warn(
            "ensure_weight_tying: PEFT trains the adapters of tied layers as one, here they train apart", stacklevel=2
        )
    return layers


def _flat(tensor: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that a tensor has here: a vector for each feature, and one matrix for a convolution."""
    if tensor in ("l", "m"):
        return (math.prod(shape),)
    return (shape[0], math.prod(shape[1:])) if len(shape) > 2 else shape


def _base(file: TensorFile, key: str | None, tensors: Tensors) -> dict[str, Any] | None:
    """What is known of the base, if its weight is in the file, as PEFT saves that of an embedding with an adapter."""
    if key is None:
        return None
    W = file.read(key)
    if W.ndim != 2:
        raise AdapterError(f"{file.path}: {key!r} must be a matrix, not of shape {list(W.shape)}")
    return entry(Frozen(W.T if tensors["A"][0].endswith("lora_embedding_A") else W))


def _whole(config: dict[str, Any], rest: Tensors, file: TensorFile, kind: str, where: Path) -> dict[str, Tensors]:
    """The tensors of the modules that were trained whole.

    A name in ``modules_to_save`` stands for all modules whose name ends so, as in PEFT: "norm" also for "post_norm". A weight
    that belongs to none is one of the base model's, as PEFT saves embeddings whose vocabulary has grown.
    """
    endings = tuple(texts(config, "modules_to_save", where))
    modules: dict[str, Tensors] = {}
    for name, (key, shape) in rest.items():
        parts = name.split(".")
        prefixes = [".".join(parts[:n]) for n in range(1, len(parts))]
        module = next((prefix for prefix in prefixes if prefix.endswith(endings)), None)
        if module is None and parts[-1] in ("weight", "bias") and not any(part.startswith(_PARTS) for part in parts):
            module = prefixes[-1] if prefixes else None
        if module is None:
            raise AdapterError(
                f"{file.path}: {key!r} belongs to no adapter of type {kind} that is read, and to no module in modules_to_save"
            )
        modules.setdefault(module, {})[name[len(module) + 1 :]] = (key, shape)
    return modules


class _Methods:
    """The method of each layer, as PEFT's configuration says it."""

    def __init__(self, config: dict[str, Any], kind: str, where: Path) -> None:
        self.config, self.kind, self.where = config, kind, where
        self.patterns = {field: self._patterns(field) for field in ("rank_pattern", "alpha_pattern", "lambda_pattern")}
        self.dropout = 0.0 if kind == "IA3" else self._dropout()
        self.parameters = parameters_of(config, where)
        if kind == "OFT" and self.dropout:
            warnings.warn(f"module_dropout = {self.dropout}: OFT has no dropout here, training goes on without", stacklevel=2)
            self.dropout = 0.0

    def _patterns(self, field: str) -> Patterns:
        values = get(self.config, field, dict, self.where, None) or {}
        for pattern, value in values.items():
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                raise AdapterError(f"{self.where}: {field} has no number for {shown(pattern)}")
        return Patterns(values, f"{self.where}: {field}")

    def _dropout(self) -> float:
        value = self.config.get("lora_dropout" if self.kind == "LORA" else "module_dropout", 0.0)
        if type(value) not in (int, float) or not 0 <= value < 1:
            raise AdapterError(f"{self.where}: dropout {shown(value)} must be at least 0 and below 1")
        return float(value)

    def of(self, layer: str, tensors: Tensors) -> Method:
        """The method of one layer."""
        try:
            return {"LORA": self._lora, "DELORA": self._delora, "IA3": self._ia3, "OFT": self._oft}[self.kind](layer, tensors)
        except (ValueError, OverflowError) as error:
            raise error if isinstance(error, AdapterError) else AdapterError(f"{self.where}, {layer}: {error}") from error

    def _number(self, field: str, pattern: str, layer: str) -> Any:
        return self.patterns[pattern].get(layer, get(self.config, field, (int, float), self.where))

    def _lora(self, layer: str, tensors: Tensors) -> Method:
        if f"{layer}.weight".endswith(tuple(f".{name}" for name in self.parameters)) or f"{layer}.weight" in self.parameters:
            layer = f"{layer}.weight"  # PEFT knows it by its parameter
        r, alpha = self._number("r", "rank_pattern", layer), self._number("lora_alpha", "alpha_pattern", layer)
        return method_of(self.config, self.kind, self.where, r=r, alpha=alpha)

    def _delora(self, layer: str, tensors: Tensors) -> Method:
        r, lam = self._number("r", "rank_pattern", layer), self._number("delora_lambda", "lambda_pattern", layer)
        return method_of(self.config, self.kind, self.where, r=r, lam=lam)

    def _ia3(self, layer: str, tensors: Tensors) -> Method:
        key, shape = tensors["l"]
        named = self.config.get("feedforward_modules")
        if isinstance(named, str):
            steps = Steps(f"{self.where}: feedforward_modules")
            side: Any = "input" if len(layer) in Pattern(named, steps).ends(layer, {0}) else "output"
        else:  # by any ending, without a dot before it
            side = "input" if layer.endswith(tuple(texts(self.config, "feedforward_modules", self.where))) else "output"
        if len(shape) == 2 and shape != (1, 1):
            by_shape = "input" if shape[0] == 1 else "output"
            if named is not None and by_shape != side:
                raise ValueError(f"{key!r} of shape {list(shape)} scales the {by_shape}, feedforward_modules says the {side}")
            side = by_shape
        elif len(shape) > 2 and side == "input":
            raise ValueError("a scale of a convolution's input is not read; merge it with PEFT and adapt the result")
        return method_of(self.config, self.kind, self.where, side=side)

    def _oft(self, layer: str, tensors: Tensors) -> Method:
        key, shape = tensors["Q"]
        if len(shape) != 2 or not shape[0]:
            raise ValueError(f"{key!r} must be a matrix, not of shape {list(shape)}")
        return method_of(self.config, self.kind, self.where, blocks=shape[0])
