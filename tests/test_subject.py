"""Subject-driven generation: the recipes on the real shapes, a small pipeline from end to end, scores, photographs."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

import delora
from delora import app
from delora.data import dreambooth
from delora.data.examples import DataError
from delora.evaluation import generation, pictures
from delora.evaluation.images import Encoder, Words, own_pairs, pairs
from delora.tasks import parse, read, subject
from delora.training import denoising, experiments
from delora.training.config import ConfigError
from delora.training.models import ModelError
from delora.training.runs import RunError
from tests import test_cli, tiny_diffusion

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "paper" / "recipes" / "subject").glob("*.toml"))
QUIET = Console(quiet=True)
PROMPTS = """Classes

subject_name,class
backpack,backpack
dog2,dog
teapot,teapot

Prompts

Object Prompts

prompt_list = [
'a {0} {1} in the snow'.format(unique_token, class_token),
'a red {0} {1}'.format(unique_token, class_token)
]

Live Subject Prompts

prompt_list = [
'a {0} {1} with a dog'.format(unique_token, class_token)
]
"""

# a solver of diffusers calls numpy in an old way
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


# ---------------------------------------------------------------- the paper's recipes


COUNTS = {
    "sd15-dreambooth": 3_188_864,
    "lora": 3_188_736,
    "dora": 3_288_576,
    "lora-r4": 797_184,
    "etherplus": 398_592,
    "oft": 11_602_368,
    "full": 859_520_964,
    "dora-fixed": 3_288_576,
    "prolonged": 3_188_864,
    "ladder": 3_188_736,
}


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory) -> str:
    """Stable Diffusion v1.5's U-Net as its configuration describes it, without weights."""
    folder = tmp_path_factory.mktemp("hub") / "stable-diffusion-v1-5"
    sizes = {
        "sample_size": 64,
        "block_out_channels": (320, 640, 1280, 1280),
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
    }
    with torch.device("meta"):
        UNet2DConditionModel(**sizes).save_config(folder / "unet")
    return str(folder)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_every_recipe_on_the_real_shapes(recipe, stable_diffusion):
    runs = read(recipe, [f"model={stable_diffusion}"]).runs()
    unet = subject.skeleton(stable_diffusion)
    first = None
    for _, run in runs:
        if run.seed != runs[0][1].seed:
            continue
        experiments.adapt(unet, run)
        summary = delora.summary(unet)
        first = first or summary.trainable
        if recipe.stem != "full":
            assert sum(layers for _, layers, _ in summary.rows) == 128
        delora.eject(unet)
        assert (run.published is not None and run.published.of(run)) or recipe.stem == "prolonged"  # which is a figure
        assert (run.subject.images, run.subject.steps, run.subject.guidance, run.subject.class_images) == (4, 25, 7.5, 200)
        assert {each.seed for _, each in runs} == ({0} if recipe.stem == "prolonged" else {0, 1, 2})
        assert run.subject.crops * 4 >= run.train.steps  # a new one at every step; each subject has four photographs or more
        assert (run.train.batch_size, run.train.schedule, run.train.clip, run.train.weight_decay) == (1, "constant", 1.0, 0.01)
    assert first == COUNTS[recipe.stem]
    assert {r.stem for r in RECIPES} == set(COUNTS)


def test_the_settings_of_the_quoted_rows():
    """Those of OFT's scripts."""
    for name, lr, steps in (("lora-r4", 1e-4, 1400), ("oft", 6e-5, 1400), ("full", 5e-6, 800)):
        _, run = read(ROOT / "paper/recipes/subject" / f"{name}.toml").runs()[0]
        assert (run.train.lr, run.train.steps) == (lr, steps)


def test_full_finetuning_trains_every_weight_of_a_unet():
    unet = tiny_diffusion.pipeline().unet
    run = read(ROOT / "paper/recipes/subject/full.toml", []).runs()[0][1]
    x, t, text = torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(1, 3, 32)
    before, weights = unet(x, t, encoder_hidden_states=text).sample, sum(p.numel() for p in unet.parameters())
    experiments.adapt(unet, run)
    assert delora.summary(unet).trainable == weights
    after = unet(x, t, encoder_hidden_states=text).sample
    torch.testing.assert_close(after, before)
    after.sum().backward()
    assert all(p.grad is not None for p in unet.parameters() if p.requires_grad)


# ---------------------------------------------------------------- a small pipeline


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A pipeline, two judges, and photographs of three subjects in DreamBooth's form."""
    folder = tmp_path_factory.mktemp("subject")
    tiny_diffusion.save(folder / "pipe")
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ViTModel(ViTConfig(**small, image_size=16, patch_size=8), add_pooling_layer=False).save_pretrained(folder / "dino")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder / "dino")
    text = small | {"vocab_size": 40, "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    vision = small | {"image_size": 16, "patch_size": 8}
    CLIPModel(CLIPConfig(projection_dim=8, vision_config=vision, text_config=text)).save_pretrained(folder / "clip")
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(folder / "clip")
    tiny_diffusion.tokenizer().save_pretrained(folder / "clip")
    words = {0: "dog", 1: "red", 2: "snow"}
    labels = {"id2label": words, "label2id": {word: i for i, word in words.items()}}
    for kind in ("multi_label", "single_label"):
        classifier = ResNetForImageClassification(
            ResNetConfig(
                embedding_size=8,
                hidden_sizes=[8],
                depths=[1],
                layer_type="basic",
                problem_type=f"{kind}_classification",
                **labels,
            )
        )
        classifier.save_pretrained(folder / kind)
        ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder / kind)
    draw = np.random.default_rng(0)
    for name, n in (("backpack", 3), ("dog2", 2), ("teapot", 2)):
        (folder / "data" / name).mkdir(parents=True)
        colour = draw.integers(0, 255, 3)
        for i in range(n):
            pixels = np.clip(colour + draw.normal(0, 40, (20 + 4 * i, 24, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "data" / name / f"{i:02d}.png")
    (folder / "data" / dreambooth.FILE).write_text(PROMPTS)
    return folder


def recipe(world: Path, out: Path, **changes: Any) -> dict[str, Any]:
    judges = {"dino": str(world / "dino"), "clip": [str(world / "clip")]}
    asked = {"resolution": 16, "class_images": 2, "images": 2, "steps": 2, "guidance": 2.0, "snapshots": 1, **judges}
    data: dict[str, Any] = {
        "name": "tiny",
        "out": str(out),
        "model": str(world / "pipe"),
        "task": "subject",
        "data": {"source": str(world / "data")},
        "subject": asked | {"names": ["dog2", "backpack"]},
        "adapter": {"method": "delora", "r": 2, "lam": 4.0, "targets": r".*attn[12]\.(to_q|to_k|to_v|to_out\.0)"},
        "train": {"steps": 2, "batch_size": 1, "lr": 1e-2, "schedule": "constant", "warmup": 0.0, "clip": 1.0, "save_steps": 1},
    }
    for key, value in changes.items():
        data[key] = data[key] | value if isinstance(value, dict) else value
    return data


@pytest.fixture(scope="module")
def done(world, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "done"
    summary = experiments.train(subject, parse(recipe(world, out)), QUIET)
    assert summary.agreement == {"adapter": 2, "diffusers": 2}
    return out


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_two_steps_from_end_to_end(world, done):
    (run,) = (done / "variants").iterdir()
    assert names(run / "subjects") == ["backpack", "dog2"]
    assert names(run / "subjects" / "backpack" / "pictures") == ["00-0.png", "00-1.png", "01-0.png", "01-1.png"]
    assert names(run / "subjects" / "dog2" / "snapshots") == ["00000.png", "00001.png", "00002.png"]
    assert names(done / "prior") == ["backpack", "dog"]
    assert names(done / "adapter") == names(done / "diffusers") == ["backpack", "dog2"]
    result = json.loads((run / "result.json").read_text())
    assert {"dino", "clip_i", "clip_t", "dino real", "clip_i real", "dino by subject"} <= set(result["scores"])
    assert result["test"] == result["scores"]["dino"]
    assert result["distance"] > 0
    # The first picture is the base model's; after a step it is another one.
    first, second = (np.array(Image.open(run / "subjects" / "dog2" / "snapshots" / f"0000{i}.png")) for i in (0, 2))
    assert not np.array_equal(first, second)


@pytest.mark.parametrize(("name", "variants"), [("ladder", 7), ("prolonged", 3)])
def test_a_recipe_of_the_paper_with_small_parts(world, tmp_path, name, variants):
    """Every variant with its own adapter and training, but for the number of steps, on the small pipeline."""
    judges = [f"subject.dino={world / 'dino'}", f'subject.clip=["{world / "clip"}"]']
    small = ["resolution=16", "class_images=1", "images=1", "steps=2", "crops=2", "snapshots=1", "scored=[1]", 'names=["dog2"]']
    places = [f"out={tmp_path / 'out'}", f"model={world / 'pipe'}", f"data.source={world / 'data'}", "seeds=[0]"]
    changes = [*places, *judges, *(f"subject.{change}" for change in small), "train.steps=2", "train.save_steps=1"]
    results = experiments.train(subject, read(ROOT / f"paper/recipes/subject/{name}.toml", changes), QUIET).results
    assert len(results) == variants
    for result in results:
        assert result.diverged is None
        assert result.distance > 0
        assert {"dino", "dino after 1", "dino untuned"} <= set(result.scores)
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["|dW| up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0"] > 0 for row in rows)


def test_scores_after_a_step_are_those_of_a_run_that_ends_there(world, done, tmp_path):
    """And the run goes on as if nothing had been scored. One layer's distance is recorded beside the mean of all."""
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"
    runs = {}
    for steps, scored in ((2, [1]), (1, [])):
        out = tmp_path / str(steps)
        changes = {"subject": {"names": ["dog2"], "scored": scored}, "train": {"steps": steps, "record_layers": [layer]}}
        experiments.train(subject, parse(recipe(world, out, **changes)), QUIET)
        runs[steps] = json.loads((out / "variants" / "tiny" / "subjects" / "dog2" / "scores.json").read_text())["scores"]
    whole = json.loads((done / "variants" / "tiny" / "subjects" / "dog2" / "scores.json").read_text())["scores"]
    for name in ("dino", "clip_i", "clip_t"):
        assert runs[2][f"{name} after 1"] == runs[1][name] != runs[2][name]
        assert runs[2][name] == whole[name]
    (result,) = (tmp_path / "2" / "variants").glob("*/result.json")
    assert json.loads(result.read_text())["scores"]["dino after 1"] == pytest.approx(np.mean(runs[1]["dino"]))
    rows = [json.loads(line) for line in (tmp_path / "2" / "metrics.jsonl").read_text().splitlines()]
    first, second = (row[f"|dW| {layer}"] for row in rows)
    assert 0 < first < second


def test_the_scores_pool_all_pairs_of_all_subjects(world, done):
    """By hand from the pictures in the folder: every photograph with every picture of its subject, in one mean."""
    (run,) = (done / "variants").iterdir()
    encoder = Encoder(str(world / "dino"), torch.device("cpu"))

    def features(folder: Path) -> torch.Tensor:
        return encoder.images([dreambooth.open_image(file) for file in sorted(folder.glob("*.png"))])

    total, count, means = 0.0, 0, []
    for name in ("backpack", "dog2"):
        photographs, made = features(world / "data" / name), features(run / "subjects" / name / "pictures")
        cosines = [float(a @ b) for a in photographs for b in made]
        total, count = total + sum(cosines), count + len(cosines)
        means.append(sum(cosines) / len(cosines))
    scores = json.loads((run / "result.json").read_text())["scores"]
    assert scores["dino"] == pytest.approx(total / count, abs=1e-5)
    assert scores["dino by subject"] == pytest.approx(sum(means) / 2, abs=1e-5)


def test_the_pictures_of_the_model_as_it_was_are_the_other_end_of_the_scale(world, done):
    """What it makes of the prompts, drawn once for all runs and scored like a run's own pictures."""
    drawn = done / "untuned" / "dog2"
    assert names(drawn) == names(done / "variants" / "tiny" / "subjects" / "dog2" / "pictures")
    pipe = generation.pipeline(str(world / "pipe"))
    (again,) = generation.sample(pipe, "a qwe dog with a dog", 0, 1, 2, 2.0, 16)
    seen = np.array(Image.open(drawn / "00-0.png"), dtype=float)
    assert np.abs(np.array(again) - seen).mean() < 1
    encoder = Encoder(str(world / "dino"), torch.device("cpu"))
    photographs, made = (
        encoder.images([dreambooth.open_image(file) for file in sorted(folder.glob("*.png"))])
        for folder in (world / "data" / "dog2", drawn)
    )
    scores = json.loads((done / "variants" / "tiny" / "subjects" / "dog2" / "scores.json").read_text())["scores"]
    assert scores["dino untuned"] == pytest.approx(pairs(photographs, made).tolist(), abs=1e-5)


def test_words_of_the_prompts_that_the_pictures_show(world):
    """By the classifier's own logits; a word that it does not know is not asked for."""
    judge = Words(str(world / "multi_label"), torch.device("cpu"))
    shown = [dreambooth.open_image(file) for file in sorted((world / "data" / "backpack").glob("*.png"))]
    pixels = judge.processor(shown, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        seen = judge.model(pixel_values=pixels).logits.sigmoid() > 0.5
    prompts = ["a red dog", "a purple cat", "a dog in the snow"]
    expected = [seen[0, 1], seen[0, 0], seen[2, 0], seen[2, 2]]
    assert judge.shown(shown, prompts).tolist() == [float(x) for x in expected]
    with pytest.raises(ModelError, match="single_label does not give each label a probability of its own"):
        Words(str(world / "single_label"), torch.device("cpu"))


def test_a_convolutional_networks_features_are_means_over_the_picture(world):
    encoder = Encoder(str(world / "multi_label"), torch.device("cpu"))
    shown = [dreambooth.open_image(file) for file in sorted((world / "data" / "backpack").glob("*.png"))]
    pixels = encoder.processor(shown, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = encoder.model(pixel_values=pixels).pooler_output.flatten(1)
    torch.testing.assert_close(encoder.images(shown), torch.nn.functional.normalize(expected, dim=-1), atol=1e-6, rtol=1e-5)


def test_a_classifier_in_place_of_the_clips(world, tmp_path):
    asked = {"clip": [], "classifier": str(world / "multi_label"), "names": ["dog2"], "snapshots": 0}
    experiments.train(subject, parse(recipe(world, tmp_path / "out", subject=asked)), QUIET)
    (run,) = (tmp_path / "out" / "variants").iterdir()
    scores = json.loads((run / "result.json").read_text())["scores"]
    assert {"dino", "dino real", "dino untuned", "prompt", "prompt untuned", "dino by subject"} == set(scores)
    assert 0 <= scores["prompt"] <= 1


def test_a_run_that_was_stopped_ends_with_the_same_numbers(world, done, tmp_path):
    """One subject's training was killed after its first step, with half of the pictures of the other one made."""
    out = tmp_path / "again"
    shutil.copytree(done, out)
    (run,) = (out / "variants").glob("tiny")
    for file in (out / "summary.json", run / "result.json", *run.glob("subjects/*/scores.json")):
        file.unlink()
    shutil.rmtree(run / "subjects" / "dog2" / "checkpoints" / "checkpoint-2")
    shutil.rmtree(run / "subjects" / "dog2" / "pictures")
    (run / "subjects" / "backpack" / "pictures" / "01-1.png").unlink()
    experiments.train(subject, parse(recipe(world, out)), QUIET)

    def numbers(folder: Path) -> dict[str, Any]:
        values = json.loads((folder / "variants" / "tiny" / "result.json").read_text())
        return {key: value for key, value in values.items() if key != "seconds"}

    assert numbers(out) == numbers(done)


def test_without_a_prior_and_with_photographs_of_ones_own(world, tmp_path):
    own = {
        "word": "dog",
        "prompts": ["a photo of {} on the beach"],
        "class_images": 0,
        "names": [],
        "snapshots": 0,
        "images": 1,
    }
    changes = {"subject": own, "data": {"source": str(world / "data" / "dog2")}, "train": {"steps": 1}}
    experiments.train(subject, parse(recipe(world, tmp_path / "out", **changes)), QUIET)
    assert names(tmp_path / "out" / "adapter") == ["dog2"]
    assert names(tmp_path / "out" / "prior" / "dog") == []


# ---------------------------------------------------------------- a folder of photographs, and no judge


OWN = "a photo of qwe dog"


@pytest.fixture(scope="module")
def own(world, tmp_path_factory) -> Path:
    """What ``delora finetune`` makes of a folder of photographs."""
    out = tmp_path_factory.mktemp("own") / "mine"
    small = ["class_images=1", "crops=2", "images=1", "steps=2", "guidance=2.0", "snapshots=0"]
    changes = [*(f"subject.{change}" for change in small), "train.steps=2", "train.lr=0.05", "adapter.lam=4.0"]
    given = ["finetune", world / "pipe", world / "data" / "dog2", "--word", "dog", "--out", out, *changes]
    code, told, err = test_cli.run(*given)
    assert code == 0, err
    for expected in ("2 photographs of “qwe dog”, in 16 x 16", "judge = false  # no other model is needed", "Test fit"):
        assert expected in told
    return out


def picture_of(pipe: Any, prompt: str = OWN) -> torch.Tensor:
    return subject.rgb(generation.sample(pipe, prompt, 0, 1, 2, 2.0, 16)[0])


def adapted(world: Path, own: Path) -> Any:
    pipe = generation.pipeline(str(world / "pipe"))
    delora.load(pipe.unet, own / "adapter" / "dog2")
    return pipe


def test_without_a_judge_the_score_is_the_share_of_the_error_that_is_gone(world, own):
    """Measured anew, from the photographs on, with the same crops and noise; an adapter that does nothing has none."""
    (result,) = (own / "variants").glob("*/result.json")
    scores = json.loads(result.read_text())
    assert (scores["metric"], scores["test"]) == ("fit", scores["scores"]["fit"])
    experiment = parse(json.loads((own / "config.json").read_text()))
    pipe = adapted(world, own)
    subject.set_seed(experiment.seed)
    photographs = [dreambooth.open_image(file) for file in sorted((world / "data" / "dog2").glob("*.png"))]
    crops = subject.latents(pipe, photographs, 16, experiment.subject.crops)
    material = subject.Pairs(crops, None, subject.embedded(pipe, [OWN]))
    denoiser = subject.denoiser_of(pipe, 1.0)
    before = torch.get_rng_state()
    assert subject.fit_of(denoiser, material).tolist() == pytest.approx([scores["test"]], abs=1e-5)
    assert torch.equal(torch.get_rng_state(), before)
    assert scores["test"] != 0
    delora.strength(pipe.unet, 0.0)
    assert subject.fit_of(denoiser, material).tolist() == pytest.approx([0.0], abs=1e-7)
    code, told, err = test_cli.run("evaluate", own)
    assert (code, f"test fit {100 * scores['test']:.1f} % (2 examples)" in " ".join(told.split())) == (0, True), told + err


def test_evaluate_scores_an_adapter_as_its_run_did(world, done):
    experiment = parse(json.loads((done / "config.json").read_text()))
    scores, photographs = subject.evaluate(experiment, done / "adapter" / "dog2")
    trained = json.loads((done / "variants" / "tiny" / "subjects" / "dog2" / "scores.json").read_text())["scores"]
    assert scores == {name: pytest.approx(np.mean(trained[name]), abs=1e-3) for name in ("dino", "clip_i", "clip_t")}
    assert photographs == 2
    with pytest.raises(RunError, match="has the name of none of the subjects: backpack, dog2"):
        subject.evaluate(experiment, done / "adapter")


def test_generate_takes_the_folder_of_a_run(world, own, tmp_path):
    """Its model, its size, its solver's steps, and the subject where the prompt has braces."""
    given = ["generate", own, "a photo of {}", "--count", 1, "--strength", "0,1", "--out", tmp_path / "grid.png"]
    code, _, told = test_cli.run(*given)
    assert code == 0, told
    sheet, times = np.array(Image.open(tmp_path / "grid.png")), 96 // tiny_diffusion.SIZE
    pipe = adapted(world, own)
    for number, strength in enumerate((0.0, 1.0)):
        delora.strength(pipe.unet, strength)
        top = pictures.MARGIN + pictures.LABEL + number * (96 + pictures.MARGIN + pictures.LABEL)
        seen = sheet[top:, pictures.MARGIN :][:96:times, :96:times]
        assert np.array_equal(seen, picture_of(pipe).permute(1, 2, 0).numpy())
    code, _, told = test_cli.run("generate", world / "data", "a dog", "--out", tmp_path / "other.png")
    assert (code, "holds no adapter" in told) == (1, True)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # diffusers calls names of peft that are to go
def test_a_run_of_photographs_is_exported_and_merged_from_the_command_line(world, own, tmp_path):
    expected, base = picture_of(adapted(world, own)), picture_of(generation.pipeline(str(world / "pipe")))
    assert (expected - base).abs().mean() > 1, "the adapter does nothing: the test has nothing to tell"
    for kind in ("diffusers", "kohya"):
        code, _, told = test_cli.run("export", own, "--kind", kind, "--out", tmp_path / kind)
        assert code == 0, told
        fresh = generation.pipeline(str(world / "pipe"))
        fresh.load_lora_weights(tmp_path / kind)
        assert (picture_of(fresh) - expected).abs().mean() < 1
        begins = {"diffusers": "unet.", "kohya": "lora_unet_"}[kind]
        assert all(name.startswith(begins) for name in load_file(tmp_path / kind / "pytorch_lora_weights.safetensors"))
    code, _, told = test_cli.run("merge", own / "adapter" / "dog2", "--out", tmp_path / "merged")
    assert code == 0, told
    assert (picture_of(generation.pipeline(str(tmp_path / "merged"))) - expected).abs().mean() < 1
    code, _, told = test_cli.run("export", own, "--out", tmp_path / "lora")
    assert (code, "--kind diffusers or --kind kohya" in " ".join(told.replace("│", " ").split())) == (2, True)


def test_the_page_of_a_run_of_photographs(world, own, done):
    page, pipe = app.shown(own), adapted(world, own)
    assert torch.equal(subject.rgb(page.at(1.0, "a photo of {}")), picture_of(pipe))
    delora.strength(pipe.unet, 0.0)
    assert torch.equal(subject.rgb(page.at(0.0, OWN)), picture_of(pipe))
    with pytest.raises(RunError, match="has an adapter for each of 2 subjects: give one of .*backpack"):
        app.shown(done)
    with pytest.raises(ConfigError, match="write qwe and the class"):
        app.shown(done, done / "adapter" / "dog2").at(1.0, "a photo of {}")


@pytest.mark.parametrize("key", ["dino", "clip", "classifier"])
def test_a_hint_for_a_judge_works_as_it_is_written(world, tmp_path, key):
    """The change that the message proposes is made literally, with the folder in its place."""
    asked: dict[str, Any] = {"names": ["dog2"]}
    asked |= {key: [str(world / "clip"), "nobody/nothing"] if key == "clip" else "nobody/nothing"}
    values = recipe(world, tmp_path / "out", subject=asked)
    with pytest.raises(ModelError) as caught:
        subject.check(parse(json.loads(json.dumps(values))))
    change = str(caught.value).rpartition("in a recipe: ")[2].removesuffix(")")
    (argument,) = shlex.split(change.replace("FOLDER", str(world / ("multi_label" if key == "classifier" else key))))
    assert subject.check(parse(values, [argument]))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{world}/data/dog2"], "say in a word what they show, such as --word mug"),
        (["{world}/data/dog2", "--word", "dog", "--text", "body"], "--text is for tables of texts"),
        (["{world}/data/dog2/00.png", "--word", "dog"], "is one picture: give the folder"),
        (["{world}/data/dog2", "--word", "dog", "subject.judge=true"], "subject.dino=FOLDER"),
        (["{world}/data/prompts_and_classes.txt", "--word", "dog"], "--word is what photographs show"),
        (["{world}/data/dog3", "--word", "dog"], "dog3 is not there"),
        (["{world}/data", "--word", "dog"], "data holds none: give a folder of photographs"),
    ],
)
def test_photographs_that_cannot_be_learned_are_refused_in_words(world, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    code, _, told = test_cli.run("finetune", world / "pipe", *(each.format(world=world) for each in arguments))
    assert (code != 0, words in told) == (True, True), told
    assert not names(tmp_path)


def test_what_is_odd_about_photographs_is_told(world, tmp_path):
    shutil.copytree(world / "data" / "dog2", tmp_path / "dogs")
    shutil.copy(tmp_path / "dogs" / "00.png", tmp_path / "dogs" / "copy.png")
    (tmp_path / "dogs" / "notes.txt").touch()
    (mine,) = dreambooth.read(str(tmp_path / "dogs"), word="dog")
    told = dreambooth.odd(mine, 22)
    assert [line.split(":")[0] for line in told] == [
        "00.png is enlarged",
        "copy.png is 00.png once more",
        "copy.png is enlarged",
        "left out, for it is no picture (.jpg, .jpeg, .png, .webp)",
    ]
    assert not dreambooth.odd(dreambooth.read(str(world / "data" / "dog2"), word="dog")[0], 16)


# ---------------------------------------------------------------- parts


def test_the_loss_is_that_of_both_kinds():
    """With a U-Net that predicts zero, the loss is the mean square of the noise: 1, and the weight for the prior."""

    class Zero(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(torch.zeros(()))

        def forward(self, x: torch.Tensor, steps: torch.Tensor, encoder_hidden_states: torch.Tensor) -> Any:
            return type("Seen", (), {"sample": x * self.w})()

    pipe = tiny_diffusion.pipeline()
    torch.manual_seed(0)
    made = [torch.zeros(4, kinds, 4, 32, 32) for kinds in (1, 2)]
    losses = [
        denoising.Denoiser(Zero(), DDPMScheduler.from_config(pipe.scheduler.config), 0.18, 0.5)(
            x, x, text=torch.zeros(4, x.shape[1], 2, 8)
        )["loss"].item()
        for x in made
    ]
    n = 4 * 4 * 32 * 32
    assert losses == pytest.approx([1.0, 1.5], abs=4 * (2 / n) ** 0.5)  # four deviations of a mean of n squares


def test_crops_keep_the_aspect_and_stay_inside():
    wide = Image.fromarray(np.tile(np.arange(40, dtype=np.uint8)[None, :, None], (20, 1, 3)))
    middle, corner = subject.cropped(wide, 20, at_random=False)
    assert corner == (0, 10)
    assert middle.shape == (3, 20, 20)
    assert torch.equal(middle[0, 0], torch.arange(10, 30) / 127.5 - 1)
    torch.manual_seed(0)
    starts = {round((subject.cropped(wide, 20, at_random=True)[0][0, 0, 0].item() + 1) * 127.5) for _ in range(100)}
    assert min(starts) >= 0
    assert max(starts) <= 20
    assert len(starts) > 10


def test_pairs_of_one_subject_leave_out_each_picture_with_itself():
    x = torch.nn.functional.normalize(torch.randn(4, 8), dim=-1)
    expected = [float(x[i] @ x[j]) for i in range(4) for j in range(4) if i != j]
    assert own_pairs(x).tolist() == pytest.approx(expected)
    assert len(pairs(x, x[:2])) == 8


def test_the_prompts_of_objects_and_of_live_subjects(world):
    found = {s.name: s for s in dreambooth.read(str(world / "data"))}
    assert list(found) == ["backpack", "dog2", "teapot"]
    assert found["teapot"].prompts == ("a {} in the snow", "a red {}")
    assert found["dog2"].prompts == ("a {} with a dog",)
    assert [len(s.images) for s in found.values()] == [3, 2, 2]


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"data": {"source": "{tmp}"}}, DataError, r"does not hold prompts_and_classes\.txt: .*google/dreambooth.*your own"),
        ({"subject": {"names": ["cat9"]}}, DataError, "has no subject 'cat9'; known are backpack, dog2, teapot"),
        ({"subject": {"word": "dog"}, "data": {"source": "{tmp}"}}, DataError, "holds no photograph"),
        ({"subject": {"judge": False, "scored": [1]}}, ConfigError, r"needs subject\.judge=true"),
        ({"subject": {"word": "dog", "prompts": ["a dog"]}}, DataError, r"the prompt 'a dog' must have \{\} once"),
        ({"subject": {"word": "dog", "prompts": ["{}"]}, "data": {"source": "{tmp}"}}, DataError, "holds no photograph"),
        (
            {"model": "nobody/nothing"},
            ModelError,
            "there is no model .*\n.*\n    hf download nobody/nothing --local-dir FOLDER\n",
        ),
        ({"model": "{tmp}"}, ModelError, "is not a folder that diffusers can read"),
        ({"train": {"steps": None}}, ConfigError, r"give train\.steps"),
        ({"subject": {"scored": [1, 2, 5]}}, ConfigError, r"training ends at step 2, .*; leave out 2, 5"),
        ({"train": {"record_layers": ["to_out"]}}, ConfigError, "'to_out' is no adapted layer whose weights change; such are"),
        ({"adapter": {"targets": ["to_qq"]}}, ConfigError, "no module ends with 'to_qq'"),
        ({"data": {"train": 3}}, ConfigError, r"data\.train: unknown key; did you mean train"),
        ({"task": "sentiment"}, ConfigError, "subject: unknown key"),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_written(world, tmp_path, changes, error, words):
    given = json.loads(json.dumps(changes).replace("{tmp}", str(tmp_path)))
    with pytest.raises(error, match=words):
        experiments.train(subject, parse(recipe(world, tmp_path / "out", **given)), QUIET)
    assert not (tmp_path / "out").exists()


def test_a_damaged_photograph_and_another_prompts_file(world, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(world / "data", data)
    (data / "dog2" / "00.png").write_bytes((data / "dog2" / "00.png").read_bytes()[:60])
    with pytest.raises(DataError, match=r"00\.png cannot be read as a picture"):
        subject.check(parse(recipe(world, tmp_path / "out", data={"source": str(data)})))
    (data / dreambooth.FILE).write_text("nothing of the kind")
    with pytest.raises(DataError, match="is not the file of google/dreambooth"):
        dreambooth.read(str(data))


# ---------------------------------------------------------------- delora generate


def test_generate_writes_a_row_for_each_strength(world, done, tmp_path):
    adapter = done / "adapter" / "dog2"
    given = ["generate", adapter, "a photo of qwe dog", "--model", world / "pipe", "--count", 2, "--steps", 2]
    code, _, told = test_cli.run(*given, "--strength", "0,1", "--out", tmp_path / "grid.png")
    assert code == 0, told
    sheet = np.array(Image.open(tmp_path / "grid.png"))
    times = 96 // tiny_diffusion.SIZE  # small pictures are drawn larger: every pixel as a square of so many
    size = times * tiny_diffusion.SIZE
    step = size + pictures.MARGIN
    rows = [pictures.MARGIN + i * (step + pictures.LABEL) + pictures.LABEL for i in range(2)]
    squares = [[sheet[top:, left:][:size, :size] for left in (pictures.MARGIN, pictures.MARGIN + step)] for top in rows]
    seen = [[square[::times, ::times] for square in row] for row in squares]
    assert np.array_equal(seen[0][1].repeat(times, 0).repeat(times, 1), squares[0][1])
    pipe = generation.pipeline(str(world / "pipe"))
    base = generation.sample(pipe, "a photo of qwe dog", 0, 2, 2, 2.0)  # the run's guidance
    delora.load(pipe.unet, adapter)
    tuned = generation.sample(pipe, "a photo of qwe dog", 0, 2, 2, 2.0)
    assert all(np.array_equal(a, np.array(b)) for a, b in zip(seen[0], base, strict=True))
    assert all(np.array_equal(a, np.array(b)) for a, b in zip(seen[1], tuned, strict=True))
    assert not np.array_equal(seen[0][0], seen[1][0])


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--strength", "1;2"], 2, "expected numbers separated by commas"),
        (["--strength", "-1"], 1, "must be a finite number, at least 0"),
        (["--out", "{tmp}/there.png"], 2, "exists: choose another file"),
        (["--model", "{tmp}"], 1, "is not a folder that diffusers can read"),
    ],
)
def test_a_mistake_of_generate_is_told(world, done, tmp_path, options, code, words):
    (tmp_path / "there.png").touch()
    given = [
        "generate",
        done / "adapter" / "dog2",
        "a dog",
        "--model",
        world / "pipe",
        "--steps",
        1,
        "--out",
        tmp_path / "x.png",
    ]
    seen, _, told = test_cli.run(*given, *(o.format(tmp=tmp_path) for o in options))
    assert (seen, words in " ".join(told.replace("│", " ").split())) == (code, True), told
    assert names(tmp_path) == ["there.png"]
