"""The library's own format: a folder with one JSON and one safetensors file.

The JSON names the safetensors file and its SHA-256, and holds a checksum of itself. The tensors are written first, under a new
name; then the JSON replaces the old one in a single step; then the file that the old one named is deleted. So a crash at any
moment leaves either the old adapter or the new one, complete, and who reads meanwhile gets one of the two. Of several processes
that save into one folder, one writes at a time. Nothing is unpickled, and everything is checked before the model is changed.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from delora.diagnostics import report
from delora.errors import nearest_path
from delora.formats import bases, cards
from delora.formats.files import (
    AdapterError,
    Saved,
    SavedLayer,
    TensorFile,
    beyond_float32,
    get,
    known_keys,
    leftovers,
    locked,
    read_json,
    require_bounded,
    shown,
    too_much,
    write_atomically,
)
from delora.formats.peft import read as read_peft
from delora.formats.peft_own import beyond_peft
from delora.hosts import Convolution, Embedding, Slot
from delora.injection import activate, check_name, install, refuse_parallel
from delora.layer import Adapted, Adapter, Copy, Placed, attach
from delora.meeting import collective, writes
from delora.methods import METHODS, Full
from delora.methods.base import checked_replace, fields_of, has_dropout, name_of, unsaid
from delora.models import (
    active_adapter,
    adapted_layers,
    adapter_names,
    adapters,
    clean_name,
    places,
    refuse_inside,
    unwrapped,
)
from delora.pretrained import SavePretrained
from delora.sharded import fill, numbers
from delora.ties import share_copies
from delora.version import __version__

__all__ = [
    "JSON",
    "description",
    "in_words",
    "is_adapter",
    "load",
    "open_folder",
    "require_adapter",
    "save",
    "seal",
]

SCHEMA = 2
JSON, LOCK = "adapter.json", ".lock"
TENSORS = re.compile(r"adapter-[0-9a-f]{16}\.safetensors")
KEYS = ("format", "schema", "method", "fields", "layers", "also_train", "base_model", "tensors", "versions", "checksum")
LAYER_KEYS = ("shape", "method", "fields", "dropout", "strength", "base", "report")
REPORTED = ("lam", "reach", "distance", "relative", "bound", "bound_used", "spectral", "effective_rank")
WEIGHTS = {str(d).removeprefix("torch."): d for d in vars(torch).values() if isinstance(d, torch.dtype) and d.is_floating_point}


# ---------------------------------------------------------------- saving


@collective
def save(model: nn.Module, folder: str | os.PathLike[str], name: str | None = None) -> Path:
    """Write an adapter (the active one, if ``name`` is None) and the modules trained with it to a folder.

    An adapter that is there is replaced; other files stay. Beside it a card is written, README.md, whose parts between delora's
    markers are written anew by the next save; a README.md without them is left alone. Of several processes that save into one
    folder at once, one writes after the other.

    Raises:
        ValueError: there is no such adapter, or a number of it cannot be written; nothing is written then.

    >>> import delora, tempfile
    >>> model = delora.inject(nn.Sequential(nn.Linear(4, 4)), delora.DeLoRA(r=2), ["0"])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     sorted(file.suffix for file in delora.save(model, folder).iterdir())
    ['.json', '.md', '.safetensors']
    """
    name = active_adapter(model) if name is None else name
    chosen = adapters(model, name)
    tensors: dict[str, Tensor] = {}
    for layer, a in chosen.items():
        if a.whole:  # as the module's own state dict names them, but for what wrappers inside it add
            kept = {_inside(layer, key): t for key, t in a.saved().items()}
        else:
            kept = {f"{layer}.{key}": t for key, t in a.saved().items()}
        tensors |= {key: numbers(t).cpu().contiguous() for key, t in kept.items()}
    for key, t in tensors.items():
        if not torch.isfinite(t).all():
            raise ValueError(f"{key} holds NaN or infinity: nothing was written to {folder}")
    data = to_bytes({key: t.clone() for key, t in tensors.items()})  # clones: safetensors refuses shared memory
    digest = hashlib.sha256(data).hexdigest()
    first = next((a.method for a in chosen.values() if not a.whole), Full())
    config = getattr(unwrapped(model), "config", None)
    described = {
        "format": "delora",
        "schema": SCHEMA,
        "method": name_of(first),
        "fields": fields_of(first),
        "layers": {layer: _layer_entry(layer, a, first) for layer, a in chosen.items() if not a.whole},
        "also_train": {layer: {"strength": a.strength} for layer, a in chosen.items() if a.whole},
        "base_model": getattr(config, "_name_or_path", None) or None,
        "tensors": {"file": f"adapter-{digest[:16]}.safetensors", "bytes": len(data), "sha256": digest},
        "versions": {"delora": __version__, "torch": str(torch.__version__)},
    }
    try:
        text = json.dumps(described | {"checksum": seal(described)}, indent=1, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise ValueError(f"a field of the method is no value of JSON: {error}; nothing was written to {folder}") from error
    if (much := too_much(text)) is not None:
        raise ValueError(
            f"{len(chosen):,} layers are more than a folder can hold: {JSON} would have {much}; nothing was written"
        )
    folder = Path(folder)
    if not writes():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with _replacing(folder, folder / f"adapter-{digest[:16]}.safetensors") as file:
        write_atomically(file, data)
        write_atomically(folder / JSON, text)
        with suppress(Exception):  # a saved adapter is worth more than its card
            cards.write(folder, described)
    return folder


SavePretrained.adapter = save


def _inside(layer: str, key: str) -> str:
    """The name of a tensor inside a layer, without those of wrappers in between."""
    return f"{layer}.{clean_name(f'_.{key}')[2:]}"


def seal(described: Mapping[str, Any]) -> str:
    """The SHA-256 of a JSON object without its checksum: of its text with sorted keys, without spaces, in ASCII.

    >>> seal({"a": 1, "checksum": "x"}) == seal({"a": 1}) == hashlib.sha256(b'{"a":1}').hexdigest()
    True
    """
    plain = {key: value for key, value in described.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()).hexdigest()


@contextmanager
def _replacing(folder: Path, file: Path) -> Iterator[Path]:
    """A context in which this process alone saves into the folder; at its end goes what its new JSON replaces.

    Deleted are the tensors that the JSON named which was replaced, and what savers left that were killed: these tell in the
    lock's notes which tensors they were about to write and to delete.
    """
    with locked(folder / LOCK) as notes:
        dead = {name for name in notes.read(4096).decode("ascii", "replace").split() if TENSORS.fullmatch(name)}
        replaced = _named(folder)
        for temporary in [*leftovers(folder / JSON), *leftovers(folder / cards.CARD), *_temporary(folder)]:
            temporary.unlink(missing_ok=True)
        new = not file.exists()
        going = dead | ({replaced} if replaced is not None else set())
        _note(notes, going | {file.name})
        try:
            yield file
        except BaseException:
            if new and _named(folder) not in (None, file.name):
                file.unlink(missing_ok=True)
            raise
        for name in going - {file.name}:
            (folder / name).unlink(missing_ok=True)


def _note(notes: BinaryIO, names: Iterable[str]) -> None:
    notes.seek(0)
    notes.write(" ".join(names).encode())
    notes.truncate()
    notes.flush()


def _temporary(folder: Path) -> list[Path]:
    """What killed savers left of tensors that were not written to their end."""
    name = re.compile(rf"\.{TENSORS.pattern}(\.[0-9a-f]+)?\.tmp")
    return [file for file in folder.iterdir() if name.fullmatch(file.name)]


def _named(folder: Path) -> str | None:
    """The tensor file that a folder's JSON names, if it has one that can be read."""
    try:
        name = read_json(folder / JSON)["tensors"]["file"]
    except (AdapterError, KeyError, TypeError):
        return None
    return name if isinstance(name, str) and TENSORS.fullmatch(name) else None


def _layer_entry(layer: str, adapter: Placed, first: Any) -> dict[str, Any]:
    """The JSON entry of one layer. Its ``report`` lets people inspect an adapter without its base model."""
    common, fields = fields_of(first), fields_of(adapter.method)
    if (large := beyond_float32(fields)) is not None:
        raise ValueError(f"{layer}: {large} is beyond float32's numbers: nothing was written")
    reported = _reported(adapter)  # first: where it reads W, that tells the fingerprint, too
    W = adapter.frozen
    base = bases.entry(W)
    if not (math.isfinite(base["norm"]) and math.isfinite(base["probe"])):
        raise ValueError(f"{layer}: its frozen weight holds NaN or infinity: nothing was written")
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
    entry["base"] = base
    entry["report"] = reported
    return entry


def _reported(adapter: Placed) -> dict[str, float]:
    """What readers are told of a layer; nothing where it cannot be computed, as for a strength of 1e30."""
    try:
        measured = report(adapter)
    except Exception:  # a saved adapter is worth more than its report
        return {}
    return {key: value for key in REPORTED if (value := getattr(measured, key)) is not None and math.isfinite(value)}


# ---------------------------------------------------------------- loading


@collective
def load(
    model: nn.Module,
    folder: str | os.PathLike[str],
    name: str = "default",
    *,
    allow_other_base: bool = False,
    methods: Iterable[type] = (),
) -> nn.Module:
    """Read an adapter into a model, make it the active one, and freeze everything else. Changes the model and returns it.

    The folder comes from `save`, or from PEFT with an adapter of type LORA, DELORA, IA3 or OFT. If the model has an adapter
    of this name with the same layers and methods, its tensors take the values of the file, so that training can continue;
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
    classes = [*methods, *(type(a.method) for each in adapter_names(root) for a in adapters(root, each).values())]
    modules = places(root)
    saved = open_folder(folder, {name_of(kind): kind for kind in classes} | METHODS, modules, type(root).__name__)
    built = {layer: _rebuilt(modules[layer], layer, entry, saved, allow_other_base) for layer, entry in saved.layers.items()}
    is_active = any(layer.active == name for layer in adapted_layers(root).values())
    if not is_active:
        refuse_parallel(model, "load")
    if name in adapter_names(root):
        _overwrite(adapters(root, name), built, name)
        if not is_active:
            activate(root, name)
    else:
        check_name(root, name)
        share_copies({layer: (modules[layer], made) for layer, made in built.items()})
        install(root, built, name)
    return model


def open_folder(folder: Path, methods: Mapping[str, type], modules: Mapping[str, nn.Module | Slot], model: str) -> Saved:
    """The adapter in a folder, its layers by the names that they have in a model of the class ``model`` with these modules.

    Raises:
        AdapterError: it cannot be read, whatever the files hold, or does not fit these modules.

    >>> import delora, tempfile
    >>> net = nn.Sequential(nn.Linear(4, 4))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = delora.save(delora.inject(net, delora.LoRA(r=2), ["0"]), folder)
    ...     list(open_folder(Path(folder), METHODS, places(net), "Sequential").layers)
    ['0']
    """
    require_adapter(folder)
    with in_words(folder):
        if (folder / JSON).is_file():
            return _read(folder, methods, modules, model)
        saved = read_peft(folder)
        names = _names(saved.layers, modules, model, folder, saved.base_model)
        _refuse_nested(
            names.values(), [names[layer] for layer, e in saved.layers.items() if isinstance(e.method, Full)], folder
        )
        return Saved(saved.source, saved.file, {names[layer]: entry for layer, entry in saved.layers.items()}, saved.base_model)


@contextmanager
def in_words(folder: Path) -> Iterator[None]:
    """A context in which whatever goes wrong is an AdapterError: a file decides what it makes its reader do.

    >>> with in_words(Path("a")):
    ...     [][0]
    Traceback (most recent call last):
    delora.formats.files.AdapterError: a cannot be read: IndexError: 'list index out of range'
    """
    try:
        yield
    except AdapterError:
        raise
    except Exception as error:
        raise AdapterError(f"{folder} cannot be read: {type(error).__name__}: {shown(str(error))}") from error


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
        raise AdapterError(f"there is no folder {folder}{nearest_path(folder)}")
    if not is_adapter(folder):
        there = sorted(p.name for p in folder.iterdir())[:10]
        raise AdapterError(f"{folder} holds no adapter: expected {JSON} (delora) or adapter_config.json (PEFT), found {there}")


def description(where: Path) -> dict[str, Any]:
    """What a folder's JSON says, after a check of its schema, its checksum and its keys.

    Raises:
        AdapterError: it is damaged, or no description of an adapter.

    >>> import delora, tempfile
    >>> model = delora.inject(nn.Sequential(nn.Linear(4, 4)), delora.LoRA(r=2), ["0"])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     description(delora.save(model, folder) / JSON)["fields"]
    {'r': 2, 'alpha': 16.0, 'rslora': False}
    """
    data = read_json(where)
    if data.get("format") != "delora":
        raise AdapterError(f"{where} does not describe a delora adapter: its 'format' is {shown(data.get('format'))}")
    schema = get(data, "schema", int, where)
    if not 1 <= schema <= SCHEMA:
        todo = "upgrade delora" if schema > SCHEMA else "no version of delora wrote that"
        raise AdapterError(f"{where} has schema {schema}, this delora reads schemas 1 to {SCHEMA}: {todo}")
    known_keys(data, KEYS if schema > 1 else KEYS[:-1], where)
    get(data, "method", str, where)
    get(data, "base_model", str, where, None)
    for key in ("fields", "layers", "also_train", "tensors", "versions"):
        get(data, key, dict, where)
    known_keys(data["tensors"], ("file", "bytes", "sha256"), f"{where}, 'tensors'")
    known_keys(data["versions"], ("delora", "torch"), f"{where}, 'versions'")
    for part, keys in (("layers", LAYER_KEYS), ("also_train", ("strength",))):
        for layer, entry in data[part].items():
            require_bounded(layer, where)
            at = f"{where}, {layer!r}"
            if not isinstance(entry, dict):
                raise AdapterError(f"{at}: must be an object, got {shown(entry)}")
            known_keys(entry, keys, at)
            known_keys(get(entry, "report", dict, at, {}), REPORTED, f"{at}, 'report'")
    if not data["layers"] and not data["also_train"]:
        raise AdapterError(f"{where} names no layer")
    if both := next((layer for layer in data["layers"] if layer in data["also_train"]), None):
        raise AdapterError(f"{where}: {both!r} is in 'layers' and in 'also_train'")
    if schema > 1 and get(data, "checksum", str, where) != seal(data):
        raise AdapterError(
            f"{where} does not hold what its checksum was made of: it is damaged or was changed; take another copy, or, to "
            "change it, load and save the adapter"
        )
    return data


def _read(folder: Path, methods: Mapping[str, type], modules: Mapping[str, nn.Module | Slot], model: str) -> Saved:
    where = folder / JSON
    for attempt in range(100):
        before = _version(where)
        try:
            data = description(where)
            names = _names([*data["layers"], *data["also_train"]], modules, model, folder, data["base_model"])
            _refuse_nested(names.values(), [names[layer] for layer in data["also_train"]], folder)
            file = _tensors(folder, data["tensors"], where)
            return Saved(folder, file, _layers(data, names, file, methods, where), data["base_model"])
        except AdapterError:
            # Another process may have replaced the JSON since, and deleted the tensors that it named.
            if attempt == 99 or _version(where) == before:
                raise
    raise AssertionError


def _version(file: Path) -> tuple[int, int, int]:
    """What tells one version of a file from another that took its place."""
    about = file.stat()
    return about.st_ino, about.st_mtime_ns, about.st_size


def _layers(
    data: dict[str, Any], names: Mapping[str, str], file: TensorFile, methods: Mapping[str, type], where: Path
) -> dict[str, SavedLayer]:
    first = _method(data["method"], data["fields"], methods, where)
    layers: dict[str, SavedLayer] = {}
    for layer, entry in data["layers"].items():
        at = f"{where}, {layer!r}"
        fields = get(entry, "fields", dict, at, {})
        own = get(entry, "method", str, at, None)
        method = _changed(first, fields, at) if own is None else _method(own, fields, methods, at)
        if isinstance(method, Full):
            raise AdapterError(f"{at}: a layer that is trained whole belongs into 'also_train'")
        base = get(entry, "base", dict, at)
        known_keys(base, ("dtype", "norm", "probe", "kind"), f"{at}, 'base'")
        get(base, "kind", str, at, None)
        if get(base, "dtype", str, at) not in WEIGHTS:
            raise AdapterError(f"{at}: {shown(base['dtype'])} is not the dtype of a weight")
        for key in ("norm", "probe"):
            get(base, key, (int, float), at)
        shape = get(entry, "shape", list, at)
        if not all(type(n) is int and n >= 0 for n in shape):
            raise AdapterError(f"{at}: 'shape' must be a list of sizes, got {shown(shape)}")
        dropout = get(entry, "dropout", (int, float), at, 0.0)
        if not 0 <= dropout < 1 or (dropout and not has_dropout(method)):
            raise AdapterError(f"{at}: dropout {shown(dropout)} is out of range for {type(method).__name__}")
        layers[layer] = SavedLayer(method, float(dropout), _strength(entry, at), tuple(shape), base)
    for layer, entry in data["also_train"].items():
        layers[layer] = SavedLayer(Full(), strength=_strength(entry, f"{where}, {layer!r}"))
    for key, shape in file.shapes.items():
        owner = next((layer for layer in _prefixes(key) if layer in layers), None)
        if owner is None:
            raise AdapterError(f"{file.path}: {key!r} belongs to no layer that {JSON} names")
        layers[owner].tensors[key.removeprefix(owner + ".")] = (key, shape)
    return {names[layer]: entry for layer, entry in layers.items()}


def _strength(entry: dict[str, Any], at: str) -> float:
    strength = get(entry, "strength", (int, float), at, 1.0)
    if strength < 0 or beyond_float32({"strength": strength}):
        raise AdapterError(f"{at}: strength {shown(strength)} is out of range")
    return float(strength)


def _prefixes(key: str) -> Iterable[str]:
    parts = key.split(".")
    return (".".join(parts[:n]) for n in range(1, len(parts)))


def _method(name: str, fields: dict[str, Any], methods: Mapping[str, type], where: object) -> Any:
    if name not in methods:
        raise AdapterError(
            f"{where}: unknown method {shown(name)}: known are {', '.join(sorted(methods))}; "
            "pass your own as delora.load(..., methods=[YourMethod]), on the command line with --method module:YourMethod"
        )
    kind = methods[name]
    return _made(lambda: kind(**unsaid(kind) | fields), where)


def _changed(method: Any, fields: dict[str, Any], where: str) -> Any:
    return _made(lambda: checked_replace(method, fields, where), where)


def _made(make: Callable[[], Any], where: object) -> Any:
    try:
        method = make()
    except Exception as error:  # whatever a method says of values that it does not know
        text = str(error)
        raise AdapterError(text if text.startswith(str(where)) else f"{where}: {text}") from error
    if (large := beyond_float32(fields_of(method))) is not None:
        raise AdapterError(f"{where}: {large} is beyond float32's numbers")
    return method


def _tensors(folder: Path, entry: dict[str, Any], where: Path) -> TensorFile:
    name, size = get(entry, "file", str, where), get(entry, "bytes", int, where)
    digest = get(entry, "sha256", str, where)
    if not TENSORS.fullmatch(name):
        raise AdapterError(f"{where}: {shown(name)} is not the name of an adapter's tensor file")
    path = folder / name
    if not path.is_file():
        raise AdapterError(f"{path} is {'no file' if path.exists() else 'missing'}")
    try:
        with path.open("rb") as data:
            there = os.fstat(data.fileno()).st_size
            actual = hashlib.file_digest(data, "sha256").hexdigest() if there == size else None
    except OSError as error:
        raise AdapterError(f"{path} cannot be read: {error.strerror or error}") from error
    if actual is None:
        raise AdapterError(f"{path} has {there:,} bytes, {JSON} says {size:,}: it is truncated or was changed")
    if actual != digest:
        raise AdapterError(f"{path} does not hold the bytes that {JSON} describes: it is damaged or was changed")
    return TensorFile(path)


def _names(
    layers: Iterable[str], modules: Mapping[str, nn.Module | Slot], model: str, source: Path, base_model: str | None
) -> dict[str, str]:
    """The name of each saved layer in the model: its own, or without the names of wrappers in it."""
    names = {layer: layer if layer in modules else clean_name(layer) for layer in layers}
    missing = [layer for layer, name in names.items() if name not in modules]
    if missing:
        short = missing[0] if len(missing[0]) <= 100 else ""
        close = difflib.get_close_matches(short, modules, n=1)
        hint = f"the nearest name is {close[0]!r}" if close else "no name is near"
        made_for = f"; the adapter was made for {shown(base_model)}" if base_model else ""
        raise AdapterError(
            f"{source}: {len(missing)} of {len(names)} layers are not in this {model}, "
            f"first {shown(missing[0])} ({hint}){made_for}"
        )
    taken: dict[Any, str] = {}
    for layer, name in names.items():
        if (other := taken.setdefault(modules[name], layer)) != layer:
            raise AdapterError(f"{source}: {other!r} and {layer!r} are one and the same module of this {model}")
    return names


def _refuse_nested(names: Iterable[str], whole: Iterable[str], source: Path) -> None:
    """Refuse a layer inside a module that is trained whole."""
    outer = set(whole)
    for name in names:
        if (around := next((prefix for prefix in _prefixes(name) if prefix in outer), None)) is not None:
            raise AdapterError(f"{source}: {name!r} lies inside {around!r}, which is trained whole")


def _rebuilt(module: nn.Module | Slot, name: str, entry: SavedLayer, saved: Saved, allow_other_base: bool) -> Adapter | Copy:
    """The adapter of one layer, with the tensors of the file, after all checks."""
    layer = module.base if isinstance(module, Adapted) else module
    try:
        adapter = attach(entry.method, layer, entry.dropout, blank=True)
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:  # a rank of 10^15 has no place, not even on meta
        raise AdapterError(f"{saved.source}: {name}: {error}") from error
    if isinstance(adapter, Adapter):
        host = Placed(adapter, layer).host
        if entry.peft and isinstance(host, Convolution) and (why := _other_convolution(entry.peft, host.layer)):
            raise AdapterError(
                f"{saved.source}: {name} is a convolution{why}, on which PEFT's {type(entry.method).__name__} computes "
                "something else than a change of the weight; merge it with PEFT and adapt the result"
            )
        _check_base(name, Placed(adapter, layer), entry, saved, allow_other_base)
    own = {_inside(name, key): key for key in adapter.saved()}
    expected = {own[_inside(name, key)]: t for key, t in adapter.saved().items()}
    stored = {own.get(_inside(name, key), key): value for key, value in entry.tensors.items()}
    if len(stored) < len(entry.tensors):
        raise AdapterError(f"{saved.file.path}: {name} has one tensor under two names")
    for key, tensor in expected.items():
        if key not in stored:
            raise AdapterError(f"{saved.file.path}: the tensor {name}.{key} is missing")
        if stored[key][1] != tuple(tensor.shape):
            if isinstance(layer, nn.Embedding):
                _refuse_resized(name, tensor.shape, stored[key][1], saved)
            raise AdapterError(
                f"{saved.file.path}: {name}.{key} has shape {list(stored[key][1])}, expected {list(tensor.shape)}"
            )
    if extra := sorted(set(stored) - set(expected)):
        raise AdapterError(f"{saved.file.path}: {name} has a tensor {extra[0]!r} that {entry.method} does not know")
    for key, (file_key, shape) in stored.items():
        value = saved.file.read(file_key).reshape(shape)
        kind = expected[key].dtype
        if value.is_floating_point() != expected[key].is_floating_point():
            raise AdapterError(f"{saved.file.path}: {name}.{key} is {value.dtype}, expected {kind}")
        # A tensor of its own: a view of the file's memory may be aligned otherwise, and then a product rounds otherwise.
        cast = value.to(kind, copy=True)
        if not (torch.isfinite(cast).all() if value.is_floating_point() else (cast.to(value.dtype) == value).all()):
            raise AdapterError(f"{saved.file.path}: {name}.{key} holds numbers that {kind} cannot hold")
        adapter.put(key, cast, Placed(adapter, layer).host.device)
    adapter.strength = entry.strength
    return adapter


def _other_convolution(kind: str, layer: Any) -> str:
    """What of a convolution makes PEFT's adapter of a kind something else than a change of its weight; "" if nothing does."""
    if kind == "OFT" and math.prod(layer.kernel_size) > 1:
        return " with a kernel"
    if kind == "LORA" and layer.groups > 1:
        return f" with groups = {layer.groups}"
    return f": {beyond_peft(layer)}" if kind == "LORA" and beyond_peft(layer) else ""


def _check_base(name: str, adapter: Placed, entry: SavedLayer, saved: Saved, allow_other_base: bool) -> None:
    W = adapter.frozen
    if entry.shape is not None and entry.shape != tuple(W.shape):
        if isinstance(adapter.host, Embedding):
            _refuse_resized(name, W.shape[::-1], entry.shape[::-1], saved)
        raise AdapterError(
            f"{saved.source}: {name} is {list(W.shape)} in this model, the adapter was made for {list(entry.shape)}"
        )
    if W.device.type == "meta":
        raise AdapterError(f"{name} is on the meta device: load the base model's weights before the adapter")
    if allow_other_base or entry.base is None:
        return
    if "columns" in entry.base:  # PEFT's DELORA holds the column norms of its base, in the base's dtype
        norms, c = saved.file.read(entry.base["columns"]).to(W.device), adapter.tensors()["c"]
        same = norms.shape == c.shape and bool((norms.to(c.dtype) - c).norm() <= torch.finfo(torch.bfloat16).eps * c.norm())
    else:
        same = bases.is_same(entry.base, W)
    if not same:
        made_for = f" ({saved.base_model})" if saved.base_model else ""
        there, here = (e.get("kind", e.get("dtype")) for e in (entry.base, bases.entry(W)))
        kinds = f"{shown(there)} there, {here} here: " if there is not None and there != here else ""
        raise AdapterError(
            f"{saved.source}: {kinds}the weights of {name} are not those the adapter was trained on{made_for}; "
            "load the right base model, or pass allow_other_base=True if you want this one"
        )


def _refuse_resized(name: str, here: Sequence[int], there: Sequence[int], saved: Saved) -> None:
    """Refuse an embedding that has another number of rows than the one the adapter was made for."""
    if len(here) == len(there) == 2 and here[1] == there[1]:
        raise AdapterError(
            f"{saved.source}: the vocabulary was resized: {name} has {here[0]:,} rows in this model, the adapter was made for "
            f"{there[0]:,}; load it after model.resize_token_embeddings({there[0]})"
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
                fill(placed.saved()[key], tensor)
