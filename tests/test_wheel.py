"""The wheel that people install: built, put into an environment of its own, used from an empty folder."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from tests import test_outside

ROOT = Path(__file__).parents[1]
# torch and safetensors with what they themselves need, and nothing else.
CORE = "torch torchgen functorch safetensors numpy numpy.libs typing_extensions.py"
CORE += " sympy mpmath networkx jinja2 markupsafe filelock fsspec"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder, ROOT]
    subprocess.run(command, check=True, env=os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"})
    (file,) = folder.glob("delora-*.whl")
    return file


def environment(folder: Path, wheel: Path) -> Path:
    """A virtual environment with the wheel alone; its site-packages."""
    venv.create(folder, with_pip=False)
    (site,) = folder.glob("lib/python*/site-packages")
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(site)  # a wheel of pure Python is its installed files
    return site


@pytest.fixture(scope="module")
def bare(wheel, tmp_path_factory) -> Path:
    """An environment with the wheel, torch and safetensors; its interpreter."""
    folder = tmp_path_factory.mktemp("bare")
    site = environment(folder, wheel)
    here = Path(importlib.util.find_spec("torch").origin).parents[1]
    for name in CORE.split():
        if (here / name).exists():
            (site / name).symlink_to(here / name)
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def full(wheel, tmp_path_factory) -> Path:
    """An environment with the wheel and all extras, those of the environment that the tests run in."""
    folder = tmp_path_factory.mktemp("full")
    site = environment(folder, wheel)
    here = Path(importlib.util.find_spec("torch").origin).parents[1]
    (site / "extras.pth").write_text(f"{here}\n")  # after the wheel, and without the source tree, whose .pth is not read again
    return folder / "bin" / "python"


def run(python: Path, folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    options = {"cwd": folder, "env": env | {"OMP_NUM_THREADS": "1", "COLUMNS": "160"}, "capture_output": True, "text": True}
    return subprocess.run([python, *map(str, arguments)], check=False, **options)


def delora(python: Path, folder: Path, *arguments: object) -> str:
    done = run(python, folder, "-c", "from delora.cli import main; main()", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_holds_the_library_its_types_and_its_recipes_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {"delora/py.typed", "delora/recipes/quickstart.toml", "delora/recipes/methods.toml"} <= set(names)
    assert all(name.startswith(("delora/", "delora-")) for name in names)


def test_the_core_without_extras(bare, tmp_path):
    code = """
import torch, delora, sys
assert "site-packages" in delora.__file__
model = torch.nn.Sequential(torch.nn.Linear(4, 4))
delora.inject(model, delora.DeLoRA(r=2), ["0"])
delora.save(model, "adapter"); delora.load(model, "adapter"); delora.export.peft(model, "lora"); delora.merge(model)
print(delora.__version__)
"""
    done = run(bare, tmp_path, "-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == importlib.metadata.version("delora")
    told = run(bare, tmp_path, "-c", "import delora.cli")
    assert 'pip install "delora[cli]"' in told.stderr


def test_the_shipped_recipes_from_an_empty_folder(full, tmp_path):
    listed = delora(full, tmp_path, "recipes")
    assert "quickstart" in listed
    assert "5 minutes" in listed
    few = ["variants=[]", "data.train=64", "data.validation=32", "data.test=32", "train.epochs=1"]
    assert "Test accuracy [%]" in delora(full, tmp_path, "train", "quickstart", *few, "out=shipped")
    delora(full, tmp_path, "recipes", "copy", "quickstart", ".")
    assert (tmp_path / "quickstart.toml").read_bytes() == (ROOT / "src" / "delora" / "recipes" / "quickstart.toml").read_bytes()


def test_a_method_and_a_task_of_ones_own_from_two_files(full, tmp_path):
    test_outside.write(tmp_path)
    assert "Test r2 [%]" in delora(full, tmp_path, "train", "my.toml")
    code = """
import torch, delora
from mymethods import Outer
from mytasks.tickets import Regression
model, x = Regression(), torch.randn(3, 4)
delora.load(model, "out/adapter", methods=[Outer], allow_other_base=True)
y = model(x)["logits"]
delora.merge(model)
torch.testing.assert_close(model(x)["logits"], y)
"""
    done = run(full, tmp_path, "-c", code)
    assert done.returncode == 0, done.stderr


def test_a_type_checker_sees_the_types(full, tmp_path):
    (tmp_path / "use.py").write_text(
        "import delora\nfrom delora import DeLoRA\nreveal_type(DeLoRA(r=4).r)\nreveal_type(delora.distances)\nDeLoRA(r='4')\n"
    )
    # What other libraries say of their types is not asked, and takes two minutes to read.
    (tmp_path / "mypy.ini").write_text("[mypy]\nfollow_imports = skip\n[mypy-delora.*]\nfollow_imports = silent\n")
    command = [sys.executable, "-m", "mypy", "--strict", "--python-executable", full, "use.py"]
    told = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True, check=False).stdout
    assert 'Revealed type is "int"' in told.replace("builtins.", "")
    assert "dict[str, float]" in told
    assert 'Argument "r" to "DeLoRA" has incompatible type "str"' in told
    assert "Found 1 error" in told
