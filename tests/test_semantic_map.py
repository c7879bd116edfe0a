"""Semantic map to image: the recipes on the real shapes, a small pipeline from end to end, the scores' formulas, the data."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel
from PIL import Image
from rich.console import Console
from torchmetrics.classification import MulticlassJaccardIndex
from transformers import (
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SegformerImageProcessor,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

import delora
from delora.data import maps
from delora.data.examples import DataError
from delora.evaluation import generation
from delora.evaluation.segmentation import UNLABELLED, Overlap, Segmenter, frechet
from delora.tasks import parse, read, semantic_map
from delora.tasks.semantic_map import with_hint
from delora.training import experiments
from delora.training.config import ConfigError
from tests import tiny_diffusion
from tests.test_subject import stable_diffusion  # noqa: F401 (a fixture)

ROOT = Path(__file__).parents[1]
QUIET = Console(quiet=True)
CLASSES, SIZE = 3, tiny_diffusion.SIZE

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


# ---------------------------------------------------------------- the paper's recipes


@pytest.mark.parametrize(
    "recipe", sorted((ROOT / "paper" / "recipes" / "semantic_map").glob("*.toml")), ids=lambda recipe: recipe.stem
)
def test_every_recipe_on_the_real_shapes(recipe, stable_diffusion):  # noqa: F811
    """128 attention matrices and 16 gated layers, and the hint encoder of ControlNet: 1,086,480 parameters."""
    runs = [run for _, run in read(recipe, [f"model={stable_diffusion}"]).runs()]
    assert {run.seed for run in runs} == {0, 1, 2}
    for run in runs[::3]:
        unet = with_hint(semantic_map.skeleton(stable_diffusion), None)
        experiments.adapt(unet, run)
        rows = {method: (layers, count) for method, layers, count in delora.summary(unet).rows}
        assert rows.pop("Full()") == (1, 1_086_480)
        ((layers, _),) = rows.values()
        assert layers == 128 + 16
        assert (run.train.epochs, run.train.precision) == (10, "bf16")
        assert (run.semantic_map.steps, run.semantic_map.guidance) == (50, 9.0)
        assert run.published is None  # which another segmenter measured


# ---------------------------------------------------------------- a small pipeline


def scenes(folder: Path, part: str, n: int) -> None:
    """Two halves of different classes and colours, a strip of pixels without a label."""
    draw = np.random.default_rng(len(part))
    for kind in ("images", "annotations", "controls"):
        (folder / part / kind).mkdir(parents=True, exist_ok=True)
    captions = []
    for i in range(n):
        labels = np.full((20, 24), 1 + i % CLASSES, dtype=np.uint8)
        labels[10:] = 1 + (i + 1) % CLASSES
        labels[:2] = 0
        colours = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255]], dtype=np.uint8)[labels]
        pixels = np.clip(colours * 0.6 + draw.normal(40, 20, colours.shape), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / part / "images" / f"{i:03d}.png")
        Image.fromarray(labels).save(folder / part / "annotations" / f"{i:03d}.png")
        Image.fromarray(colours).save(folder / part / "controls" / f"{i:03d}.png")
        captions.append({"name": f"{i:03d}", "caption": "a red dog on the beach"})
    (folder / part / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in captions))


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("maps")
    tiny_diffusion.save(folder / "pipe")
    torch.manual_seed(0)
    sizes = {
        "hidden_sizes": [8, 8],
        "depths": [1, 1],
        "num_attention_heads": [1, 1],
        "sr_ratios": [1, 1],
        "num_encoder_blocks": 2,
    }
    sizes |= {"patch_sizes": [3, 3], "strides": [2, 2], "mlp_ratios": [2, 2], "decoder_hidden_size": 8}
    SegformerForSemanticSegmentation(SegformerConfig(**sizes, num_labels=CLASSES)).save_pretrained(folder / "segmenter")
    SegformerImageProcessor(size={"height": SIZE, "width": SIZE}).save_pretrained(folder / "segmenter")
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ViTModel(ViTConfig(**small, image_size=16, patch_size=8), add_pooling_layer=False).save_pretrained(folder / "eyes")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder / "eyes")
    scenes(folder / "data", "training", 6)
    scenes(folder / "data", "validation", 4)
    return folder


def recipe(world: Path, out: Path, **changes: Any) -> dict[str, Any]:
    judges = {"segmenter": str(world / "segmenter"), "fid": str(world / "eyes"), "classes": CLASSES}
    data: dict[str, Any] = {
        "name": "tiny",
        "out": str(out),
        "model": str(world / "pipe"),
        "task": "semantic_map",
        "data": {"source": str(world / "data")},
        "semantic_map": {"resolution": SIZE, "steps": 2, "guidance": 2.0, "maps": 3, **judges},
        "adapter": {
            "method": "delora",
            "r": 2,
            "lam": 4.0,
            "targets": r".*attn[12]\.to_q|.*ff\.net\.0\.proj",
            "also_train": ["conv_in.encoder"],
        },
        "train": {"epochs": 1, "batch_size": 3, "lr": 1e-2, "schedule": "constant", "warmup": 0.0, "save_steps": 1},
    }
    for key, value in changes.items():
        data[key] = data[key] | value if isinstance(value, dict) else value
    return data


@pytest.fixture(scope="module")
def done(world, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "done"
    assert experiments.train(semantic_map, parse(recipe(world, out)), QUIET).agreement == {"adapter": 2}
    return out


def numbers(out: Path) -> dict[str, Any]:
    values = json.loads((out / "variants" / "tiny" / "result.json").read_text())
    return {key: value for key, value in values.items() if key != "seconds"}


def test_two_steps_from_end_to_end(world, done):
    result = numbers(done)
    assert set(result["scores"]) == {"miou", "accuracy", "miou real", "accuracy real", "fid"}
    assert (result["test"], result["reported"]) == (result["scores"]["miou"], "miou")
    pictures = done / "variants" / "tiny" / "pictures"
    assert sorted(p.name for p in pictures.iterdir()) == ["000.png", "001.png", "002.png"]
    assert len(list((done / "cache").glob("*.safetensors"))) == 6
    # The hint encoder has learned: its last layer, zero at the start, is so no more.
    pipe = semantic_map.adaptable(parse(recipe(world, done)))
    delora.load(pipe.unet, done / "adapter")
    delora.merge(pipe.unet)
    assert pipe.unet.conv_in.encoder.conv_out.weight.abs().max() > 0


def test_the_papers_ladder_with_small_parts(world, tmp_path):
    """Every rung with its own adapter and training, but for the number of epochs, on the small pipeline."""
    parts = {"segmenter": world / "segmenter", "fid": world / "eyes", "classes": CLASSES, "resolution": SIZE, "steps": 2}
    parts |= {"maps": 2, "scales": [SIZE, 2 * SIZE]}
    places = [f"out={tmp_path / 'out'}", f"model={world / 'pipe'}", f"data.source={world / 'data'}", "seeds=[0]"]
    changes = [*places, *(f"semantic_map.{key}={value}" for key, value in parts.items()), "train.epochs=1"]
    recipe = (ROOT / "paper/recipes/semantic_map/ladder.toml").read_text().replace("hint =", "# hint =")  # a new encoder
    (tmp_path / "ladder.toml").write_text(recipe)
    results = experiments.train(semantic_map, read(tmp_path / "ladder.toml", changes), QUIET).results
    assert len(results) == 6
    assert all(result.diverged is None and result.distance > 0 for result in results)


def test_a_run_that_was_stopped_ends_with_the_same_numbers(world, done, tmp_path):
    out = tmp_path / "again"
    shutil.copytree(done, out)
    run = out / "variants" / "tiny"
    for file in (out / "summary.json", run / "result.json", run / "pictures" / "001.png", next((out / "cache").iterdir())):
        file.unlink()
    shutil.rmtree(run / "checkpoints" / "checkpoint-2")
    experiments.train(semantic_map, parse(recipe(world, out)), QUIET)
    assert numbers(out) == numbers(done)


def test_evaluating_gives_the_runs_scores(world, done, tmp_path):
    shutil.copytree(done / "adapter", tmp_path / "adapter")
    scores, n = semantic_map.evaluate(parse(recipe(world, done)), tmp_path / "adapter")
    assert n == 3
    assert scores == pytest.approx(numbers(done)["scores"], abs=1e-6)


def test_the_hint_is_nothing_at_the_start_and_follows_the_map_later(world):
    pipe = generation.pipeline(str(world / "pipe"))
    draw = {"prompt": "a dog", "seed": 0, "count": 1, "steps": 2, "guidance": 2.0, "resolution": SIZE, "solver": "ddim"}
    before = np.array(generation.sample(pipe, **draw)[0])
    unet: Any = with_hint(pipe.unet, None)
    one, other = torch.zeros(1, 3, SIZE, SIZE), torch.ones(1, 3, SIZE, SIZE)
    unet.conv_in.control = one
    assert np.array_equal(np.array(generation.sample(pipe, **draw)[0]), before)
    torch.nn.init.normal_(unet.conv_in.encoder.conv_out.weight)
    seen: list[Any] = []
    calls: list[int] = []
    unet.conv_in.encoder.register_forward_hook(lambda *_: calls.append(len(seen)))
    for control in (one, other):
        unet.conv_in.control = control
        seen.append(np.array(generation.sample(pipe, **draw)[0]))
    assert not np.array_equal(*seen)
    assert calls == [0, 1]  # once for each map, not once for each step of the solver
    unet.conv_in.control = None
    assert np.array_equal(np.array(generation.sample(pipe, **draw)[0]), before)


def test_a_controlnets_encoder_is_taken_and_one_of_another_width_refused(tmp_path):
    torch.manual_seed(0)
    blocks = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "layers_per_block": 1, "norm_num_groups": 8}
    for width in (16, 32):
        net = ControlNetModel(block_out_channels=(width, 32), cross_attention_dim=32, attention_head_dim=8, **blocks)
        torch.nn.init.normal_(net.controlnet_cond_embedding.conv_out.weight)
        net.save_pretrained(tmp_path / str(width))
    unet: Any = with_hint(tiny_diffusion.pipeline().unet, str(tmp_path / "16"))
    expected = ControlNetModel.from_pretrained(tmp_path / "16").controlnet_cond_embedding.conv_out.weight
    assert torch.equal(unet.conv_in.encoder.conv_out.weight, expected)
    with pytest.raises(ConfigError, match="gives 32 channels, the U-Net has 16"):
        with_hint(tiny_diffusion.pipeline().unet, str(tmp_path / "32"))


# ---------------------------------------------------------------- scores


def test_overlap_by_hand():
    """Three classes, two pictures; the pixel without a label does not count, nor does a class that is nowhere."""
    overlap = Overlap(4)
    overlap.add(torch.tensor([[0, 0], [1, 2]]), torch.tensor([[0, 1], [1, UNLABELLED]]))
    overlap.add(torch.tensor([[0, 2], [2, 2]]), torch.tensor([[0, 2], [2, 0]]))
    # class 0: 2 of 4; class 1: 1 of 2; class 2: 2 of 3
    assert overlap.scores() == pytest.approx({"miou": (2 / 4 + 1 / 2 + 2 / 3) / 3, "accuracy": 5 / 7})


def test_overlap_against_torchmetrics():
    torch.manual_seed(0)
    overlap, peer = Overlap(5), MulticlassJaccardIndex(5, ignore_index=UNLABELLED)
    for _ in range(4):
        predicted, labels = torch.randint(0, 5, (1, 9, 7)), torch.randint(-1, 5, (1, 9, 7))
        overlap.add(predicted[0], labels[0])
        peer.update(predicted, labels)
    assert overlap.scores()["miou"] == pytest.approx(peer.compute().item(), rel=1e-6)


def test_a_segmenter_that_looks_at_several_scales(world):
    """The mean of its probabilities, by hand; at its processor's own size alone it is what it is without scales."""

    def segmenter(*scales: int) -> Segmenter:
        made = Segmenter(str(world / "segmenter"), torch.device("cpu"), scales)
        with torch.no_grad():  # sharp, so that the mean of probabilities is not that of logits
            made.model.decode_head.classifier.weight.mul_(100)
        return made

    noise = np.random.default_rng(0).integers(0, 255, (2 * SIZE, 2 * SIZE, 3)).astype(np.uint8)
    picture, size = Image.fromarray(noise), (2 * SIZE, 2 * SIZE)
    once, several = segmenter(), segmenter(SIZE, 3 * SIZE)
    assert torch.equal(segmenter(SIZE).labels(picture, size), once.labels(picture, size))
    total = torch.zeros(CLASSES, *size)
    for side in (SIZE, 3 * SIZE):
        small = picture.resize((side, side), Image.Resampling.BILINEAR)
        pixels = once.processor(small, return_tensors="pt", size={"height": side, "width": side})["pixel_values"]
        with torch.no_grad():
            logits = once.model(pixel_values=pixels).logits
        total += torch.nn.functional.interpolate(logits, size=size, mode="bilinear")[0].softmax(0)
    assert torch.equal(several.labels(picture, size), total.argmax(0))
    assert not torch.equal(several.labels(picture, size), once.labels(picture, size))


def test_frechet_against_its_closed_form():
    """Two Gaussians whose samples are made to have exactly these means and covariances; they do not commute."""
    torch.manual_seed(0)

    def sampled(mean: torch.Tensor, root: torch.Tensor) -> torch.Tensor:
        x = torch.randn(200, 3, dtype=torch.float64)
        x = x - x.mean(0)
        white = x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T
        return white @ root.T + mean

    roots = [torch.randn(3, 3, dtype=torch.float64) for _ in range(2)]
    means = [torch.zeros(3, dtype=torch.float64), torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64)]
    s1, s2 = (r @ r.T for r in roots)
    values, vectors = torch.linalg.eigh(s1)
    half = vectors @ values.sqrt().diag() @ vectors.T
    root = torch.linalg.eigvalsh(half @ s2 @ half).clamp_min(0).sqrt().sum()
    expected = (5 + s1.trace() + s2.trace() - 2 * root).item()
    a, b = (sampled(m, r) for m, r in zip(means, roots, strict=True))
    assert frechet(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet(a, a) == pytest.approx(0.0, abs=1e-6)
    with pytest.raises(ValueError, match="two pictures or more"):
        frechet(a[:1], b)


# ---------------------------------------------------------------- the data


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda d: shutil.rmtree(d / "validation"), r"validation does not hold images/, annotations/, .*ADEChallengeData2016"),
        (lambda d: (d / "training" / "controls" / "002.png").unlink(), r"002\.png has no .*controls"),
        (lambda d: (d / "validation" / "captions.jsonl").write_text('{"name": "000", "caption": "x"}\n'), "no caption for 001"),
        (lambda d: (d / "validation" / "captions.jsonl").write_text("no\n"), "line 1: expected name and caption, got 'no'"),
        (
            lambda d: Image.fromarray(np.full((4, 4), 9, dtype=np.uint8)).save(d / "validation" / "annotations" / "001.png"),
            "expected one channel of values from 0 to 3, found up to 9",
        ),
    ],
)
def test_data_that_are_not_what_they_should_be(world, tmp_path, damage, words):
    shutil.copytree(world / "data", tmp_path / "data")
    damage(tmp_path / "data")
    with pytest.raises(DataError, match=words):
        experiments.train(semantic_map, parse(recipe(world, tmp_path / "out", data={"source": str(tmp_path / "data")})), QUIET)
    assert not (tmp_path / "out").exists()


def test_labels_keep_their_values_when_they_are_resized(world):
    scene = maps.read(str(world / "data"), "validation")[0]
    assert set(semantic_map.annotation(scene, SIZE, CLASSES).unique().tolist()) == {UNLABELLED, 0, 1}
    seen = semantic_map.control(scene, SIZE)
    assert set(seen.unique().tolist()) == {0.0, 1.0}
