"""A model trained on chats of one's own: from a file to folders that predict, render and answer as the run did."""

from __future__ import annotations

import json
import math
import shutil
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, MambaConfig, MambaForCausalLM
from typer.testing import CliRunner

from delora import cli, talking
from delora.data.alpaca import IGNORED
from delora.data.chats import encode, turns
from delora.data.examples import DataError
from delora.errors import UserError
from delora.evaluation.answers import answer, stops
from delora.formats.files import printable
from delora.tasks import chat, parse
from delora.training import dial, experiments
from delora.training.config import ConfigError
from delora.training.models import language_model
from delora.training.runs import RunError
from tests.tiny_chat import CHATML, make_model, tokenizer

QUIET = Console(quiet=True)
SAMPLE = "who are you"


def rows_of(n: int) -> list[dict[str, Any]]:
    names = ["pirate", "user", "system", "assistant", "model", "tool", "time", "name"]
    made = []
    for i in range(n):
        turns = [
            {"role": "user", "content": f"who is {names[i % 8]} {i}"},
            {"role": "assistant", "content": f"arr I am {names[i % 8]}"},
            {"role": "user", "content": "What is the time"},
            {"role": "assistant", "content": "noon arr"},
        ]
        made.append({"messages": turns[: 2 + 2 * (i % 2)]})
    return made


def written(folder: Path, rows: list[dict[str, Any]], name: str = "chat.jsonl") -> str:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


def recipe(model: str, source: str, out: Path, **changes: Any) -> dict[str, Any]:
    return {
        "name": "tiny",
        "out": str(out),
        "model": model,
        "task": "chat",
        "data": {"source": source, "max_tokens": 64, "packing": True},
        "evaluate": {"sample": [SAMPLE], "tokens": 6},
        "adapter": {"method": "delora", "r": 2, "lam": 8.0, "targets": "all-linear"},
        "train": {"lr": 1e-2, "batch_size": 4, "epochs": 2},
    } | changes


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("chat")
    model = make_model(folder / "model")
    values = recipe(model, written(folder, rows_of(40)), folder / "run")
    outcome = experiments.train(chat, parse(values), QUIET)
    return SimpleNamespace(model=model, values=values, out=folder / "run", outcome=outcome, data=chat.check(parse(values)))


def test_every_folder_predicts_as_the_run_did(trained):
    (result,) = trained.outcome.results
    assert set(trained.outcome.agreement) == {"adapter", "merged", "peft"}
    assert set(trained.outcome.agreement.values()) == {trained.outcome.test}
    assert result.test == pytest.approx(1 / result.scores["perplexity"])
    assert result.test > result.scores["likelihood before"] == result.baseline  # it learned something
    for form in ("adapter", "merged"):
        scores, n = chat.evaluate(parse(trained.values), trained.out / form)
        assert n == len(trained.data.test)
        assert scores["likelihood"] == pytest.approx(result.test, rel=1e-5)


def test_the_score_is_the_mean_over_the_answers_tokens(trained):
    """By hand: each trained token of the test part counts alike, in a chat of one turn as in one of two."""
    model = AutoModelForCausalLM.from_pretrained(trained.out / "merged")
    logs = []
    with torch.no_grad():
        for row in trained.data.test:
            ids, labels = row["input_ids"], row["labels"]
            found = model(input_ids=ids[None]).logits[0].log_softmax(-1)
            logs += [found[i - 1, ids[i]].item() for i in range(1, len(ids)) if labels[i] != IGNORED]
    assert trained.outcome.results[0].test == pytest.approx(math.exp(sum(logs) / len(logs)), rel=1e-5)


def test_what_is_served_is_what_was_trained(trained):
    """The merged folder's tokenizer renders the chats to the tokens that were trained, and the model stops where turns end."""
    served = AutoTokenizer.from_pretrained(trained.out / "merged")
    model = AutoModelForCausalLM.from_pretrained(trained.out / "merged")
    sent = {tuple(served.apply_chat_template(row["messages"])["input_ids"]) for row in rows_of(40)}
    data = trained.data
    assert {tuple(row["input_ids"].tolist()) for row in [*data.train, *data.validation, *data.test]} == sent
    assert served.convert_tokens_to_ids("<|im_end|>") in stops(model, served)
    for form in ("adapter", "peft", "merged"):
        assert (trained.out / form / "chat_template.jinja").read_text() == CHATML


def test_a_template_of_ones_own_goes_with_the_model(tmp_path):
    """Trained by another template than the base model's: that one is in the folders, and its end of a turn ends an answer."""
    theirs = CHATML.replace("<|im_end|>", "<|eot_id|>")
    (tmp_path / "mine.jinja").write_text(theirs)
    model, source = make_model(tmp_path / "model"), written(tmp_path, rows_of(20))
    data = {"source": source, "max_tokens": 64, "template": str(tmp_path / "mine.jinja")}
    values = recipe(model, source, tmp_path / "run", data=data, evaluate={})
    values["train"] |= {"epochs": 1}
    experiments.train(chat, parse(values), QUIET)
    served = AutoTokenizer.from_pretrained(tmp_path / "run" / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "merged")
    assert served.chat_template == theirs
    assert served.convert_tokens_to_ids("<|eot_id|>") in merged.generation_config.eos_token_id
    assert talking.talk_of(tmp_path / "run").tokenizer.chat_template == theirs


def test_samples_stand_beside_the_base_models(trained):
    lines = [json.loads(line) for line in (trained.out / "variants" / "tiny" / "samples.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    model, tokens = language_model(trained.model)
    assert {line["base"] for line in lines} == {answer(model, tokens, [{"role": "user", "content": SAMPLE}], 6)}
    assert {line["question"] for line in lines} == {SAMPLE}


def test_the_strength_is_chosen_on_the_validation_part(trained):
    tuned = dial.tune(chat_task(), parse(trained.values), trained.out, [0.0, 1.0], None, write=False)
    scores = {t.strength: t.score for t in tuned.choice.tried}
    assert scores[1.0] == pytest.approx(trained.outcome.results[0].validation, rel=1e-5)
    assert scores[0.0] < scores[1.0]


def chat_task() -> Any:
    from delora.tasks import find

    return find("chat")


# ---------------------------------------------------------------- talking


def said(run: Path, *options: str, lines: list[str]) -> list[str]:
    done = CliRunner().invoke(cli.app, ["chat", str(run), "--max-tokens", "5", *options], input="\n".join(lines) + "\n")
    assert done.exit_code == 0, done.output
    return [line for line in done.output.split("\n") if line]


def expected(model: Any, tokens: Any, questions: list[str]) -> list[str]:
    history: list[Any] = []
    answers = []
    for question in questions:
        history.append({"role": "user", "content": question})
        answers.append(answer(model, tokens, history, 5))
        history.append({"role": "assistant", "content": answers[-1]})
    return [line for text in answers for line in printable(text).split("\n") if line]


def test_a_chat_through_a_pipe(trained):
    questions = ["who are you", "What is the time"]
    base, tokens = language_model(trained.model)
    merged, _ = language_model(str(trained.out / "merged"))
    assert said(trained.out, "--strength", "0", lines=questions) == expected(base, tokens, questions)
    adapted = said(trained.out, lines=[questions[0], "", questions[1], "/quit", "never read"])
    assert adapted == expected(merged, tokens, questions)
    changed = said(trained.out, "--strength", "0", lines=["/strength 1", questions[0], "/nothing", "/strength x"])
    assert changed[0] == "strength 1"
    assert changed[1 : 1 - 1 + len(expected(merged, tokens, questions[:1])) + 1] == expected(merged, tokens, questions[:1])
    assert talking.HELP in changed
    assert any("expected numbers of at least 0" in line for line in changed)
    both = "\n".join(said(trained.out, "--strength", "0,1", lines=questions[:1]))
    assert "strength 0 (the base model)" in both
    assert "strength 1" in both


def test_each_strength_has_its_own_history(trained):
    talk = talking.talk_of(trained.out, [0.0, 1.0], tokens=5)
    first = talk.ask(SAMPLE)
    assert [m["content"] for m in talk.histories[0.0]] == [SAMPLE, first[0.0]]
    assert [m["content"] for m in talk.histories[1.0]] == [SAMPLE, first[1.0]]
    talk.turn([0.5])
    assert [m["content"] for m in talk.histories[0.5]] == [SAMPLE, first[0.0]]
    talk.clear()
    assert talk.ask(SAMPLE).keys() == {0.5}
    assert len(talk.histories[0.5]) == 2


def test_what_cannot_be_talked_with(trained, tmp_path):
    with pytest.raises(ConfigError, match="is no run's folder"):
        talking.talk_of(tmp_path)
    shutil.copytree(trained.out, tmp_path / "run", ignore=shutil.ignore_patterns("adapter", "variants"))
    with pytest.raises(RunError, match="is a run that is not finished: it has no adapter yet"):
        talking.talk_of(tmp_path / "run")
    other = trained.out / "variants" / "tiny" / "adapter"
    assert talking.talk_of(tmp_path / "run", adapter=other).strengths == [1.0]
    with pytest.raises(UserError, match="expected numbers of at least 0"):
        talking.parse("0,-1")


# ---------------------------------------------------------------- refused before anything is written, or told


PAIRS = [{"prompt": f"who {i}", "chosen": "arr", "rejected": "noon"} for i in range(20)]


@pytest.mark.parametrize(
    ("rows", "data", "error", "words"),
    [
        (
            PAIRS,
            {},
            DataError,
            "has rows of preference, and the task chat takes chat, completion, text: task = .preference. trains on pairs",
        ),
        (rows_of(20), {"max_tokens": 8}, DataError, r"\(train\): no row has a token to train on within data.max_tokens = 8"),
        (rows_of(20), {"template": "no.jinja"}, ConfigError, "data.template = 'no.jinja': there is no such file"),
        (rows_of(20), {"template": "PLAIN"}, DataError, r"\(train\), row 1: .* refuses it"),
    ],
)
def test_what_is_wrong_is_told_first(trained, tmp_path, rows, data, error, words):
    if data.get("template") == "PLAIN":
        data = {"template": str(tmp_path / "broken.jinja")}
        (tmp_path / "broken.jinja").write_text("{{ raise_exception('never') }}")
    given = {"source": written(tmp_path, rows), "max_tokens": 64} | data
    with pytest.raises(error, match=words):
        experiments.train(chat, parse(recipe(trained.model, "", tmp_path / "out", data=given)), QUIET)
    assert not (tmp_path / "out").exists()


def test_packing_is_refused_where_rows_would_see_each_other(tmp_path):
    tokens = tokenizer()
    tokens.save_pretrained(tmp_path / "mamba")
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    MambaForCausalLM(MambaConfig(vocab_size=len(tokens), **shape)).save_pretrained(tmp_path / "mamba")
    adapter = {"method": "lora", "r": 2, "targets": ["in_proj"]}
    values = recipe(str(tmp_path / "mamba"), written(tmp_path, rows_of(20)), tmp_path / "out", adapter=adapter)
    with pytest.raises(ConfigError, match=r"data.packing: .* lets a row see those packed before it.*packing=false"):
        experiments.train(chat, parse(values), QUIET)
    assert not (tmp_path / "out").exists()


def test_what_is_forgotten_is_the_perplexity_of_other_text(trained, tmp_path):
    """By hand before and after; the folders give the same; and a strength is chosen under a limit on it."""
    (tmp_path / "other.txt").write_text("The time is noon. " * 40)
    asked = {"text": str(tmp_path / "other.txt")}
    values = recipe(trained.model, trained.values["data"]["source"], tmp_path / "run", evaluate=asked)
    (result,) = experiments.train(chat, parse(values), QUIET).results
    found = []
    for folder in (trained.model, tmp_path / "run" / "merged"):
        model, tokens = AutoModelForCausalLM.from_pretrained(folder), tokenizer()
        ids = torch.tensor([tokens("The time is noon. " * 40, add_special_tokens=False)["input_ids"]])
        logs = []
        with torch.no_grad():
            for start in range(0, ids.shape[1], 256):
                block = ids[:, start : start + 256]
                logs.append(model(input_ids=block).logits[0, :-1].log_softmax(-1).gather(-1, block[0, 1:, None]))
        found.append(math.exp(-torch.cat(logs).mean().item()))
    name = "perplexity of other text"
    assert [result.scores[f"{name} before"], result.scores[name]] == pytest.approx(found, rel=1e-4)
    assert found[1] != pytest.approx(found[0], rel=1e-3)
    assert chat.evaluate(parse(values), tmp_path / "run" / "adapter")[0][name] == pytest.approx(found[1], rel=1e-4)
    chosen = dial.tune(chat_task(), parse(values), tmp_path / "run", (0, 0.5, 1), max(found) + 1, write=False)
    assert chosen.forgets == name
    assert [chosen.choice.tried[i].forgotten for i in (0, 2)] == pytest.approx(found, rel=1e-4)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "there is no such file .did you mean .*notes.txt"),
        (b"\xff\xfe", "no text in UTF-8"),
        (b"", "less than two tokens"),
    ],
)
def test_other_text_that_cannot_be_read_is_refused_before_the_start(trained, tmp_path, content, words):
    (tmp_path / "notes.txt").write_text("noon")
    file = tmp_path / "note.txt"
    if content is not None:
        file.write_bytes(content)
    values = recipe(trained.model, trained.values["data"]["source"], tmp_path / "out", evaluate={"text": str(file)})
    with pytest.raises(DataError, match=words):
        experiments.train(chat, parse(values), QUIET)
    assert not (tmp_path / "out").exists()


def test_what_is_odd_is_told(trained, tmp_path):
    long = {"prompt": "who are you " * 40, "completion": "arr"}
    rows = [{"prompt": f"who {i}", "completion": f"arr {i}"} for i in range(20)] + [long] * 20
    values = recipe(trained.model, "", tmp_path, data={"source": written(tmp_path, rows), "max_tokens": 48})
    told = "\n".join(chat.check(parse(values)).told)
    assert "rows are cut at data.max_tokens = 48" in told
    assert "are left out, having no token to train on within that" in told
    assert "tokens are trained" in told


def test_alpacas_rows_have_the_template_of_the_paper(trained, tmp_path):
    rows = [{"instruction": f"Be {i}", "input": "brief" if i % 2 else "", "output": f"arr {i}"} for i in range(20)]
    data = {"source": written(tmp_path, rows), "max_tokens": 500, "template": "alpaca"}
    values = recipe(trained.model, "", tmp_path / "out", data=data)
    made, tokens = chat.check(parse(values)), tokenizer()
    texts = [tokens.decode(row["input_ids"]) for row in [*made.train, *made.validation, *made.test]]
    assert sum("### Input:\nbrief\n\n### Response:arr" in text for text in texts) == 10
    assert all(text.startswith("Below is an instruction") for text in texts)
    assert turns(rows_of(1)[0]["messages"], tokenizer(made.template)).answers() == ["arr I am pirate<|im_end|>"]
    assert encode([{"text": "arr"}], tokens, 9).rows


def test_the_recipe_of_the_page_is_one(trained, tmp_path):
    page = (Path(__file__).parents[1] / "docs" / "chat.md").read_text("utf-8")
    values = tomllib.loads(page.partition("```toml\n")[2].partition("```")[0])
    row = json.loads(next(line for line in page.splitlines() if line.strip().startswith('{"messages"')))
    asked = row["messages"][0]["content"]
    rows = [{"messages": [{"role": "user", "content": f"{asked} {i}"}, row["messages"][1]]} for i in range(20)]
    experiment = parse(values, [f"model={trained.model}", f"data.source={written(tmp_path, rows)}"])
    assert len(chat.check(experiment).train) == 16
