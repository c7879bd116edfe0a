"""Clothes with captions that are computed from the pictures: Fashion-MNIST (Xiao, Rasul & Vollgraf 2017, arXiv:1708.07747).

The 70,000 grey pictures of 28 x 28 pixels in ten classes come from Debian's package ``dataset-fashion-mnist``. Each is placed
on a black square of 32 x 32 pixels, larger or smaller, wider or narrower, brighter or darker; its caption says so.
"""

from __future__ import annotations

import gzip
import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from delora.data.examples import DataError
from delora.data.packages import fetch
from delora.formats.files import whole_folder
from paper.standins import PREPARED
from paper.standins.packages import FASHION_MNIST

CLASSES = ("top", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
ATTRIBUTES = (("small", "large"), ("dark", "bright"), ("narrow", "wide"))
WORDS = (*CLASSES, *(word for pair in ATTRIBUTES for word in pair))  # the outputs of the classifier
SIZE = 32  # pixels of a picture's side
SEEN = 0.1  # a pixel brighter than this belongs to the garment
# Below the first number the pair's first word is true, above the second number its other word, in between neither.
LIMITS = {"small": (19.0, 24.0), "dark": (0.4, 0.55), "narrow": (0.7, 1.05)}


@dataclass(frozen=True)
class Clothes:
    """``items`` [n, 28, 28] in [0, 1], ``labels`` [n] into `CLASSES`."""

    items: Tensor
    labels: Tensor


@cache
def read(part: Literal["train", "test"], folder: Path | None = None) -> Clothes:
    """The 60,000 pictures for training or the 10,000 for testing, from the package or from a folder that holds its files.

    Raises:
        PackageError: the package cannot be fetched; the error says what to do by hand.
        DataError: a file is not one of Fashion-MNIST, or is damaged.
    """
    folder = folder or fetch(FASHION_MNIST)
    stem = {"train": "train", "test": "t10k"}[part]
    labels = _idx(folder / f"{stem}-labels-idx1-ubyte.gz", 1)
    items = _idx(folder / f"{stem}-images-idx3-ubyte.gz", 3)
    if len(items) != len(labels) or items.shape[1:] != (28, 28) or labels.max() >= len(CLASSES):
        raise DataError(
            f"{folder}: {part} is not Fashion-MNIST: {list(items.shape)} pictures, {len(labels)} labels up to {labels.max()}"
        )
    return Clothes(items.float() / 255, labels.long())


def _idx(file: Path, dimensions: int) -> Tensor:
    """Reads the IDX format: two zero bytes, the type (8: bytes), the number of dimensions, each in four bytes, the values."""
    try:
        data = gzip.decompress(file.read_bytes())
    except (OSError, EOFError) as error:
        raise DataError(f"{file} cannot be read: {error}") from error
    head = 4 + 4 * dimensions
    sizes = [int.from_bytes(data[at : at + 4], "big") for at in range(4, head, 4)]
    if data[:4] != bytes([0, 0, 8, dimensions]) or len(data) != head + math.prod(sizes):
        raise DataError(f"{file} is not an IDX file of bytes in {dimensions} dimensions, or is damaged")
    return torch.frombuffer(bytearray(data[head:]), dtype=torch.uint8).reshape(sizes)


# ---------------------------------------------------------------- pictures


@dataclass(frozen=True)
class Looks:
    """How items are placed on the square, one value for each: ``scale`` of the 28 pixels, ``stretch`` of width over height,
    ``gamma``, the power of the brightness, ``shift`` [n, 2] in pixels to the right and down."""

    scale: Tensor
    stretch: Tensor
    gamma: Tensor
    shift: Tensor

    @classmethod
    def draw(cls, n: int, generator: torch.Generator) -> Looks:
        """Small or large, dark or bright, narrow or wide with equal probability; anywhere on the square where it fits."""

        def uniform(low: float, high: float, *shape: int) -> Tensor:
            return low + (high - low) * torch.rand(n, *shape, generator=generator)

        large = torch.rand(n, generator=generator) < 0.5
        scale = torch.where(large, uniform(0.9, 1.08), uniform(0.5, 0.72))
        room = (SIZE - 28 * scale).clamp_min(0) / 2
        shift = uniform(-1, 1, 2) * room[:, None].clamp_max(4)
        return cls(scale, uniform(math.log(0.6), math.log(1.7)).exp(), uniform(math.log(0.5), math.log(3.0)).exp(), shift)


def placed(items: Tensor, looks: Looks) -> Tensor:
    """Items [n, 28, 28] as pictures [n, 32, 32] in [0, 1]."""
    wide = looks.stretch.sqrt()
    grow = torch.stack([looks.scale * wide, looks.scale / wide], 1)  # of width and height
    most = SIZE / 28 / grow.max(1).values
    grow = grow * most.clamp_max(1)[:, None]  # an item that would not fit is made smaller
    theta = torch.zeros(len(items), 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = (SIZE / 28 / grow).T
    theta[:, :, 2] = -theta[:, [0, 1], [0, 1]] * looks.shift / (SIZE / 2)
    grid = F.affine_grid(theta, [len(items), 1, SIZE, SIZE], align_corners=False)
    resized = F.grid_sample(items[:, None], grid, mode="bilinear", align_corners=False)[:, 0]
    return resized.clamp(0, 1) ** looks.gamma[:, None, None]


def measures(pictures: Tensor) -> dict[str, Tensor]:
    """The garment's longer side [pixels], mean brightness, and width over height, of pictures [n, 32, 32].

    The keys are the first words of the pairs in `ATTRIBUTES`.
    """
    garment = pictures > SEEN
    width, height = (_extent(garment.any(axis)) for axis in (1, 2))
    light = (pictures * garment).sum((1, 2)) / garment.sum((1, 2)).clamp_min(1)
    return {"small": torch.maximum(width, height), "dark": light, "narrow": width / height.clamp_min(1)}


def _extent(occupied: Tensor) -> Tensor:
    """The number of places from the first to the last occupied one, of rows [n, places]."""
    places = torch.arange(occupied.shape[1])
    last = torch.where(occupied, places, -1).max(1).values
    first = torch.where(occupied, places, occupied.shape[1]).min(1).values
    return (last - first + 1).clamp_min(0).float()


def attributes(pictures: Tensor) -> Tensor:
    """[n, 3]: for each pair in `ATTRIBUTES` 0 for the first word, 1 for the second, -1 for neither."""
    by_pair = []
    for (name, (low, high)), values in zip(LIMITS.items(), measures(pictures).values(), strict=True):
        assert name in WORDS
        by_pair.append(torch.where(values < low, 0, torch.where(values > high, 1, -1)))
    return torch.stack(by_pair, 1)


def present(pictures: Tensor, labels: Tensor) -> Tensor:
    """[n, words], 1 for each of `WORDS` that is true of a picture, else 0; of pictures [n, 32, 32] with class labels [n]."""
    truth = torch.zeros(len(pictures), len(WORDS))
    truth[torch.arange(len(labels)), labels] = 1
    for pair, values in enumerate(attributes(pictures).T):
        for word in (0, 1):
            truth[values == word, len(CLASSES) + 2 * pair + word] = 1
    return truth


# ---------------------------------------------------------------- captions


def caption(label: int, attribute: Sequence[int], generator: torch.Generator) -> str:
    """A caption such as "a photo of a small bright boot". Each true word appears with probability 2/3, in random order.

    One caption in ten has a random word of three letters before the class, so that such a word is nothing new to a model that
    later learns the token of a subject.
    """

    def chance(p: float) -> bool:
        return bool(torch.rand((), generator=generator) < p)

    words = [ATTRIBUTES[pair][value] for pair, value in enumerate(attribute) if value >= 0 and chance(2 / 3)]
    order = torch.randperm(len(words), generator=generator).tolist()
    words = [words[i] for i in order]
    if chance(0.1):
        words.append("".join(chr(97 + int(torch.randint(26, (), generator=generator))) for _ in range(3)))
    article = "a " if chance(0.5) else ""
    return f"a photo of {article}{' '.join([*words, CLASSES[label]])}"


# ---------------------------------------------------------------- patterns


def pattern(kind: str, period: int = 4) -> Tensor:
    """A pattern [32, 32] in [0, 1] to multiply a picture with; ``kind`` is one of `PATTERNS`."""
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    half = period // 2
    match kind:
        case "stripes":
            dark = y % period < half
        case "bars":
            dark = x % period < half
        case "checks":
            dark = (x // half + y // half) % 2 == 0
        case "diagonals":
            dark = (x + y) % period < half
        case "dots":
            dark = (x % period < half) & (y % period < half)
        case "rings":
            dark = ((x - SIZE / 2 + 0.5).square() + (y - SIZE / 2 + 0.5).square()).sqrt() % period < half
        case _:
            raise ValueError(f"no pattern {kind!r}; known are {', '.join(PATTERNS)}")
    return torch.where(dark, 0.15, 1.0)


PATTERNS = ("stripes", "bars", "checks", "diagonals", "dots", "rings")


# ---------------------------------------------------------------- subjects, as DreamBooth has them

# Each subject's class, pattern and period of the pattern.
SUBJECTS = {
    "striped_boot": ("boot", "stripes", 4),
    "checked_bag": ("bag", "checks", 8),
    "dotted_top": ("top", "dots", 6),
    "barred_pullover": ("pullover", "bars", 6),
    "diagonal_dress": ("dress", "diagonals", 6),
    "ringed_coat": ("coat", "rings", 6),
}
CHOOSING = ("barred_pullover", "diagonal_dress")  # settings are chosen on these and judged on `JUDGED`
VIEWED = (*CHOOSING, "ringed_coat")  # settings are chosen on these by new views
JUDGED = ("striped_boot", "checked_bag", "dotted_top")
VIEWS, NEW_VIEWS = 5, 16  # a subject's photographs, and pictures of it that no run sees
PROMPTS = tuple(f"a photo of a {word} {{}}" for pair in ATTRIBUTES for word in pair)
LEAST = 0.55  # least mean brightness of a subject, so that its pattern is visible


def subjects() -> Path:
    """Five pictures each of six garments that no model was trained on, laid out as google/dreambooth's folder.

    A subject is the first of the 10,000 test pictures of its class that is bright enough, multiplied with a pattern, which
    moves with it. The prompts ask for it small, large, dark, bright, narrow and wide.
    """
    folder = PREPARED / "fashion-subjects"
    if folder.is_dir() and {place.name for place in folder.iterdir() if place.is_dir()} != set(SUBJECTS):
        shutil.rmtree(folder)  # of an earlier version, which had other subjects
    return _made(folder, _subjects)


def new_views() -> Path:
    """16 other pictures of each of these garments, in a folder with its name; looks are drawn as those of the photographs."""
    return _made(PREPARED / "fashion-new-views", lambda folder: _photographed(folder, NEW_VIEWS, seed=1))


def _subjects(folder: Path) -> None:
    _photographed(folder, VIEWS, seed=0)
    prompts = "\n".join(f"'{prompt.replace('{}', '{0} {1}')}'.format(unique_token, class_token)," for prompt in PROMPTS)
    classes = "\n".join(f"{name},{word}" for name, (word, _, _) in SUBJECTS.items())
    blocks = (
        "Classes",
        f"subject_name,class\n{classes}",
        "Prompts",
        "Object Prompts",
        prompts,
        "Live Subject Prompts",
        prompts,
    )
    (folder / "prompts_and_classes.txt").write_text("\n\n".join(blocks), "utf-8")


def _photographed(folder: Path, views: int, seed: int) -> None:
    clothes, generator = read("test"), torch.Generator().manual_seed(seed)
    light = measures(F.pad(clothes.items, (2, 2, 2, 2)))["dark"]
    for name, (word, kind, period) in SUBJECTS.items():
        item = int(((clothes.labels == CLASSES.index(word)) & (light > LEAST)).nonzero()[0])
        patterned = clothes.items[item] * pattern(kind, period)[2:30, 2:30]

        def about(middle: float, width: float) -> Tensor:
            return middle + width * (2 * torch.rand(views, generator=generator) - 1)

        looks = Looks(about(0.95, 0.08), about(0, 0.1).exp(), about(0, 0.2).exp(), torch.stack([about(0, 2), about(0, 2)], 1))
        for number, picture in enumerate(placed(patterned.expand(views, -1, -1), looks)):
            save(picture, folder / name / f"{number:02d}.png")


def save(picture: Tensor, file: Path) -> None:
    """Writes [h, w] or [h, w, 3] in [0, 1] as an RGB file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    image(picture).save(file)


def image(picture: Tensor) -> Any:
    """[h, w] or [h, w, 3] in [0, 1] as an RGB picture."""
    return Image.fromarray((picture * 255).round().byte().numpy()).convert("RGB")


def _made(folder: Path, make: Callable[[Path], None]) -> Path:
    """The folder, made if it is missing."""
    if not folder.is_dir():
        with whole_folder(folder) as new:
            make(new)
    return folder


# ---------------------------------------------------------------- scenes, as ADE20K has them

PARTS = ("background", "dark part", "middle part", "bright part")
SHADES = (0.1, 0.35, 0.65)  # of the mean over 3 x 3 pixels: where one part ends and the next begins
COLOURS = torch.tensor([[0.0, 0.0, 0.0], [0.2, 0.2, 1.0], [0.2, 0.9, 0.2], [1.0, 0.3, 0.2]])
SCENES = {"training": 2000, "validation": 640}


def parts(pictures: Tensor) -> Tensor:
    """The label maps of pictures [n, 32, 32]: an index into `PARTS` for each pixel, by the mean brightness around it."""
    smooth = F.avg_pool2d(pictures[:, None], 3, stride=1, padding=1, count_include_pad=False)[:, 0]
    return torch.bucketize(smooth, torch.tensor(SHADES))


def scenes() -> Path:
    """Pictures, their label maps, the maps in colours, and captions that name the class, in the layout that `maps.read` reads.

    The first 2,000 training pictures and the first 640 test pictures, each in random looks.
    """
    return _made(PREPARED / "fashion-scenes", _scenes)


def _scenes(folder: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    for part, count in SCENES.items():
        clothes = read("train" if part == "training" else "test")
        pictures = placed(clothes.items[:count], Looks.draw(count, generator))
        captions = []
        for number, (picture, labels) in enumerate(zip(pictures, parts(pictures), strict=True)):
            name = f"{number:04d}"
            save(picture, folder / part / "images" / f"{name}.png")
            save(COLOURS[labels], folder / part / "controls" / f"{name}.png")
            annotation = folder / part / "annotations" / f"{name}.png"
            annotation.parent.mkdir(exist_ok=True)
            Image.fromarray((labels + 1).byte().numpy()).save(annotation)
            captions.append({"name": name, "caption": f"a photo of a {CLASSES[clothes.labels[number]]}"})
        (folder / part / "captions.jsonl").write_text("".join(json.dumps(c) + "\n" for c in captions), "utf-8")
