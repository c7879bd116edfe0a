"""Semantic map to image: a text-to-image model learns to follow label maps.

A small hint encoder (ControlNet's) reads the coloured map; its output is added to that of the U-Net's first convolution. The
adapter is in the attention and the gated layers. Scores: mIoU and accuracy of a segmenter on the pictures, and the FID.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from diffusers import ControlNetModel
from diffusers.models.controlnets.controlnet import ControlNetConditioningEmbedding
from PIL import Image
from pydantic import Field
from rich.console import Console
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor, nn
from torch.utils.data import Dataset

import delora
from delora.data import maps
from delora.data.dreambooth import open_image
from delora.data.examples import DataError
from delora.data.maps import Scene
from delora.evaluation.generation import pipeline, sample
from delora.evaluation.images import Encoder
from delora.evaluation.pictures import write
from delora.evaluation.segmentation import UNLABELLED, Inception, Overlap, Segmenter, frechet
from delora.formats.files import write_atomically
from delora.tasks.subject import rgb
from delora.training import denoising
from delora.training.config import ConfigError, Count, Experiment, Rate, Strict
from delora.training.denoising import Denoiser, denoiser_of, embedded, form_of, skeleton
from delora.training.experiments import adapt, begin, conclude, fit
from delora.training.models import loading
from delora.training.runs import Result, RunContext, RunError

__all__ = [
    "Data",
    "Hinted",
    "MapSettings",
    "Material",
    "Settings",
    "base",
    "check",
    "columns",
    "deliver",
    "evaluate",
    "run",
    "with_hint",
]

CHECKED = 2  # pictures that are made again with the delivered adapter
AT_ONCE = 16  # pictures in one batch
SELECTION = "There is no part to validate on beside the test maps: settings are compared by the test score itself."
NOT_SHARES = ("fid",)


class Data(Strict):
    """The folder of pictures, label maps and captions, in the form that `delora.data.maps` reads.

    >>> Data().source
    'ade20k'
    """

    source: str = "ade20k"


class MapSettings(Strict):
    """How a text-to-image model learns to follow label maps, and how that is judged.

    ``hint``: a ControlNet whose hint encoder is used (default: a new one); it is trained if ``adapter.also_train`` has
    "conv_in.encoder". ``maps``: how many of the validation maps are drawn (default: all), each in ``steps`` of DDIM with
    ``guidance``. ``segmenter``: a model of transformers with ``classes`` classes, which sees each picture with its shorter side
    of each length in ``scales`` (default: once, as its processor resizes it). ``fid``: "inception", or a vision model for the
    features.

    >>> MapSettings(maps=500).classes
    150
    """

    hint: str | None = None
    resolution: Annotated[int, Field(ge=8)] = 512
    maps: Annotated[int, Field(ge=2)] | None = None
    steps: Count = 50
    guidance: Rate = 9.0
    segmenter: str = "openmmlab/upernet-convnext-small"
    scales: list[Count] = Field(default=[])
    classes: Count = 150
    fid: str = "inception"


class Settings(Experiment):
    """An experiment of this kind.

    >>> adapter = {"method": "lora", "r": 4, "targets": ["to_q"]}
    >>> recipe = {"task": "semantic_map", "name": "mine", "out": "runs/mine", "model": "sd", "adapter": adapter}
    >>> Settings.model_validate(recipe).semantic_map.guidance
    9.0
    """

    task: Literal["semantic_map"]
    data: Data = Data()
    semantic_map: MapSettings = MapSettings()


def columns(experiment: Settings) -> tuple[str, ...]:
    """The share of correct pixels, beside the mIoU.

    >>> columns(None)
    ('accuracy',)
    """
    return ("accuracy",)


@dataclass(frozen=True)
class Material:
    """A run's data: the scenes to train on, and those whose maps are drawn and scored.

    >>> Material(train=[], test=[]).test
    []
    """

    train: list[Scene]
    test: list[Scene]


class Hinted(nn.Module):
    """The U-Net's first convolution plus the hint, ``layer(x) + encoder(control)``.

    ``control`` is [batch, 3, height, width] in [0, 1]. The encoder makes its input smaller by ``factor``, so the control is
    first resized, without mixing colours, to fit the convolution's output. Without a control, it is the convolution alone. If x
    has more pictures than the control (with guidance it has twice as many), the hint is repeated. Without gradients the hint of
    a control is computed once, for all steps of the solver.

    >>> hinted = Hinted(nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(3, 8, 2, stride=2), factor=2)
    >>> hinted.control = torch.rand(1, 3, 16, 16)
    >>> hinted(torch.rand(2, 4, 8, 8)).shape
    torch.Size([2, 8, 8, 8])
    """

    def __init__(self, layer: nn.Module, encoder: nn.Module, factor: int) -> None:
        super().__init__()
        self.layer, self.encoder, self.factor = layer, encoder, factor
        self.control = None

    @property
    def control(self) -> Tensor | None:
        return self._control

    @control.setter
    def control(self, control: Tensor | None) -> None:
        self._control = control
        self._hint: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        if self.control is None:
            return y
        hint = self._hint
        if hint is None:
            size = [self.factor * side for side in y.shape[-2:]]
            control = self.control.to(next(self.encoder.parameters()).dtype)
            if list(control.shape[-2:]) != size:
                control = nn.functional.interpolate(control, size)
            hint = self.encoder(control).to(y.dtype)
            if not torch.is_grad_enabled():
                self._hint = hint
        return y + hint.repeat(len(y) // len(hint), 1, 1, 1)


CHANNELS = (16, 32, 96, 256)  # of the hint encoder's stages; each except the first halves the size
CONTROLNET = 8  # the factor by which a ControlNet's hint encoder makes its input smaller


def with_hint(unet: nn.Module, source: str | None, factor: int = CONTROLNET) -> nn.Module:
    """Give the U-Net a hint encoder: a ControlNet's, or a new one, whose last layer is zero and leaves the output unchanged.

    ``factor``, a power of two, is that by which the autoencoder makes pictures smaller; a new encoder does so with the map.

    >>> unet = nn.Module()
    >>> unet.conv_in = nn.Conv2d(4, 8, 3, padding=1)
    >>> type(with_hint(unet, None).conv_in).__name__
    'Hinted'
    """
    conv: Any = unet.conv_in
    if source is None:
        stages = (CHANNELS + CHANNELS[-1:] * factor.bit_length())[: factor.bit_length()]
        with torch.device(conv.weight.device):
            encoder: nn.Module = ControlNetConditioningEmbedding(conv.out_channels, block_out_channels=stages)
    else:
        factor = CONTROLNET
        encoder = loading(ControlNetModel, source).controlnet_cond_embedding
        channels = encoder.get_submodule("conv_out").get_parameter("weight").shape[0]
        if channels != conv.out_channels:
            raise ConfigError(f"the hint encoder of {source} gives {channels} channels, the U-Net has {conv.out_channels}")
    unet.conv_in = Hinted(conv, encoder.to(conv.weight.device).requires_grad_(False), factor)
    return unet


def run(experiment: Settings, context: RunContext, data: Material) -> Result:
    """Pipeline, hint, inject, data, train, pictures, scores. An interrupted run resumes; pictures already made are kept."""
    settings = experiment.semantic_map
    begin(experiment, context)
    pipe = adaptable(experiment)
    scenes = Cached(data.train, context.shared / "cache", settings.resolution)
    scenes.fill(pipe, context.console)
    adapt(pipe.unet, experiment)
    denoiser = denoiser_of(pipe, 0.0)
    trainer = fit(experiment, context, Mapped(denoiser), metric=None, train_dataset=scenes)

    def score() -> dict[str, Any]:
        scores = scored(experiment, pipe, data.test, context.folder / "pictures")
        return {"validation": scores["miou"], "test": scores["miou"], "scores": scores}

    return conclude(experiment, context, pipe.unet, trainer, "miou", "miou", score)


def adaptable(experiment: Settings) -> Any:
    """The frozen pipeline whose U-Net has a hint encoder."""
    pipe = pipeline(experiment.model, experiment.train.weights)
    with_hint(pipe.unet, experiment.semantic_map.hint, pipe.vae_scale_factor)
    return pipe


class Mapped(nn.Module):
    """A `Denoiser` whose U-Net gets the control of each picture."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, mean: Tensor, std: Tensor, text: Tensor, control: Tensor) -> dict[str, Tensor]:
        hinted: Any = self.denoiser.network.conv_in
        hinted.control = control
        try:
            return self.denoiser(mean[:, None], std[:, None], text=text[:, None])
        finally:
            hinted.control = None


@dataclass(frozen=True)
class Cached(Dataset[Any]):
    """Scenes as latents and text embeddings, in files that are written once for all runs of an experiment."""

    scenes: Sequence[Scene]
    folder: Path
    resolution: int

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        scene = self.scenes[index]
        kept = {key: t.float() for key, t in from_bytes(self.file(scene).read_bytes()).items()}
        return kept | {"control": control(scene, self.resolution)}

    def file(self, scene: Scene) -> Path:
        return self.folder / f"{scene.name}.safetensors"

    @torch.no_grad()
    def fill(self, pipe: Any, console: Console) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        missing = [scene for scene in self.scenes if not self.file(scene).is_file()]
        if missing:
            console.print(f"Encoding {len(missing):,} pictures and captions, once", markup=False)
        for scene in missing:
            pixels = rgb(squared(open_image(scene.image), self.resolution)) / 127.5 - 1
            latent = pipe.vae.encode(pixels[None].to(pipe.vae.device, pipe.vae.dtype)).latent_dist
            kept = {"mean": latent.mean[0], "std": latent.std[0], "text": embedded(pipe, [scene.caption])["text"][0]}
            write_atomically(self.file(scene), to_bytes({key: t.half().cpu().contiguous() for key, t in kept.items()}))


def squared(picture: Any, size: int, nearest: bool = False) -> Any:
    return picture.resize((size, size), Image.Resampling.NEAREST if nearest else Image.Resampling.BICUBIC)


def control(scene: Scene, resolution: int) -> Tensor:
    """The coloured map [3, resolution, resolution] in [0, 1]; its colours are never mixed."""
    return rgb(squared(open_image(scene.control), resolution, nearest=True)) / 255


def annotation(scene: Scene, size: int, classes: int) -> Tensor:
    """The class of each pixel, from 0; `UNLABELLED` where there is none."""
    with Image.open(scene.annotation) as image:
        labels = torch.from_numpy(np.array(squared(image, size, nearest=True), dtype=np.int64)) - 1
    if labels.ndim != 2 or labels.max() >= classes or labels.min() < UNLABELLED:
        raise DataError(
            f"{scene.annotation}: expected one channel of values from 0 to {classes}, found up to {int(labels.max()) + 1}"
        )
    return labels


# ---------------------------------------------------------------- scores


def made(experiment: Settings, pipe: Any, scenes: Sequence[Scene], first: int = 0) -> list[Any]:
    """A picture for each scene's map and caption, by DDIM. The noise depends on the seed and the scene's number alone, however
    many are made at once; ``first`` is the number of the first scene."""
    settings = experiment.semantic_map
    pipe.unet.conv_in.control = torch.stack([control(scene, settings.resolution) for scene in scenes]).to(pipe.device)
    captions, seeds = [s.caption for s in scenes], [10_000 * experiment.seed + first + i for i in range(len(scenes))]
    try:
        return sample(pipe, captions, seeds, 1, settings.steps, settings.guidance, settings.resolution, solver="ddim")
    finally:
        pipe.unet.conv_in.control = None


def scored(experiment: Settings, pipe: Any, scenes: Sequence[Scene], folder: Path) -> dict[str, float]:
    """mIoU and accuracy on the pictures made, and on the real ones (the segmenter's limit); the FID between both."""
    settings = experiment.semantic_map
    segmenter = Segmenter(settings.segmenter, pipe.device, settings.scales)
    encoder: Any = Inception(pipe.device) if settings.fid == "inception" else Encoder(settings.fid, pipe.device)
    overlaps = {"": Overlap(settings.classes), " real": Overlap(settings.classes)}
    features: dict[str, list[Tensor]] = {"": [], " real": []}
    for first in range(0, len(scenes), AT_ONCE):
        some = scenes[first : first + AT_ONCE]
        files = [folder / f"{scene.name}.png" for scene in some]
        if not all(file.is_file() for file in files):
            for picture, file in zip(made(experiment, pipe, some, first), files, strict=True):
                write(picture, file)
    for scene in scenes:
        file = folder / f"{scene.name}.png"
        labels = annotation(scene, settings.resolution, settings.classes)
        for kind, picture in (("", open_image(file)), (" real", squared(open_image(scene.image), settings.resolution))):
            overlaps[kind].add(segmenter.labels(picture, (settings.resolution, settings.resolution)), labels)
            features[kind].append(encoder.images([picture]))
    scores = {f"{name}{kind}": value for kind, overlap in overlaps.items() for name, value in overlap.scores().items()}
    return scores | {"fid": frechet(torch.cat(features[" real"]), torch.cat(features[""]))}


# ---------------------------------------------------------------- before all runs, and after


def check(experiment: Settings) -> Material:
    """Raises an error for anything that would make a run fail, before one starts; returns its scenes."""
    unet = skeleton(experiment.model)
    if (form := form_of(unet)) is not denoising.SD:
        raise ConfigError(f"{experiment.model} is a {form.name}: maps are learned by the U-Net of {denoising.SD.name} alone")
    settings, source = experiment.semantic_map, experiment.data.source
    denoising.check(experiment.model, settings.resolution, "semantic_map.resolution")
    adapt(with_hint(unet, None), experiment)
    train, test = (maps.read(source, part) for part in maps.PARTS)
    if settings.maps is not None:
        test = test[: settings.maps]
    for scene in (train[0], *test):
        annotation(scene, settings.resolution, settings.classes)
    if len(test) < 2:
        raise DataError(f"{source}: {len(test)} validation map; a Frechet distance needs two or more")
    return Material(train, test)


def base(experiment: Settings) -> nn.Module:
    """The frozen U-Net with its hint encoder."""
    return adaptable(experiment).unet


def deliver(experiment: Settings, run: Path, data: Material, out: Path) -> tuple[dict[str, int], int]:
    """Write the adapter with its hint encoder and read it back; count the first pictures that equal the run's."""
    pipe = adaptable(experiment)
    delora.load(pipe.unet, run / "adapter", methods=experiment.adapter.classes())
    delora.save(pipe.unet, out / "adapter")
    some = data.test[:CHECKED]
    same = 0
    for scene, again in zip(some, made(experiment, pipe, some), strict=True):
        same += (rgb(again) - rgb(open_image(run / "pictures" / f"{scene.name}.png"))).abs().mean().item() < 1
    if same < len(some):
        raise RunError(f"{out / 'adapter'} and the trained model disagree in {len(some) - same} of {len(some)} pictures")
    return {"adapter": same}, len(some)


def evaluate(experiment: Settings, folder: Path) -> tuple[dict[str, float], int]:
    """The scores of an adapter on the test maps, and their number. The pictures are written beside the adapter."""
    data, pipe = check(experiment), adaptable(experiment)
    delora.load(pipe.unet, folder, methods=experiment.adapter.classes())
    return scored(experiment, pipe, data.test, folder.with_name(f"{folder.name}-pictures")), len(data.test)
