"""The library's own format: a folder with one JSON and one safetensors file.

The JSON names the safetensors file and its SHA-256. The tensors are written first, under a new name; then the JSON replaces
the old one in a single step. So a crash at any moment leaves either the old adapter or the new one, complete.
Nothing is unpickled, and everything is checked before the model is changed.
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

from delora.ambient import apart
from delora.diagnostics import report
from delora.formats.files import AdapterError, Saved, SavedLayer, TensorFile, get, read_json, write_atomically
from delora.formats.peft import read as read_peft
from delora.injection import check_name, install, refuse_parallel
from delora.layer import Adapted, Adapter, Copy, Placed, attach
from delora.methods import METHODS, Full
from delora.methods.base import checked_replace, fields_of, name_of
from delora.models import active_adapter, adapted_layers, adapter_names, adapters, refuse_inside, unwrapped, walk
from delora.ties import share_copies
from delora.updates import wide
from delora.version import __version__

__all__ = ["JSON", "fingerprint", "is_adapter", "load", "require_adapter", "save"]

SCHEMA = 1
JSON = "adapter.json"
TENSORS = re.compile(r"adapter-[0-9a-f]{16}\.safetensors")


# ---------------------------------------------------------------- the base's fingerprint


def fingerprint(W: Tensor) -> tuple[float, float]:
    """|W|_F and p' W q with p_i = cos(i), q_j = sin(j): two numbers that another dtype changes only by its rounding.

    Other signs or another order of the entries change the second, but not the first.

    >>> norm, probe = fingerprint(torch.eye(2))
    >>> round(norm, 4), round(probe, 4)  # probe: cos 1 sin 1 + cos 2 sin 2
    (1.4142, 0.0762)
    """
    i, j = (torch.arange(1, n + 1, dtype=torch.float64) for n in W.shape)
    p, q = torch.cos(i).to(W.device, W.dtype), torch.sin(j).to(W.device, W.dtype)
    return torch.linalg.vector_norm(W).item(), (p @ (W @ q)).item()


def _same_base(saved: Mapping[str, Any], W: Tensor, dtype: str) -> bool:
    """Whether W agrees with a saved fingerprint to within rounding.

    Rounding to a coarser dtype changes |W| by at most eps |W|, and p' W q by about eps |W|. The second may differ by eight
    times that, since rounding errors are not independent.
    """
    eps = max(torch.finfo(getattr(torch, name)).eps for name in (saved["dtype"], dtype)) if saved["dtype"] != dtype else 1e-5
    norm, probe = fingerprint(W)
    return abs(norm - saved["norm"]) <= eps * norm and abs(probe - saved["probe"]) <= 8 * eps * norm


# ---------------------------------------------------------------- saving


@apart
def save(model: nn.Module, folder: str | os.PathLike[str], name: str | None = None) -> Path:
    """Write an adapter (the active one, if ``name`` is None) and the modules trained with it to a folder.

    Raises:
        ValueError: there is no such adapter, or one of its tensors holds NaN or infinity; nothing is written then.

    >>> import delora, tempfile
    >>> model = delora.inject(nn.Sequential(nn.Linear(4, 4)), delora.DeLoRA(r=2), ["0"])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     sorted(file.suffix for file in delora.save(model, folder).iterdir())
    ['.json', '.safetensors']
    """
    name = active_adapter(model) if name is None else name
    chosen = adapters(model, name)
    tensors = {f"{layer}.{key}": t.detach().cpu().contiguous() for layer, a in chosen.items() for key, t in a.saved().items()}
    for key, t in tensors.items():
        if not torch.isfinite(t).all():
            raise ValueError(f"{key} holds NaN or infinity: nothing was written to {folder}")
    data = to_bytes({key: t.clone() for key, t in tensors.items()})  # clones: safetensors refuses shared memory
    digest = hashlib.sha256(data).hexdigest()
    first = next((a.method for a in chosen.values() if not a.whole), Full())
    config = getattr(unwrapped(model), "config", None)
    text = json.dumps(
        {
            "format": "delora",
            "schema": SCHEMA,
            "method": name_of(first),
            "fields": fields_of(first),
            "layers": {layer: _layer_entry(a, first) for layer, a in chosen.items() if not a.whole},
            "also_train": {layer: {"strength": a.strength} for layer, a in chosen.items() if a.whole},
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


def _layer_entry(adapter: Placed, first: Any) -> dict[str, Any]:
    """The JSON entry of one layer. Its ``report`` lets people inspect an adapter without its base model."""
    common, fields = fields_of(first), fields_of(adapter.method)
    W = adapter.host.read()
    norm, probe = fingerprint(W.to(wide(W.dtype)))
    r = report(adapter)
    entry: dict[str, Any] = {"shape": list(W.shape)}
    if type(adapter.method) is not type(first):
        entry["method"] = name_of(adapter.method)
        entry["fields"] = fields
    elif changed := {key: value for key, value in fields.items() if value != common[key]}:
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


@apart
def load(
    model: nn.Module,
    folder: str | os.PathLike[str],
    name: str = "default",
    *,
    allow_other_base: bool = False,
    methods: Iterable[type] = (),
) -> nn.Module:
    """Read an adapter into a model, make it the active one, and freeze everything else. Changes the model and returns it.

    The folder comes from `save`, or from PEFT with an adapter of type LORA or DELORA. If the model has an adapter of this
    name with the same layers and methods, its tensors take the values of the file, so that training can continue;
    otherwise the adapter is added.

    Args:
        model: the base model, with its weights loaded.
        folder: a folder that holds an adapter.
        name: the adapter's name in the model.
        allow_other_base: load even if the weights are not those it was trained on; shapes must still fit.
        methods: your own method classes that the adapter may use; those that the model already uses need not be listed.

    Raises:
        AdapterError: the folder cannot be read or does not fit the model; nothing in the model is changed then.

    >>> import copy, delora, tempfile
    >>> base = nn.Sequential(nn.Linear(4, 4))
    >>> model = delora.inject(copy.deepcopy(base), delora.DeLoRA(r=2), ["0"])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     again = delora.load(base, delora.save(model, folder))
    >>> torch.equal(again(torch.eye(4)), model(torch.eye(4)))
    True
    """
    root, folder = unwrapped(model), Path(folder)
    refuse_inside(root, "load")
    classes = [*methods, *(type(a.method) for layer in adapted_layers(root).values() for a in layer.adapters.values())]
    saved = _open(folder, {name_of(kind): kind for kind in classes} | METHODS)
    modules = dict(walk(root))
    located = _located(root, saved)
    built = {layer: _rebuilt(modules[layer], layer, entry, saved, allow_other_base) for layer, entry in located.items()}
    if name in adapter_names(root):
        _overwrite(adapters(root, name), built, name)
    else:
        refuse_parallel(model, "load")
        check_name(root, name)
        share_copies({layer: (modules[layer], made) for layer, made in built.items()})
        install(root, built, name)
    return model


def _open(folder: Path, methods: Mapping[str, type]) -> Saved:
    require_adapter(folder)
    return _read(folder, methods) if (folder / JSON).is_file() else read_peft(folder)


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter, in this library's format or PEFT's.

    >>> is_adapter(Path("no such folder"))
    False
    """
    return any((folder / name).is_file() for name in (JSON, "adapter_config.json"))


def require_adapter(folder: Path) -> None:
    """Check, before a large model is loaded, that a folder holds an adapter.

    Raises:
        AdapterError: there is none, neither in this library's format nor in PEFT's.

    >>> require_adapter(Path("missing"))
    Traceback (most recent call last):
    delora.formats.files.AdapterError: there is no folder missing
    """
    if not folder.is_dir():
        raise AdapterError(f"there is no folder {folder}")
    if not is_adapter(folder):
        there = sorted(p.name for p in folder.iterdir())[:10]
        raise AdapterError(f"{folder} holds no adapter: expected {JSON} (delora) or adapter_config.json (PEFT), found {there}")


def _read(folder: Path, methods: Mapping[str, type]) -> Saved:
    where = folder / JSON
    data = read_json(where)
    if data.get("format") != "delora":
        raise AdapterError(f"{where} does not describe a delora adapter: its 'format' is {data.get('format')!r}")
    schema = get(data, "schema", int, where)
    if schema != SCHEMA:
        todo = "upgrade delora" if schema > SCHEMA else "no version of delora wrote that"
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
            "pass your own as delora.load(..., methods=[YourMethod]), on the command line with --method module:YourMethod"
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
    """The saved layers, after a check that each is in the model."""
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


def _rebuilt(module: nn.Module, name: str, entry: SavedLayer, saved: Saved, allow_other_base: bool) -> Adapter | Copy:
    """The adapter of one layer, with the tensors of the file, after all checks."""
    layer = module.base if isinstance(module, Adapted) else module
    try:
        adapter = attach(entry.method, layer, entry.dropout, blank=True)
    except (TypeError, ValueError) as error:
        raise AdapterError(f"{saved.source}: {name}: {error}") from error
    if isinstance(adapter, Adapter):
        _check_base(name, Placed(adapter, layer), entry, saved, allow_other_base)
    expected = adapter.saved()
    stored = entry.tensors
    for key, tensor in expected.items():
        if key not in stored:
            raise AdapterError(f"{saved.file.path}: the tensor {name}.{key} is missing")
        if stored[key][1] != tuple(tensor.shape):
            raise AdapterError(
                f"{saved.file.path}: {name}.{key} has shape {list(stored[key][1])}, expected {list(tensor.shape)}"
            )
    if extra := sorted(set(stored) - set(expected)):
        raise AdapterError(f"{saved.file.path}: {name} has a tensor {extra[0]!r} that {entry.method} does not know")
    for key, (file_key, shape) in stored.items():
        value = saved.file.read(file_key)
        if value.is_floating_point() != expected[key].is_floating_point():
            raise AdapterError(f"{saved.file.path}: {name}.{key} is {value.dtype}, expected {expected[key].dtype}")
        # A tensor of its own: a view of the file's memory may be aligned otherwise, and then a product rounds otherwise.
        device = Placed(adapter, layer).host.read().device
        adapter.put(key, value.reshape(shape).clone(), device)
    adapter.strength = entry.strength
    return adapter


def _check_base(name: str, adapter: Placed, entry: SavedLayer, saved: Saved, allow_other_base: bool) -> None:
    W = adapter.host.read()
    if entry.shape is not None and entry.shape != tuple(W.shape):
        raise AdapterError(
            f"{saved.source}: {name} is {list(W.shape)} in this model, the adapter was made for {list(entry.shape)}"
        )
    if W.is_meta:
        raise AdapterError(f"{name} is on the meta device: load the base model's weights before the adapter")
    if allow_other_base or entry.base is None:
        return
    if "columns" in entry.base:  # PEFT's DELORA holds the column norms of its base, in the base's dtype
        norms, c = saved.file.read(entry.base["columns"]).to(W.device), adapter.tensors()["c"]
        same = norms.shape == c.shape and bool((norms.to(c.dtype) - c).norm() <= torch.finfo(torch.bfloat16).eps * c.norm())
    else:
        same = _same_base(entry.base, W.to(wide(W.dtype)), str(W.dtype).removeprefix("torch."))
    if not same:
        made_for = f" ({saved.base_model})" if saved.base_model else ""
        raise AdapterError(
            f"{saved.source}: the weights of {name} are not those the adapter was trained on{made_for}; "
            "load the right base model, or pass allow_other_base=True if you want this one"
        )


def _overwrite(current: Mapping[str, Placed], new: Mapping[str, Adapter | Copy], name: str) -> None:
    """Copy the new values in place, so that an optimizer keeps its parameters."""
    if {k: a.method for k, a in current.items()} != {k: a.method for k, a in new.items()}:
        raise AdapterError(
            f"this model already has an adapter named {name!r} with other layers or methods: "
            "choose another name=, or delora.eject it first"
        )
    with torch.no_grad():
        for layer, placed in current.items():
            placed.adapter.strength = new[layer].strength
            for key, tensor in new[layer].saved().items():
                placed.saved()[key].copy_(tensor)
