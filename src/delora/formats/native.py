"""Adapters as files: a folder with one JSON and one safetensors file.

The JSON names the safetensors file and its SHA-256. The tensors are written first, under a new name, then the JSON takes
the place of the old one in a single step: a crash at any moment leaves the old adapter or the new one, both whole.
Nothing is unpickled, and everything is checked before anything in the model is changed.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from delora.diagnostics import report
from delora.formats.files import AdapterError, Saved, SavedLayer, TensorFile, get, read_json, write_atomically
from delora.formats.peft import read as read_peft
from delora.injection import check_name, install
from delora.layer import Adapted, Adapter, Copy, attach
from delora.methods import METHODS, Full
from delora.methods.base import checked_replace, fields_of, name_of
from delora.models import active_adapter, adapter_names, adapters, unwrapped, walk
from delora.version import __version__

__all__ = ["fingerprint", "is_adapter", "load", "require_adapter", "save"]

SCHEMA = 1
JSON = "adapter.json"
TENSORS = re.compile(r"adapter-[0-9a-f]{16}\.safetensors")


# ---------------------------------------------------------------- the base's fingerprint


def fingerprint(W: Tensor) -> tuple[float, float]:
    """|W|_F and p' W q with p_i = cos(i), q_j = sin(j): two numbers that survive a change of dtype to its precision.

    The first does not see a change of signs or of places, the second does.
    """
    i, j = (torch.arange(1, n + 1, dtype=torch.float64) for n in W.shape)
    p, q = torch.cos(i).to(W.device, W.dtype), torch.sin(j).to(W.device, W.dtype)
    return torch.linalg.vector_norm(W).item(), (p @ (W @ q)).item()


def _same_base(saved: Mapping[str, Any], W: Tensor, dtype: str) -> bool:
    """Rounding to a coarser dtype changes |W| by at most eps |W|, and p' W q by about eps |W|; all else changes it more.

    Eight standard deviations for the second, since rounding errors are not independent.
    """
    eps = max(torch.finfo(getattr(torch, name)).eps for name in (saved["dtype"], dtype)) if saved["dtype"] != dtype else 1e-5
    norm, probe = fingerprint(W)
    return abs(norm - saved["norm"]) <= eps * norm and abs(probe - saved["probe"]) <= 8 * eps * norm


# ---------------------------------------------------------------- saving


def save(model: nn.Module, folder: str | os.PathLike[str], name: str | None = None) -> Path:
    """Write an adapter (the active one) and the modules trained with it to a folder.

    Raises:
        ValueError: there is no such adapter, or one of its tensors holds NaN or infinity; nothing is written then.
    """
    name = active_adapter(model) if name is None else name
    chosen = adapters(model, name)
    tensors = {f"{layer}.{key}": t.detach().cpu().contiguous() for layer, a in chosen.items() for key, t in a.saved().items()}
    for key, t in tensors.items():
        if not torch.isfinite(t).all():
            raise ValueError(f"{key} holds NaN or infinity: nothing was written to {folder}")
    data = to_bytes({key: t.clone() for key, t in tensors.items()})  # clones: safetensors refuses shared memory
    digest = hashlib.sha256(data).hexdigest()
    first = next((a.method for a in chosen.values() if isinstance(a, Adapter)), Full())
    config = getattr(unwrapped(model), "config", None)
    text = json.dumps(
        {
            "format": "delora",
            "schema": SCHEMA,
            "method": name_of(first),
            "fields": fields_of(first),
            "layers": {layer: _layer_entry(a, first) for layer, a in chosen.items() if isinstance(a, Adapter)},
            "also_train": {layer: {"strength": a.strength} for layer, a in chosen.items() if isinstance(a, Copy)},
            "base_model": getattr(config, "_name_or_path", None) or None,
            "tensors": {"file": f"adapter-{digest[:16]}.safetensors", "bytes": len(data), "sha256": digest},
            "versions": {"delora": __version__, "torch": str(torch.__version__)},
        },
        indent=1,
        allow_nan=False,
    )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"adapter-{digest[:16]}.safetensors"
    write_atomically(file, data)
    write_atomically(folder / JSON, text.encode())
    for old in folder.glob("adapter-*.safetensors"):
        if old != file and re.fullmatch(r"adapter-[0-9a-f]{16}\.safetensors", old.name):
            old.unlink(missing_ok=True)
    return folder


def _layer_entry(adapter: Adapter, first: Any) -> dict[str, Any]:
    """What is said of one layer. ``report`` is for readers: an adapter can be inspected without its base model."""
    common, own = fields_of(first), fields_of(adapter.method)
    W = adapter.host.matrix()
    norm, probe = fingerprint(adapter.host.weight())
    r = report(adapter)
    entry: dict[str, Any] = {"shape": list(W.shape)}
    if type(adapter.method) is not type(first):
        entry["method"] = name_of(adapter.method)
        entry["fields"] = own
    elif changed := {key: value for key, value in own.items() if value != common[key]}:
        entry["fields"] = changed
    if adapter.dropout:
        entry["dropout"] = adapter.dropout
    if adapter.strength != 1:
        entry["strength"] = adapter.strength
    entry["base"] = {"dtype": str(W.dtype).removeprefix("torch."), "norm": norm, "probe": probe}
    entry["report"] = {
        key: value
        for key in ("lam", "distance", "relative", "bound", "bound_used", "spectral", "effective_rank")
        if (value := getattr(r, key)) is not None and math.isfinite(value)
    }
    return entry


# ---------------------------------------------------------------- loading


def load(
    model: nn.Module,
    folder: str | os.PathLike[str],
    name: str = "default",
    *,
    allow_other_base: bool = False,
    methods: Iterable[type] = (),
) -> nn.Module:
    """Read an adapter into a model, make it the active one, and freeze all else. Changes the model and returns it.

    Reads our folders, and PEFT's of type LORA and DELORA. If the model has an adapter of this name with the same layers
    and methods, its tensors take the values of the file (training goes on from there); otherwise it is added.

    Args:
        name: the adapter's name in the model.
        allow_other_base: take it although the weights are not those it was trained on; shapes must still fit.
        methods: your own method classes that the adapter may use.

    Raises:
        AdapterError: in words, before anything in the model is changed.
    """
    root, folder = unwrapped(model), Path(folder)
    saved = _open(folder, {name_of(m): m for m in methods} | METHODS)
    built = {layer: _rebuilt(root, layer, entry, saved, allow_other_base) for layer, entry in _located(root, saved).items()}
    if name in adapter_names(root):
        _overwrite(adapters(root, name), built, name)
    else:
        check_name(root, name)
        install(root, built, name)
    return model


def _open(folder: Path, methods: Mapping[str, type]) -> Saved:
    require_adapter(folder)
    return _read(folder, methods) if (folder / JSON).is_file() else read_peft(folder)


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter, ours or PEFT's."""
    return any((folder / name).is_file() for name in (JSON, "adapter_config.json"))


def require_adapter(folder: Path) -> None:
    """Raises AdapterError if a folder holds no adapter, neither ours nor PEFT's: to be asked before a large model is loaded."""
    if not folder.is_dir():
        raise AdapterError(f"there is no folder {folder}")
    if not is_adapter(folder):
        there = sorted(p.name for p in folder.iterdir())[:10]
        raise AdapterError(f"{folder} holds no adapter: expected {JSON} (ours) or adapter_config.json (PEFT), found {there}")


def _read(folder: Path, methods: Mapping[str, type]) -> Saved:
    where = folder / JSON
    data = read_json(where)
    if data.get("format") != "delora":
        raise AdapterError(f"{where} does not describe a delora adapter: its 'format' is {data.get('format')!r}")
    schema = get(data, "schema", int, where)
    if schema != SCHEMA:
        todo = "upgrade delora" if schema > SCHEMA else "it is none that was ever written"
        raise AdapterError(f"{where} has schema {schema}, this delora reads schema {SCHEMA}: {todo}")
    entries, whole = get(data, "layers", dict, where), get(data, "also_train", dict, where)
    first = _method(get(data, "method", str, where), get(data, "fields", dict, where), methods, where)
    layers: dict[str, SavedLayer] = {}
    for layer, entry in (entries | whole).items():
        at = f"{where}, {layer!r}"
        if not isinstance(entry, dict):
            raise AdapterError(f"{at}: must be an object, got {entry!r}")
        strength = get(entry, "strength", (int, float), at, 1.0)
        dropout = get(entry, "dropout", (int, float), at, 0.0)
        if not (0 <= strength < math.inf and 0 <= dropout < 1):
            raise AdapterError(f"{at}: strength {strength} or dropout {dropout} is out of range")
        if layer in whole:
            layers[layer] = SavedLayer(Full(), strength=strength)
            continue
        fields = get(entry, "fields", dict, at, {})
        method = _method(entry["method"], fields, methods, at) if "method" in entry else _changed(first, fields, at)
        base = get(entry, "base", dict, at)
        dtype = getattr(torch, get(base, "dtype", str, at), None)
        if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise AdapterError(f"{at}: {base['dtype']!r} is not the dtype of a weight")
        for key in ("norm", "probe"):
            get(base, key, (int, float), at)
        shape = tuple(get(entry, "shape", list, at))
        layers[layer] = SavedLayer(method, float(dropout), float(strength), shape, base)
    if not layers:
        raise AdapterError(f"{where} names no layer")
    file = _tensors(folder, get(data, "tensors", dict, where), where)
    for key, shape in file.shapes.items():
        owner = next((layer for layer in _prefixes(key) if layer in layers), None)
        if owner is None:
            raise AdapterError(f"{file.path}: {key!r} belongs to no layer that {JSON} names")
        layers[owner].tensors[key.removeprefix(owner + ".")] = (key, shape)
    return Saved(folder, file, layers, get(data, "base_model", str, where, None))


def _prefixes(key: str) -> Iterable[str]:
    parts = key.split(".")
    return (".".join(parts[:n]) for n in range(1, len(parts)))


def _method(name: Any, fields: dict[str, Any], methods: Mapping[str, type], where: object) -> Any:
    if name not in methods:
        raise AdapterError(
            f"{where}: unknown method {name!r}: known are {', '.join(sorted(methods))}; "
            "pass your own as delora.load(..., methods=[YourMethod])"
        )
    try:
        return methods[name](**fields)
    except (TypeError, ValueError) as error:
        raise AdapterError(f"{where}: {error}") from error


def _changed(method: Any, fields: dict[str, Any], where: str) -> Any:
    try:
        return checked_replace(method, fields, where)
    except ValueError as error:
        raise AdapterError(str(error)) from error


def _tensors(folder: Path, entry: dict[str, Any], where: Path) -> TensorFile:
    name, size = get(entry, "file", str, where), get(entry, "bytes", int, where)
    if not TENSORS.fullmatch(name):
        raise AdapterError(f"{where}: {name!r} is not the name of an adapter's tensor file")
    path = folder / name
    if not path.is_file():
        raise AdapterError(f"{path} is missing")
    if path.stat().st_size != size:
        raise AdapterError(f"{path} has {path.stat().st_size:,} bytes, {JSON} says {size:,}: it is truncated or was changed")
    with path.open("rb") as data:
        if hashlib.file_digest(data, "sha256").hexdigest() != get(entry, "sha256", str, where):
            raise AdapterError(f"{path} does not hold the bytes that {JSON} describes: it is damaged or was changed")
    return TensorFile(path)


def _located(model: nn.Module, saved: Saved) -> dict[str, SavedLayer]:
    """The saved layers, each of which is in the model."""
    names = {name for name, _ in walk(model)}
    missing = [layer for layer in saved.layers if layer not in names]
    if missing:
        close = difflib.get_close_matches(missing[0], names, n=1)
        hint = f"the nearest name is {close[0]!r}" if close else "no name is near"
        made_for = f"; the adapter was made for {saved.base_model!r}" if saved.base_model else ""
        raise AdapterError(
            f"{saved.source}: {len(missing)} of {len(saved.layers)} layers are not in this {type(model).__name__}, "
            f"first {missing[0]!r} ({hint}){made_for}"
        )
    return saved.layers


def _rebuilt(model: nn.Module, name: str, entry: SavedLayer, saved: Saved, allow_other_base: bool) -> Adapter | Copy:
    """The adapter of one layer with the tensors of the file, after every check that can be made."""
    module = model.get_submodule(name)
    layer = module.base if isinstance(module, Adapted) else module
    try:
        adapter = attach(entry.method, layer, entry.dropout, blank=True)
    except (TypeError, ValueError) as error:
        raise AdapterError(f"{saved.source}: {name}: {error}") from error
    if isinstance(adapter, Adapter):
        _check_base(name, adapter, entry, saved, allow_other_base)
    expected = adapter.saved()
    given = entry.tensors
    for key, tensor in expected.items():
        if key not in given:
            raise AdapterError(f"{saved.file.path}: the tensor {name}.{key} is missing")
        if given[key][1] != tuple(tensor.shape):
            raise AdapterError(
                f"{saved.file.path}: {name}.{key} has shape {list(given[key][1])}, expected {list(tensor.shape)}"
            )
    if extra := sorted(set(given) - set(expected)):
        raise AdapterError(f"{saved.file.path}: {name} has a tensor {extra[0]!r} that {entry.method} does not know")
    for key, (file_key, shape) in given.items():
        value = saved.file.read(file_key)
        if value.is_floating_point() != expected[key].is_floating_point():
            raise AdapterError(f"{saved.file.path}: {name}.{key} is {value.dtype}, expected {expected[key].dtype}")
        adapter.put(key, value.reshape(shape))
    adapter.strength = entry.strength
    return adapter


def _check_base(name: str, adapter: Adapter, entry: SavedLayer, saved: Saved, allow_other_base: bool) -> None:
    W = adapter.host.matrix()
    if entry.shape is not None and entry.shape != tuple(W.shape):
        raise AdapterError(
            f"{saved.source}: {name} is {list(W.shape)} in this model, the adapter was made for {list(entry.shape)}"
        )
    if W.is_meta:
        raise AdapterError(f"{name} is on the meta device: load the base model's weights before the adapter")
    if allow_other_base or entry.base is None:
        return
    if "columns" in entry.base:  # PEFT's DELORA carries the column norms of its base, in the base's dtype
        norms, c = saved.file.read(entry.base["columns"]).to(W.device), adapter.tensors()["c"]
        same = norms.shape == c.shape and bool((norms.to(c.dtype) - c).norm() <= torch.finfo(torch.bfloat16).eps * c.norm())
    else:
        same = _same_base(entry.base, adapter.host.weight(), str(W.dtype).removeprefix("torch."))
    if not same:
        made_for = f" ({saved.base_model})" if saved.base_model else ""
        raise AdapterError(
            f"{saved.source}: the weights of {name} are not those the adapter was trained on{made_for}; "
            "load the right base model, or pass allow_other_base=True if you mean it"
        )


def _overwrite(current: Mapping[str, Adapter | Copy], new: Mapping[str, Adapter | Copy], name: str) -> None:
    """Take the values over, in place: an optimizer keeps its parameters."""
    if {k: a.method for k, a in current.items()} != {k: a.method for k, a in new.items()}:
        raise AdapterError(
            f"this model already has an adapter named {name!r} with other layers or methods: "
            "choose another name=, or delora.eject it first"
        )
    with torch.no_grad():
        for layer, adapter in current.items():
            adapter.strength = new[layer].strength
            for key, tensor in new[layer].saved().items():
                adapter.saved()[key].copy_(tensor)
