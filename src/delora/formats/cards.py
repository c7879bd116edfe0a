"""The card beside an adapter's files: a README.md that says what the adapter is and how to use it, made from its JSON alone.

What is generated stands between two markers, and in a front matter that says so in its first line. `delora.save` writes these
parts anew; all else in the file is the user's, and so is a README.md without markers.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from delora.formats.files import printable, write_atomically
from delora.methods import METHODS

__all__ = ["CARD", "cell", "text", "write"]

CARD = "README.md"
BEGIN, END = "<!-- delora: written by save from here -->", "<!-- delora: to here -->"
FRONT = "# Written by delora. Delete this line to keep changes of your own."
REPO = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")  # what may be a repository's name on the Hub
MOST_BYTES, MOST_GROUPS = 2**20, 40  # of a README.md that is read; rows of a table
CITATION = """@inproceedings{bini2025decoupling,
  title = {Decoupling Angles and Strength in Low-rank Adaptation},
  author = {Massimo Bini and Leander Girrbach and Zeynep Akata},
  booktitle = {International Conference on Learning Representations},
  year = {2025},
  url = {https://arxiv.org/abs/2503.18225},
}"""


def write(
    folder: Path,
    described: Mapping[str, Any],
    *,
    data: str | None = None,
    metrics: Mapping[str, float] | None = None,
    repo: str | None = None,
    extra: Mapping[str, Any] | None = None,
) -> bool:
    """Write a folder's card, or its generated parts anew; whether there is one that could be written.

    ``described``: what the folder's JSON says. ``repo``: its name on the Hub. ``extra``: more keys of the front matter.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write(Path(folder), {"method": "lora", "fields": {"r": 2}, "layers": {}}), (Path(folder) / CARD).is_file()
    (True, True)
    """
    file = folder / CARD
    body = text(described, data=data, metrics=metrics, repo=repo)
    front = _front(described, extra or {})
    if not file.is_file():
        write_atomically(file, f"{front}\n{body}\n".encode())
        return True
    if file.stat().st_size > MOST_BYTES:
        return False
    old = file.read_text("utf-8")
    begin, end = old.find(BEGIN), old.find(END)
    if begin < 0 or end < begin:
        return False
    new = f"{old[:begin]}{body}{old[end + len(END) :]}"
    if (ours := re.match(rf"---\n{re.escape(FRONT)}\n.*?\n---\n", new, re.DOTALL)) is not None:
        new = front + new[ours.end() :]
    if new != old:
        write_atomically(file, new.encode())
    return True


def cell(value: object) -> str:
    r"""Any text as one cell of a Markdown table, or one line: without control characters, mark-up or HTML.

    >>> cell("a|b `c` <script>\n[x](y)")
    'a\\|b \\`c\\` &lt;script&gt;\\\\n\\[x\\](y)'
    """
    plain = printable(str(value), newlines=False)
    plain = re.sub(r"([\\`*_{}\[\]|#~!])", r"\\\1", plain[:200])
    return plain.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else cell(value)


def _base(described: Mapping[str, Any]) -> tuple[str | None, bool]:
    """The base model's name, of a folder only the last part, and whether it may be a name on the Hub."""
    name = described.get("base_model")
    if not isinstance(name, str) or not name:
        return None, False
    if REPO.fullmatch(name):
        return name, True
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1] or None, False


def _front(described: Mapping[str, Any], extra: Mapping[str, Any]) -> str:
    base, on_hub = _base(described)
    keys: dict[str, Any] = {"library_name": "delora"}
    if base is not None and on_hub:
        keys["base_model"] = base
    keys["tags"] = ["delora", str(described.get("method"))]
    keys |= extra
    lines = [f"{key}: {json.dumps(value, ensure_ascii=True)}" for key, value in keys.items()]  # JSON is YAML
    return "\n".join(["---", FRONT, *lines, "---", ""])


def text(
    described: Mapping[str, Any],
    *,
    data: str | None = None,
    metrics: Mapping[str, float] | None = None,
    repo: str | None = None,
) -> str:
    """The generated part of a card, from what an adapter's JSON says.

    >>> layers = {"a.q": {"shape": [4, 4], "report": {"relative": 0.25, "effective_rank": 1.5}}}
    >>> print(text({"method": "lora", "fields": {"r": 2}, "layers": layers}).split("## How far")[1].split("##")[0])
     it is from the base model
    <BLANKLINE>
    | layers | number | mean distance | largest | effective rank |
    |---|---|---|---|---|
    | q | 1 | 0.25 | 0.25 | 1.5 |
    <BLANKLINE>
    The distance is \\|W' - W\\| / \\|W\\|; layers by the last part of their names. `delora inspect` shows each.
    <BLANKLINE>
    <BLANKLINE>
    """
    method = METHODS.get(str(described.get("method")))
    name = method.__name__ if method is not None else cell(described.get("method"))
    fields = ", ".join(f"{cell(k)} = {_number(v)}" for k, v in described.get("fields", {}).items())
    base, on_hub = _base(described)
    of = f" of {cell(base)}" if base else ""
    layers = described.get("layers", {})
    lines = [BEGIN, "", f"# A {name} adapter{of}", ""]
    lines += [f"- Method: {name} ({fields})" if fields else f"- Method: {name}"]
    if method is not None and (equation := (method.__doc__ or "").strip().partition("\n")[0].strip()):
        lines += ["", f"      {equation}", ""]
    lines += [f"- Adapted layers: {len(layers):,}"]
    if others := [layer for layer, entry in layers.items() if entry.get("method") or entry.get("fields")]:
        lines += [f"- With a method or fields of their own: {len(others):,}, such as {cell(others[0])}"]
    if whole := list(described.get("also_train", {})):
        more = ", ..." if len(whole) > 8 else ""
        lines += [f"- Trained whole: {', '.join(map(cell, whole[:8]))}{more}"]
    strengths = {entry.get("strength", 1) for entry in layers.values()}
    if strengths - {1}:
        lines += [f"- Strength: {', '.join(map(_number, sorted(strengths)))}"]
    versions = described.get("versions", {})
    lines += [f"- Written by delora {cell(versions.get('delora', '?'))}, torch {cell(versions.get('torch', '?'))}"]
    if file := described.get("tensors", {}).get("file"):
        lines += [f"- This card is of {cell(file)}"]
    lines += ["", "## Data", "", cell(data) if data else "Not told."]
    lines += ["", "## Metrics", ""]
    lines += (
        ["| | |", "|---|---|", *(f"| {cell(k)} | {_number(v)} |" for k, v in metrics.items())] if metrics else ["Not told."]
    )
    lines += ["", *_distances(layers), *_use(base if on_hub else None, repo)]
    return "\n".join([*lines, "", END])


def _distances(layers: Mapping[str, Any]) -> list[str]:
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for layer, entry in layers.items():
        groups.setdefault(layer.rpartition(".")[2], []).append(entry.get("report", {}))
    rows = []
    for group, reports in groups.items():
        far, rank = (_values(reports, key) for key in ("relative", "effective_rank"))
        if far:
            mean = f"{sum(rank) / len(rank):.3g}" if rank else ""
            rows += [f"| {cell(group)} | {len(reports):,} | {sum(far) / len(far):.3g} | {max(far):.3g} | {mean} |"]
    if not rows:
        return []
    left = [f"| and {len(rows) - MOST_GROUPS:,} more | | | | |"] if len(rows) > MOST_GROUPS else []
    return [
        "## How far it is from the base model",
        "",
        "| layers | number | mean distance | largest | effective rank |",
        "|---|---|---|---|---|",
        *rows[:MOST_GROUPS],
        *left,
        "",
        "The distance is \\|W' - W\\| / \\|W\\|; layers by the last part of their names. `delora inspect` shows each.",
        "",
    ]


def _values(reports: list[Mapping[str, Any]], key: str) -> list[float]:
    return [r[key] for r in reports if isinstance(r.get(key), (int, float)) and math.isfinite(r[key])]


def _use(base: str | None, repo: str | None) -> list[str]:
    folder, base = repo or "FOLDER", base or "BASE"
    return [
        "## How to use it",
        "",
        "```python",
        "import delora",
        "from transformers import AutoModel  # or the class for the task",
        "",
        f"model = AutoModel.from_pretrained({base!r})",
        f"delora.load(model, {folder!r})  # refused if the base's weights are others",
        "delora.strength(model, 0.5)     # turn it down, or up",
        "```",
        "",
        f"To serve it: `delora export FOLDER --model {base} --out OUT` writes an exact LoRA for PEFT, vLLM and others,",
        f"where there is one; `delora merge FOLDER --model {base} --out OUT` writes a plain model.",
        "",
        "## Citation",
        "",
        "```bibtex",
        CITATION,
        "```",
    ]
