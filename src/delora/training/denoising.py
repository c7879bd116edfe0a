"""What a text-to-image model of diffusers is trained by: its network, what that is given beside noisy latents, and the loss.

Known are the forms of Stable Diffusion 1 and 2, Stable Diffusion XL, Stable Diffusion 3 and FLUX.1. Sources, beside the
pipelines of diffusers 0.42:

- diffusers' ``examples/dreambooth``: ``train_dreambooth_lora.py``, ``..._sdxl.py``, ``..._sd3.py``, ``..._flux.py``
- Stable Diffusion XL (arXiv 2307.01952, section 2.2): the network is told the size of a picture and where it was cut
- flow matching and its times: Esser et al. (arXiv 2403.03206, sections 2 and 3.1)
- FLUX.1-dev, into which guidance is distilled, is trained at one of 1: kohya-ss/sd-scripts, ``docs/flux_train_network.md``
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
import transformers
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from torch import Tensor, nn

from delora.training.config import ConfigError
from delora.training.models import refused

__all__ = [
    "FORMS",
    "Denoiser",
    "Form",
    "check",
    "denoiser_of",
    "dry",
    "embedded",
    "form_of",
    "guidance",
    "latent",
    "network",
    "others",
    "resolution",
    "skeleton",
]

Given = dict[str, Tensor]
PREDICTIONS = ("epsilon", "v_prediction")  # of diffusion: the noise, the velocity
FLOW = "FlowMatchEulerDiscreteScheduler"
ANOTHER_NOISE = "EDM"  # the first letters of schedulers whose noise is added in another way
NOT_DISTILLED = 1.0


@dataclass(frozen=True)
class Form:
    """A form of text-to-image models.

    Args:
        name: as people call it.
        part: where a pipeline has its network, "unet" or "transformer".
        network: the class of diffusers.
        size: the side of the latents that it draws, where the network's configuration has no ``sample_size``.
        guidance: that with which diffusers' pipeline draws if nothing else is asked.
        multiple: of which the side of the latents has to be a multiple.
        text: the pipeline's states of some prompts.
        shapes: those of the states of one prompt, from the network's configuration.
        predict: the network's output for noisy latents, times (0 to 1000) and what else it is given.
    """

    name: str
    part: str
    network: Any
    guidance: float
    text: Callable[[Any, list[str]], Given]
    shapes: Callable[[Any], dict[str, tuple[int, ...]]]
    predict: Callable[[nn.Module, Tensor, Tensor, Given], Tensor]
    size: int | None = None
    multiple: int = 1


# ---------------------------------------------------------------- Stable Diffusion 1 and 2


def _sd_text(pipe: Any, prompts: list[str]) -> Given:
    return {"text": pipe.encode_prompt(prompts, pipe.device, 1, do_classifier_free_guidance=False)[0]}


def _sd_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    return {"text": (77, config["cross_attention_dim"])}


def _sd(network: nn.Module, noisy: Tensor, times: Tensor, given: Given) -> Tensor:
    predicted: Tensor = network(noisy, times, encoder_hidden_states=given["text"]).sample
    return predicted


# ---------------------------------------------------------------- Stable Diffusion XL


def _pooled(pipe: Any, prompts: list[str], *others: None) -> Given:
    """The states and the pooled ones, of a pipeline that has each with and without guidance."""
    text, _, pooled, _ = pipe.encode_prompt(prompts, *others, device=pipe.device, do_classifier_free_guidance=False)
    return {"text": text, "pooled": pooled}


def _xl_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    return {"text": (77, config["cross_attention_dim"]), "pooled": (pooled,)}


def _xl(network: nn.Module, noisy: Tensor, times: Tensor, given: Given) -> Tensor:
    added = {"text_embeds": given["pooled"], "time_ids": given["place"]}
    predicted: Tensor = network(noisy, times, encoder_hidden_states=given["text"], added_cond_kwargs=added).sample
    return predicted


# ---------------------------------------------------------------- Stable Diffusion 3


def _sd3_text(pipe: Any, prompts: list[str]) -> Given:
    return _pooled(pipe, prompts, None, None)


def _sd3_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    return {"text": (77 + 256, config["joint_attention_dim"]), "pooled": (config["pooled_projection_dim"],)}


def _sd3(network: nn.Module, noisy: Tensor, times: Tensor, given: Given) -> Tensor:
    text, pooled = given["text"], given["pooled"]
    predicted: Tensor = network(noisy, encoder_hidden_states=text, pooled_projections=pooled, timestep=times).sample
    return predicted


# ---------------------------------------------------------------- FLUX.1


def _flux_text(pipe: Any, prompts: list[str]) -> Given:
    text, pooled, _ = pipe.encode_prompt(prompts, None, device=pipe.device)
    return {"text": text, "pooled": pooled}


def _flux_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    return {"text": (512, config["joint_attention_dim"]), "pooled": (config["pooled_projection_dim"],)}


def _flux(network: Any, noisy: Tensor, times: Tensor, given: Given) -> Tensor:
    """Each row is a square of two by two latents; it is told its place, and the network the guidance."""
    squares = F.pixel_unshuffle(noisy, 2)
    height, width = squares.shape[-2:]
    place = torch.zeros(height, width, 3, dtype=noisy.dtype, device=noisy.device)
    place[..., 1] += torch.arange(height, device=noisy.device)[:, None]
    place[..., 2] += torch.arange(width, device=noisy.device)
    distilled = network.config.guidance_embeds
    predicted = network(
        hidden_states=squares.flatten(2).mT,
        timestep=times / 1000,
        guidance=torch.full((len(noisy),), NOT_DISTILLED, device=noisy.device) if distilled else None,
        pooled_projections=given["pooled"],
        encoder_hidden_states=given["text"],
        txt_ids=noisy.new_zeros(given["text"].shape[1], 3),
        img_ids=place.flatten(0, 1),
    ).sample
    return F.pixel_shuffle(predicted.mT.unflatten(2, (height, width)), 2)


# ---------------------------------------------------------------- which form a model has

SD = Form("Stable Diffusion 1 or 2", "unet", UNet2DConditionModel, 7.5, _sd_text, _sd_shapes, _sd)
XL = Form("Stable Diffusion XL", "unet", UNet2DConditionModel, 5.0, _pooled, _xl_shapes, _xl)
SD3 = Form("Stable Diffusion 3", "transformer", SD3Transformer2DModel, 7.0, _sd3_text, _sd3_shapes, _sd3)
FLUX = Form("FLUX.1", "transformer", FluxTransformer2DModel, 3.5, _flux_text, _flux_shapes, _flux, size=128, multiple=2)
FORMS = (SD, XL, SD3, FLUX)


def form_of(network: nn.Module) -> Form:
    """The form of a network.

    Raises:
        ConfigError: it is none of `FORMS`.

    >>> with torch.device("meta"):
    ...     form_of(FluxTransformer2DModel(num_layers=1, num_single_layers=1)).name
    'FLUX.1'
    """
    config: Any = network.config
    return _form("the model", type(network).__name__, config)


def _form(model: str, kind: str, config: Mapping[str, Any]) -> Form:
    added = config.get("addition_embed_type")
    if kind == UNet2DConditionModel.__name__:
        found = {None: SD, "text_time": XL}.get(added)
    else:
        found = next((form for form in FORMS if form.network.__name__ == kind), None)
    if found is None:
        raise ConfigError(
            f"{model}: its network is a {kind}{f' with {added}' if added else ''}: pictures are learned by the networks of "
            f"{', '.join(form.name for form in FORMS)}"
        )
    return found


def network(pipe: Any) -> nn.Module:
    """The network of a pipeline that is trained."""
    found: nn.Module = pipe.transformer if getattr(pipe, "transformer", None) is not None else pipe.unet
    return found


def _read(model: str, kind: Any, part: str) -> Any:
    try:
        return kind.load_config(model, subfolder=part)
    except (OSError, ValueError) as error:
        raise refused(model, "diffusers", error) from error


def _configured(model: str) -> tuple[Form, Any]:
    """A model's form and its network's configuration.

    Raises:
        ConfigError: its form is none of `FORMS`.
        ModelError: there is no such model.
    """
    try:
        config: Any = SD3Transformer2DModel.load_config(model, subfolder="transformer")
    except (OSError, ValueError):
        config = _read(model, UNet2DConditionModel, "unet")
    return _form(model, config["_class_name"], config), config


def skeleton(model: str) -> Any:
    """The network's layers on the meta device. Errors are those of a model that is not there or of another form."""
    form, config = _configured(model)
    with torch.device("meta"):
        return form.network.from_config(config)


def latent(model: str) -> int:
    """How many pixels wide one latent is."""
    return int(2 ** (len(_read(model, AutoencoderKL, "vae")["block_out_channels"]) - 1))


def resolution(model: str) -> int:
    """The side of the pictures that a model draws, in pixels."""
    form, config = _configured(model)
    return int(form.size or config["sample_size"]) * latent(model)


def check(model: str, side: int, key: str) -> None:
    """Raise an error if pictures of this side, which ``key`` of a recipe gives, cannot be learned by this model.

    Raises:
        ConfigError: its form, its noise or what it predicts are not known, it draws from more than a text, or the side does not
            fit it.
    """
    form, config = _configured(model)
    index: Any = DiffusionPipeline.load_config(model)
    pipeline: Any = getattr(diffusers, index["_class_name"], None)
    channels = _read(model, AutoencoderKL, "vae").get("latent_channels", 4) * form.multiple**2
    from_picture = pipeline is not None and "image" in signature(pipeline.__call__).parameters
    if from_picture or config["in_channels"] != channels:
        raise ConfigError(
            f"{model}: {index['_class_name']} draws from more than a text, such as another picture (its network takes "
            f"{config['in_channels']} channels, a picture's latents have {channels}); pictures are learned by models that draw "
            "from a text alone"
        )
    noise: Any = _read(model, DDPMScheduler, "scheduler")
    kind, predicts = noise.get("_class_name", ""), noise.get("prediction_type", "epsilon")
    if (form.part == "transformer") != (kind == FLOW) or kind.startswith(ANOTHER_NOISE):
        raise ConfigError(f"{model}: its noise is that of {kind}, with which no {form.name} is trained here")
    if kind != FLOW and predicts not in PREDICTIONS:
        raise ConfigError(f"{model}: it predicts {predicts!r}; known are {', '.join(PREDICTIONS)}")
    patch = form.multiple * (config["patch_size"] if form.part == "transformer" else 1)
    if side % (multiple := latent(model) * patch):
        raise ConfigError(f"{key} = {side}: {model} takes multiples of {multiple}")


def guidance(model: str) -> float:
    """The guidance with which diffusers draws with a model if nothing else is asked."""
    return _configured(model)[0].guidance


def dry(network: Any, side: int, latent: int, kinds: int) -> tuple[Denoiser, Callable[[int], Given]]:
    """The loss of a network on the meta device, and a function of a number of rows that gives a batch to train on.

    ``side``: of the pictures; ``latent``: how many pixels one latent is wide; ``kinds``: 2 with class pictures, 1 without.
    """
    config, form = network.config, form_of(network)
    channels, latents = config["in_channels"] // form.multiple**2, side // latent
    picture = (channels, latents, latents)
    shapes = {"mean": picture, "std": picture, "place": (6,)} | form.shapes(config)
    noise = FlowMatchEulerDiscreteScheduler() if form.part == "transformer" else DDPMScheduler()
    return Denoiser(network, noise, 1.0, 1.0, 0.0, form), lambda rows: {
        key: torch.empty(rows, kinds, *shape, device="meta") for key, shape in shapes.items()
    }


def others(model: str) -> int:
    """How many parameters a pipeline has beside those of its network: of its text encoders and its autoencoder."""
    index: Any = DiffusionPipeline.load_config(model)
    form, _ = _configured(model)
    total = 0
    for part, entry in index.items():
        if part.startswith("_") or part in (form.part, "safety_checker") or not isinstance(entry, list) or entry[0] is None:
            continue
        kind: Any = getattr(diffusers if entry[0] == "diffusers" else transformers, entry[1], None)
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
            continue  # a tokenizer, a scheduler
        known: Any = kind
        with torch.device("meta"):
            if entry[0] == "diffusers":
                built = known.from_config(known.load_config(model, subfolder=part))
            else:
                built = known(known.config_class.from_pretrained(model, subfolder=part))
        total += sum(p.numel() for p in built.parameters())
    return total


@torch.no_grad()
def embedded(pipe: Any, prompts: Sequence[str]) -> Given:
    """What the text encoders say of each prompt, on the CPU: ``text`` [prompts, tokens, width], and some ``pooled``
    [prompts, width].
    """
    form = form_of(network(pipe))
    return {key: states.float().cpu() for key, states in form.text(pipe, list(prompts)).items()}


# ---------------------------------------------------------------- the loss


class Denoiser(nn.Module):
    """The loss of a latent diffusion model: the squared error of what its network predicts of the noise.

    Diffusion: noisy latents are ``sqrt(a) x + sqrt(1 - a) n`` at a uniform time; the network predicts the noise ``n``, or the
    velocity ``sqrt(a) n - sqrt(1 - a) x``. Flow matching: they are ``(1 - s) x + s n``, where the place of ``s`` in the
    scheduler's sequence is drawn from the logit-normal distribution, and it predicts ``n - x``. ``x = (latent - shift) scale``.

    With pairs of an instance and a class picture, it is the error of the first plus ``weight`` times that of the second.
    """

    def __init__(
        self, network: nn.Module, scheduler: Any, scale: float, weight: float, shift: float = 0.0, form: Form = SD
    ) -> None:
        super().__init__()
        self.network, self.form = network, form
        self.scale, self.shift, self.weight = scale, shift, weight
        self.flows = isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
        self.predicts = None if self.flows else scheduler.config.prediction_type
        # For each time the share of noise s, or of diffusion a, the variance that is left of the picture.
        self.levels: Tensor
        self.register_buffer("levels", scheduler.sigmas if self.flows else scheduler.alphas_cumprod, persistent=False)

    def forward(self, mean: Tensor, std: Tensor, **given: Tensor) -> dict[str, Tensor]:
        """``mean``, ``std`` of the latents [batch, kinds, channels, height, width]; what is given beside them, such as ``text``
        [batch, kinds, tokens, width].
        """
        kinds = mean.shape[1]
        dtype = next(self.network.parameters()).dtype
        mean, std = mean.flatten(0, 1), std.flatten(0, 1)
        given = {key: states.flatten(0, 1).to(dtype) for key, states in given.items()}
        latents = (mean + std * torch.randn_like(std) - self.shift) * self.scale
        noise = torch.randn_like(latents)
        noisy, times, target = self._noisy(latents, noise)
        predicted = self.form.predict(self.network, noisy.to(dtype), times, given).float()
        errors = (predicted - target).pow(2).flatten(1).mean(1).unflatten(0, (-1, kinds)).mean(0)
        return {"loss": errors[0] + self.weight * errors[1:].sum()}

    def _noisy(self, latents: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Noisy latents, their times and what is to be predicted."""
        steps = len(self.levels)
        if self.flows:
            drawn = torch.randn(len(latents), device=latents.device).sigmoid()
            shares = self.levels[(drawn * steps).long()]
            share = shares[:, None, None, None]
            return (1 - share) * latents + share * noise, shares * steps, noise - latents
        times = torch.randint(steps, (len(latents),), device=latents.device)
        left = self.levels[times][:, None, None, None]
        noisy = left.sqrt() * latents + (1 - left).sqrt() * noise
        return noisy, times, noise if self.predicts == "epsilon" else left.sqrt() * noise - (1 - left).sqrt() * latents


def denoiser_of(pipe: Any, weight: float) -> Denoiser:
    """The loss of a pipeline's network."""
    trained, vae = network(pipe), pipe.vae.config
    form = form_of(trained)
    kind = FlowMatchEulerDiscreteScheduler if form.part == "transformer" else DDPMScheduler
    return Denoiser(
        trained, kind.from_config(pipe.scheduler.config), vae.scaling_factor, weight, vae.get("shift_factor") or 0.0, form
    )
