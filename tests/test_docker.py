"""The Dockerfile, as far as it can be tested without Docker: its files, its commands, its versions, its entry point."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINES = [line.partition(" ") for line in (ROOT / "Dockerfile").read_text("utf-8").splitlines() if line[:1].isupper()]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def said(instruction: str) -> list[str]:
    return [rest for word, _, rest in LINES if word == instruction]


def test_every_command_is_one_of_the_shell_and_installs_the_tested_versions():
    for command in said("RUN"):
        subprocess.run(["bash", "-n", "-c", command], check=True)
    tools, install = (shlex.split(command) for command in said("RUN"))
    assert tools[:2] == ["pip", "install"]
    assert all("==" in word for word in tools[2:] if not word.startswith("-"))
    assert install[install.index("--constraint") + 1] in said("COPY")[0].split()[:-1]
    (extras,) = re.findall(r"\.\[(.+)\]", install[-1])
    assert set(extras.split(",")) <= PROJECT["optional-dependencies"].keys()
    assert re.search(r"^torch==\d", (ROOT / "constraints.txt").read_text("utf-8"), re.MULTILINE)
    assert not [word for word in install if word.startswith("torch")]  # the constraint alone says which
    assert said("ARG") == ["TORCH=cpu"]


def test_the_entry_point_and_python_are_the_packages():
    (entry,) = said("ENTRYPOINT")
    assert json.loads(entry) == list(PROJECT["scripts"])
    (python,) = re.findall(r"python:(\d+\.\d+)", said("FROM")[0])
    assert f">={python}" == PROJECT["requires-python"]  # the one that constraints.txt is of


def test_what_is_copied_is_all_that_the_package_is_built_from(tmp_path):
    ignored = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    for copied in said("COPY"):
        *sources, target = copied.split()
        for source in sources:
            assert f"!{source}" in ignored  # else Docker would not see it
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, tmp_path / target)
            else:
                shutil.copy(ROOT / source, tmp_path / target)
    build = "from hatchling.build import build_wheel; print(build_wheel('.'))"
    done = subprocess.run([sys.executable, "-c", build], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(tmp_path / done.stdout.strip()) as wheel:
        names = wheel.namelist()
    modules = {name for name in names if name.endswith(".py")}
    assert modules == {file.relative_to(ROOT / "src").as_posix() for file in (ROOT / "src").rglob("*.py")}
    assert any(name.endswith("/LICENSE") for name in names)


@pytest.mark.parametrize("page", ["Dockerfile", "docs/installing.md"])
def test_every_docker_command_of_a_page_is_one_of_ours(page):
    commands = re.findall(r"^[# ]*(docker .+?)(?: {3,}.*)?$", (ROOT / page).read_text("utf-8"), re.MULTILINE)
    assert commands
    for words in map(shlex.split, commands):
        arguments = [words[i + 1].partition("=")[0] for i, word in enumerate(words) if word == "--build-arg"]
        assert set(arguments) <= {line.partition("=")[0] for line in said("ARG")}
