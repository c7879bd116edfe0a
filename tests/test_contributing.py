"""CONTRIBUTING's page on a method, followed to the letter in a copy of the tree: one file and one line, and all is green."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def walked(tmp_path_factory) -> Path:
    """The tree after the two steps."""
    folder = tmp_path_factory.mktemp("walk")
    for name in ("src", "tests", "docs", "examples", "paper/__init__.py", "pyproject.toml", "README.md", "CONTRIBUTING.md"):
        target = folder / name
        target.parent.mkdir(exist_ok=True)
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, target)
    page = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    code = textwrap.dedent(re.search(r" *```python\n(.*?)\n *```", page, re.DOTALL)[1].join("\n\n"))
    (line,) = re.findall(r"`(from delora\.methods\.mymethod import .*?)`", page)
    methods = folder / "src" / "delora" / "methods"
    (methods / "mymethod.py").write_text("from __future__ import annotations\n" + code.lstrip("\n"))
    table = (methods / "__init__.py").read_text("utf-8")
    last = re.findall(r"^from delora\.methods\.\w+ import [A-Z].*$", table, re.MULTILINE)[-1]
    (methods / "__init__.py").write_text(table.replace(last, f"{last}\n{line}"))
    return folder


def run(folder: Path, *arguments: str) -> str:
    env = os.environ | {"PYTHONPATH": f"{folder / 'src'}:{folder}", "OMP_NUM_THREADS": "1"}
    env.pop("PYTEST_XDIST_WORKER", None)
    done = subprocess.run([sys.executable, *arguments], cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_a_method_is_one_file_and_one_line(walked):
    told = run(walked, "-c", "import delora; print(delora.__file__, 'MyMethod' in delora.__all__, delora.METHODS['mymethod'])")
    assert told.startswith(str(walked))
    assert "True <class 'delora.methods.mymethod.MyMethod'>" in told
    run(walked, "-m", "docs.generate")
    assert "## MyMethod" in (walked / "docs" / "methods.md").read_text("utf-8")
    page = "test_the_page_of_the_methods_is_made_from_what_the_methods_say"
    chosen = f"MyMethod or mymethod or {page} or every_method or hold_every_method"
    places = [
        "tests/contract",
        "tests/test_methods.py",
        "tests/test_docs.py",
        "tests/oracles",
        "src/delora/methods/mymethod.py",
    ]
    passed = run(walked, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", "-k", chosen, *places)
    assert int(re.search(r"(\d+) passed", passed)[1]) > 100
