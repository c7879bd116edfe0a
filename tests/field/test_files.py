"""1o. Files: one of the two, whole, whoever saves, reads or is killed; every hostile file is refused in words, soon."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import delora
from delora import DeLoRA, Full, LoRA
from delora.evaluation.adapters import describe
from delora.formats import files
from delora.formats.files import AdapterError, leftovers, locked, printable, read_json, whole_folder, write_atomically
from delora.formats.native import JSON, description
from delora.updates import LowRank
from tests.cases import Net, ids, shake
from tests.field import campaign
from tests.field.campaign import in_a_process, judged, saves_for_ever, two_adapters, which
from tests.test_checkpoint import edit, refuses, rewrite, tensor_file


@pytest.fixture
def base():
    return Net().eval()


@pytest.fixture
def folder(base, tmp_path):
    """A saved adapter of `base`."""
    model = copy.deepcopy(base)
    delora.inject(model, DeLoRA(r=2), ["q", "v"], also_train=["classifier"], overrides={"v": {"r": 3, "lam": 2.0}})
    return delora.save(shake(model), tmp_path / "adapter")


@dataclass(frozen=True)
class Careless:
    """A method of one's own that does not check its fields."""

    scale: float = 1e300

    def init(self, W):
        return {"b": nn.Parameter(W.new_zeros(len(W), 1))}

    def update(self, W, p):
        return LowRank(p["b"], self.scale * p["b"].new_ones(1, 8))


def only_an_adapter(folder: Path) -> bool:
    return sorted(p.suffix for p in folder.iterdir()) == [".json", ".md", ".safetensors"]


def save_often(model: nn.Module, folder: Path) -> None:
    for _ in range(25):
        delora.save(model, folder)


# ---------------------------------------------------------------- several processes, and killed ones


@pytest.mark.parametrize("locks", ["the system's", "files"])
def test_of_two_processes_that_save_into_one_folder_one_adapter_is_left_whole(tmp_path, monkeypatch, locks):
    """With the system's locks, and with those of a system that has none."""
    if locks == "files":
        monkeypatch.setattr(files, "fcntl", None)
    base, models = two_adapters()
    x = ids()
    outputs = [model(x) for model in models]
    for _ in range(3):
        processes = [in_a_process(lambda model=model: save_often(model, tmp_path / "a")) for model in models]
        assert [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes] == [0, 0]
        assert which(base, outputs, x, tmp_path / "a") is not None
        assert only_an_adapter(tmp_path / "a")


def test_two_killed_savers_leave_one_adapter_whole_and_the_next_one_clears_up(tmp_path):
    seen = campaign.kills(30, tmp_path / "a")
    assert seen["whole"] == 30
    assert seen["files too many after the next save"] == 0
    assert seen["files that a killed process left"] > 0, "no kill came in the middle of a save: the test has nothing to tell"


def test_a_reader_beside_a_writer_gets_the_old_or_the_new(tmp_path):
    base, models = two_adapters()
    x = ids()
    outputs = [model(x) for model in models]
    delora.save(models[0], tmp_path)
    writer = in_a_process(lambda: saves_for_ever(models, tmp_path))
    try:
        numbers = [which(base, outputs, x, tmp_path) for _ in range(150)]
    finally:
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
    assert set(numbers) == {0, 1}


def test_a_lock_file_that_no_process_holds_is_taken_after_a_while(tmp_path, monkeypatch):
    """Where the system has no locks, the lock is a file, which a killed process leaves; its notes go to the next one."""
    monkeypatch.setattr(files, "fcntl", None)
    monkeypatch.setattr(files, "PATIENCE", 0.05)
    lock = tmp_path / ".lock"
    lock.write_bytes(b"what was done")
    words = r"another process has been saving .*: save into another folder, or delete .*\.lock"
    with pytest.raises(AdapterError, match=words), locked(lock):
        pass
    long_ago = time.time() - 2 * files.STALE
    os.utime(lock, (long_ago, long_ago))
    with locked(lock) as notes:
        assert notes.read() == b"what was done"
    assert not list(tmp_path.iterdir())


def test_temporary_files_are_removed_when_they_are_old(tmp_path):
    """That of a process killed alone, and those of several that wrote at a time."""
    file = tmp_path / "a.txt"
    for name, age in (("", 2 * files.STALE), (".0123", 2 * files.STALE), (".4567", 0.0)):
        left = tmp_path / f".a.txt{name}.tmp"
        left.touch()
        os.utime(left, (time.time() - age,) * 2)
    (tmp_path / ".a.txt.mine").touch()
    write_atomically(file, b"x")
    assert leftovers(file) == [tmp_path / ".a.txt.4567.tmp"]
    assert (tmp_path / ".a.txt.mine").exists()
    assert file.read_bytes() == b"x"


def test_a_file_is_written_in_the_same_number_of_steps_whatever_else_its_folder_holds(tmp_path, monkeypatch):
    """A data set's cache has a file for each picture: with a look at all others for each, 20,000 took twenty minutes."""
    looked = []
    monkeypatch.setattr(files, "_inside", lambda folder: looked.append(folder) or [])
    for number in range(3):
        write_atomically(tmp_path / f"{number}.txt", b"x")
    assert not looked
    assert len(list(tmp_path.iterdir())) == 3


def test_a_folder_that_a_killed_process_was_writing_goes_with_the_next_one(tmp_path):
    def write_for_ever() -> None:
        with whole_folder(tmp_path / "model") as new:
            (new / "weights").write_text("half")
            signal.pause()

    process = in_a_process(write_for_ever)
    while not list(tmp_path.glob(".partial-*/new/weights")):
        time.sleep(0.01)
    with whole_folder(tmp_path / "other"):
        assert list(tmp_path.glob(".partial-*/new/weights")), "a living process lost its folder"
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    with whole_folder(tmp_path / "model") as new:
        (new / "weights").write_text("all")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "other"]


def test_only_the_tensors_go_that_the_replaced_json_named(base, folder):
    """A file that looks like one of ours, and is named by no JSON of this folder, is not ours to delete."""
    others = [folder / f"adapter-{digit * 16}.safetensors" for digit in "0a"]
    for other in others:
        other.write_bytes(b"kept")
    before = tensor_file_of(folder)
    delora.save(shake(delora.load(base, folder)), folder)
    assert not before.exists()
    assert tensor_file_of(folder).exists()
    assert [other.read_bytes() for other in others] == [b"kept", b"kept"]


def tensor_file_of(folder: Path) -> Path:
    return folder / json.loads((folder / JSON).read_text())["tensors"]["file"]


def test_a_save_that_fails_leaves_what_was_there(base, folder, tmp_path):
    model = delora.load(copy.deepcopy(base), folder)
    x = ids()
    before, names = model(x), sorted(folder.iterdir())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / JSON).mkdir()  # nothing can take its place
    shake(model)
    with pytest.raises(OSError):
        delora.save(model, tmp_path / "full")
    model.q.base.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="q: its frozen weight holds NaN or infinity: nothing was written"):
        delora.save(model, folder)
    assert sorted(folder.iterdir()) == names
    assert torch.equal(delora.load(base, folder)(x), before)


# ---------------------------------------------------------------- the JSON


def test_every_bit_of_the_json_counts(base, folder):
    """One bit flipped: the JSON is refused, or says the same."""
    raw, said = (folder / JSON).read_bytes(), description(folder / JSON)
    draw = random.Random(0)
    for bit in draw.sample(range(8 * len(raw)), 600):
        new = bytearray(raw)
        new[bit // 8] ^= 1 << bit % 8
        (folder / JSON).write_bytes(new)
        try:
            assert description(folder / JSON) == said
        except AdapterError:
            continue
    (folder / JSON).write_bytes(raw)
    delora.load(base, folder)


def test_a_json_that_was_changed_by_hand_is_refused(base, folder):
    data = json.loads((folder / JSON).read_text())
    data["layers"]["q"]["strength"] = 0.5
    (folder / JSON).write_text(json.dumps(data))
    refuses(base, folder, "does not hold what its checksum was made of: it is damaged or was changed")
    del data["checksum"]
    (folder / JSON).write_text(json.dumps(data))
    refuses(base, folder, "'checksum' is missing")


def test_the_checksum_is_that_of_the_document(folder):
    """As docs/files.md says it, for other programs."""
    data = json.loads((folder / JSON).read_text())
    checksum = data.pop("checksum")
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    assert checksum == hashlib.sha256(text.encode("ascii")).hexdigest()


UNKNOWN = [(), ("layers", "q"), ("layers", "q", "base"), ("layers", "q", "report"), ("also_train", "classifier")]
UNKNOWN += [("tensors",), ("versions",)]


@pytest.mark.parametrize("schema", [1, 2])
@pytest.mark.parametrize("path", UNKNOWN, ids=".".join)
def test_an_unknown_key_is_an_error(base, folder, path, schema):
    def add(data):
        data["schema"] = schema
        if schema == 1:
            del data["checksum"]
        for key in path:
            data = data[key]
        data["strenght"] = 0.5

    edit(folder, add)
    refuses(base, folder, "unknown key 'strenght': known are .*; it is damaged, or a newer delora wrote it")


def test_files_of_schema_1_are_read(tmp_path):
    """Written by hand, as version 0.1.0 wrote them."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    model[0].weight.data = torch.eye(2)
    A, B = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.5], [0.25]])
    save_file({"0.A": A, "0.B": B}, tmp_path / "a")
    raw = (tmp_path / "a").read_bytes()
    digest = hashlib.sha256(raw).hexdigest()
    (tmp_path / "a").rename(tmp_path / f"adapter-{digest[:16]}.safetensors")
    text = f"""{{
     "format": "delora", "schema": 1, "method": "lora", "fields": {{"r": 1, "alpha": 2.0, "rslora": false}},
     "layers": {{"0": {{"shape": [2, 2], "base": {{"dtype": "float32", "norm": {2**0.5}, "probe": 0.0762446}},
                        "report": {{"distance": 1.25}}}}}},
     "also_train": {{}}, "base_model": null, "tensors": {{"file": "adapter-{digest[:16]}.safetensors",
     "bytes": {len(raw)}, "sha256": "{digest}"}}, "versions": {{"delora": "0.1.0", "torch": "2.13.0"}}}}"""
    (tmp_path / JSON).write_text(text)
    assert describe(tmp_path).rows[0][1] == "2 x 2"
    assert torch.equal(delora.load(model, tmp_path)(torch.eye(2)), torch.eye(2) + 2 * (B @ A).T)
    delora.save(model, tmp_path)
    assert json.loads((tmp_path / JSON).read_text())["schema"] == 2
    assert only_an_adapter(tmp_path)


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("value", [1e300, -1e300, 1e39])
def test_numbers_that_the_adapter_cannot_hold_are_refused(base, folder, value):
    rewrite(folder, lambda t: t.update({"q.A": torch.full((2, 8), value, dtype=torch.float64)}))
    refuses(base, folder, r"q\.A holds numbers that torch.float32 cannot hold")


def test_whole_numbers_that_a_buffer_cannot_hold_are_refused(tmp_path):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(1, dtype=torch.int32))
            self.linear = nn.Linear(2, 2)

        def forward(self, x):
            return self.linear(x)

    model = nn.Sequential(Counting())
    delora.save(delora.inject(copy.deepcopy(model), Full(), ["0"]), tmp_path)
    rewrite(tmp_path, lambda t: t.update({"0.count": torch.tensor([2**40])}))
    refuses(model, tmp_path, r"0\.count holds numbers that torch.int32 cannot hold")


def test_a_float64_file_that_fits_is_read(base, folder):
    x = ids()
    expected = delora.load(copy.deepcopy(base), folder)(x)
    rewrite(folder, lambda t: t.update({key: value.double() for key, value in t.items()}))
    assert torch.equal(delora.load(base, folder)(x), expected)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "uint16", "complex64"])
def test_dtypes_that_no_adapter_has_are_refused_by_name(base, folder, dtype):
    rewrite(folder, lambda t: t.update({"q.A": torch.zeros(2, 8).to(getattr(torch, dtype))}))
    refuses(base, folder, r"'q\.A' is of the dtype '[A-Z0-9_]+': F64, F32, F16, BF16, .* are read")


@pytest.mark.parametrize("lam", [1e30, 3e38])
def test_a_report_never_blocks_a_save(base, tmp_path, lam):
    model = delora.inject(copy.deepcopy(base), DeLoRA(r=2, lam=lam, start="soft"), ["q"])
    delora.save(shake(model, 1e-3), tmp_path)
    loaded = delora.load(base, tmp_path)
    for name, tensor in model.q.adapter.saved().items():
        assert torch.equal(tensor, loaded.q.adapter.saved()[name])
    assert describe(tmp_path).rows[0][1] == "8 x 8"


def test_a_report_that_cannot_be_computed_is_left_out(base, tmp_path):
    model = delora.inject(copy.deepcopy(base), LoRA(r=2), ["q"])
    for t in model.q.adapter.tensors().values():
        t.data.fill_(1e30)  # the product overflows: no singular values
    delora.save(model, tmp_path)
    report = json.loads((tmp_path / JSON).read_text())["layers"]["q"]["report"]
    assert all(abs(value) < float("inf") for value in report.values())
    delora.load(base, tmp_path)


def test_hyperparameters_beyond_float32_are_refused_when_given_saved_and_read(base, folder, tmp_path):
    with pytest.raises(ValueError, match=r"alpha = 1e\+300 is beyond float32's numbers"):
        LoRA(r=2, alpha=1e300)
    model = delora.inject(copy.deepcopy(base), Careless(), ["q"])
    with pytest.raises(ValueError, match=r"q: scale = 1e\+300 is beyond float32's numbers: nothing was written"):
        delora.save(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    edit(folder, lambda d: d["fields"].update(lam=1e39))
    refuses(base, folder, r"lam = 1e\+39 is beyond float32's numbers")


# ---------------------------------------------------------------- hostile files


def raw_edit(folder: Path, old: str, new: str) -> None:
    """Text in the place of a value, in a file of schema 1, which has no checksum."""
    data = json.loads((folder / JSON).read_text())
    data["schema"] = 1
    del data["checksum"]
    text = json.dumps(data)
    assert old in text
    (folder / JSON).write_text(text.replace(old, new, 1))


HOSTILE = {
    "a number of 400 digits": ('"r": 2', '"r": ' + "9" * 400),
    "a number of 5,000 digits": ('"r": 2', '"r": ' + "9" * 5000),
    "a strength of 10^400": ('"shape": [8, 8]', '"shape": [8, 8], "strength": 1' + "0" * 400),
    "a float beyond all": ('"lam": 8.0', '"lam": 1e999'),
    "a list for a method": ('"method": "delora"', '"method": []'),
    "a list for a layer's method": ('"shape": [8, 8]', '"shape": [8, 8], "method": [], "fields": {}'),
    "brackets in brackets": ('"r": 2', '"r": ' + "[" * 900 + "]" * 900),
    "many brackets in brackets": ('"r": 2', '"r": ' + "[" * 100_000 + "]" * 100_000),
    "a rank with no place": ('"r": 2', '"r": 1000000000000000000'),
    "a rank with almost no place": ('"r": 2', '"r": 1000000000000'),
    "one key twice": ('"r": 2', '"r": 2, "r": 2'),
    "a name with 100,000 dots": ('"v":', '"' + ".".join("v" * 100_000) + '":'),
    "a long name": ('"v":', '"' + "v" * 1_000_000 + '":'),
    "a dtype that is a module": ('"dtype": "float32"', '"dtype": "_inductor"'),
    "a shape of shapes": ('"shape": [8, 8]', '"shape": [[8], 8]'),
    "a million objects": ('"r": 2', '"r": [' + "{}," * 1_000_000 + "{}]"),
    "ten million numbers": ('"r": 2', '"r": [' + "1," * 10_000_000 + "1]"),
    "twenty thousand layers": ('"v":', "".join(f'"v{i}": {{"shape": []}}, ' for i in range(20_000)) + '"v":'),
    "a lone surrogate": ('"v":', '"\\ud800":'),
    "fields that are no fields": ('"r": 2', '"self": 2'),
    "an unhashable field": ('"start": "subtract"', '"start": {}'),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_json_is_refused_in_words_within_a_second(base, folder, case):
    raw_edit(folder, *HOSTILE[case])
    assert judged(base, folder) in ("refused", "read")
    with pytest.raises(AdapterError) as caught:
        delora.load(base, folder)
    assert len(str(caught.value)) < 5000
    assert str(caught.value).isprintable()


def header(folder: Path, text: bytes) -> None:
    """A tensor file with this header, for which the JSON vouches."""
    file = tensor_file(folder)
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    raw = file.read_bytes()
    edit(folder, lambda d: d["tensors"].update(bytes=len(raw), sha256=hashlib.sha256(raw).hexdigest()))


EMPTY = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{" + ",".join(f'"q.{i}":{EMPTY}' for i in range(400_000)) + "}", "holds more tensors than are read"),
        ('{"q.A":' + "[" * 100_000 + "]" * 100_000 + "}", "is not a whole safetensors file"),
        (f'{{"{".".join("q" * 100_000)}":{EMPTY}}}', r"more than 1,024 in 64 parts are not read"),
        ('{"q.A":{"dtype":"F4","shape":[2,8],"data_offsets":[0,8]}}', "'q.A' is of the dtype 'F4'"),
        ('{"q.A":{"dtype":[],"shape":[2,8],"data_offsets":[0,8]}}', "'dtype' must be str"),
        ('{"q.A":{"dtype":"F32","shape":[-2,8],"data_offsets":[0,8]}}', r"has the shape \[-2, 8\]"),
        (f'{{"q.A":{EMPTY},"q.A":{EMPTY}}}', "holds the key 'q.A' twice"),
        ("[]", "its header is no object"),
    ],
    ids=range(8),
)
def test_a_hostile_header_is_refused_in_words_within_a_second(base, folder, text, words):
    header(folder, text.encode())
    assert judged(base, folder) == "refused"
    refuses(base, folder, words)


def test_a_header_that_is_larger_than_any_is_not_read(base, folder):
    with tensor_file(folder).open("r+b") as file:
        file.write((2**27).to_bytes(8, "little"))
        file.truncate(2**27 + 8)  # sparse: takes no space
    with pytest.raises(AdapterError, match=r"its header would have 134,217,728 bytes, more than 50,331,648 are not read"):
        files.TensorFile(tensor_file(folder))


def test_two_names_of_one_module_are_refused(base, folder):
    base.other = base.q

    def twice(data):
        data["layers"]["other"] = data["layers"]["q"]

    edit(folder, twice)
    refuses(base, folder, "'q' and 'other' are one and the same module of this Net")


def test_a_layer_inside_a_module_that_is_trained_whole_is_refused(base, folder):
    edit(folder, lambda d: d["layers"].update({"classifier.0": d["layers"]["q"]}))
    refuses(base, folder, "'classifier.0' lies inside 'classifier', which is trained whole")


def test_special_files_are_not_opened(base, folder):
    """A pipe would never end."""
    os.mkfifo(folder / "pipe")
    tensor_file(folder).unlink()
    os.rename(folder / "pipe", tensor_file_of(folder))
    refuses(base, folder, "is no file")
    (folder / JSON).unlink()
    os.mkfifo(folder / JSON)
    refuses(base, folder, "holds no adapter")


def test_mutated_folders_are_refused_in_words_or_read(tmp_path):
    outcome = campaign.mutants(300, tmp_path, seed=1)
    assert set(outcome) <= {"read", "refused"}, outcome
    assert outcome["refused"] > 200


def test_no_control_character_is_in_an_error(base, folder):
    edit(folder, lambda d: d["layers"].update({"\x1b]0;x\x07\n": d["layers"].pop("q")}))
    with pytest.raises(AdapterError) as caught:
        delora.load(base, folder)
    assert "\x1b" not in str(caught.value)
    assert r"\x1b]0;x\x07" in str(caught.value)
    with pytest.raises(AdapterError, match=r"there is no folder no\\x1b\[2J"):
        delora.load(base, "no\x1b[2J")


def test_what_is_printable_stays_and_all_else_is_escaped():
    every = "".join(map(chr, range(0x3000)))
    shown = printable(every)
    assert shown.replace("\n", "").isprintable()
    assert printable(shown) == shown
    assert printable("Größe ∑ 層\n") == "Größe ∑ 層\n"


def test_a_json_that_cannot_be_read_is_told(tmp_path):
    with pytest.raises(AdapterError, match=r"no\.json cannot be read: No such file or directory"):
        read_json(tmp_path / "no.json")


# ---------------------------------------------------------------- names


class Inside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.module = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.module(torch.tanh(self.a(x)))


@pytest.mark.parametrize("wrapped", ["the saved", "the read", "both"])
@pytest.mark.parametrize("how", ["compile", "checkpoint"])
def test_wrappers_inside_a_module_that_is_trained_whole_have_no_part_in_names(tmp_path, wrapped, how):
    def wrap(model: nn.Module) -> None:
        inner = model.head.a
        model.head.a = checkpoint_wrapper(inner) if how == "checkpoint" else torch.compile(inner, backend="eager")

    model = nn.ModuleDict({"head": Inside()})
    other = copy.deepcopy(model)
    if wrapped != "the read":
        wrap(model)
    if wrapped != "the saved":
        wrap(other)
    shake(delora.inject(model, Full(), ["head"]))
    delora.save(model, tmp_path)
    names = {"head.a.weight", "head.a.bias", "head.module.weight", "head.module.bias"}
    assert set(load_file(tensor_file(tmp_path))) == names
    delora.load(other, tmp_path)
    x = torch.randn(3, 4)
    torch.testing.assert_close(other["head"](x), model["head"](x))


def test_a_model_with_a_child_called_module_keeps_its_name(tmp_path):
    model = nn.ModuleDict({"module": nn.ModuleDict({"q": nn.Linear(4, 4)}), "q": nn.Linear(4, 4)})
    other = copy.deepcopy(model)
    delora.save(shake(delora.inject(model, LoRA(r=2), ["module.q"])), tmp_path)
    delora.load(other, tmp_path)
    assert [name for name, m in other.named_modules() if isinstance(m, delora.Adapted)] == ["module.q"]


@pytest.mark.parametrize("kind", ["adapter", "whole"])
def test_a_resized_vocabulary_is_told_with_both_sizes(tmp_path, kind):
    method = LoRA(r=2) if kind == "adapter" else Full()
    delora.save(delora.inject(Net(), method, ["emb"]), tmp_path)
    other = Net()
    other.emb = nn.Embedding(23, 8)
    words = r"the vocabulary was resized: emb has 23 rows in this model, the adapter was made for 20; load it after "
    refuses(other, tmp_path, words + r"model\.resize_token_embeddings\(20\)")


def test_what_could_not_be_read_is_not_written(base, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_CONTAINERS", 10)
    model = delora.inject(base, LoRA(r=2), ["q", "v"])
    with pytest.raises(
        ValueError, match="2 layers are more than a folder can hold: .* objects and lists; 10 are read; nothing was"
    ):
        delora.save(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()
