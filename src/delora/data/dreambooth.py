"""Photographs of subjects, with the word for their class and the prompts they are judged by.

N. Ruiz et al., "DreamBooth: Fine Tuning Text-to-Image Diffusion Models for Subject-Driven Generation", CVPR 2023: 30
subjects of 4 to 6 photographs, in the GitHub repository google/dreambooth. A folder of one's own photographs serves as well.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from delora.data.examples import DataError

__all__ = ["FILE", "Subject", "open_image", "read"]

FILE = "prompts_and_classes.txt"
IMAGES = (".jpg", ".jpeg", ".png", ".webp")
LIVE = ("cat", "dog")  # the classes whose subjects have the second list of prompts


@dataclass(frozen=True)
class Subject:
    """``prompts`` have ``{}`` where the token and the class, or the class alone, are put."""

    name: str
    word: str
    images: tuple[Path, ...]
    prompts: tuple[str, ...]


def read(source: str, names: Sequence[str] = (), word: str | None = None, prompts: Sequence[str] = ()) -> list[Subject]:
    """The subjects of a folder, in alphabetical order; all of them if no names are given.

    Args:
        source: the folder ``dataset`` of google/dreambooth, which holds `FILE` and a folder for each subject; or, with
            ``word`` and ``prompts``, a folder of photographs of one subject.

    Raises:
        DataError: in words, with what to fetch.
    """
    folder = Path(source)
    for prompt in prompts:
        if prompt.count("{}") != 1:
            raise DataError(f"the prompt {prompt!r} must have {{}} once, where the subject is put")
    if word is not None:
        if not folder.is_dir():
            raise DataError(f"there is no folder {source!r} of photographs")
        if not prompts:
            raise DataError("give subject.prompts, such as ['a photo of {} on the beach'], to judge your subject by")
        return [Subject(folder.resolve().name, word, _images(folder), tuple(prompts))]
    if not (folder / FILE).is_file():
        raise DataError(
            f"{source!r} does not hold {FILE}: give the folder 'dataset' of the GitHub repository google/dreambooth as "
            "data.source; or a folder of your own photographs, with subject.word and subject.prompts"
        )
    words, lists = _parse((folder / FILE).read_text("utf-8"), str(folder / FILE))
    for name in names:
        if name not in words:
            raise DataError(f"{folder / FILE} has no subject {name!r}; there are {', '.join(words)}")
    every = sorted(names or words)
    chosen = {name: tuple(prompts) or lists[words[name] in LIVE] for name in every}
    return [Subject(name, words[name], _images(folder / name), chosen[name]) for name in every]


def _parse(text: str, where: str) -> tuple[dict[str, str], tuple[tuple[str, ...], tuple[str, ...]]]:
    """The classes of the subjects; the prompts for objects and those for live subjects."""
    before, _, live = text.partition("Live Subject Prompts")
    classes, _, objects = before.partition("Prompts")
    words = dict(re.findall(r"^(\w+),(.+?)\s*$", classes, re.MULTILINE))
    words.pop("subject_name", None)
    found = [
        tuple(line.replace("{0} {1}", "{}") for line in re.findall(r"'([^']*\{0\} \{1\}[^']*)'", part))
        for part in (objects, live)
    ]
    if not words or not all(found):
        raise DataError(
            f"{where} is not the file of google/dreambooth: it has {len(words)} subjects and {[len(f) for f in found]} prompts"
        )
    return words, (found[0], found[1])


def _images(folder: Path) -> tuple[Path, ...]:
    files = tuple(sorted(p for p in folder.glob("*") if p.suffix.lower() in IMAGES))
    if not files:
        raise DataError(f"{folder} holds no photograph ({', '.join(IMAGES)})")
    return files


def open_image(file: Path) -> Any:
    """A picture as RGB, turned as its camera was held.

    Raises:
        DataError: it is no picture, or a damaged one.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(file) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise DataError(f"{file} cannot be read as a picture: {error}") from error
