"""The card beside an adapter: it says what the JSON says, no name is mark-up, it is never in the way, and users' words stay."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
import yaml
from torch import nn

import delora
from delora import DeLoRA, LoRA
from delora.formats import cards
from delora.formats.files import AdapterError
from tests.cases import Net, ids, shake

HOSTILE = "a|b `c` <script>alert(1)</script> ![x](http://y) \x1b[2J \n# no heading <!-- delora: to here --> ---"


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    model = delora.inject(Net(), DeLoRA(r=2), ["q", "v"], also_train=["classifier"], overrides={"v": {"r": 3}})
    return delora.save(shake(model), tmp_path / "adapter")


def read(folder):
    return (folder / "README.md").read_text("utf-8")


def front(text):
    assert text.startswith("---\n")
    return yaml.safe_load(text.split("---\n")[1])


def test_a_card_says_what_the_json_says(folder):
    said = json.loads((folder / "adapter.json").read_text())
    text = read(folder)
    for words in ("# A DeLoRA adapter", "r = 2, lam = 8", "Trained whole: classifier", "fields of their own: 1, such as v"):
        assert words in text
    assert said["tensors"]["file"] in text
    for layer in ("q", "v"):
        seen = said["layers"][layer]["report"]
        assert f"| {layer} | 1 | {seen['relative']:.3g} | {seen['relative']:.3g} | {seen['effective_rank']:.3g} |" in text
    assert text.count("Not told.") == 2
    assert front(text) == {"library_name": "delora", "tags": ["delora", "delora"]}


@pytest.mark.parametrize(
    ("base", "named", "shown"),
    [
        ("org/model-1.5", "org/model-1.5", "org/model-1.5"),
        ("/home/someone/models/mine", None, "mine"),
        ("C:\\models\\mine", None, "mine"),
        (HOSTILE, None, None),
    ],
)
def test_a_base_on_the_hub_is_named_and_of_a_folder_only_the_last_part(base, named, shown, tmp_path):
    model = Net()
    model.config = type("Config", (), {"_name_or_path": base})()
    text = read(delora.save(delora.inject(model, LoRA(2), ["q"]), tmp_path))
    assert front(text).get("base_model") == named
    assert shown is None or f"# A LoRA adapter of {shown}\n" in text
    assert "home" not in text
    assert f"from_pretrained({named or 'BASE'!r})" in text


def harmless(text):
    """Outside of what we write ourselves there is no mark-up: one pair of markers, our headings, our tables."""
    assert (text.count(cards.BEGIN), text.count(cards.END)) == (1, 1)
    assert "<script" not in text
    assert "\x1b" not in text
    assert "](" not in text.replace("\\](", "").replace("\\]", "")
    headings = [line for line in text.splitlines() if line.startswith("#") and line != cards.FRONT]
    assert all(line.startswith(("# A ", "## ")) for line in headings), headings
    for line in text.splitlines():
        if line.startswith("|") and "number" not in line:
            assert line.replace("\\|", "").count("|") in (3, 6), line


def test_no_name_is_mark_up(tmp_path):
    model = nn.Sequential()
    model.add_module("in", nn.Linear(4, 4))
    odd = HOSTILE.replace(".", "")
    model.add_module(odd, nn.Linear(4, 4))
    model.add_module(odd + "head", nn.Linear(4, 2))
    delora.inject(model, LoRA(2), ["in", odd], also_train=[odd + "head"], overrides={"script": {"r": 1}})
    model.config = type("Config", (), {"_name_or_path": HOSTILE})()
    delora.save(model, tmp_path)
    harmless(read(tmp_path))
    delora.card(tmp_path, data=HOSTILE, metrics={HOSTILE: 0.5}, repo="me/mine")
    harmless(read(tmp_path))
    assert "&lt;script&gt;" in read(tmp_path)


def test_what_users_write_around_the_generated_part_stays(folder):
    text = read(folder).replace('library_name: "delora"', 'library_name: "delora"\nlicense: mit')
    text = (
        text.replace(cards.BEGIN, f"My own words.\n\n{cards.BEGIN}").replace("# A DeLoRA adapter", "# Mine")
        + "\nAnd at the end.\n"
    )
    (folder / "README.md").write_text(text)
    model = delora.load(Net(), folder, allow_other_base=True)
    delora.save(shake(model), folder)
    new = read(folder)
    assert "My own words.\n\n<!-- delora" in new
    assert new.endswith("\nAnd at the end.\n")
    assert "# A DeLoRA adapter" in new  # inside of the markers all is written anew
    assert "license" not in front(new)
    kept = new.replace(cards.FRONT + "\n", "license: mit\n")
    (folder / "README.md").write_text(kept)
    delora.save(shake(model), folder)
    assert front(read(folder))["license"] == "mit"  # without its first line, the front matter is the user's


def test_a_readme_without_markers_is_the_users(folder):
    (folder / "README.md").write_text("Mine.")
    delora.save(delora.load(Net(), folder, allow_other_base=True), folder)
    assert read(folder) == "Mine."
    with pytest.raises(ValueError, match=r"has no parts of delora's: it is yours, and left alone"):
        delora.card(folder, data="x")
    assert read(folder) == "Mine."


def test_data_and_metrics_belong_to_one_state_of_the_weights(folder):
    delora.card(folder, data="Reviews of films", metrics={"accuracy": 0.853, "n": 1500})
    assert "Reviews of films" in read(folder)
    assert "| accuracy | 0.853 |\n| n | 1500 |" in read(folder)
    delora.save(delora.load(Net(), folder, allow_other_base=True), folder)
    assert read(folder).count("Not told.") == 2


@pytest.mark.parametrize("there", ["a folder", "no text", "too large", "cannot be replaced"])
def test_a_card_is_in_no_saves_way(there, folder):
    file = folder / "README.md"
    file.unlink()
    if there == "a folder":
        file.mkdir()
    elif there == "too large":
        file.write_text(cards.BEGIN + "x" * cards.MOST_BYTES + cards.END)
    else:
        file.write_bytes(b"\xff\xfe" + cards.BEGIN.encode() + cards.END.encode())
    model = shake(delora.load(Net(), folder, allow_other_base=True))
    x, before = ids(), sorted(p.name for p in folder.iterdir() if p.suffix != ".safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        delora.save(model, folder)
    again = delora.load(Net(), folder, allow_other_base=True)
    for layer in ("q", "v"):
        for key, t in model.get_submodule(layer).adapter.tensors().items():
            assert torch.equal(t, again.get_submodule(layer).adapter.tensors()[key]) or key == "c"
    assert sorted(p.name for p in folder.iterdir() if p.suffix != ".safetensors") == before
    assert model(x).shape == (4, 3)


def test_a_killed_savers_card_is_cleared_away(folder):
    (folder / ".README.md.0123456789abcdef.tmp").write_text("half")
    delora.save(delora.load(Net(), folder, allow_other_base=True), folder)
    assert sorted(p.suffix for p in folder.iterdir()) == [".json", ".md", ".safetensors"]


def test_a_card_of_what_is_no_adapter_is_refused(tmp_path):
    with pytest.raises(AdapterError, match=r"adapter\.json cannot be read"):
        delora.card(tmp_path)


def test_a_thousand_layers_make_a_short_card():
    layers = {f"h.{i}.part{i % 60}": {"shape": [4, 4], "report": {"relative": 0.1}} for i in range(1000)}
    text = cards.text({"method": "lora", "fields": {}, "layers": layers})
    assert "| and 20 more | | | | |" in text
    assert len(text) < 5000
