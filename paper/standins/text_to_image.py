"""A small text-to-image model of our own, pretrained on Fashion-MNIST, with the models that judge its pictures.

    python -m paper.standins.text_to_image paper/standins/weights/fashion

The folder gets a ``classifier``, which predicts the words that are true of a picture; a ``segmenter``, which predicts its label
map; and a diffusers pipeline with Stable Diffusion's parts and names: an autoencoder from 32 x 32 pixels to 8 x 8 latents, a
U-Net with self- and cross-attention, a text encoder, a tokenizer. A part that exists is not made again. The model is a stand-in
for Stable Diffusion 1.5: the recipes for images run on it, and no score of it is comparable with the paper's.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
    ResNetConfig,
    ResNetForImageClassification,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTImageProcessor,
    set_seed,
)

from delora.evaluation.generation import pipeline, sample
from delora.evaluation.images import Words
from delora.evaluation.pictures import grid, write
from delora.evaluation.segmentation import Overlap, Segmenter
from delora.formats.files import write_atomically
from delora.integrations.checkpoints import last_checkpoint
from delora.training.denoising import Denoiser
from paper.standins import fashion
from paper.standins.fashion import CLASSES, PATTERNS, SIZE, WORDS, Clothes, Looks

LATENT, TOKENS = 8, 16  # channels of a latent; tokens of a prompt, at most
UNCONDITIONAL = 0.1  # share of captions that are left out in training, for guidance
POOL = 4  # looks for which each picture's latents are kept
LOG = "log.jsonl"


@dataclass(frozen=True)
class Plan:
    """The steps of each part, and the number of pictures (None: all). The defaults are those of the shipped model."""

    classifier: int = 5000
    segmenter: int = 1500
    autoencoder: int = 2500
    diffusion: int = 12000
    pictures: int | None = None
    batch: int = 64


# ---------------------------------------------------------------- pictures for the parts


class Numbers(Dataset[int]):
    """The numbers 0 to n - 1; a collator turns each batch of them into pictures."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> int:
        return index


@dataclass
class Drawn:
    """Makes batches of placed pictures; with ``patterns``, half of them get a random one. ``make`` builds the inputs."""

    clothes: Clothes
    make: Callable[[Tensor, Tensor], dict[str, Tensor]]
    patterns: bool
    generator: torch.Generator

    def __call__(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        chosen = torch.tensor(numbers)
        labels = self.clothes.labels[chosen]
        pictures = fashion.placed(self.clothes.items[chosen], Looks.draw(len(chosen), self.generator))
        if self.patterns:
            pictures = torch.where(self._random(len(chosen)) < 0.5, pictures, pictures * self._patterns(len(chosen)))
        return self.make(pictures, labels)

    def _random(self, n: int) -> Tensor:
        return torch.rand(n, 1, 1, generator=self.generator)

    def _patterns(self, n: int) -> Tensor:
        def one(high: int) -> int:
            return int(torch.randint(high, (), generator=self.generator))

        return torch.stack([fashion.pattern(PATTERNS[one(len(PATTERNS))], 3 + one(6)) for _ in range(n)])


def pixels(pictures: Tensor) -> Tensor:
    """Pictures [n, 32, 32] in [0, 1] as the models take them, [n, 3, 32, 32] in [-1, 1]."""
    return (2 * pictures - 1)[:, None].expand(-1, 3, -1, -1)


def fit(
    name: str,
    folder: Path,
    model: nn.Module,
    plan: Plan,
    steps: int,
    data: Any,
    lr: float,
    watch: Sequence[TrainerCallback] = (),
    **kwargs: Any,
) -> None:
    """Trains all weights of a part, with warm-up and a cosine schedule; resumes from the last checkpoint; logs the losses."""
    work = folder / "checkpoints" / name
    arguments = TrainingArguments(
        output_dir=str(work),
        max_steps=steps,
        per_device_train_batch_size=plan.batch,
        learning_rate=lr,
        weight_decay=0.01,
        warmup_steps=min(200, steps // 10),
        lr_scheduler_type="cosine",
        max_grad_norm=1.0,
        save_steps=500,
        save_total_limit=1,
        logging_steps=max(1, min(100, steps // 10)),
        seed=0,
        use_cpu=not torch.accelerator.is_available(),
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        dataloader_drop_last=True,
        disable_tqdm=True,
        report_to="none",
    )
    started = time.monotonic()
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[Log(folder / LOG, name), *watch], **kwargs)
    trainer.remove_callback(PrinterCallback)
    checkpoint = last_checkpoint(work)
    if checkpoint is not None and checkpoint.endswith(f"-{steps}"):
        trainer._load_from_checkpoint(checkpoint)  # train() would do one step more
        return
    trainer.train(resume_from_checkpoint=checkpoint)
    print(f"{name}: {steps} steps in {(time.monotonic() - started) / 60:.1f} minutes", flush=True)


class Log(TrainerCallback):
    """Appends each loss that is logged to a file of JSON lines."""

    def __init__(self, file: Path, part: str) -> None:
        self.file, self.part = file, part

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            with self.file.open("a") as out:
                out.write(
                    json.dumps({"part": self.part, "step": state.global_step, "loss": float(f"{logs['loss']:.4g}")}) + "\n"
                )


# ---------------------------------------------------------------- the judges


def classifier(folder: Path, plan: Plan, clothes: Clothes) -> None:
    """A small ResNet with a probability for each of `WORDS`, trained on plain and patterned pictures."""
    set_seed(0)
    words = dict(enumerate(WORDS))
    config = ResNetConfig(
        embedding_size=32,
        hidden_sizes=[32, 64, 64],
        depths=[2, 2, 2],
        layer_type="basic",
        id2label=words,
        label2id={word: i for i, word in words.items()},
        problem_type="multi_label_classification",
    )
    model = ResNetForImageClassification(config)

    def make(pictures: Tensor, labels: Tensor) -> dict[str, Tensor]:
        wide = F.interpolate(pixels(pictures), scale_factor=2, mode="bilinear")
        return {"pixel_values": wide, "labels": fashion.present(pictures, labels)}

    collate = Drawn(clothes, make, True, torch.Generator().manual_seed(1))
    fit("classifier", folder, model, plan, plan.classifier, Numbers(len(clothes.labels)), 2e-3, data_collator=collate)
    model.half().save_pretrained(folder / "classifier")
    ViTImageProcessor(size={"height": 2 * SIZE, "width": 2 * SIZE}).save_pretrained(folder / "classifier")


def segmenter(folder: Path, plan: Plan, clothes: Clothes) -> None:
    """A small SegFormer (Xie et al. 2021) that predicts the label maps of `fashion.parts`."""
    set_seed(0)
    names = dict(enumerate(fashion.PARTS))
    config = SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[4, 2],
        hidden_sizes=[16, 32],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[4, 4],
        decoder_hidden_size=32,
        id2label=names,
        label2id={name: i for i, name in names.items()},
    )

    def make(pictures: Tensor, labels: Tensor) -> dict[str, Tensor]:
        wide = F.interpolate(pixels(pictures), scale_factor=4, mode="bilinear")
        return {"pixel_values": wide, "labels": fashion.parts(pictures)}

    model = SegformerForSemanticSegmentation(config)
    collate = Drawn(clothes, make, False, torch.Generator().manual_seed(5))
    fit("segmenter", folder, model, plan, plan.segmenter, Numbers(len(clothes.labels)), 2e-3, data_collator=collate)
    model.half().save_pretrained(folder / "segmenter")
    ViTImageProcessor(size={"height": 4 * SIZE, "width": 4 * SIZE}).save_pretrained(folder / "segmenter")


# ---------------------------------------------------------------- the pipeline's parts


class Autoencoding(nn.Module):
    """The squared error of the reconstruction, 0.1 of the absolute one, and 1e-6 of the latents' divergence from N(0, 1)."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        latent = self.vae.encode(pixel_values).latent_dist
        error = self.vae.decode(latent.sample()).sample.float() - pixel_values
        return {"loss": error.square().mean() + 0.1 * error.abs().mean() + 1e-6 * latent.kl().mean()}


def autoencoder(folder: Path, plan: Plan, clothes: Clothes) -> Any:
    set_seed(0)
    vae: Any = AutoencoderKL(
        sample_size=SIZE,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=LATENT,
        norm_num_groups=8,
        mid_block_add_attention=False,
    )
    collate = Drawn(clothes, lambda pictures, _: {"pixel_values": pixels(pictures)}, True, torch.Generator().manual_seed(2))
    fit(
        "autoencoder",
        folder,
        Autoencoding(vae),
        plan,
        plan.autoencoder,
        Numbers(len(clothes.labels)),
        2e-3,
        data_collator=collate,
    )
    return vae.eval()


def tokenizer() -> PreTrainedTokenizerFast:
    """Words of the captions are single tokens; any other word is spelled letter by letter."""
    letters = [chr(97 + i) for i in range(26)]
    words = ["<start>", "<end>", "<unk>", *letters, *(f"##{x}" for x in letters), "photo", "of", *WORDS]  # "a" is a letter
    tokens = Tokenizer(WordPiece({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokens.pre_tokenizer = Whitespace()
    tokens.post_processor = TemplateProcessing(single="<start> $A <end>", special_tokens=[("<start>", 0), ("<end>", 1)])
    names = {"bos_token": "<start>", "eos_token": "<end>", "unk_token": "<unk>", "pad_token": "<end>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokens, model_max_length=TOKENS, **names)


def unet() -> Any:
    return UNet2DConditionModel(
        sample_size=SIZE // 4,
        in_channels=LATENT,
        out_channels=LATENT,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(64, 96),
        layers_per_block=1,
        cross_attention_dim=64,
        attention_head_dim=4,  # the number of heads: diffusers kept this name from Stable Diffusion's time
        norm_num_groups=16,
    )


def text_encoder(vocabulary: int) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )


SCHEDULE: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}


class Captioned(nn.Module):
    """The denoiser's loss of captions in tokens, so that the text encoder is trained as well."""

    def __init__(self, denoiser: Denoiser, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.denoiser, self.text_encoder = denoiser, text_encoder

    def forward(self, mean: Tensor, std: Tensor, input_ids: Tensor) -> dict[str, Tensor]:
        text = self.text_encoder(input_ids).last_hidden_state
        return self.denoiser(mean[:, None], std[:, None], text=text[:, None])


class Averaged(TrainerCallback):
    """Keeps the moving average of the weights, which becomes the shipped model."""

    def __init__(self, model: nn.Module, file: Path) -> None:
        self.model, self.file = model, file
        self.mean = EMAModel(model.parameters(), decay=0.999)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step and self.file.is_file():
            self.mean.load_state_dict(torch.load(self.file, weights_only=True))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.mean.step(self.model.parameters())

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        torch.save(self.mean.state_dict(), self.file)


@torch.no_grad()
def latents(vae: Any, clothes: Clothes, looks: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean and standard deviation of the latents, labels and attributes, of each picture in several looks."""
    generator = torch.Generator().manual_seed(3)
    batches = []
    for _ in range(looks):
        for chosen in torch.arange(len(clothes.labels)).split(500):
            pictures = fashion.placed(clothes.items[chosen], Looks.draw(len(chosen), generator))
            latent = vae.encode(pixels(pictures)).latent_dist
            batches.append((latent.mean.half(), latent.std.half(), clothes.labels[chosen], fashion.attributes(pictures)))
    mean, std, labels, attributes = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return mean, std, labels, attributes


def diffusion(folder: Path, plan: Plan, clothes: Clothes, vae: Any) -> None:
    """Trains the U-Net and the text encoder, then writes the whole pipeline to the folder in half precision."""
    mean, std, labels, attributes = latents(vae, clothes, POOL)
    scale = 1 / (mean.float().square() + std.float().square()).mean().sqrt().item()
    vae.register_to_config(scaling_factor=scale)
    tokens, generator = tokenizer(), torch.Generator().manual_seed(4)
    set_seed(0)
    denoiser = Denoiser(unet(), DDPMScheduler(**SCHEDULE), scale, 0.0)
    model = Captioned(denoiser, text_encoder(len(tokens)))

    def batch(numbers: Sequence[int]) -> dict[str, Tensor]:
        chosen = torch.tensor(numbers)
        drop = torch.rand(len(chosen), generator=generator) < UNCONDITIONAL
        captions = [
            "" if dropped else fashion.caption(label, attribute, generator)
            for label, attribute, dropped in zip(
                labels[chosen].tolist(), attributes[chosen].tolist(), drop.tolist(), strict=True
            )
        ]
        ids = tokens(captions, padding="max_length", truncation=True, return_tensors="pt")["input_ids"]
        return {"mean": mean[chosen].float(), "std": std[chosen].float(), "input_ids": ids}

    work = folder / "checkpoints"
    average = Averaged(model, work / "average.pt")
    fit("diffusion", folder, model, plan, plan.diffusion, Numbers(len(labels)), 1e-3, data_collator=batch, watch=[average])
    average.mean.copy_to(model.parameters())
    pipe: Any = StableDiffusionPipeline(
        vae=vae.half(),
        text_encoder=model.text_encoder.half(),
        tokenizer=tokens,
        unet=denoiser.network.half(),
        scheduler=DDIMScheduler(**SCHEDULE, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder)


# ---------------------------------------------------------------- is it good enough?

GATES = {"samples": 0.9, "maps": 0.9}  # the least scores, see `examine`, for comparisons on this model
EXAMINED, GATES_FILE, SAMPLES_FILE = 24, "gates.json", "samples.png"


def examine(folder: Path, count: int = EXAMINED, guidance: float = 3.0, steps: int = 20) -> dict[str, float]:
    """Scores the parts on pictures that none was trained on, and writes the scores to ``gates.json``.

    ``samples``: the share of ``count`` pictures for each "a photo of a CLASS" whose class the classifier finds most probable;
    ``attributes``: the share of the words of "a photo of a ATTRIBUTE CLASS" that it finds more probable than not; ``real``: as
    ``samples``, of real pictures; ``maps``: the segmenter's mIoU on real pictures; ``psnr`` of the autoencoder [dB].
    """
    pipe, words = pipeline(str(folder)), Words(str(folder / "classifier"), torch.device("cpu"))
    prompts = [f"a photo of a {word}" for word in CLASSES]
    rows = [sample(pipe, prompt, 100 + i, count, steps, guidance) for i, prompt in enumerate(prompts)]
    plain = [(first(words, row) == i).double() for i, row in enumerate(rows)]
    detailed = [f"a photo of a {word} {name}" for pair in fashion.ATTRIBUTES for word in pair for name in CLASSES]
    drawn = [sample(pipe, prompt, 200 + i, 1, steps, guidance)[0] for i, prompt in enumerate(detailed)]
    write(
        grid(
            [row[:12] for row in rows] + [drawn[i : i + 10] for i in range(0, len(drawn), 10)],
            [*CLASSES, *(w for pair in fashion.ATTRIBUTES for w in pair)],
        ),
        folder / SAMPLES_FILE,
    )

    clothes = fashion.read("test")
    pictures = fashion.placed(clothes.items[:2000], Looks.draw(2000, torch.Generator().manual_seed(6)))
    labels = clothes.labels[:2000]
    shown = [fashion.image(picture) for picture in pictures]
    recognised = first(words, shown) == labels
    segmenter, overlap = Segmenter(str(folder / "segmenter"), torch.device("cpu")), Overlap(len(fashion.PARTS))
    for image, parts in zip(shown[:500], fashion.parts(pictures[:500]), strict=True):
        overlap.add(segmenter.labels(image, (SIZE, SIZE)), parts)
    with torch.no_grad():
        back = pipe.vae.decode(pipe.vae.encode(pixels(pictures)).latent_dist.mean).sample.mean(1) / 2 + 0.5
    scores = {
        "samples": torch.cat(plain).mean().item(),
        "attributes": words.shown(drawn, detailed).mean().item(),
        "real": recognised.float().mean().item(),
        "maps": overlap.scores()["miou"],
        "psnr": -10 * (back - pictures).square().mean().log10().item(),
    }
    by_class = {name: round(p.mean().item(), 3) for name, p in zip(CLASSES, plain, strict=True)}
    rounded = {key: round(value, 4) for key, value in scores.items()} | {"samples by class": by_class}
    write_atomically(folder / GATES_FILE, (json.dumps(rounded, indent=1) + "\n").encode())
    return scores


def first(words: Words, pictures: Sequence[Any]) -> Tensor:
    """The most probable class of each picture, as an index into `CLASSES`, shape [pictures]."""
    return words.logits(pictures)[:, : len(CLASSES)].argmax(1)


# ---------------------------------------------------------------- all of it


def pretrain(folder: Path) -> None:
    """Makes the parts that are missing, then scores all of them.

    Raises:
        SystemExit: a score is below its gate.
    """
    parts(folder, Plan())
    scores = examine(folder)
    print(scores)
    for gate, least in GATES.items():
        if scores[gate] < least:
            raise SystemExit(f"{gate}: {scores[gate]:.3f}, at least {least} is needed: train longer")


def parts(folder: Path, plan: Plan) -> None:
    """Makes the pipeline, the classifier and the segmenter if they are missing in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    clothes = fashion.read("train")
    clothes = Clothes(clothes.items[: plan.pictures], clothes.labels[: plan.pictures])
    if not (folder / "model_index.json").is_file():
        vae = autoencoder(folder, plan, clothes)
        diffusion(folder, plan, clothes, vae)
    if not (folder / "classifier" / "config.json").is_file():
        classifier(folder, plan, clothes)
    if not (folder / "segmenter" / "config.json").is_file():
        segmenter(folder, plan, clothes)


if __name__ == "__main__":
    pretrain(Path(sys.argv[1]))
