"""Collect the pages of the site, with their links turned into the site's:  python -m docs.collect FOLDER

The site shows README, CONTRIBUTING, ``docs`` with its notebooks, and ``paper/docs``, which are written for a reader of the
repository. A link to a file that is no page, such as a test, becomes its name. The pages of the reference are made from the
public names.
"""

from __future__ import annotations

import json
import posixpath
import re
import shutil
import sys
from pathlib import Path

import delora

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s#]+)(#[^)\s]*)?\)")
FENCED = re.compile(r"^ *```.*?^ *```", re.DOTALL | re.MULTILINE)
WHOLE = "\n    options: {show_root_heading: false, show_root_toc_entry: false}"
REFERENCE = {
    "Models": "inject param_groups summary disabled strength choose_strength activate merge merged blend eject reference "
    "routed serving",
    "Files": "save load from_peft push card export.peft export.vllm export.diffusers export.gguf",
    "Diagnostics": "distances diagnostics.inspect diagnostics.Recorder diagnostics.LayerReport",
    "Trainers": "integrations.AdapterTrainer integrations.AdapterCheckpoints integrations.Monitor",
}


def pages() -> dict[str, str]:
    """The files that the site shows, by their paths from the repository's root, and their paths in the site."""
    shown = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "paper/README.md": "paper/index.md"}
    for pattern in ("docs/*.md", "docs/*.png", "paper/docs/*.md", "paper/docs/figures/*.png"):
        for file in sorted(ROOT.glob(pattern)):
            path = file.relative_to(ROOT).as_posix()
            shown[path] = path.removeprefix("docs/")
    for file in sorted(ROOT.glob("docs/notebooks/*.ipynb")):
        shown[file.relative_to(ROOT).as_posix()] = f"notebooks/{file.stem}.md"
    return shown


def relinked(text: str, source: str, shown: dict[str, str]) -> str:
    """The text of the file ``source`` with its links turned into the site's; blocks of code are left as they are.

    >>> relinked("[the guide](docs/guide.md#limits) and [a test](tests/x.py)", "README.md", {"docs/guide.md": "guide.md"})
    '[the guide](guide.md#limits) and a test'
    """
    start = posixpath.dirname(shown.get(source, source)) or "."

    def turn(match: re.Match[str]) -> str:
        picture, words, target, anchor = match.groups()
        if re.match(r"\w+:", target):
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if path not in shown:
            return words
        return f"{picture}[{words}]({posixpath.relpath(shown[path], start)}{anchor or ''})"

    pieces, end = [], 0
    for code in FENCED.finditer(text):
        pieces += [LINK.sub(turn, text[end : code.start()]), code[0]]
        end = code.end()
    return "".join([*pieces, LINK.sub(turn, text[end:])])


def notebook(text: str) -> str:
    """A notebook's file as a page: its texts, and its code in blocks.

    >>> notebook('{"cells": [{"cell_type": "code", "source": ["x = 1\\\\n", "x"]}]}')
    '```python\\nx = 1\\nx\\n```\\n'
    """
    parts = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
    return "\n\n".join(parts) + "\n"


def reference() -> dict[str, str]:
    """The pages of the reference, by their paths in the site. Each name stands under the module that defines it."""
    made = {}
    for title, names in REFERENCE.items():
        made[f"reference/{title.lower()}.md"] = f"# {title}\n\n" + "\n".join(f"::: {_defined(name)}" for name in names.split())
    methods = "\n".join(f"::: {m.__module__}.{m.__name__}" for m in dict.fromkeys(delora.METHODS.values()))
    made["reference/methods.md"] = (
        f"# Methods\n\nA method is a frozen dataclass; its fields are its hyperparameters.\n\n{methods}"
    )
    parts = "\n".join(f"::: delora.{name}{WHOLE}" for name in ("updates", "lowrank", "hosts.base"))
    made["reference/parts.md"] = f"# Updates and hosts\n\nFor methods and layers of one's own.\n\n{parts}"
    return {path: text + "\n" for path, text in made.items()}


def _defined(name: str) -> str:
    value: object = delora
    for part in name.split("."):
        value = getattr(value, part)
    return f"{value.__module__}.{value.__name__}"  # type: ignore[attr-defined]


def main(out: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)
    shown = pages()
    for source, path in shown.items():
        target = out / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.suffix == ".md":
            text = (ROOT / source).read_text("utf-8")
            target.write_text(relinked(notebook(text) if source.endswith(".ipynb") else text, source, shown), "utf-8")
        else:
            shutil.copyfile(ROOT / source, target)
    for path, text in reference().items():
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        (out / path).write_text(text, "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
