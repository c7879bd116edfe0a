"""Photographs of subjects, with the word for their class and the prompts by which they are judged.

N. Ruiz et al., "DreamBooth: Fine Tuning Text-to-Image Diffusion Models for Subject-Driven Generation", CVPR 2023: 30
subjects of 4 to 6 photographs, in the GitHub repository google/dreambooth. A folder of your own photographs works too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from delora.data.examples import DataError
from delora.errors import nearest, nearest_path

__all__ = ["FILE", "IMAGES", "PLAIN", "Subject", "odd", "open_image", "photographs", "read"]

FILE = "prompts_and_classes.txt"
IMAGES = (".jpg", ".jpeg", ".png", ".webp")
PLAIN = ("a photo of {}",)  # the prompts for photographs of one's own that have none
LIVE = ("cat", "dog")  # the classes whose subjects have the second list of prompts


@dataclass(frozen=True)
class Subject:
    """One subject. Its ``prompts`` have ``{}`` in the place of "token class", or of the class alone.

    >>> rex = Subject("rex", "dog", (Path("rex/1.jpg"),), ("a photo of {} on the beach",))
    >>> rex.prompts[0].format(f"qwe {rex.word}")
    'a photo of qwe dog on the beach'
    """

    name: str
    word: str
    images: tuple[Path, ...]
    prompts: tuple[str, ...]


def read(source: str, names: Sequence[str] = (), word: str | None = None, prompts: Sequence[str] = ()) -> list[Subject]:
    """The subjects of a folder, in alphabetical order; all of them if no names are given.

    Args:
        source: the folder ``dataset`` of google/dreambooth, which holds `FILE` and a folder for each subject; or, with
            ``word``, a folder of photographs of one subject. It may have ``prompts``; by default `PLAIN`.

    Raises:
        DataError: the folder, a subject, a photograph or a prompt is missing; the message says what to fetch.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     Path(folder, "1.jpg").touch()
    ...     (subject,) = read(folder, word="dog", prompts=["a photo of {} on the beach"])
    >>> subject.word, len(subject.images)
    ('dog', 1)
    """
    folder = Path(source)
    for prompt in prompts:
        if prompt.count("{}") != 1:
            raise DataError(f"the prompt {prompt!r} must have {{}} once, in the subject's place")
    if word is not None:
        if not folder.is_dir():
            raise DataError(f"there is no folder {source!r} of photographs{nearest_path(source)}")
        return [Subject(folder.resolve().name, word, _images(folder), tuple(prompts) or PLAIN)]
    if not (folder / FILE).is_file():
        raise DataError(
            f"{source!r} does not hold {FILE}: give the folder 'dataset' of the GitHub repository google/dreambooth as "
            "data.source; or a folder of your own photographs, with what they show, such as subject.word=mug"
        )
    words, lists = _parse((folder / FILE).read_text("utf-8"), str(folder / FILE))
    for name in names:
        if name not in words:
            raise DataError(f"{folder / FILE} has no subject {name!r}; {nearest(name, list(words))}")
    chosen = sorted(names or words)
    by_name = {name: tuple(prompts) or lists[words[name] in LIVE] for name in chosen}
    return [Subject(name, words[name], _images(folder / name), by_name[name]) for name in chosen]


def _parse(text: str, where: str) -> tuple[dict[str, str], tuple[tuple[str, ...], tuple[str, ...]]]:
    """The class of each subject; the prompts for objects and those for live subjects."""
    before, _, live = text.partition("Live Subject Prompts")
    classes, _, objects = before.partition("Prompts")
    words = dict(re.findall(r"^(\w+),(.+?)\s*$", classes, re.MULTILINE))
    words.pop("subject_name", None)
    lists = [
        tuple(line.replace("{0} {1}", "{}") for line in re.findall(r"'([^']*\{0\} \{1\}[^']*)'", part))
        for part in (objects, live)
    ]
    if not words or not all(lists):
        raise DataError(
            f"{where} is not the file of google/dreambooth: it has {len(words)} subjects and {[*map(len, lists)]} prompts"
        )
    return words, (lists[0], lists[1])


def photographs(folder: Path) -> tuple[Path, ...]:
    """The files of a folder that are named as pictures; none if it is no folder.

    >>> photographs(Path("no such folder"))
    ()
    """
    return tuple(sorted(p for p in folder.glob("*") if p.suffix.lower() in IMAGES and not p.name.startswith(".")))


def odd(subject: Subject, resolution: int) -> list[str]:
    """Sentences on what is odd about a subject's photographs: equal ones, ones smaller than the resolution, other files."""
    told = []
    folder = subject.images[0].parent
    same: dict[bytes, str] = {}
    for file in subject.images:
        first = same.setdefault(file.read_bytes(), file.name)
        if first != file.name:
            told.append(f"{file.name} is {first} once more")
        if (side := min(open_image(file).size)) < resolution:
            told.append(f"{file.name} is enlarged: its shorter side has {side} pixels, and the model draws {resolution}")
    if others := sorted(p.name for p in folder.iterdir() if p not in subject.images and not p.name.startswith(".")):
        told.append(f"left out, for it is no picture ({', '.join(IMAGES)}): {', '.join(others[:5])}")
    return told


def _images(folder: Path) -> tuple[Path, ...]:
    files = photographs(folder)
    if not files:
        raise DataError(f"{folder} holds no photograph ({', '.join(IMAGES)})")
    return files


def open_image(file: Path) -> Any:
    """A picture in RGB, turned upright as its EXIF data say.

    Raises:
        DataError: the file is not a picture, or is damaged.

    >>> import tempfile
    >>> from PIL import Image
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     Image.new("L", (4, 3)).save(f"{folder}/grey.png")
    ...     picture = open_image(Path(folder, "grey.png"))
    >>> picture.mode, picture.size
    ('RGB', (4, 3))
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(file) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise DataError(f"{file} cannot be read as a picture: {error}") from error
