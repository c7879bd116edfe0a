"""Clothes and what is computed from them: the files, the looks, the captions, the subjects, the scenes."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from delora.data import dreambooth, maps
from delora.data.examples import DataError
from delora.evaluation import generation
from delora.evaluation.images import Words
from delora.evaluation.segmentation import Segmenter
from delora.tasks import semantic_map, subject
from paper.standins import fashion
from paper.standins import text_to_image as recipe
from paper.standins.fashion import ATTRIBUTES, CLASSES, SIZE, WORDS, Looks
from tests.paper.clothes import needed


def idx(values: torch.Tensor) -> bytes:
    head = bytes([0, 0, 8, values.ndim]) + b"".join(n.to_bytes(4, "big") for n in values.shape)
    return head + values.numpy().tobytes()


def files(folder: Path, items: torch.Tensor, labels: torch.Tensor) -> Path:
    for stem in ("train", "t10k"):
        (folder / f"{stem}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(items)))
        (folder / f"{stem}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    return folder


@pytest.fixture
def made(tmp_path) -> Path:
    torch.manual_seed(0)
    items = torch.randint(256, (5, 28, 28), dtype=torch.uint8)
    return files(tmp_path, items, torch.arange(5, dtype=torch.uint8))


def test_the_files_are_read_as_they_were_written(made):
    clothes = fashion.read("test", made)
    torch.manual_seed(0)
    assert torch.equal((clothes.items * 255).round().byte(), torch.randint(256, (5, 28, 28), dtype=torch.uint8))
    assert clothes.labels.tolist() == [0, 1, 2, 3, 4]


def test_files_that_are_not_what_they_should_be(made, tmp_path):
    file = made / "t10k-images-idx3-ubyte.gz"
    whole = gzip.decompress(file.read_bytes())
    for damaged, words in (
        (gzip.compress(whole[:-1]), "is not an IDX file of bytes in 3 dimensions, or is damaged"),
        (gzip.compress(b""), "is not an IDX file"),
        (gzip.compress(whole)[:-20], "cannot be read"),
        (b"no", "cannot be read"),
        (gzip.compress(idx(torch.zeros(4, 28, 28, dtype=torch.uint8))), "4, 28, 28.* 5 labels"),
    ):
        file.write_bytes(damaged)
        fashion.read.cache_clear()
        with pytest.raises(DataError, match=words):
            fashion.read("test", made)
    fashion.read.cache_clear()
    files(made, torch.zeros(1, 28, 28, dtype=torch.uint8), torch.tensor([10], dtype=torch.uint8))
    with pytest.raises(DataError, match="labels up to 10"):
        fashion.read("test", made)


def box(width: int, height: int) -> torch.Tensor:
    item = torch.zeros(1, 28, 28)
    item[0, 14 - height // 2 : 14 + height // 2, 14 - width // 2 : 14 + width // 2] = 0.5
    return item


def looks(scale=1.0, stretch=1.0, gamma=1.0, shift=(0.0, 0.0)) -> Looks:
    return Looks(*(torch.tensor([x]) for x in (scale, stretch, gamma)), torch.tensor([shift]))


def test_looks_do_what_they_say():
    """Of a grey box: its side follows the scale, its shape the stretch, its brightness the power, its place the shift."""
    measured = {key: value.item() for key, value in fashion.measures(fashion.placed(box(20, 20), looks())).items()}
    assert measured == pytest.approx({"small": 20, "dark": 0.5, "narrow": 1.0}, abs=0.02)

    def measured_of(**changed):
        return {key: value.item() for key, value in fashion.measures(fashion.placed(box(20, 20), looks(**changed))).items()}

    assert measured_of(scale=0.6)["small"] == pytest.approx(12, abs=1)  # to a pixel
    assert measured_of(stretch=1.44)["narrow"] == pytest.approx(1.44, rel=0.12)
    assert measured_of(gamma=2.0)["dark"] == pytest.approx(0.25, abs=0.02)
    moved = fashion.placed(box(8, 8), looks(shift=(5.0, -3.0)))[0]
    there = fashion.placed(box(8, 8), looks())[0]
    torch.testing.assert_close(moved, there.roll((-3, 5), (0, 1)), atol=1e-5, rtol=0)


def test_what_does_not_fit_is_made_smaller():
    picture = fashion.placed(box(28, 28), looks(scale=1.08, stretch=1.7))
    assert fashion.measures(picture)["small"].item() == SIZE
    assert fashion.measures(picture)["narrow"].item() == pytest.approx(1.7, rel=0.1)


def test_attributes_are_those_of_the_picture():
    pictures = torch.cat([fashion.placed(box(28, 14), looks()), fashion.placed(box(10, 20), looks(gamma=3.0, scale=0.7))])
    assert fashion.attributes(pictures).tolist() == [[1, -1, 1], [0, 0, 0]]  # large and wide; small, dark and narrow
    truth = fashion.present(pictures, torch.tensor([9, 0]))
    true = [{WORDS[i] for i in row.nonzero().flatten().tolist()} for row in truth]
    assert true == [{"boot", "large", "wide"}, {"top", "small", "dark", "narrow"}]
    assert fashion.attributes(torch.zeros(1, SIZE, SIZE)).tolist() == [[0, 0, 0]]  # nothing is there: no error


def test_captions_say_only_what_is_true():
    generator = torch.Generator().manual_seed(0)
    attribute = [0, -1, 1]
    allowed = {"a", "photo", "of", "small", "wide", "bag"}
    strange, used = 0, set()
    for _ in range(300):
        words = fashion.caption(CLASSES.index("bag"), attribute, generator).split()
        assert words[:3] == ["a", "photo", "of"]
        assert words[-1] == "bag"
        other = [word for word in words if word not in allowed]
        assert all(len(word) == 3 and word not in WORDS for word in other)
        strange, used = strange + len(other), used | set(words)
    assert 10 <= strange <= 55  # 30 are expected; four deviations
    assert {"small", "wide"} <= used


def test_patterns_are_different_and_unknown_ones_refused():
    made = [fashion.pattern(kind) for kind in fashion.PATTERNS]
    assert len({p.numpy().tobytes() for p in made}) == len(made)
    assert all(p.shape == (SIZE, SIZE) and 0 < p.min() < p.max() == 1 for p in made)
    with pytest.raises(ValueError, match="no pattern 'stars'; known are stripes"):
        fashion.pattern("stars")


# ---------------------------------------------------------------- the real pictures


@needed
def test_the_real_pictures():
    for part, count in (("train", 60_000), ("test", 10_000)):
        clothes = fashion.read(part)
        assert clothes.items.shape == (count, 28, 28)
        assert clothes.labels.bincount().tolist() == [count // 10] * 10


@needed
def test_every_attribute_is_common_among_the_looks():
    clothes = fashion.read("test")
    pictures = fashion.placed(clothes.items[:2000], Looks.draw(2000, torch.Generator().manual_seed(0)))
    for values in fashion.attributes(pictures).T:
        assert min((values == v).float().mean().item() for v in (0, 1, -1)) > 0.1


@needed
def test_subjects_are_in_dreambooths_form():
    by_name = {s.name: s for s in dreambooth.read(str(fashion.subjects()))}
    assert set(by_name) == set(fashion.SUBJECTS)
    assert set(fashion.CHOOSING) < set(by_name)
    for name, learned in by_name.items():
        assert (learned.word, len(learned.images)) == (fashion.SUBJECTS[name][0], fashion.VIEWS)
        assert learned.prompts == fashion.PROMPTS
        assert {word for prompt in learned.prompts for word in prompt.split()} >= {w for pair in ATTRIBUTES for w in pair}
        assert dreambooth.open_image(learned.images[0]).size == (SIZE, SIZE)


@needed
def test_new_views_are_the_same_garment_seen_anew():
    """Each is nearer to one of its own subject's photographs than to any of another subject's of another class."""
    folder = fashion.new_views()
    photographs = {
        s.name: [subject.rgb(dreambooth.open_image(f)) for f in s.images] for s in dreambooth.read(str(fashion.subjects()))
    }
    right = total = 0
    for name in photographs:
        files = sorted((folder / name).glob("*.png"))
        assert len(files) == fashion.NEW_VIEWS
        for view in (subject.rgb(dreambooth.open_image(file)) for file in files):
            assert not any(torch.equal(view, seen) for seen in photographs[name])
            near = {other: min((view - seen).square().mean().item() for seen in seen_) for other, seen_ in photographs.items()}
            right, total = right + (min(near, key=near.get) == name), total + 1
    assert right / total > 0.5  # one in six by chance


@needed
def test_scenes_have_the_labels_of_their_pictures():
    scenes = maps.read(str(fashion.scenes()), "validation")
    assert [len(maps.read(str(fashion.scenes()), part)) for part in maps.PARTS] == list(fashion.SCENES.values())
    for scene in scenes[:20]:
        picture = subject.rgb(dreambooth.open_image(scene.image)).mean(0) / 255
        labels = semantic_map.annotation(scene, SIZE, len(fashion.PARTS))
        assert (labels == fashion.parts(picture[None])[0]).float().mean() > 0.99  # but for rounding to 256 levels
        torch.testing.assert_close(
            semantic_map.control(scene, SIZE).permute(1, 2, 0), fashion.COLOURS[labels], atol=1 / 255, rtol=0
        )
        assert scene.caption.rpartition(" ")[2] in CLASSES


# ---------------------------------------------------------------- the model that is pretrained on them

# a solver of diffusers calls numpy in an old way
drawing = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> Path:
    """Two steps of each part on 24 pictures: the code of the whole pretraining, not its quality."""
    folder = tmp_path_factory.mktemp("fashion")
    recipe.parts(folder, TINY)
    return folder


TINY = recipe.Plan(classifier=2, segmenter=2, autoencoder=2, diffusion=2, pictures=24, batch=4)


@pytest.mark.slow
@drawing
@needed
def test_pretraining_from_end_to_end(pretrained):
    pipe = generation.pipeline(str(pretrained))
    (picture,) = generation.sample(pipe, "a photo of a boot", 0, 1, 2, 2.0)
    assert picture.size == (SIZE, SIZE)
    assert Words(str(pretrained / "classifier"), torch.device("cpu")).known.keys() == set(WORDS)
    labels = Segmenter(str(pretrained / "segmenter"), torch.device("cpu")).labels(picture, (SIZE, SIZE))
    assert labels.shape == (SIZE, SIZE)
    assert labels.max() < len(fashion.PARTS)
    lines = [json.loads(line) for line in (pretrained / recipe.LOG).read_text().splitlines()]
    assert {line["part"] for line in lines} == {"autoencoder", "diffusion", "classifier", "segmenter"}


@pytest.mark.slow
@needed
def test_what_is_there_is_not_trained_again(pretrained):
    before = {p: p.read_bytes() for p in pretrained.rglob("*") if p.is_file()}
    recipe.parts(pretrained, TINY)
    assert {p: p.read_bytes() for p in pretrained.rglob("*") if p.is_file()} == before


@pytest.mark.slow
@drawing
@needed
def test_the_latents_have_unit_size_for_the_denoiser(pretrained):
    vae = generation.pipeline(str(pretrained)).vae
    clothes = fashion.read("train")
    few = fashion.Clothes(clothes.items[:24], clothes.labels[:24])
    mean, std, labels, attributes = recipe.latents(vae, few, recipe.POOL)
    assert labels.tolist() == clothes.labels[:24].tolist() * recipe.POOL
    assert attributes.shape == (24 * recipe.POOL, len(ATTRIBUTES))
    size = (mean.float().square() + std.float().square()).mean().sqrt() * vae.config.scaling_factor
    assert size.item() == pytest.approx(1, abs=0.01)  # of half-precision numbers


def test_a_word_that_no_caption_has_is_spelled():
    tokens = recipe.tokenizer()
    assert tokens.tokenize("a photo of a small qwe boot") == ["a", "photo", "of", "a", "small", "q", "##w", "##e", "boot"]
    assert "<unk>" not in tokens.tokenize("a photo of striped boots")
    ids = tokens("a photo of a boot", padding="max_length")["input_ids"]
    assert len(ids) == recipe.TOKENS
    assert (ids[0], set(ids[6:])) == (tokens.bos_token_id, {tokens.eos_token_id})
