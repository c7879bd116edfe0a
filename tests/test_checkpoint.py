"""Adapter files: whole or not at all, and never trusted."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import pickle
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import delora
from delora import DeLoRA, Full, LoRA
from delora.formats.files import AdapterError
from delora.formats.native import seal
from tests.cases import Net, ids, shake


@pytest.fixture
def base():
    return Net().eval()


@pytest.fixture
def folder(base, tmp_path):
    """A saved adapter of `base`."""
    model = copy.deepcopy(base)
    delora.inject(model, DeLoRA(r=2), ["q", "v"], also_train=["classifier"], overrides={"v": {"r": 3, "lam": 2.0}})
    return delora.save(shake(model), tmp_path / "adapter")


def tensor_file(folder: Path) -> Path:
    return next(folder.glob("*.safetensors"))


def edit(folder: Path, change) -> None:
    """Change the JSON as one who knows the format would: with a checksum that vouches for it."""
    data = json.loads((folder / "adapter.json").read_text())
    change(data)
    if data.get("schema") != 1:
        data["checksum"] = seal(data)
    (folder / "adapter.json").write_text(json.dumps(data))


def rewrite(folder: Path, change) -> None:
    """Change the tensors, with a JSON that vouches for them."""
    file = tensor_file(folder)
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    vouch(folder)


def vouch(folder: Path) -> None:
    data = tensor_file(folder).read_bytes()
    edit(folder, lambda d: d["tensors"].update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest()))


def refuses(base, folder, words, **kwargs):
    """Loading is an error in these words, and the model stays as it was."""
    before = {name: id(module) for name, module in base.named_modules()}
    with pytest.raises(AdapterError, match=words):
        delora.load(base, folder, **kwargs)
    assert {name: id(module) for name, module in base.named_modules()} == before
    assert all(p.requires_grad for p in base.parameters())


def test_what_is_in_the_json(folder):
    data = json.loads((folder / "adapter.json").read_text())
    assert data["schema"] == 2
    assert (data["method"], data["fields"]["lam"]) == ("delora", 8.0)
    assert data["layers"]["q"]["shape"] == [8, 8]
    assert data["layers"]["v"]["fields"] == {"r": 3, "lam": 2.0}
    assert list(data["also_train"]) == ["classifier"]
    assert 0 < data["layers"]["q"]["report"]["bound_used"] <= 1
    assert sorted(data["versions"]) == ["delora", "torch"]
    assert {p.name for p in folder.iterdir()} == {"adapter.json", data["tensors"]["file"], "README.md"}


def test_a_file_that_does_not_say_whether_lam_was_learned_is_of_one_that_was(base, folder):
    """So it was by default, when such files were written."""
    assert json.loads((folder / "adapter.json").read_text())["fields"]["learn_lam"] is False
    edit(folder, lambda d: d["fields"].pop("learn_lam"))
    delora.load(base, folder)
    assert base.q.adapter.method == DeLoRA(r=2, learn_lam=True)
    assert base.v.adapter.method == DeLoRA(r=3, lam=2.0, learn_lam=True)


def test_the_file_of_a_soft_adapter_is_as_small_as_a_loras(base, tmp_path):
    sizes = []
    for name, method in (("a", LoRA(r=4)), ("b", DeLoRA(r=4, start="soft"))):
        delora.inject(base, method, ["q", "v"], name=name)
        tensors = load_file(tensor_file(delora.save(base, tmp_path / name)))
        sizes.append(sum(t.numel() for t in tensors.values()))
    assert sizes[1] == sizes[0] + 2  # one lam for each layer


def test_loading_into_a_model_that_has_it_takes_the_values_over_in_place(base, folder):
    model = delora.load(copy.deepcopy(base), folder)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    x, before = ids(), model(ids())
    before = model(x)
    delora.strength(shake(model), 0.5)
    delora.load(model, folder)
    assert torch.equal(model(x), before)
    assert all(p is parameters[name] for name, p in model.named_parameters() if p.requires_grad)
    assert parameters


def test_what_is_loaded_is_the_active_one_whether_or_not_the_model_had_it(base, folder):
    model = delora.load(copy.deepcopy(base), folder, "a")
    x = ids()
    expected = model(x)
    delora.inject(model, LoRA(r=2), ["q"], name="b")
    delora.load(model, folder, "a")
    assert delora.models.active_adapter(model) == "a"
    assert torch.equal(model(x), expected)
    assert {p.requires_grad for a in delora.models.adapters(model, "b").values() for p in a.adapter.parameters()} == {False}


def test_loading_over_an_adapter_of_another_kind_is_refused(base, folder):
    delora.inject(base, LoRA(r=2), ["q"])
    x, before = ids(), None
    before = shake(base)(x)
    with pytest.raises(AdapterError, match="already has an adapter named 'default' with other layers or methods"):
        delora.load(base, folder)
    assert torch.equal(base(x), before)
    delora.load(base, folder, name="other")
    delora.activate(base, "default")
    assert torch.equal(base(x), before)


def test_loading_draws_no_random_numbers(base, folder):
    state = torch.get_rng_state()
    delora.load(base, folder)
    assert torch.equal(torch.get_rng_state(), state)


def test_saving_again_leaves_one_adapter_and_other_files_alone(base, folder):
    (folder / "notes.txt").write_text("mine")
    (folder / "adapter-mine.safetensors").write_text("mine too")
    model = shake(delora.load(base, folder))
    delora.save(model, folder)
    assert len(list(folder.glob("adapter-*.safetensors"))) == 2
    assert {p.name for p in folder.iterdir()} > {"notes.txt", "adapter-mine.safetensors", "adapter.json"}


def test_an_adapter_with_a_nan_is_not_written_over_a_good_one(base, folder):
    model = delora.load(copy.deepcopy(base), folder)
    model.q.adapter.A.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"q\.A holds NaN or infinity: nothing was written"):
        delora.save(model, folder)
    delora.load(base, folder)


class InHalves:
    """A file whose every write can be cut short."""

    def __init__(self, file, act):
        self.file, self.act = file, act

    def write(self, data):
        self.file.write(data[: len(data) // 2])
        self.file.flush()
        self.act()
        self.file.write(data[len(data) // 2 :])

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


def save_and_die(model, folder, at: int) -> None:
    """In a process of its own: save, and die at the given act on the disk. It never returns."""
    acts = 0

    def act():
        nonlocal acts
        acts += 1
        if acts == at:
            os._exit(9)

    def crashing(function):
        def wrapped(*args, **kwargs):
            act()
            return function(*args, **kwargs)

        return wrapped

    open_path = Path.open
    Path.open = lambda path, mode: InHalves(open_path(path, mode), act)  # only writing opens files this way
    os.fsync, os.replace, os.unlink = crashing(os.fsync), crashing(os.replace), crashing(os.unlink)
    try:
        delora.save(model, folder)
    finally:
        os._exit(0)


def test_a_crash_at_any_moment_leaves_the_old_adapter_or_the_new_one(base, tmp_path):
    """The process dies at its first, second, ... act on the disk, some in the middle of a write, until it gets through."""
    model = shake(delora.inject(copy.deepcopy(base), LoRA(r=2), ["q"]))
    x, old = ids(), None
    old = model(x)
    newer = shake(copy.deepcopy(model))
    new = newer(x)
    seen = []
    for at in range(1, 40):
        folder = delora.save(model, tmp_path / str(at))
        process = os.fork()
        if process == 0:
            save_and_die(newer, folder, at)
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        out = delora.load(copy.deepcopy(base), folder)(x)
        assert torch.equal(out, old) or torch.equal(out, new)
        seen.append("new" if torch.equal(out, new) else "old")
        delora.save(model, folder)
        assert sorted(p.suffix for p in folder.iterdir()) == [
            ".json",
            ".md",
            ".safetensors",
        ]  # nothing is left of the dead process
        if status == 0:
            break
        assert status == 9
    assert seen[0] == "old"
    assert seen[-1] == "new"
    assert len(seen) > 8


# ---------------------------------------------------------------- files that are not what they should be


def test_no_such_folder_and_no_adapter(base, tmp_path):
    refuses(base, tmp_path / "nowhere", "there is no folder .*nowhere")
    (tmp_path / "pytorch_model.bin").write_text("")
    refuses(
        base,
        tmp_path,
        r"holds no adapter: expected adapter.json \(delora\) or adapter_config.json \(PEFT\), found \['pytorch_model.bin'\]",
    )


def test_truncated_tensors(base, folder):
    file = tensor_file(folder)
    file.write_bytes(file.read_bytes()[:-100])
    refuses(base, folder, "bytes, adapter.json says .*: it is truncated or was changed")
    vouch(folder)
    refuses(base, folder, "is not a whole safetensors file")


def test_damaged_tensors(base, folder):
    file = tensor_file(folder)
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    refuses(base, folder, "does not hold the bytes that adapter.json describes")


def test_missing_tensors_file(base, folder):
    tensor_file(folder).unlink()
    refuses(base, folder, "adapter-.*safetensors is missing")


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_a_pickle_is_never_opened(base, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tensor_file(folder).write_bytes(pickle.dumps(Bomb()))
    vouch(folder)
    refuses(base, folder, "is not a whole safetensors file")
    peft = tmp_path / "peft"
    peft.mkdir()
    (peft / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
    (peft / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))
    refuses(base, peft, r"has no adapter_model.safetensors \(adapter_model.bin is a pickle and is never opened\)")
    assert not (tmp_path / "exploded").exists()


def test_a_header_that_claims_more_than_there_is(base, folder):
    header = json.dumps({"q.A": {"dtype": "F32", "shape": [2**40, 8], "data_offsets": [0, 2**45]}}).encode()
    tensor_file(folder).write_bytes(struct.pack("<Q", len(header)) + header)
    vouch(folder)
    refuses(base, folder, "is not a whole safetensors file")
    tensor_file(folder).write_bytes(struct.pack("<Q", 2**60) + b"{}")
    vouch(folder)
    refuses(base, folder, "is not a whole safetensors file")


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc/passwd", "adapter-0000000000000000.safetensors/../x", "adapter.json"]
)
def test_a_path_that_leads_elsewhere(base, folder, name):
    edit(folder, lambda d: d["tensors"].update(file=name))
    refuses(base, folder, "is not the name of an adapter's tensor file")


JSON_CASES = [
    (lambda d: d.update(schema=3), "has schema 3, this delora reads schemas 1 to 2: upgrade delora"),
    (lambda d: d.update(schema=0), "no version of delora wrote that"),
    (lambda d: d.update(schema="1"), "'schema' must be int, got '1'"),
    (lambda d: d.update(format="other"), "does not describe a delora adapter: its 'format' is 'other'"),
    (lambda d: d.update(method="delroa"), "unknown method 'delroa': known are bitfit, bottleneck, delora, "),
    (lambda d: d.update(method="os.system"), "unknown method 'os.system'"),
    (lambda d: d["fields"].update(lam=-1), "lam = -1: must be a finite number above 0"),
    (lambda d: d["fields"].update(lamda=1), "unexpected keyword argument 'lamda'"),
    (lambda d: d["fields"].update(start=["soft"]), "start = .* must be one of"),
    (lambda d: d["layers"]["v"]["fields"].update(rank=1), "DeLoRA has no field 'rank'"),
    (lambda d: d["layers"]["v"]["fields"].update(r="8"), "r = '8': the rank must be an integer"),
    (lambda d: d.pop("layers"), "'layers' is missing"),
    (lambda d: d.update(layers=[]), r"'layers' must be dict, got \[\]"),
    (lambda d: d.update(layers={}, also_train={}), "names no layer"),
    (lambda d: d["layers"].update(q=3), "'q': must be an object, got 3"),
    (lambda d: d["layers"]["q"].update(shape=[9, 8]), r"q is \[8, 8\] in this model, the adapter was made for \[9, 8\]"),
    (lambda d: d["layers"]["q"].update(strength=-1), "strength -1 is out of range"),
    (lambda d: d["layers"]["q"].update(dropout=2), "dropout 2 is out of range for DeLoRA"),
    (lambda d: d["layers"]["q"]["base"].update(dtype="nn"), "'nn' is not the dtype of a weight"),
    (lambda d: d["layers"]["q"]["base"].update(norm=None), "'norm' must be int or float, got None"),
    (lambda d: d["layers"].update(query=d["layers"].pop("q")), "1 of 3 layers are not in this Net, first 'query'"),
    (lambda d: d["tensors"].update(bytes=-1), "bytes, adapter.json says -1"),
    (lambda d: d["tensors"].pop("sha256"), "'sha256' is missing"),
]


@pytest.mark.parametrize(("change", "words"), JSON_CASES, ids=[words for _, words in JSON_CASES])
def test_a_changed_json(base, folder, change, words):
    edit(folder, change)
    refuses(base, folder, words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is not valid JSON"),
        ('{"format": "delora", "sch', "is not valid JSON"),
        ("[1]", "must hold a JSON object, not a list"),
        ('{"format": "delora", "schema": NaN}', "is not valid JSON .*it holds NaN"),
        ("[" * 100_000, "is not valid JSON"),
        ("\x00\xff", "is not valid JSON"),
    ],
)
def test_a_broken_json(base, folder, text, words):
    (folder / "adapter.json").write_text(text, encoding="latin-1")
    refuses(base, folder, words)


def test_an_oversized_json(base, folder, monkeypatch):
    with (folder / "adapter.json").open("r+b") as file:
        file.truncate(65 * 2**20)  # sparse: takes no space
    refuses(base, folder, "more than an adapter's description can have")


TENSOR_CASES = [
    (lambda t: t.pop("q.A"), r"the tensor q\.A is missing"),
    (lambda t: t.pop("classifier.0.bias"), r"the tensor classifier\.0\.bias is missing"),
    (lambda t: t.update({"q.C": torch.zeros(1)}), r"q has a tensor 'C' that DeLoRA\(.* does not know"),
    (lambda t: t.update({"zzz.A": torch.zeros(1)}), r"'zzz\.A' belongs to no layer"),
    (lambda t: t.update({"q.A": torch.zeros(3, 8)}), r"q\.A has shape \[3, 8\], expected \[2, 8\]"),
    (lambda t: t.update({"q.A": torch.zeros(8, 2)}), r"q\.A has shape \[8, 2\], expected \[2, 8\]"),
    (lambda t: t.update({"q.lam": torch.tensor([float("nan")])}), r"'q\.lam' holds NaN or infinity"),
    (lambda t: t.update({"q.B": torch.full((8, 2), float("inf"))}), r"'q\.B' holds NaN or infinity"),
    (lambda t: t.update({"q.B": torch.zeros(8, 2, dtype=torch.int64)}), r"q\.B is torch.int64, expected torch.float32"),
]


@pytest.mark.parametrize(("change", "words"), TENSOR_CASES, ids=[words for _, words in TENSOR_CASES])
def test_changed_tensors(base, folder, change, words):
    rewrite(folder, change)
    refuses(base, folder, words)


def test_a_model_without_the_layers(folder):
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.qq, self.v, self.classifier = nn.Linear(8, 8), nn.Linear(8, 12), nn.Linear(2, 2)

    refuses(Other(), folder, r"1 of 3 layers are not in this Other, first 'q' \(the nearest name is 'qq'\)")


# ---------------------------------------------------------------- the right base


def test_another_base_is_refused_unless_it_is_meant(base, folder):
    other = copy.deepcopy(base)
    other.q.weight.data[3, 4] += 0.01
    refuses(other, folder, "the weights of q are not those the adapter was trained on.*allow_other_base=True")
    delora.load(other, folder, allow_other_base=True)


@pytest.mark.parametrize(
    "change",
    [
        lambda W: -W,
        lambda W: W.flip(0),
        lambda W: W.T.contiguous(),
        lambda W: W * 1.001,
        lambda W: W + torch.randn_like(W) / 1e3,
    ],
)
def test_the_fingerprint_sees_signs_places_and_small_changes(base, folder, change):
    base.q.weight.data = change(base.q.weight.data)
    refuses(base, folder, "the weights of q are not those")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_same_base_in_another_dtype_is_the_same_base(base, folder, dtype):
    delora.load(base.to(dtype), folder)


def test_a_finetuned_base_in_another_dtype_is_another_base(base, folder):
    W = base.q.weight.data  # grown as well as changed: two numbers in bfloat16 do not see every change of a twentieth
    W += 0.05 * (W + W.std() * torch.randn_like(W))
    refuses(base.bfloat16(), folder, "the weights of q are not those")


def test_a_meta_model_cannot_be_checked(base, folder):
    with torch.device("meta"):
        model = Net()
    refuses(model, folder, "q is on the meta device: load the base model's weights before the adapter")


def test_a_head_alone_can_be_saved(base, tmp_path):
    x = ids()
    model = shake(delora.inject(copy.deepcopy(base), Full(), ["classifier"]))
    delora.save(model, tmp_path)
    assert torch.equal(delora.load(base, tmp_path)(x), model(x))
