"""Pictures with their label maps and captions, such as ADE20K (B. Zhou et al., "Scene Parsing through ADE20K", CVPR 2017).

A folder of this form::

    training/images/NAME.jpg        the picture
    training/annotations/NAME.png   its labels: 0 is unlabelled, then the classes from 1
    training/controls/NAME.png      the labels in colours, as the model sees them
    training/captions.jsonl         {"name": "NAME", "caption": "..."} on each line
    validation/...                  the same
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from delora.data.dreambooth import IMAGES
from delora.data.examples import DataError

__all__ = ["PARTS", "Scene", "read"]

PARTS = ("training", "validation")


@dataclass(frozen=True)
class Scene:
    """The files of one picture, and its caption.

    >>> room = Scene("a", Path("images/a.jpg"), Path("annotations/a.png"), Path("controls/a.png"), "a room")
    >>> room.caption
    'a room'
    """

    name: str
    image: Path
    annotation: Path
    control: Path
    caption: str


def read(source: str, part: str) -> list[Scene]:
    """The scenes of "training" or "validation", in the order of their names.

    Raises:
        DataError: a picture lacks its labels, colours or caption; the message says what the folder must hold.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for file in ("images/a.jpg", "annotations/a.png", "controls/a.png", "captions.jsonl"):
    ...         Path(folder, "training", file).parent.mkdir(parents=True, exist_ok=True)
    ...         _ = Path(folder, "training", file).write_text('{"name": "a", "caption": "a room"}')
    ...     [scene.caption for scene in read(folder, "training")]
    ['a room']
    """
    folder = Path(source) / part
    captions = _captions(folder / "captions.jsonl") if (folder / "captions.jsonl").is_file() else None
    images = {p.stem: p for p in sorted((folder / "images").glob("*")) if p.suffix.lower() in IMAGES}
    if captions is None or not images:
        raise DataError(
            f"{folder} does not hold images/, annotations/, controls/ and captions.jsonl. For ADE20K: images and annotations "
            "of ADEChallengeData2016; captions (by BLIP) and coloured maps as the GitHub repository Zeju1997/oft prepares them"
        )
    scenes = []
    for name, image in images.items():
        labels, control = (folder / kind / f"{name}.png" for kind in ("annotations", "controls"))
        for file in (labels, control):
            if not file.is_file():
                raise DataError(f"{image} has no {file}")
        if name not in captions:
            raise DataError(f"{folder / 'captions.jsonl'} has no caption for {name}")
        scenes.append(Scene(name, image, labels, control, captions[name]))
    return scenes


def _captions(file: Path) -> dict[str, str]:
    captions: dict[str, str] = {}
    for number, line in enumerate(file.read_text("utf-8").split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
                captions[str(row["name"])] = str(row["caption"])
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"{file}, line {number}: expected name and caption, got {line[:80]!r}") from error
    return captions
