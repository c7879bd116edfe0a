"""2. Words: what a user, a file or a folder gets wrong is told as one message; no name moves the terminal."""

from __future__ import annotations

import json
import os
import pty
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

import delora
from delora.formats.files import printable
from delora.training.runs import RESULT
from tests import tiny
from tests.field.campaign import mutated_bytes, mutated_json
from tests.test_checkpoint import edit
from tests.test_cli import run
from tests.test_overview import make


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A model, data, and a recipe over both."""
    folder = tmp_path_factory.mktemp("words")
    data = tiny.recipe(tiny.make_model(folder / "model"), tiny.make_sentences(folder / "data"), folder / "out")
    tiny.write(data, folder / "recipe.json")
    return folder


IMPOSSIBLE = {
    "train.save_steps=4": (2, "train.save_steps = 4: this task keeps its best epoch .* leave save_steps out"),
    'adapter.overrides={"("={r=2}}': (2, r"overrides: '\(' is not a regular expression: missing \)"),
    'adapter.targets="("': (2, r"targets='\(' is not a regular expression"),
    "adapter.lam=1e39": (2, r"adapter\.lam = 1e\+39 is beyond float32's numbers"),
    'adapter.overrides={"query"={lam=1e39}}': (2, r"adapter\.overrides\.query\.lam = 1e\+39 is beyond float32's numbers"),
    "adapter.r=100000000000000000000": (2, r"adapter\.r = 100000000000000000000: must be below 2,147,483,648"),
    "seed=8589934592": (2, "seed = 8589934592: input should be less than 4294967296"),
    "seed=4294967295": (2, "seed = 4294967295: must be below 4,294,967,295"),
    "train.batch_size=100000000000000000000000": (2, r"train\.batch_size = 10+: must be below 2,147,483,648"),
    "train.accumulation=100000000000000000000000": (2, r"train\.accumulation = 10+: must be below"),
    "train.steps=100000000000000000000000": (2, r"train\.steps = 10+: must be below"),
    "data.max_tokens=100000000000000000000000": (2, r"data\.max_tokens = 10+: must be below"),
    "train.lr=1e300": (2, r"train\.lr = 1e\+300 is beyond float32's numbers"),
    "train.weight_decay=1e39": (2, r"train\.weight_decay = 1e\+39 is beyond float32's numbers"),
    'out="a\\u0000b"': (1, r"out = 'a\\x00b': no folder can have this name"),
    f'out="{"a" * 300}"': (1, "no folder can have this name: File name too long"),
    "out={file}/x": (1, "no folder can have this name: Not a directory"),
    "out=/": (1, "out = '/': a run needs a folder of its own"),
    'model="a\\u0000b"': (1, r"there is no model 'a\\x00b'"),
    'data.source="a\\u0000b"': (1, r"there is no a\\x00b/movieReview"),
}


@pytest.mark.parametrize("change", IMPOSSIBLE)
def test_an_impossible_recipe_is_told_by_its_key_and_nothing_is_written(world, tmp_path, change):
    code, words = IMPOSSIBLE[change]
    before = sorted(p for p in world.rglob("*") if not p.name.endswith(".lock"))
    changes = [change.replace("{file}", str(world / "recipe.json"))]
    got, printed, message = run("train", world / "recipe.json", f"out={tmp_path / 'out'}", *changes)
    message = printable(message)  # as the command prints it
    assert (got, bool(re.search(words, message))) == (code, True), message
    assert not printed
    assert not [p for p in tmp_path.iterdir() if not p.name.endswith(".lock")]
    assert sorted(p for p in world.rglob("*") if not p.name.endswith(".lock")) == before


def test_fresh_through_a_symbolic_link_starts_anew(world, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    command = ["train", world / "recipe.json", f"out={tmp_path / 'out'}", "train.epochs=1"]
    for more in ([], ["--fresh", "train.lr=0.02"]):
        code, _, message = run(*command, *more)
        assert code == 0, message
    assert json.loads((tmp_path / "disk" / "config.json").read_text())["train"]["lr"] == 0.02
    assert (tmp_path / "out").is_symlink()


# ---------------------------------------------------------------- what reaches a terminal

EVIL = "q\x1b]0;owned\x07\x1b[2J\r\n\x9b31m\u202ek"


@pytest.fixture
def evil(tmp_path) -> Path:
    """An adapter whose names, base model and hyperparameters are made to move a terminal."""
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.Linear(4, 4)})
    delora.inject(model, delora.LoRA(r=2), ["a", "b"], also_train=["c"])
    folder = delora.save(model, tmp_path / f"adapter{EVIL[:6]}")

    def rename(data):
        data["layers"][EVIL] = data["layers"].pop("a")
        data["also_train"][EVIL + "2"] = data["also_train"].pop("c")
        data["base_model"], data["method"] = EVIL, EVIL
        data["fields"] |= {"r": EVIL, EVIL: EVIL}

    edit(folder, rename)
    return folder


BETWEEN = b"-- the next command --"


def in_a_terminal(*commands: Sequence[object]) -> list[bytes]:
    """What each of some commands writes to a terminal, on both of its streams; all in one process."""
    ours, theirs = pty.openpty()
    code = (
        "import sys\nfrom contextlib import suppress\nfrom delora.cli import main\n"
        f"for command in {[list(map(str, command)) for command in commands]!r}:\n"
        " sys.argv = ['delora', *command]\n with suppress(SystemExit):\n  main()\n"
        f" print({BETWEEN.decode()!r}, flush=True)"
    )
    env = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200", "TERM": "xterm", "PYTHONIOENCODING": "utf-8"}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=theirs, stderr=theirs, env=env)
    os.close(theirs)
    written = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        written += piece
    process.wait()
    os.close(ours)
    return written.split(BETWEEN)[:-1]


COLOURS = re.compile(rb"\x1b\[[0-9;]*m")


def quiet(written: bytes) -> bool:
    """Whether nothing but text, line breaks and our own colours is in it."""
    text = COLOURS.sub(b"", written).decode("utf-8")
    return all(c.isprintable() or c in "\r\n" for c in text)


def test_no_control_character_of_a_name_reaches_the_terminal(world, evil):
    commands: list[list[object]] = [
        ["inspect", evil],
        ["evaluate", evil, "--recipe", world / "recipe.json"],
        ["merge", evil, "--model", world / "model", "--out", evil.parent / "x"],
        ["report", evil],
    ]
    written = in_a_terminal(*commands)
    for said in written:
        assert rb"\x1b" in said, said  # it is told, as text
        assert quiet(said), said
    assert len(written) == len(commands)


def test_a_recipe_with_such_names_is_run_and_shown_without_harm(world, tmp_path):
    data = json.loads((world / "recipe.json").read_text()) | {"name": EVIL, "out": str(tmp_path / "out")}
    recipe = tiny.write(data | {"variants": [{"name": EVIL}]}, tmp_path / "recipe.json")
    (written,) = in_a_terminal(["train", recipe, "train.epochs=1"])
    assert b"report.html" in written, written
    assert rb"\x1b" in written
    bare = re.sub(rb"\x1b\[(\?25[hl]|[12][AK])", b"", written)  # the bar itself moves the cursor
    assert quiet(bare), bare


def test_the_columns_of_a_table_stay_apart(evil):
    code, printed, _ = run("inspect", evil)
    assert code == 0
    rows = [line for line in printed.splitlines() if "4 x 4" in line]
    assert len(rows) == 2
    assert len({line.index("4 x 4") for line in rows}) == 1


# ---------------------------------------------------------------- damaged files of runs


def fails_in_words(*arguments: object) -> str:
    """A command that must not end in a traceback (`run` sees to that); its message, if it failed."""
    code, _, message = run(*arguments)
    assert code in (0, 1, 2)
    return message if code else ""


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("result.json", "{", "result.json is not valid JSON"),
        ("result.json", "[]", "result.json must hold a JSON object"),
        ("result.json", '{"name": 1}', "another version of delora"),
        ("result.json", '{"test": "high"}', r"result.json is damaged: test = 'high': Input should be a valid number"),
        ("result.json", '{"scores": {"a": []}}', r"result.json is damaged: scores.a = \[\]"),
        ("result.json", '{"seed": null}', "result.json is damaged: seed = None"),
        ("result.json", '{"task": "os"}', "result.json is damaged: it is of the task 'os', config.json of 'sentiment'"),
        ("config.json", "", "config.json is not valid JSON"),
        ("config.json", None, "config.json cannot be read: No such file or directory"),
        ("metrics.jsonl", '{"step": 1, "loss": ', "metrics.jsonl, line 1 is not valid JSON"),
        ("metrics.jsonl", '{"step": 1}\n{"loss": 1.0}', "metrics.jsonl, line 2: 'step' is missing; delete the file"),
        ("metrics.jsonl", '{"step": "x"}', "metrics.jsonl, line 1: 'step' must be int, got 'x'"),
        ("metrics.jsonl", '{"step": 1, "distance": {}}', "'distance' must be int or float, got {}"),
        ("metrics.jsonl", "7", "metrics.jsonl, line 1 must be an object, got 7"),
        ("metrics.jsonl", "\xff", "metrics.jsonl, line 1 is not valid JSON"),
    ],
)
def test_a_damaged_file_of_a_run_is_named(tmp_path, name, text, words):
    folder = make(tmp_path / "runs", 0.5) if (tmp_path / "runs").mkdir() is None else tmp_path
    file = folder / name
    if text is None:
        file.unlink()
    elif name == RESULT and text.startswith('{"') and text != '{"name": 1}':
        file.write_text(json.dumps(json.loads(file.read_text()) | json.loads(text)))
    else:
        file.write_text(text, encoding="latin-1")
    code, _, message = run("report", tmp_path / "runs", "--out", tmp_path / "page")
    assert code == 1
    assert re.search(words, message), message
    assert not (tmp_path / "page").exists()


def test_a_failure_that_gives_no_reason_is_named(tmp_path):
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "b").mkdir()
    make(tmp_path / "runs" / "a", 0.5)
    (tmp_path / "runs" / "b" / "failed.json").write_text("{}")
    assert "failed.json: 'error' is missing" in fails_in_words("report", tmp_path / "runs", "--out", tmp_path / "page")


def test_no_mutated_file_of_a_run_ends_in_a_traceback(tmp_path):
    (tmp_path / "runs").mkdir()
    make(tmp_path / "runs", 0.5)
    draw = random.Random(0)
    kept = {file: file.read_bytes() for file in (tmp_path / "runs").iterdir()}
    refused = 0
    for number in range(120):
        file = draw.choice(list(kept))
        if draw.random() < 0.5 or file.suffix == ".jsonl":
            file.write_bytes(mutated_bytes(kept[file], draw))
        else:
            file.write_text(mutated_json(json.loads(kept[file]), draw), encoding="utf-8", errors="surrogatepass")
        refused += bool(fails_in_words("report", tmp_path / "runs", "--out", tmp_path / f"page-{number}"))
        file.write_bytes(kept[file])
        shutil.rmtree(tmp_path / f"page-{number}", ignore_errors=True)
    assert refused > 60


@pytest.mark.slow
def test_a_damaged_experiment_is_named_when_it_is_run_again(world, tmp_path):
    out = tmp_path / "out"
    command = ["train", world / "recipe.json", f"out={out}", "train.epochs=1"]
    assert run(*command)[0] == 0
    for name, words in (
        ("summary.json", "summary.json"),
        ("config.json", "config.json|holds a run with other settings"),
        ("variants/tiny/result.json", "result.json"),
        ("variants/tiny/metrics.jsonl", r"metrics\.jsonl, line 1"),
    ):
        kept = (out / name).read_bytes()
        for text in (b"{", b"[]", b'{"results": [{}]}'):
            (out / name).write_bytes(text)
            assert re.search(words, fails_in_words(*command)), (name, text)
        (out / name).write_bytes(kept)
    assert run(*command)[0] == 0


def test_the_recorders_numbers_are_what_a_reader_of_metrics_takes(world, tmp_path):
    """What we write we read: every value of a run's metrics is a finite number."""
    out = tmp_path / "out"
    assert run("train", world / "recipe.json", f"out={out}", "train.epochs=1")[0] == 0
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert rows
    assert all(torch.isfinite(torch.tensor(value)) for row in rows for key, value in row.items() if key != "run")
