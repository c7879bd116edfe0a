"""What text-to-image models are trained by: the networks of four pipelines, their noise, a folder of photographs with each."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, PixArtTransformer2DModel
from PIL import Image

import delora
from delora import app
from delora.data import dreambooth
from delora.evaluation import generation
from delora.tasks import parse, subject
from delora.training import denoising, memory
from delora.training.config import ConfigError
from delora.training.denoising import FORMS, Denoiser
from tests import test_cli, test_memory, tiny_diffusion

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # a solver calls numpy in an old way
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # diffusers calls names of peft that are to go
]

PIPELINES = {
    "sd": tiny_diffusion.pipeline,
    "sdxl": tiny_diffusion.sdxl,
    "sd3": tiny_diffusion.sd3,
    "flux": tiny_diffusion.flux,
}
SIZE, LATENTS = 16, 8
PROMPT = "a photo of qwe dog in the snow"
NEW = ("sdxl", "sd3", "flux")


def made(kind: str) -> Any:
    pipe = PIPELINES[kind]()
    pipe.set_progress_bar_config(disable=True)
    return pipe


# ---------------------------------------------------------------- the loss


@pytest.mark.parametrize("kind", PIPELINES)
def test_the_network_is_given_in_training_what_it_is_given_when_it_draws(kind):
    """Each output of the pipeline's own drawing, from the latents and the time that it had, comes out again."""
    pipe = made(kind)
    network, calls = denoising.network(pipe), []
    hook = network.register_forward_hook(lambda _, args, given, out: calls.append((args, given, out[0])), with_kwargs=True)
    noise = torch.Generator().manual_seed(0)
    pipe(PROMPT, num_inference_steps=3, guidance_scale=1.0, height=SIZE, width=SIZE, generator=noise, output_type="latent")
    hook.remove()
    form = denoising.form_of(network)
    given = denoising.embedded(pipe, [PROMPT]) | {"place": torch.tensor([[SIZE, SIZE, 0, 0, SIZE, SIZE]], dtype=torch.float32)}
    assert len(calls) == 3
    for args, called, expected in calls:
        noisy, time = args[0] if args else called["hidden_states"], args[1] if len(args) > 1 else called["timestep"]
        if kind == "flux":  # the pipeline's own way from rows to latents
            noisy, expected = (pipe._unpack_latents(rows, SIZE, SIZE, pipe.vae_scale_factor) for rows in (noisy, expected))
            time = 1000 * time
        with torch.no_grad():
            found = form.predict(network, noisy, time.expand(len(noisy)), given)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow"])
def test_a_network_that_knows_the_picture_has_no_loss(kind):
    """It finds noise or velocity by what the scheduler says of noisy latents; so noise, times and targets belong together."""
    scheduler: Any = DDPMScheduler(prediction_type=kind) if kind != "flow" else FlowMatchEulerDiscreteScheduler(shift=3.0)
    mean, scale, shift = torch.randn(5, 2, 4, 8, 8), 0.7, 0.3
    x = ((mean - shift) * scale).flatten(0, 1)

    def knows(network: Any, noisy: torch.Tensor, times: torch.Tensor, given: Any) -> torch.Tensor:
        if kind == "flow":
            return (noisy - x) / (times / 1000)[:, None, None, None]
        kept = scheduler.alphas_cumprod[times][:, None, None, None]
        noise = (noisy - kept.sqrt() * x) / (1 - kept).sqrt()
        return noise if kind == "epsilon" else kept.sqrt() * noise - (1 - kept).sqrt() * x

    form = dataclasses.replace(FORMS[0], predict=knows)
    denoiser = Denoiser(torch.nn.Linear(1, 1), scheduler, scale, 0.5, shift, form)
    # The least share of noise, 1e-4 in variance, enlarges the rounding of a latent by a hundred.
    assert denoiser(mean, torch.zeros_like(mean))["loss"].item() < (100 * 10 * torch.finfo(torch.float32).eps) ** 2


def test_the_times_of_flow_matching_are_logit_normal_in_the_schedulers_sequence():
    """SD3 draws with a shift of 3: its sequence has it, too. Half of the places lie between the quartiles of that law."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    denoiser = Denoiser(torch.nn.Linear(1, 1), scheduler, 1.0, 0.0)
    n = 20_000
    _, times, _ = denoiser._noisy(torch.zeros(n, 1, 1, 1), torch.zeros(n, 1, 1, 1))
    shares = times / 1000
    places = shares / (3 - 2 * shares)  # without the shift
    quartile = torch.tensor(0.6745).sigmoid().item()
    assert ((places - 0.5).abs() < quartile - 0.5).float().mean().item() == pytest.approx(0.5, abs=4 * (0.25 / n) ** 0.5 + 2e-3)
    assert places.mean().item() == pytest.approx(0.5, abs=4 * 0.21 / n**0.5 + 1e-3)


def test_stable_diffusion_xl_is_told_the_size_of_a_picture_and_where_it_was_cut():
    pipe, wide = made("sdxl"), Image.new("RGB", (96, 48))
    material = subject.Pairs(
        subject.latents(pipe, [wide], SIZE, 3),
        subject.latents(pipe, [Image.new("RGB", (SIZE, SIZE))], SIZE, 1),
        denoising.embedded(pipe, [PROMPT, "a dog"]),
    )
    for index in range(3):
        own, prior = material[index]["place"]
        assert own[[0, 1, 2, 4, 5]].tolist() == [48, 96, 0, SIZE, SIZE]
        assert 0 <= own[3] <= SIZE  # of a picture resized to 32 x 16
        assert prior.tolist() == [SIZE, SIZE, 0, 0, SIZE, SIZE]
    assert len({material[index]["place"][0, 3].item() for index in range(3)}) > 1


@pytest.mark.parametrize("kind", PIPELINES)
def test_the_estimated_memory_is_what_a_step_takes(kind):
    """As for language models: a dry batch has the shapes of the material, so that the estimate can be the measured peak."""
    pipe = made(kind)

    def network() -> Any:
        torch.manual_seed(0)
        form, config = denoising.form_of(denoising.network(pipe)), denoising.network(pipe).config
        return delora.inject(form.network.from_config(config), delora.DeLoRA(r=2, reach=0.1), ["to_q"])

    with torch.device("meta"):
        denoiser, batch = denoising.dry(network(), SIZE, SIZE // LATENTS, 2)
    pictures = [Image.new("RGB", (SIZE, SIZE))]
    crops = subject.latents(pipe, pictures, SIZE, 1)
    material = subject.Pairs(crops, crops, denoising.embedded(pipe, [PROMPT, "a dog"]))
    real = {key: states[None] for key, states in material[0].items()}
    dry = batch(1)
    assert set(dry) == set(real)
    assert {key for key in dry if dry[key].shape != real[key].shape} <= {"text"}  # the small tokenizer has 16 tokens
    assert all(dry["text"].shape[i] == real["text"].shape[i] for i in (0, 1, 3))
    shapes = {key: states.to("meta") for key, states in real.items()}
    found = memory.estimate(denoiser, shapes)
    taken = test_memory.measured(lambda: denoising.dry(network(), SIZE, SIZE // LATENTS, 2)[0], real, "fp32", 1)
    print(found, found.peak / taken)
    assert found.peak == pytest.approx(taken, rel=0.2)


# ---------------------------------------------------------------- the real models' sizes

PUBLISHED: dict[str, tuple[str, dict[str, Any], float]] = {
    "sdxl": (
        "unet",
        {
            "sample_size": 128,
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "block_out_channels": [320, 640, 1280],
            "transformer_layers_per_block": [1, 2, 10],
            "attention_head_dim": [5, 10, 20],
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        2.6e9,
    ),
    "sd3": (
        "transformer",
        {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192},
        2.0e9,
    ),
    "flux": ("transformer", {"guidance_embeds": True}, 12e9),
}


@pytest.mark.parametrize("kind", NEW)
def test_the_real_networks_have_the_published_sizes_and_their_memory_is_known(kind, tmp_path):
    part, config, published = PUBLISHED[kind]
    form = denoising.form_of(denoising.network(made(kind)))
    with torch.device("meta"):
        form.network(**config).save_config(tmp_path / part)
    made(kind).vae.save_config(tmp_path / "vae")
    network = denoising.skeleton(str(tmp_path)).to(torch.bfloat16)
    places = {name: layer.weight.shape for name, layer in network.named_modules() if name.endswith(("to_q", "to_v"))}
    delora.inject(network, delora.DeLoRA(r=8, reach=0.1), ["to_q", "to_v"])
    summary = delora.summary(network)
    assert summary.base == pytest.approx(published, rel=0.05)
    assert summary.trainable == 8 * sum(sum(shape) for shape in places.values())
    if kind == "sdxl":
        return  # many blocks of different sizes: its estimate takes ten seconds
    denoiser, batch = denoising.dry(network, 1024, 8, 2)
    kept = memory.estimate(denoiser, batch(1))
    memory.checkpoint(denoiser)
    again = memory.estimate(denoiser, batch(1))
    assert kept.weights == again.weights == pytest.approx(2 * published, rel=0.05)
    states = 2 * 4096 * network.inner_dim * 2  # of two pictures of 4096 squares, in bfloat16
    blocks = sum(len(each) for name, each in network.named_children() if name.endswith("transformer_blocks"))
    assert again.saved > blocks * states
    assert kept.saved > 4 * again.saved


# ---------------------------------------------------------------- photographs of one's own


@pytest.fixture(scope="module", params=NEW)
def done(request, tmp_path_factory) -> tuple[Path, Path]:
    """The model's folder and the run that ``delora finetune`` makes of two photographs."""
    folder = tmp_path_factory.mktemp(request.param)
    made(request.param).save_pretrained(folder / "pipe")
    (folder / "mug").mkdir()
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 255, (24, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "mug" / f"{i}.png")
    small = ["resolution=16", "class_images=1", "crops=2", "images=1", "steps=2", "snapshots=1"]
    changes = [*(f"subject.{change}" for change in small), "train.steps=2", "train.lr=0.05", "adapter.reach=0.5"]
    given = ["finetune", folder / "pipe", folder / "mug", "--word", "mug", "--out", folder / "run", *changes]
    code, told, err = test_cli.run(*given)
    assert code == 0, err
    told = " ".join(told.split())
    assert "memory, estimated:" in told
    assert "saved for the backward pass" in told
    return folder / "pipe", folder / "run"


def picture(pipe: Any, prompt: str = "a photo of qwe mug") -> torch.Tensor:
    return subject.rgb(generation.sample(pipe, prompt, 0, 1, 2, guidance(pipe), SIZE)[0])


def guidance(pipe: Any) -> float:
    return denoising.form_of(denoising.network(pipe)).guidance


def adapted(model: Path, run: Path) -> Any:
    pipe = generation.pipeline(str(model))
    delora.load(denoising.network(pipe), run / "adapter" / "mug")
    return pipe


def test_a_run_is_evaluated_looked_at_exported_and_merged(done, tmp_path):
    """What was trained is what is drawn, by every way that leads to a picture."""
    model, run = done
    expected, base = picture(adapted(model, run)), picture(generation.pipeline(str(model)))
    assert (expected - base).abs().mean() > 1, "the adapter does nothing: the test has nothing to tell"
    scores = json.loads(next(run.glob("variants/*/result.json")).read_text())
    code, told, err = test_cli.run("evaluate", run)
    assert (code, f"test fit {100 * scores['test']:.1f} % (2 examples)" in " ".join(told.split())) == (0, True), told + err
    page = app.shown(run)
    assert torch.equal(subject.rgb(page.at(1.0, "a photo of {}")), expected)
    assert torch.equal(subject.rgb(page.at(0.0, "a photo of {}")), base)
    for kind in ("diffusers", "kohya"):
        code, _, err = test_cli.run("export", run, "--kind", kind, "--out", tmp_path / kind)
        assert code == 0, err
        if kind == "kohya" and model.parent.name[:-1] != "sdxl":
            continue  # diffusers reads none of SD3, and of FLUX those of the real width: tests/field/test_image_names.py
        fresh = generation.pipeline(str(model))
        fresh.load_lora_weights(tmp_path / kind)
        assert (picture(fresh) - expected).abs().mean() < 1
    code, _, err = test_cli.run("merge", run / "adapter" / "mug", "--out", tmp_path / "merged")
    assert code == 0, err
    assert (picture(generation.pipeline(str(tmp_path / "merged"))) - expected).abs().mean() < 1


def test_the_score_is_the_share_of_the_error_that_is_gone(done):
    """With the same crops, noise and times; the crops are those of the seed."""
    model, run = done
    experiment = parse(json.loads((run / "config.json").read_text()))
    pipe = adapted(model, run)
    subject.set_seed(experiment.seed)
    photographs = [dreambooth.open_image(file) for file in sorted((model.parent / "mug").glob("*.png"))]
    material = subject.Pairs(
        subject.latents(pipe, photographs, SIZE, 2), None, denoising.embedded(pipe, ["a photo of qwe mug"])
    )
    denoiser = denoising.denoiser_of(pipe, 0.0)
    scores = json.loads(next(run.glob("variants/*/result.json")).read_text())
    assert subject.fit_of(denoiser, material).tolist() == pytest.approx([scores["test"]], abs=1e-5)
    assert experiment.subject.guidance == guidance(pipe)


# ---------------------------------------------------------------- what is not known


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("sdxl", {"scheduler": {"_class_name": "EDMEulerScheduler"}}, "its noise is that of EDMEulerScheduler, with which no"),
        ("sd", {"scheduler": {"prediction_type": "sample"}}, "it predicts 'sample'; known are epsilon, v_prediction"),
        ("sd3", {"scheduler": {"_class_name": "DDIMScheduler"}}, "its noise is that of DDIMScheduler"),
        ("sd", {"unet": {"addition_embed_type": "image"}}, "is a UNet2DConditionModel with image: pictures are learned by"),
        ("sdxl", {"": {"_class_name": "StableDiffusionXLImg2ImgPipeline"}}, "Img2ImgPipeline draws from more than a text"),
        ("sd", {"unet": {"in_channels": 9}}, "takes 9 channels, a picture's latents have 4"),
        ("flux", {"transformer": {"in_channels": 128}}, "takes 128 channels"),
        ("flux", {"subject.resolution": 18}, "subject.resolution = 18: .* takes multiples of 4"),
        ("sdxl", {"subject.resolution": 17}, "takes multiples of 2"),
    ],
)
def test_what_is_not_known_is_refused_in_words(kind, change, words, tmp_path):
    made(kind).save_pretrained(tmp_path / "pipe")
    for part, values in change.items():
        if isinstance(values, dict):
            names = {"": "model_index.json", "scheduler": "scheduler_config.json"}
            file = tmp_path / "pipe" / part / names.get(part, "config.json")
            file.write_text(json.dumps(json.loads(file.read_text()) | values))
    side = change.get("subject.resolution", SIZE)
    with pytest.raises(ConfigError, match=words):
        denoising.check(str(tmp_path / "pipe"), side, "subject.resolution")


def test_another_network_is_refused_with_the_names_of_those_that_learn(tmp_path):
    with torch.device("meta"):
        PixArtTransformer2DModel().save_config(tmp_path / "transformer")
    with pytest.raises(ConfigError, match=r"is a PixArtTransformer2DModel: pictures .* Stable Diffusion 3, FLUX\.1"):
        denoising.skeleton(str(tmp_path))
