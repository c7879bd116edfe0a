"""What an adapter on disk does to each layer, without the base model."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch

from delora.diagnostics import singular_values
from delora.formats.files import AdapterError, Saved, SavedLayer, get, shown
from delora.formats.native import JSON, description, in_words, require_adapter
from delora.formats.peft import read
from delora.methods import Full
from delora.methods.base import reads_weight
from delora.updates import LowRank

__all__ = ["Description", "describe"]

HEADER = ("shape", "r", "lam", "reach", "|dW|/|W|", "bound used", "effective rank")
PEFT_HEADER = ("shape", "r", "lam", "|dW|", "effective rank")


@dataclass(frozen=True)
class Description:
    """A table of the layers, with notes.

    >>> Description("LoRA(r=2)", ("layer", "r"), [("0", "2")], ["base model: not recorded"]).rows
    [('0', '2')]
    """

    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    notes: list[str]


def describe(folder: Path) -> Description:
    """What an adapter does to each layer: ours from ``adapter.json`` alone, PEFT's LORA or DELORA from their factors.

    Raises:
        AdapterError: the folder holds neither, or is damaged.

    >>> import delora, tempfile
    >>> model = delora.inject(torch.nn.Sequential(torch.nn.Linear(4, 3)), delora.LoRA(r=2), ["0"])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     describe(delora.save(model, folder)).rows[0][:3]
    ('0', '3 x 4', '2')
    """
    require_adapter(folder)
    with in_words(folder):
        return _ours(folder / JSON) if (folder / JSON).is_file() else _peft(read(folder))


def _ours(file: Path) -> Description:
    data = description(file)
    rows = {name: _our_row(name, entry, data["fields"], file) for name, entry in data["layers"].items()}
    settings = ", ".join(f"{key}={value!r}" for key, value in data["fields"].items())
    size = get(data["tensors"], "bytes", int, file)
    notes = [f"base model: {data['base_model'] or 'not recorded'}; {size / 1000:,.0f} kB of tensors"]
    notes += [f"trained whole: {', '.join(data['also_train'])}"] if data["also_train"] else []
    return _table(f"{data['method']}({settings})", HEADER, rows, notes)


def _our_row(name: str, entry: Any, fields: dict[str, Any], file: Path) -> tuple[str, ...]:
    at = f"{file}, {name!r}"
    report = get(entry, "report", dict, at, {})
    settings = fields | get(entry, "fields", dict, at, {})
    values = [get(report, key, (int, float), at, None) for key in ("lam", "reach", "relative", "bound_used", "effective_rank")]
    figures = [_number(value, places) for value, places in zip(values, (2, 3, 3, 3, 1), strict=True)]
    return _shape(get(entry, "shape", list, at)), shown(settings.get("r", "–")).strip("'"), *figures


def _peft(saved: Saved) -> Description:
    whole = [name for name, layer in saved.layers.items() if isinstance(layer.method, Full)]
    rows = {name: _peft_row(name, layer, saved) for name, layer in saved.layers.items() if name not in whole}
    notes = [f"base model: {saved.base_model or 'not recorded'}; |dW|/|W| needs its weights and is left out"]
    notes += [f"trained whole: {', '.join(whole)}"] if whole else []
    return _table(f"PEFT: {saved.file.path.parent}", PEFT_HEADER, rows, notes)


def _peft_row(name: str, layer: SavedLayer, saved: Saved) -> tuple[str, ...]:
    method: Any = layer.method
    p = {key: saved.file.read(file_key).reshape(shape).float() for key, (file_key, shape) in layer.tensors.items()}
    if layer.base is not None and "columns" in layer.base:  # PEFT's DELORA carries the column norms of W
        p["c"] = saved.file.read(layer.base["columns"]).float()
    r = str(getattr(method, "r", "–"))
    if reads_weight(method):
        return "–", r, "–", "–", "–"
    try:
        update = method.update(None, p)
        if not isinstance(update, LowRank):
            return "–", r, "–", "–", "–"
        if update.up.ndim != 2 or update.down.ndim != 2:
            raise ValueError("they are no matrices")
        values = singular_values(update)
        lam = p["lam"].item() if "lam" in p else None
    except (LookupError, TypeError, ValueError, RuntimeError) as error:
        raise AdapterError(f"{saved.file.path}: the tensors of {name} are not those of a {method}: {error}") from error
    share = values / values.sum().clamp_min(torch.finfo(values.dtype).tiny)
    effective = torch.special.entr(share).sum().exp().item() if values.any() else 0.0
    shape = _shape([update.up.shape[0], update.down.shape[1]])
    return shape, r, _number(lam, 2), _number(values.norm().item(), 3), _number(effective, 1)


def _table(title: str, header: tuple[str, ...], rows: dict[str, tuple[str, ...]], notes: list[str]) -> Description:
    """The layers by name; the part that all names begin with is moved into the header."""
    parts = zip(*(name.split(".")[:-1] for name in rows), strict=False)
    common = ".".join(same[0] for same in takewhile(lambda column: len(set(column)) == 1, parts)) if len(rows) > 1 else ""
    first = f"layer of {common}" if common else "layer"
    named = [(name.removeprefix(common + "."), *row) for name, row in rows.items()]
    return Description(title, (first, *header), named, notes)


def _shape(shape: list[int]) -> str:
    return " x ".join(map(shown, shape))


def _number(value: float | None, places: int) -> str:
    if value is None:
        return "–"
    return f"{value:.{places}f}" if abs(value) < 1e6 else f"{value:.3g}"
