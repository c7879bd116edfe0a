"""Subject-driven generation (DreamBooth): a text-to-image model learns a subject from a few photographs.

One adapter for each subject, trained with prior preservation; pictures for the subject's prompts; DINO and CLIP-I, the
likeness to the photographs, and CLIP-T, that to the prompt. The same scores of the photographs among themselves, and of what
the model as it was makes of the prompts, are the ends of their scale.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from PIL import Image
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

import delora
from delora.data import dreambooth
from delora.data.dreambooth import Subject, open_image
from delora.evaluation.generation import pipeline, sample
from delora.evaluation.images import Encoder, Words, own_pairs, pairs
from delora.evaluation.pictures import write
from delora.files import read_json
from delora.inject import adapters
from delora.layer import Adapter
from delora.training.config import ConfigError, Experiment, slug
from delora.training.experiments import begin, finish, fit, inject, reached
from delora.training.models import refused
from delora.training.runs import METRICS, Result, RunError, write_json

SCORES = "scores.json"
CROPS = 8  # random crops of each photograph, drawn once


def run(experiment: Experiment, folder: Path, row: str, setting: str, subjects: list[Subject], console: Console) -> Result:
    """For each subject: pipeline, inject, photographs, train, pictures, scores. What a stopped run has done is kept."""
    begin(experiment, folder)
    scores, last, trainable, seconds = [], {}, 0, 0.0
    diverged = None
    for subject in subjects:
        place = folder / "subjects" / slug(subject.name)
        place.mkdir(parents=True, exist_ok=True)
        if not (place / SCORES).is_file():
            one(experiment, place, subject, folder.parent.parent, console)
        done = read_json(place / SCORES)
        trainable, seconds = done["trainable"], seconds + done["seconds"]
        if done["diverged"] is not None:
            diverged = done["diverged"]
            break
        scores.append(done["scores"])
        last = done["reached"]
    found: dict[str, Any] = {"diverged": diverged}
    if diverged is None:
        pooled = {name: fmean(v for s in scores for v in s[name]) for name in scores[0]}
        by_subject = [name for name in ("dino", "clip_i") if name in pooled]
        macro = {f"{name} by subject": fmean(fmean(s[name]) for s in scores) for name in by_subject}
        # There is no part to validate on: as in the paper, settings are compared by the score itself.
        found |= {"validation": pooled["dino"], "test": pooled["dino"], "scores": pooled | macro, **last}
    (folder / METRICS).write_text(_metrics(folder, subjects), "utf-8")
    return finish(experiment, folder, row, setting, "dino", "dino", trainable=trainable, seconds=seconds, **found)


def one(experiment: Experiment, place: Path, subject: Subject, shared: Path, console: Console) -> None:
    """One subject's run, to its ``scores.json``: every score as the list of its pairs, so that they can be pooled.

    ``shared``: the folder of what the model as it was has drawn, the same for all runs of an experiment.
    """
    asked = experiment.subject
    pipe = pipeline(experiment.model, experiment.train.weights)
    judge = Judge(experiment, subject, pipe.device)  # the anchors, first
    kept = class_pictures(experiment, pipe, subject.word, shared / "prior")
    untuned = before(experiment, pipe, subject, judge, shared / "untuned")

    class_prompt, instance_prompt = f"a photo of {subject.word}", f"a photo of {asked.token} {subject.word}"
    set_seed(experiment.seed)
    material = Pairs(
        moments(pipe, judge.photographs, asked.resolution, CROPS),
        moments(pipe, kept, asked.resolution, 1) if kept else None,
        embedded(pipe, [instance_prompt, class_prompt]),
    )
    inject(pipe.unet, experiment)
    denoiser = Denoiser(
        pipe.unet, DDPMScheduler.from_config(pipe.scheduler.config), pipe.vae.config.scaling_factor, asked.prior_weight
    )
    watch = Snapshots(
        pipe, place / "snapshots", asked.snapshots, subject.prompts[0].format(f"{asked.token} {subject.word}"), experiment
    )
    trainer = fit(
        experiment.model_copy(update={"name": f"{experiment.name}: {subject.name}"}),
        place,
        denoiser,
        console,
        metric=None,
        train_dataset=material,
        watch=[watch],
    )
    done: dict[str, Any] = {"diverged": trainer.diverged, "trainable": delora.summary(pipe.unet).trainable}
    done["seconds"] = trainer.state.log_history[-1]["seconds"]
    if trainer.diverged is None:
        delora.save(pipe.unet, place / "adapter")
        pictures = generate(experiment, pipe, subject, place / "pictures")
        own = {name: values.tolist() for name, values in (judge.scores(pictures) | judge.real).items()}
        done["scores"] = own | untuned
        done["reached"] = reached(pipe.unet, place / "adapter")
    write_json(place / SCORES, done)


def before(experiment: Experiment, pipe: Any, subject: Subject, judge: Judge, folder: Path) -> dict[str, list[float]]:
    """The scores of what the model as it was makes of the prompts, drawn and judged once for all runs of an experiment."""
    file = folder / f"{slug(subject.name)}.json"
    if not file.is_file():
        pictures = generate(experiment.model_copy(update={"seed": 0}), pipe, subject, folder / slug(subject.name))
        write_json(file, {f"{name} untuned": values.tolist() for name, values in judge.scores(pictures).items()})
    found: dict[str, list[float]] = read_json(file)
    return found


class Judge:
    """What is said of a subject's pictures: likeness to its photographs by DINO and the CLIPs, to the prompts by the CLIPs and
    the classifier. Each score is a row of values, to be pooled. ``real``: how alike the photographs are among themselves.
    """

    def __init__(self, experiment: Experiment, subject: Subject, device: torch.device) -> None:
        asked = self.asked = experiment.subject
        self.photographs = [open_image(file) for file in subject.images]
        self.encoders = {"dino": Encoder(asked.dino, device)} | {name: Encoder(name, device) for name in asked.clip}
        self.words = None if asked.classifier is None else Words(asked.classifier, device)
        self.references = {key: encoder.images(self.photographs) for key, encoder in self.encoders.items()}
        self.prompts = [prompt.format(subject.word) for prompt in subject.prompts for _ in range(asked.images)]
        self.real = {f"{self._named(key, 'i')} real": own_pairs(seen) for key, seen in self.references.items()}

    def _named(self, key: str, kind: str) -> str:
        """The first CLIP's scores are the table's; those of others have its name beside them."""
        if key == "dino":
            return key
        return f"clip_{kind}" if key == self.asked.clip[0] else f"clip_{kind} {key.rpartition('/')[2]}"

    def scores(self, pictures: Sequence[Any]) -> dict[str, Tensor]:
        found = {}
        for key, encoder in self.encoders.items():
            made = encoder.images(pictures)
            found[self._named(key, "i")] = pairs(self.references[key], made)
            if key != "dino":
                found[self._named(key, "t")] = (encoder.texts(self.prompts) * made).sum(-1)
        if self.words is not None:
            found["prompt"] = self.words.shown(pictures, self.prompts)
        return found


# ---------------------------------------------------------------- the model and its material


class Denoiser(nn.Module):
    """The loss of a latent diffusion model: the squared error of the noise (or velocity) that its U-Net predicts.

    With pairs of an instance and a class picture: that of the first plus ``weight`` times that of the second.
    """

    def __init__(self, unet: nn.Module, scheduler: Any, scale: float, weight: float) -> None:
        super().__init__()
        self.unet, self.scheduler, self.scale, self.weight = unet, scheduler, scale, weight

    def forward(self, mean: Tensor, std: Tensor, text: Tensor) -> dict[str, Tensor]:
        """``mean``, ``std``: of the latents [batch, kinds, channels, height, width]; ``text`` [batch, kinds, tokens, width]."""
        kinds = mean.shape[1]
        dtype = next(self.unet.parameters()).dtype
        mean, std, text = (x.flatten(0, 1) for x in (mean, std, text))
        latents = (mean + std * torch.randn_like(std)) * self.scale
        noise = torch.randn_like(latents)
        steps = torch.randint(self.scheduler.config.num_train_timesteps, (len(latents),), device=latents.device)
        noisy = self.scheduler.add_noise(latents, noise, steps)
        predicted = self.unet(noisy.to(dtype), steps, encoder_hidden_states=text.to(dtype)).sample.float()
        kind = self.scheduler.config.prediction_type
        target = noise if kind == "epsilon" else self.scheduler.get_velocity(latents, noise, steps)
        errors = (predicted - target).pow(2).flatten(1).mean(1).unflatten(0, (-1, kinds)).mean(0)
        return {"loss": errors[0] + self.weight * errors[1:].sum()}


@torch.no_grad()
def moments(pipe: Any, pictures: Sequence[Any], resolution: int, crops: int) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the latents of ``crops`` random crops of each picture, on the CPU: encoded once, not each step."""
    found = []
    for picture in pictures:
        for _ in range(crops):
            seen = pipe.vae.encode(
                cropped(picture, resolution, crops > 1)[None].to(pipe.vae.device, pipe.vae.dtype)
            ).latent_dist
            found.append((seen.mean[0].float().cpu(), seen.std[0].float().cpu()))
    means, deviations = zip(*found, strict=True)
    return torch.stack(means), torch.stack(deviations)


def cropped(picture: Any, resolution: int, at_random: bool) -> Tensor:
    """The picture with its shorter side resized and a square cut out, in the middle or anywhere, [3, size, size] in [-1, 1]."""
    scale = resolution / min(picture.size)
    width, height = (max(resolution, round(scale * side)) for side in picture.size)
    pixels = numbers(picture.resize((width, height), Image.Resampling.BILINEAR)) / 127.5 - 1
    spare = [height - resolution, width - resolution]
    top, left = (int(torch.randint(n + 1, ())) if at_random else n // 2 for n in spare)
    return pixels[:, top : top + resolution, left : left + resolution]


def numbers(picture: Any) -> Tensor:
    """[3, height, width], from 0 to 255."""
    return torch.from_numpy(np.array(picture, dtype=np.float32)).permute(2, 0, 1)


@torch.no_grad()
def embedded(pipe: Any, prompts: list[str]) -> Tensor:
    """The text encoder's last states [prompts, tokens, width], on the CPU."""
    states, _ = pipe.encode_prompt(prompts, pipe.device, 1, do_classifier_free_guidance=False)
    return states.float().cpu()


@dataclass(frozen=True)
class Pairs(Dataset[Any]):
    """An instance with a class picture, if there are any; the class pictures in turn."""

    instance: tuple[Tensor, Tensor]
    prior: tuple[Tensor, Tensor] | None
    text: Tensor

    def __len__(self) -> int:
        return max(len(self.instance[0]), 0 if self.prior is None else len(self.prior[0]))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        kinds = [self.instance] if self.prior is None else [self.instance, self.prior]
        mean, std = (torch.stack([kind[i][index % len(kind[i])] for kind in kinds]) for i in (0, 1))
        return {"mean": mean, "std": std, "text": self.text[: len(kinds)]}


@torch.no_grad()
def class_pictures(experiment: Experiment, pipe: Any, word: str, folder: Path) -> list[Any]:
    """What the pretrained model makes of the class, once for all runs of an experiment: the prior that is preserved."""
    asked, folder = experiment.subject, folder / slug(word)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(asked.class_images):
        file = folder / f"{number:04d}.png"
        if not file.is_file():
            write(sampled(experiment, pipe, f"a photo of {word}", number, 1)[0], file)
    return [open_image(folder / f"{number:04d}.png") for number in range(asked.class_images)]


# ---------------------------------------------------------------- pictures


def sampled(experiment: Experiment, pipe: Any, prompt: str, seed: int, count: int) -> list[Any]:
    """`sample` as the experiment asks for it."""
    asked = experiment.subject
    return sample(pipe, prompt, seed, count, asked.steps, asked.guidance, asked.resolution)


def generate(experiment: Experiment, pipe: Any, subject: Subject, folder: Path) -> list[Any]:
    """Some pictures for each prompt, always from the same noise, in a folder; those that are there are not made again."""
    asked = experiment.subject
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for number, prompt in enumerate(subject.prompts):
        files = [folder / f"{number:02d}-{i}.png" for i in range(asked.images)]
        if not all(file.is_file() for file in files):
            text = prompt.format(f"{asked.token} {subject.word}")
            made = sampled(experiment, pipe, text, 1000 * experiment.seed + number, asked.images)
            for picture, file in zip(made, files, strict=True):
                write(picture, file)
        found += [open_image(file) for file in files]
    return found


class Snapshots(TrainerCallback):
    """Every so many steps one picture of a prompt, from the same noise: what Figures 3 and 8 show. 0: none."""

    def __init__(self, pipe: Any, folder: Path, every: int, prompt: str, experiment: Experiment) -> None:
        self.pipe, self.folder, self.every, self.prompt, self.experiment = pipe, folder, every, prompt, experiment

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.every and state.global_step == 0:
            self._draw(0)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.every and state.global_step % self.every == 0:
            self._draw(state.global_step)

    def _draw(self, step: int) -> None:
        # From noise of its own: training draws as if nothing was drawn here.
        (picture,) = sampled(self.experiment, self.pipe, self.prompt, self.experiment.seed, 1)
        write(picture, self.folder / f"{step:05d}.png")


def _metrics(folder: Path, subjects: Sequence[Subject]) -> str:
    """The steps of the first subject's run: each has as many."""
    file = folder / "subjects" / slug(subjects[0].name) / METRICS
    return file.read_text("utf-8") if file.is_file() else ""


# ---------------------------------------------------------------- before all runs, and after


def check(experiment: Experiment) -> list[Subject]:
    """Everything that can be wrong with a run, found before any is started; its subjects."""
    if experiment.train.steps is None:
        raise ConfigError(f"{experiment.name}: give train.steps: a subject's photographs have no epochs")
    inject(skeleton(experiment.model), experiment)
    asked = experiment.subject
    subjects = dreambooth.read(experiment.data.source, asked.names, asked.word, asked.prompts)
    for subject in subjects:
        for file in subject.images:
            open_image(file)
    return subjects


def skeleton(model: str) -> nn.Module:
    """The U-Net's layers on the meta device."""
    try:
        config = UNet2DConditionModel.load_config(model, subfolder="unet")
    except (OSError, ValueError) as error:
        raise refused(model, "diffusers", error) from error
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(config)


def base(experiment: Experiment) -> nn.Module:
    return pipeline(experiment.model, experiment.train.weights).unet


def deliver(experiment: Experiment, run: Path, subjects: list[Subject], out: Path) -> tuple[dict[str, int], int]:
    """Each subject's adapter and, where the change is low-rank, its LoRA for diffusers; the first subject's are read back.

    Compared are the pictures of its first prompt with those of the run: equal is a mean difference below one level of 256.
    """
    agreement: dict[str, int] = {}
    asked, first = experiment.subject, subjects[0]
    made = [open_image(run / "subjects" / slug(first.name) / "pictures" / f"00-{i}.png") for i in range(asked.images)]
    for subject in subjects:
        pipe = pipeline(experiment.model, experiment.train.weights)
        delora.load(pipe.unet, run / "subjects" / slug(subject.name) / "adapter")
        delora.save(pipe.unet, out / "adapter" / slug(subject.name))
        if subject is first:
            agreement["adapter"] = _alike(experiment, pipe, subject, made)
        parts = list(adapters(pipe.unet).values())
        if all(isinstance(a, Adapter) and a.low_rank() is not None for a in parts):
            delora.export.diffusers(pipe, out / "diffusers" / slug(subject.name))
            if subject is first and importlib.util.find_spec("peft"):  # which diffusers reads LoRA files with
                fresh = pipeline(experiment.model, experiment.train.weights)
                fresh.load_lora_weights(out / "diffusers" / slug(subject.name))
                agreement["diffusers"] = _alike(experiment, fresh, subject, made)
    for kind, same in agreement.items():
        if same < len(made):
            raise RunError(f"{out / kind} makes {len(made) - same} of {len(made)} other pictures than the trained model")
    return agreement, len(made)


def _alike(experiment: Experiment, pipe: Any, subject: Subject, expected: Sequence[Any]) -> int:
    text = subject.prompts[0].format(f"{experiment.subject.token} {subject.word}")
    seen = sampled(experiment, pipe, text, 1000 * experiment.seed, len(expected))
    return sum((numbers(a) - numbers(b)).abs().mean().item() < 1 for a, b in zip(seen, expected, strict=True))


def evaluate(experiment: Experiment, folder: Path) -> tuple[dict[str, float], int]:
    """Not offered: the scores of a run are in its folder, and pictures are what one looks at."""
    raise ConfigError(
        "delora evaluate is for text; the pictures and scores of a subject's run are in its folder, under subjects/"
    )
