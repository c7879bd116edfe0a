"""Subject-driven generation (DreamBooth): a text-to-image model learns a subject from a few photographs.

Each subject has its own adapter, trained with prior preservation. The pictures for its prompts are scored by DINO and CLIP-I,
their likeness to the photographs, and by CLIP-T, that to the prompt. For comparison, the photographs are scored among
themselves, and so are the base model's pictures for the same prompts. Without judges the only score is how much better the
model denoises the photographs than its base does.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import AutoConfig, TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

import delora
from delora.data import dreambooth
from delora.data.dreambooth import Subject, open_image
from delora.evaluation.generation import pipeline, sample
from delora.evaluation.images import Encoder, Words, own_pairs, pairs
from delora.evaluation.pictures import write
from delora.formats.files import read_json
from delora.formats.native import require_adapter
from delora.models import adapters
from delora.training import denoising
from delora.training.config import ConfigError, Count, Experiment, Rate, Strict, slug
from delora.training.denoising import Denoiser, denoiser_of, embedded, network, skeleton
from delora.training.experiments import adapt, begin, finish, fit, reached
from delora.training.models import loading
from delora.training.runs import METRICS, Result, RunContext, RunError, write_json
from delora.training.task import Kind

__all__ = [
    "Data",
    "Settings",
    "SubjectSettings",
    "base",
    "check",
    "columns",
    "deliver",
    "error",
    "evaluate",
    "named",
    "one",
    "respond",
    "rgb",
    "run",
    "snapshots",
]

SCORES = "scores.json"
FIT = "fit"
DRAWS = True
MEASURED, TOGETHER = 64, 8  # crops with noise by which the error is measured, and how many at a time
SELECTION = "There is no part to validate on: settings are compared by the test score itself, as in the paper."


class Data(Strict):
    """The photographs: the folder ``dataset`` of google/dreambooth, or a folder of your own.

    >>> Data().source
    'dreambooth/dataset'
    """

    source: str = "dreambooth/dataset"


class SubjectSettings(Strict):
    """How a text-to-image model learns a subject, and how that is judged.

    ``names``: the subjects of google/dreambooth (all if empty). For photographs of your own: ``word`` is the class, and
    ``prompts`` (by default one) have ``{}`` in the subject's place. ``crops`` random crops of each photograph are drawn and
    encoded before training (1: its middle); if these are as many as the steps, every step has a new one. ``class_images``
    pictures of the class preserve the prior, with ``prior_weight`` in the loss. ``images`` pictures are made for each prompt,
    in ``steps`` of the solver and with ``guidance``, and scored: at the end, and after each number of training steps in
    ``scored``, whose scores have that in their names. ``snapshots`` is the number of training steps between sample pictures
    (0: none). ``dino`` and ``clip`` are the models that judge; the table shows the first CLIP. ``classifier`` is a model whose
    labels are words: the score "prompt" is the share of the prompts' words that it sees in the pictures. Without ``judge``
    none of these is needed, and the score is "fit": by which share the error of the noise that is predicted for the
    photographs is below the base model's.

    >>> SubjectSettings(word="dog", prompts=["a photo of {} on the beach"]).token
    'qwe'
    """

    names: list[str] = Field(default=[])
    word: str | None = None
    prompts: list[str] = Field(default=[])
    token: Annotated[str, Field(min_length=1)] = "qwe"
    resolution: Annotated[int, Field(ge=8)] = 512
    crops: Count = 8
    class_images: Annotated[int, Field(ge=0)] = 200
    prior_weight: Rate = 1.0
    images: Count = 4
    steps: Count = 25
    guidance: Rate = 7.5
    snapshots: Annotated[int, Field(ge=0)] = 200
    scored: list[Count] = Field(default=[])
    judge: bool = True
    dino: str = "facebook/dino-vits16"
    clip: list[str] = Field(default=["openai/clip-vit-large-patch14", "openai/clip-vit-base-patch32"])
    classifier: str | None = None


class Settings(Experiment):
    """An experiment of this kind.

    >>> adapter = {"method": "lora", "r": 4, "targets": ["to_q"]}
    >>> recipe = {"task": "subject", "name": "mine", "out": "runs/mine", "model": "sd", "adapter": adapter}
    >>> Settings.model_validate(recipe).subject.resolution
    512
    """

    task: Literal["subject"]
    data: Data = Data()
    subject: SubjectSettings = SubjectSettings()

    def other_data(self) -> bool:
        return self.subject.word is not None


def columns(experiment: Settings) -> tuple[str, ...]:
    """The likeness to the photographs and to the prompts by CLIP, and the share of the prompts' words that are seen.

    >>> columns(None)
    ('clip_i', 'clip_t', 'prompt')
    """
    return "clip_i", "clip_t", "prompt"


def run(experiment: Settings, context: RunContext, subjects: list[Subject]) -> Result:
    """For each subject: pipeline, inject, photographs, train, pictures, scores. An interrupted run resumes where it was."""
    begin(experiment, context)
    folder, metric = context.folder, "dino" if experiment.subject.judge else FIT
    scores, last, trainable, seconds = [], {}, 0, 0.0
    diverged = None
    for subject in subjects:
        place = folder / "subjects" / slug(subject.name)
        place.mkdir(parents=True, exist_ok=True)
        if not (place / SCORES).is_file():
            one(experiment, dataclasses.replace(context, folder=place), subject)
        done = read_json(place / SCORES)
        trainable, seconds = done["trainable"], seconds + done["seconds"]
        if done["diverged"] is not None:
            diverged = done["diverged"]
            break
        scores.append(done["scores"])
        last = done["reached"]
    figures: dict[str, Any] = {"diverged": diverged}
    if diverged is None:
        pooled = {name: fmean(v for s in scores for v in s[name]) for name in scores[0]}
        by_subject = [name for name in ("dino", "clip_i") if name in pooled]
        macro = {f"{name} by subject": fmean(fmean(s[name]) for s in scores) for name in by_subject}
        # There is no part to validate on: as in the paper, settings are compared by the score itself.
        figures |= {"validation": pooled[metric], "test": pooled[metric], "scores": pooled | macro, **last}
    (folder / METRICS).write_text(_metrics(folder, subjects), "utf-8")
    return finish(experiment, context, metric, metric, trainable=trainable, seconds=seconds, **figures)


def one(experiment: Settings, context: RunContext, subject: Subject) -> None:
    """One subject's run in the context's folder, to its ``scores.json``: every score as the list of its pairs, to be pooled."""
    settings, place = experiment.subject, context.folder
    pipe = pipeline(experiment.model, experiment.train.weights)
    photographs = [open_image(file) for file in subject.images]
    judge = Judge(experiment, subject, pipe.device) if settings.judge else None  # the anchors, first
    class_images = class_pictures(experiment, pipe, subject.word, context.shared / "prior")
    untuned = {} if judge is None else before(experiment, pipe, subject, judge, context.shared / "untuned")

    class_prompt, instance_prompt = f"a photo of {subject.word}", f"a photo of {settings.token} {subject.word}"
    set_seed(experiment.seed)
    material = Pairs(
        latents(pipe, photographs, settings.resolution, settings.crops),
        latents(pipe, class_images, settings.resolution, 1) if class_images else None,
        embedded(pipe, [instance_prompt, class_prompt]),
    )
    adapt(network(pipe), experiment)
    denoiser = denoiser_of(pipe, settings.prior_weight)
    prompt = subject.prompts[0].format(f"{settings.token} {subject.word}")
    watch = Snapshots(pipe, place / "snapshots", settings.snapshots, prompt, experiment)

    def score(step: int) -> None:
        assert judge is not None
        pictures = generate(experiment, pipe, subject, place / f"pictures-{step}")
        values = judge.scores(pictures)
        write_json(_after(place, step), {f"{name} after {step}": each.tolist() for name, each in values.items()})

    trainer = fit(
        experiment.model_copy(update={"name": ": ".join(dict.fromkeys((experiment.name, subject.name)))}),
        context,
        denoiser,
        metric=None,
        train_dataset=material,
        watch=[watch, AtSteps(settings.scored, score)],
    )
    done: dict[str, Any] = {"diverged": trainer.diverged, "trainable": delora.summary(network(pipe)).trainable}
    done["seconds"] = trainer.state.log_history[-1]["seconds"]
    if trainer.diverged is None:
        delora.save(network(pipe), place / "adapter")
        pictures = generate(experiment, pipe, subject, place / "pictures")
        scores = {FIT: fit_of(denoiser, material)} if judge is None else judge.scores(pictures) | judge.real
        done["scores"] = {name: values.tolist() for name, values in scores.items()} | untuned
        for step in settings.scored:
            done["scores"] |= read_json(_after(place, step))
        done["reached"] = reached(network(pipe), place / "adapter")
    write_json(place / SCORES, done)


def fit_of(denoiser: Denoiser, material: Pairs) -> Tensor:
    """By which share the error on the photographs is below the base model's, as a row of one value."""
    with delora.disabled(denoiser.network):
        untuned = error(denoiser, material)
    return torch.tensor([1 - error(denoiser, material) / untuned])


def _after(place: Path, step: int) -> Path:
    """The file of the scores after a number of training steps."""
    return place / f"scores-{step}.json"


def snapshots(run: Path) -> dict[int, Path]:
    """The sample pictures of a run's first subject, by the step of training.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = Path(folder, "subjects", "dog", "snapshots", "00200.png")
    ...     file.parent.mkdir(parents=True)
    ...     file.touch()
    ...     list(snapshots(Path(folder)))
    [200]
    """
    folders = sorted((run / "subjects").glob("*/snapshots"))
    return {int(file.stem): file for file in sorted(folders[0].glob("*.png"))} if folders else {}


def before(experiment: Settings, pipe: Any, subject: Subject, judge: Judge, folder: Path) -> dict[str, list[float]]:
    """The scores of the base model's pictures for the prompts, computed once for all runs of an experiment."""
    file = folder / f"{slug(subject.name)}.json"
    if not file.is_file():
        pictures = generate(experiment.model_copy(update={"seed": 0}), pipe, subject, folder / slug(subject.name))
        write_json(file, {f"{name} untuned": values.tolist() for name, values in judge.scores(pictures).items()})
    scores: dict[str, list[float]] = read_json(file)
    return scores


class Judge:
    """Scores a subject's pictures: likeness to its photographs by DINO and the CLIPs, to the prompts by the CLIPs and the
    classifier. Each score is a row of values, which are averaged later. ``real``: the photographs' likeness to each other.
    """

    def __init__(self, experiment: Settings, subject: Subject, device: torch.device) -> None:
        settings = self.settings = experiment.subject
        self.photographs = [open_image(file) for file in subject.images]
        instead = _instead(settings)
        self.encoders = {
            key: Encoder(name, device, instead[name])
            for key, name in (("dino", settings.dino), *((name, name) for name in settings.clip))
        }
        name = settings.classifier
        self.words = None if name is None else Words(name, device, instead[name])
        self.references = {key: encoder.images(self.photographs) for key, encoder in self.encoders.items()}
        self.prompts = [prompt.format(subject.word) for prompt in subject.prompts for _ in range(settings.images)]
        self.real = {f"{self._named(key, 'i')} real": own_pairs(features) for key, features in self.references.items()}

    def _named(self, key: str, kind: str) -> str:
        """A score's name. The first CLIP's scores are the table's; those of another CLIP have its name in theirs."""
        if key == "dino":
            return key
        return f"clip_{kind}" if key == self.settings.clip[0] else f"clip_{kind} {key.rpartition('/')[2]}"

    def scores(self, pictures: Sequence[Any]) -> dict[str, Tensor]:
        scores = {}
        for key, encoder in self.encoders.items():
            made = encoder.images(pictures)
            scores[self._named(key, "i")] = pairs(self.references[key], made)
            if key != "dino":
                scores[self._named(key, "t")] = (encoder.texts(self.prompts) * made).sum(-1)
        if self.words is not None:
            scores["prompt"] = self.words.shown(pictures, self.prompts)
        return scores


@torch.no_grad()
def error(denoiser: Denoiser, material: Pairs) -> float:
    """The mean squared error of the predicted noise over crops of all photographs, always with the same times and noise."""
    given = material.alone()
    crops = len(given["mean"])
    device, errors = next(denoiser.network.parameters()).device, []
    training = denoiser.network.training
    denoiser.network.eval()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for start in range(0, MEASURED, TOGETHER):
            some = [k * crops // MEASURED for k in range(start, start + TOGETHER)]
            errors.append(denoiser(**{key: t[some].to(device) for key, t in given.items()})["loss"].item())
    denoiser.network.train(training)
    return fmean(errors)


# ---------------------------------------------------------------- the model and its material


@torch.no_grad()
def latents(pipe: Any, pictures: Sequence[Any], resolution: int, crops: int) -> dict[str, Tensor]:
    """``mean`` and deviation ``std`` of the latents of ``crops`` random crops of each picture, on the CPU; encoded once for all
    steps. Stable Diffusion XL is also told each one's ``place``: height and width of the picture, the crop's top and left, and
    height and width of the crop.
    """
    found = []
    for picture in pictures:
        for _ in range(crops):
            pixels, corner = cropped(picture, resolution, crops > 1)
            latent = pipe.vae.encode(pixels[None].to(pipe.vae.device, pipe.vae.dtype)).latent_dist
            place = torch.tensor([picture.height, picture.width, *corner, resolution, resolution], dtype=torch.float32)
            found.append({"mean": latent.mean[0].float().cpu(), "std": latent.std[0].float().cpu(), "place": place})
    return {key: torch.stack([each[key] for each in found]) for key in found[0]}


def cropped(picture: Any, resolution: int, at_random: bool) -> tuple[Tensor, tuple[int, int]]:
    """A square of a picture, its shorter side resized and its longer one cut, [3, resolution, resolution] in [-1, 1]; and its
    top and left in the resized picture.
    """
    scale = resolution / min(picture.size)
    width, height = (max(resolution, round(scale * side)) for side in picture.size)
    pixels = rgb(picture.resize((width, height), Image.Resampling.BILINEAR)) / 127.5 - 1
    spare = [height - resolution, width - resolution]
    top, left = (int(torch.randint(n + 1, ())) if at_random else n // 2 for n in spare)
    return pixels[:, top : top + resolution, left : left + resolution], (top, left)


def rgb(picture: Any) -> Tensor:
    """A picture as a tensor [3, height, width], from 0 to 255.

    >>> rgb(Image.new("RGB", (4, 3), "white")).shape
    torch.Size([3, 3, 4])
    """
    return torch.from_numpy(np.array(picture, dtype=np.float32)).permute(2, 0, 1)


@dataclass(frozen=True)
class Pairs(Dataset[Any]):
    """An instance, paired with a class picture if there are any. The shorter of both lists is repeated.

    ``instance``, ``prior``: what `latents` gives; ``text``: what `embedded` gives for the prompts of both.
    """

    instance: dict[str, Tensor]
    prior: dict[str, Tensor] | None
    text: dict[str, Tensor]

    def __len__(self) -> int:
        return max(len(self.instance["mean"]), 0 if self.prior is None else len(self.prior["mean"]))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        kinds = [self.instance] if self.prior is None else [self.instance, self.prior]
        pictures = {key: torch.stack([kind[key][index % len(kind[key])] for kind in kinds]) for key in self.instance}
        return pictures | {key: states[: len(kinds)] for key, states in self.text.items()}

    def alone(self) -> dict[str, Tensor]:
        """All crops of the instance as one batch."""
        crops = len(self.instance["mean"])
        text = {key: states[:1].expand(crops, *states.shape[1:]) for key, states in self.text.items()}
        return {key: states[:, None] for key, states in (self.instance | text).items()}


@torch.no_grad()
def class_pictures(experiment: Settings, pipe: Any, word: str, folder: Path) -> list[Any]:
    """The base model's pictures of the class, which preserve the prior; made once for all runs of an experiment."""
    settings, folder = experiment.subject, folder / slug(word)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(settings.class_images):
        file = folder / f"{number:04d}.png"
        if not file.is_file():
            write(sampled(experiment, pipe, f"a photo of {word}", number, 1)[0], file)
    return [open_image(folder / f"{number:04d}.png") for number in range(settings.class_images)]


# ---------------------------------------------------------------- pictures


def sampled(experiment: Settings, pipe: Any, prompt: str, seed: int, count: int) -> list[Any]:
    """`sample` with the experiment's settings."""
    settings = experiment.subject
    return sample(pipe, prompt, seed, count, settings.steps, settings.guidance, settings.resolution)


def generate(experiment: Settings, pipe: Any, subject: Subject, folder: Path) -> list[Any]:
    """The pictures for each prompt, always from the same noise, in a folder; those already there are kept."""
    settings = experiment.subject
    folder.mkdir(parents=True, exist_ok=True)
    pictures = []
    for number, prompt in enumerate(subject.prompts):
        files = [folder / f"{number:02d}-{i}.png" for i in range(settings.images)]
        if not all(file.is_file() for file in files):
            text = prompt.format(f"{settings.token} {subject.word}")
            made = sampled(experiment, pipe, text, 1000 * experiment.seed + number, settings.images)
            for picture, file in zip(made, files, strict=True):
                write(picture, file)
        pictures += [open_image(file) for file in files]
    return pictures


class Snapshots(TrainerCallback):
    """Makes a picture of a prompt after each ``every`` steps (0: never), always from the same noise, as in Figures 3 and 8."""

    def __init__(self, pipe: Any, folder: Path, every: int, prompt: str, experiment: Settings) -> None:
        self.pipe, self.folder, self.every, self.prompt, self.experiment = pipe, folder, every, prompt, experiment

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.every and state.global_step == 0:
            self._draw(0)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.every and state.global_step % self.every == 0:
            self._draw(state.global_step)

    def _draw(self, step: int) -> None:
        # The noise has its own generator, so that training draws the same random numbers with and without snapshots.
        (picture,) = sampled(self.experiment, self.pipe, self.prompt, self.experiment.seed, 1)
        write(picture, self.folder / f"{step:05d}.png")


class AtSteps(TrainerCallback):
    """Calls ``act(step)`` after each of the steps, while the weights are those of that step."""

    def __init__(self, steps: Sequence[int], act: Callable[[int], None]) -> None:
        self.steps, self.act = steps, act

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step in self.steps:
            self.act(state.global_step)


def _metrics(folder: Path, subjects: Sequence[Subject]) -> str:
    """The metrics of the first subject's run; all subjects have the same number of steps."""
    file = folder / "subjects" / slug(subjects[0].name) / METRICS
    return file.read_text("utf-8") if file.is_file() else ""


# ---------------------------------------------------------------- before all runs, and after


def check(experiment: Settings) -> list[Subject]:
    """Raises an error for anything that would make a run fail, before one starts; returns its subjects."""
    if experiment.train.steps is None:
        raise ConfigError(f"{experiment.name}: give train.steps: a subject's photographs have no epochs")
    settings = experiment.subject
    if settings.scored and not settings.judge:
        raise ConfigError(f"{experiment.name}: subject.scored = {settings.scored} needs subject.judge=true")
    if late := [step for step in settings.scored if step >= experiment.train.steps]:
        raise ConfigError(
            f"{experiment.name}: subject.scored = {settings.scored}: training ends at step {experiment.train.steps}, where the "
            f"pictures are scored anyway; leave out {', '.join(map(str, late))}"
        )
    denoising.check(experiment.model, settings.resolution, "subject.resolution")
    adapt(skeleton(experiment.model), experiment)
    subjects = dreambooth.read(experiment.data.source, settings.names, settings.word, settings.prompts)
    for subject in subjects:
        for file in subject.images:
            open_image(file)
    for judge, instead in _instead(settings).items() if settings.judge else ():
        loading(AutoConfig, judge, instead)
    return subjects


def _instead(settings: SubjectSettings) -> dict[str, str]:
    """For each model that judges, how a recipe names a folder in its place."""
    clips = {
        name: f"'subject.clip={json.dumps([*settings.clip[:i], 'FOLDER', *settings.clip[i + 1 :]])}'"
        for i, name in enumerate(settings.clip)
    }
    classifier = {} if settings.classifier is None else {settings.classifier: "subject.classifier=FOLDER"}
    return {settings.dino: "subject.dino=FOLDER"} | clips | classifier


def base(experiment: Settings) -> nn.Module:
    """The frozen network."""
    return network(pipeline(experiment.model, experiment.train.weights))


def respond(experiment: Settings, adapter: Path) -> tuple[Kind, nn.Module, Callable[[str], Any]]:
    """The network of the pipeline, and the picture that it draws for a prompt, from the noise of the experiment's seed.

    In a prompt ``{}`` stands for the subject.
    """
    pipe = pipeline(experiment.model)
    return "picture", network(pipe), lambda prompt: sampled(experiment, pipe, named(experiment, prompt), experiment.seed, 1)[0]


def named(experiment: Settings, prompt: str) -> str:
    """A prompt with the token and the class of one's own photographs where it has ``{}``.

    Raises:
        ConfigError: it has ``{}``, and the subject is none of one's own.

    >>> from types import SimpleNamespace
    >>> named(SimpleNamespace(subject=SubjectSettings(word="mug")), "a photo of {} on the beach")
    'a photo of qwe mug on the beach'
    """
    settings = experiment.subject
    if "{}" in prompt and settings.word is None:
        raise ConfigError(f"the prompt {prompt!r}: {{}} is for photographs of one's own: write {settings.token} and the class")
    return prompt.replace("{}", f"{settings.token} {settings.word}")


def evaluate(experiment: Settings, folder: Path) -> tuple[dict[str, float], int]:
    """The scores of one subject's adapter, as after training; and the number of its photographs."""
    settings, subjects = experiment.subject, check(experiment)
    subject = next((s for s in subjects if slug(s.name) == folder.resolve().name), subjects[0] if len(subjects) == 1 else None)
    if subject is None:
        raise RunError(f"{folder} has the name of none of the subjects: {', '.join(slug(s.name) for s in subjects)}")
    require_adapter(folder)
    pipe = pipeline(experiment.model, experiment.train.weights)
    delora.load(network(pipe), folder, methods=experiment.adapter.classes())
    if settings.judge:
        with tempfile.TemporaryDirectory() as place:
            pictures = generate(experiment, pipe, subject, Path(place))
            scores = Judge(experiment, subject, pipe.device).scores(pictures)
    else:
        photographs = [open_image(file) for file in subject.images]
        set_seed(experiment.seed)
        crops = latents(pipe, photographs, settings.resolution, settings.crops)
        text = embedded(pipe, [f"a photo of {settings.token} {subject.word}"])
        scores = {FIT: fit_of(denoiser_of(pipe, 0.0), Pairs(crops, None, text))}
    return {name: values.mean().item() for name, values in scores.items()}, len(subject.images)


def deliver(experiment: Settings, run: Path, subjects: list[Subject], out: Path) -> tuple[dict[str, int], int]:
    """Write each subject's adapter and, if its change is low-rank, its LoRA for diffusers; the first subject's are read back.

    Their pictures for its first prompt are compared with the run's: equal means a mean difference below one level of 256.
    """
    agreement: dict[str, int] = {}
    settings, first = experiment.subject, subjects[0]
    made = [open_image(run / "subjects" / slug(first.name) / "pictures" / f"00-{i}.png") for i in range(settings.images)]
    for subject in subjects:
        pipe = pipeline(experiment.model, experiment.train.weights)
        delora.load(network(pipe), run / "subjects" / slug(subject.name) / "adapter", methods=experiment.adapter.classes())
        delora.save(network(pipe), out / "adapter" / slug(subject.name))
        if subject is first:
            agreement["adapter"] = _alike(experiment, pipe, subject, made)
        parts = list(adapters(network(pipe)).values())
        if all(not a.whole and a.low_rank() is not None for a in parts):
            delora.export.diffusers(pipe, out / "diffusers" / slug(subject.name))
            if subject is first and importlib.util.find_spec("peft"):  # which diffusers reads LoRA files with
                fresh = pipeline(experiment.model, experiment.train.weights)
                fresh.load_lora_weights(out / "diffusers" / slug(subject.name))
                agreement["diffusers"] = _alike(experiment, fresh, subject, made)
    for kind, same in agreement.items():
        if same < len(made):
            raise RunError(f"{out / kind} and the trained model disagree in {len(made) - same} of {len(made)} pictures")
    return agreement, len(made)


def _alike(experiment: Settings, pipe: Any, subject: Subject, expected: Sequence[Any]) -> int:
    text = subject.prompts[0].format(f"{experiment.subject.token} {subject.word}")
    again = sampled(experiment, pipe, text, 1000 * experiment.seed, len(expected))
    return sum((rgb(a) - rgb(b)).abs().mean().item() < 1 for a, b in zip(again, expected, strict=True))
