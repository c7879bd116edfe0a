"""Imports only point downward, and the core needs torch and safetensors alone."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "delora"
LEVELS = [
    {"errors", "version", "torch_private", "updates", "lowrank"},
    {"methods", "hosts"},
    {"together", "layer"},
    {"models", "targets", "injection", "optimizing"},
    {"merging", "diagnostics", "formats", "export"},
    {"outside", "recipes", "data", "training", "evaluation"},
    {"tasks"},
    {"sweep", "reports", "cli"},
]
LEVEL = {part: level for level, parts in enumerate(LEVELS) for part in parts}
FILES = sorted(path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py")


def module(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> set[str]:
    """The modules of ours that a file imports, anywhere in it, but for the sake of types."""
    tree = ast.parse(path.read_text("utf-8"))
    typing = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found = set()
    known = {module(p) for p in FILES}
    for node in ast.walk(tree):
        if id(node) in typing:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names & known or {node.module}
    return {name for name in found if name.split(".")[0] == "delora"}


def part(name: str) -> str:
    return name.split(".")[1]


@pytest.mark.parametrize("path", FILES, ids=module)
def test_imports_point_downward(path):
    own = part(module(path))
    assert own in LEVEL, f"{own} has no level: give it one in this test and in delora/__init__.py"
    for name in imports(path):
        if name == "delora":  # the public face: for what stands above the core
            assert LEVEL[own] > 4
        else:
            assert LEVEL[part(name)] <= LEVEL[own], f"{module(path)} imports {name}, which lies above it"


def test_there_is_no_cycle():
    graph = {module(path): imports(path) - {"delora"} for path in FILES}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"cycle: {' -> '.join((*trail, name))}"
        if name not in done:
            for other in graph.get(name, ()):
                if other != name:
                    visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_the_core_needs_torch_and_safetensors_alone():
    """With every other library forbidden, the core imports and works (safetensors itself needs numpy to write)."""
    code = """
import sys
OTHERS = "transformers peft accelerate datasets pydantic typer rich matplotlib pandas".split()
class Forbid:
    def find_spec(self, name, *_):
        if name.split(".")[0] in OTHERS:
            raise ImportError(name)
sys.meta_path.insert(0, Forbid())
import tempfile, torch, delora
model = torch.nn.Sequential(torch.nn.Linear(4, 4))
delora.inject(model, delora.DeLoRA(r=2), ["0"])
with tempfile.TemporaryDirectory() as folder:
    delora.save(model, folder)
    delora.export.peft(model, folder + "/peft")
    delora.load(model, folder)
delora.merge(model)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_the_library_imports_nothing_heavy():
    code = (
        "import sys, delora; print([m for m in ('transformers', 'peft', 'pydantic', 'rich', 'matplotlib') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
