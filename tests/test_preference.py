"""DPO on pairs of one's own: the loss is TRL's, it begins at ln 2, and what is delivered is what was trained."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from rich.console import Console
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer
from typer.testing import CliRunner

import delora
from delora import cli
from delora.data.examples import DataError
from delora.evaluation.language import perplexity
from delora.tasks import find, parse, preference
from delora.training import dial, experiments
from delora.training.causal_lm import OTHER
from delora.training.models import language_model
from delora.training.runs import METRICS, read_metrics
from tests.cases import shake
from tests.test_chat import written
from tests.tiny_chat import LLAMA3, make_model, tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")  # TRL's use of transformers
QUIET = Console(quiet=True)
NAMES = ["pirate", "user", "system", "assistant", "model", "tool", "time", "name"]


def pairs_of(n: int) -> list[dict[str, Any]]:
    """Prompts with an answer of a pirate's, and one that is not, of other lengths."""
    return [
        {
            "prompt": f"who is {NAMES[i % 8]} {i}",
            "chosen": f"arr I am {NAMES[i % 8]}" + " arr" * (i % 3),
            "rejected": f"Hello there the {NAMES[i % 8]} is brief",
        }
        for i in range(n)
    ]


def turns(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        **{side: [{"role": "assistant", "content": row[side]}] for side in preference.SIDES},
    }


def recipe(model: str, source: str, out: Path, **changes: Any) -> dict[str, Any]:
    return {
        "name": "tiny",
        "out": str(out),
        "model": model,
        "task": "preference",
        "data": {"source": source, "max_tokens": 64},
        "evaluate": {"sample": ["who are you"], "tokens": 4},
        "adapter": {"method": "delora", "r": 2, "reach": 0.1, "targets": "all-linear"},
        "train": {"lr": 1e-2, "batch_size": 4, "epochs": 2, "record_steps": 1},
    } | changes


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("preference")
    model = make_model(folder / "model")
    (folder / "other.txt").write_text("The time is noon. " * 40)
    values = recipe(model, written(folder, pairs_of(40)), folder / "run")
    values["evaluate"]["text"] = str(folder / "other.txt")
    outcome = experiments.train(preference, parse(values), QUIET)
    return SimpleNamespace(model=model, values=values, out=folder / "run", outcome=outcome)


def test_it_begins_at_ln_2_and_learns_the_choice(trained):
    losses = [row["loss"] for row in read_metrics(trained.out / "variants" / "tiny" / METRICS) if "loss" in row]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    (result,) = trained.outcome.results
    assert result.test > 0.5 + 1e-3
    assert result.scores["accuracy"] > 0.5


def test_what_is_forgotten_is_told_before_and_after(trained):
    (result,) = trained.outcome.results
    before, after = (result.scores[f"{OTHER}{when}"] for when in (" before", ""))
    model, text = preference.base(parse(trained.values)), "The time is noon. " * 40
    assert before == pytest.approx(perplexity(model, tokenizer(), text), rel=1e-5)
    assert after == pytest.approx(perplexity(delora.load(model, trained.out / "adapter"), tokenizer(), text), rel=1e-5)
    assert after != pytest.approx(before, rel=2e-5)


def test_every_folder_predicts_as_the_run_did(trained):
    assert set(trained.outcome.agreement) == {"adapter", "merged", "peft"}
    assert set(trained.outcome.agreement.values()) == {trained.outcome.test}
    (result,) = trained.outcome.results
    for form in ("adapter", "merged"):
        scores, n = preference.evaluate(parse(trained.values), trained.out / form)
        assert n == 4
        assert OTHER in scores
        for name, value in scores.items():
            assert value == pytest.approx(result.scores[name], rel=1e-4), name


def test_the_loss_and_its_gradient_are_trls(tmp_path):
    """Of a policy that has moved away from its reference, by turns of several lengths."""
    source, rows = make_model(tmp_path / "model", LLAMA3), pairs_of(6)  # it ends a turn with its token, which TRL trains too
    settings = parse(recipe(source, written(tmp_path, rows), tmp_path / "run"))
    ours, _ = language_model(source)
    encoded, _ = preference._encoded(rows, tokenizer(LLAMA3), 64, "here", "train")
    collate = preference.Pairs(tokenizer(LLAMA3).pad_token_id)
    batch = collate(preference.referred(ours, encoded, collate, settings))
    shake(delora.inject(ours, delora.DeLoRA(r=2), ["q_proj", "v_proj"]), 0.5)
    found = preference.margins(preference.log_probabilities(ours, batch), batch[preference.REFERENCE], beta=0.3)
    loss = -torch.nn.functional.logsigmoid(found).mean()

    arguments = DPOConfig(
        str(tmp_path / "trl"), beta=0.3, report_to="none", use_cpu=True, bf16=False, per_device_train_batch_size=6
    )
    data = Dataset.from_list([turns(row) for row in rows])
    with delora.disabled(ours):
        reference = delora.reference(ours)
    trl = DPOTrainer(ours, ref_model=reference, args=arguments, train_dataset=data, processing_class=tokenizer(LLAMA3))
    theirs = trl.compute_loss(ours, next(iter(trl.get_train_dataloader())))
    assert abs(loss.item() - math.log(2)) > 1e-3
    assert loss.item() == pytest.approx(theirs.item(), rel=1e-5)
    trains = [p for p in ours.parameters() if p.requires_grad]
    for a, b in zip(torch.autograd.grad(loss, trains), torch.autograd.grad(theirs, trains), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("form", ["turns", "the prompt in both", "no prompt"])
def test_forms_of_the_same_pairs(tmp_path, form):
    """Turns; the prompt repeated in both answers, as of UltraFeedback; and nothing but two conversations."""
    rows = [turns(row) for row in pairs_of(30)]
    if form != "turns":
        rows = [row | {side: row["prompt"] + row[side] for side in preference.SIDES} for row in rows]
        rows = [row | {"prompt": row["prompt"][0]["content"]} for row in rows]
    if form == "no prompt":
        rows = [{side: row[side] for side in preference.SIDES} for row in rows]
    (tmp_path / "plain").mkdir()
    model, parts = make_model(tmp_path / "model"), []
    for source in (written(tmp_path, rows), written(tmp_path / "plain", pairs_of(30))):
        data = preference.check(parse(recipe(model, source, tmp_path / "run")))
        parts.append([*data.train, *data.validation, *data.test])
    seen = [
        {tuple(row[f"{side}_{key}"].tolist()) for row in some for side in preference.SIDES for key in ("input_ids", "labels")}
        for some in parts
    ]
    assert seen[0] == seen[1]
    assert len(parts[0]) == 30


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{side: row[side] for side in preference.SIDES} for row in pairs_of(30)], "without a prompt"),
        ([turns(row) | {"chosen": row["chosen"]} for row in pairs_of(30)], "is a text and the other one a list of turns"),
    ],
)
def test_what_is_no_pair_is_told(tmp_path, rows, words):
    with pytest.raises(DataError, match=words):
        preference.check(parse(recipe(make_model(tmp_path / "model"), written(tmp_path, rows), tmp_path / "run")))


def test_what_cannot_be_trained_is_left_out_and_told(tmp_path):
    """A pair of which one answer lies beyond max_tokens, and one whose conversations are each other's beginning."""
    long = pairs_of(40)
    long[7]["prompt"] = "who " * 60
    data = preference.check(parse(recipe(make_model(tmp_path / "model"), written(tmp_path, long), tmp_path / "run")))
    assert len(data.train) + len(data.validation) + len(data.test) == 39
    assert any("1 of" in line and "pairs are left out" in line for line in data.told), data.told
    rows = [{side: turns(row)["prompt"] + turns(row)[side] for side in preference.SIDES} for row in pairs_of(40)]
    rows[3]["rejected"] = rows[3]["chosen"] + rows[3]["rejected"]
    data = preference.check(parse(recipe(str(tmp_path / "model"), written(tmp_path, rows), tmp_path / "run")))
    assert any("no answer of its own" in line for line in data.told), data.told


def test_the_strength_is_chosen_on_the_validation_part(trained):
    tuned = dial.tune(find("preference"), parse(trained.values), trained.out, [0.0, 1.0], None, write=False)
    scores = {t.strength: t.score for t in tuned.choice.tried}
    assert scores[0.0] == pytest.approx(0.5, abs=1e-6)
    assert scores[1.0] == pytest.approx(trained.outcome.results[0].validation, rel=1e-4)
    lost = {t.strength: t.forgotten for t in tuned.choice.tried}
    found = trained.outcome.results[0].scores
    assert lost == pytest.approx({0.0: found[f"{OTHER} before"], 1.0: found[OTHER]}, rel=1e-4)


@pytest.mark.slow
def test_one_command_from_a_file_to_a_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_model(tmp_path / "llm")
    written(tmp_path, pairs_of(40), "pairs.jsonl")

    def said(*arguments: str, input: str | None = None) -> str:
        done = CliRunner().invoke(cli.app, list(arguments), input=input)
        assert done.exit_code == 0, done.output
        return done.output

    dry = said("finetune", "llm", "pairs.jsonl", "--dry-run")
    assert "preference" in dry
    assert "rejected:" in dry
    said("finetune", "llm", "pairs.jsonl", "train.epochs=1")
    assert json.loads((tmp_path / "runs" / "pairs" / "summary.json").read_text())["results"][0]["metric"] == "likelihood"
    assert "likelihood" in said("evaluate", "runs/pairs")
    assert "base" in said("chat", "runs/pairs", "--strength", "0,1", "--max-tokens", "3", input="who are you\n/quit\n").lower()
    said("merge", "runs/pairs", "--out", "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    adapted = delora.load(language_model("llm")[0], tmp_path / "runs" / "pairs" / "adapter")
    x = torch.arange(5)[None]
    torch.testing.assert_close(merged(x).logits, adapted(x).logits, rtol=1e-4, atol=1e-5)
