"""The strength that is chosen after training: by which law, what it leaves alone, and the command that writes it."""

from __future__ import annotations

import copy
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

import delora
from delora import DeLoRA, LoRA
from delora.choosing import STRENGTHS, Choice
from delora.models import adapters
from delora.tasks import classification, instructions, parse
from delora.training import experiments
from delora.training.dial import tune
from delora.training.runs import Result
from tests import tiny
from tests.cases import Holder, Net, ids, shake
from tests.test_cli import run
from tests.test_instruction import recipe as instruction_recipe

QUIET = Console(quiet=True)


def trained(dropout: float = 0.0) -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    with torch.no_grad():
        return shake(delora.inject(model, DeLoRA(r=2, lam=2.0), ["0", "2"], dropout=dropout))


def strengths(model: nn.Module) -> set[float]:
    return {placed.strength for placed in adapters(model).values()}


def in_turn(values):
    """A score that gives the values one after the other."""
    each = iter(values)
    return lambda model: next(each)


@pytest.mark.parametrize("best", [0.0, 0.5, 1.25])
def test_what_fits_best_is_chosen_and_set(best):
    model, x = trained(), torch.randn(7, 6)
    delora.strength(model, best)
    expected = model(x).detach()
    delora.strength(model, 1)
    choice = delora.choose_strength(model, lambda model: -(model(x) - expected).square().sum())
    assert choice.strength == best
    assert [each.strength for each in choice.tried] == list(STRENGTHS)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("budget", [0.0, 1.0, 2.5, 9.0])
def test_nothing_that_fits_the_budget_is_better(budget):
    model = trained()
    choice = delora.choose_strength(
        model, in_turn([1.0, 5.0, 3.0, 7.0]), strengths=[0, 1, 2, 3], forgotten=in_turn([0.0, 1.0, 2.0, 3.0]), budget=budget
    )
    fitting = [each for each in choice.tried if each.forgotten <= budget]
    assert choice.strength in [each.strength for each in fitting]
    assert max(each.score for each in fitting) == next(e.score for e in choice.tried if e.strength == choice.strength)
    assert strengths(model) == {choice.strength}


def test_of_equal_scores_the_lower_strength_is_taken():
    assert delora.choose_strength(trained(), in_turn([0.5, 0.7, 0.7]), strengths=[2, 0.5, 1]).strength == 1.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_never_chosen(bad):
    for values in ([bad, 0.1, 0.2], [0.1, bad, 0.2], [0.1, 0.2, bad]):
        choice = delora.choose_strength(trained(), in_turn(values), strengths=[0, 1, 2])
        assert choice.tried[int(choice.strength)].score == 0.2
    lost = delora.choose_strength(trained(), in_turn([1, 2]), strengths=[0, 1], forgotten=in_turn([1, math.nan]), budget=1)
    assert lost.strength == 0


@pytest.mark.parametrize("which", ["score", "forgotten"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_after_an_error_the_strength_is_what_it_was(which, error):
    model = trained()
    delora.strength(model, 0.75)

    def fails(model: nn.Module) -> float:
        if strengths(model) == {2.0}:
            raise error
        return 0.0

    with pytest.raises(error):
        delora.choose_strength(model, **{"score": in_turn(range(9)), "forgotten": in_turn(range(9))} | {which: fails})
    assert strengths(model) == {0.75}
    assert model.training


REFUSED = {
    "no fit": (
        dict(forgotten=lambda model: 3 - max(strengths(model)) / 4, budget=2, strengths=[1, 2]),
        "the least is 2.5, at strength 2; raise the budget",
    ),
    "forgotten is NaN": (dict(forgotten=lambda model: math.nan, budget=2), "the least is nan"),
    "no finite score": (dict(score=lambda model: math.nan, strengths=[1, 2]), "no score is finite at strengths 1, 2"),
    "no number": (dict(score=lambda model: None), "score returned NoneType: it must return one number"),
    "many numbers": (dict(score=lambda model: torch.ones(2)), "score returned Tensor: it must return one number"),
    "budget alone": (dict(budget=1), "nothing says what is forgotten: give forgotten="),
    "budget NaN": (dict(budget=math.nan, forgotten=lambda model: 0), "must be a finite number"),
    "none to try": (dict(strengths=[]), "there is none to try"),
    "below 0": (dict(strengths=[0, -1]), "-1 must be a finite number, at least 0"),
    "a text": (dict(strengths="0,1"), "'0' must be a finite number"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_meaning_is_refused_and_changes_nothing(case):
    arguments, words = REFUSED[case]
    model = trained()
    delora.strength(model, 0.75)
    with pytest.raises((ValueError, TypeError), match=words):
        delora.choose_strength(model, **{"score": lambda model: 1.0} | arguments)
    assert strengths(model) == {0.75}


def test_a_model_without_one_active_strength_is_refused():
    def choose(model: nn.Module) -> Choice:
        return delora.choose_strength(model, lambda model: 0.0)

    with pytest.raises(ValueError, match="this model has no adapter"):
        choose(nn.Sequential(nn.Linear(2, 2)))
    model = delora.inject(trained(), LoRA(r=1), ["0"], name="other")
    with pytest.warns(UserWarning, match="none is active now"):
        delora.eject(model, "other")
    with pytest.raises(ValueError, match="no adapter is active: delora.activate one of"):
        choose(model)
    model = trained()
    with delora.disabled(model), pytest.raises(ValueError, match="choose_strength inside delora.disabled"):
        choose(model)
    adapters(model)["2"].adapter.strength = 0.5
    with pytest.raises(ValueError, match="different strengths, 0.5 in '2' and 1 in '0'"):
        choose(model)
    assert {layer: placed.strength for layer, placed in adapters(model).items()} == {"0": 1.0, "2": 0.5}


def test_it_is_scored_in_evaluation_mode_and_left_in_its_own():
    model, x = trained(dropout=0.5).train(), torch.randn(7, 6)
    model[1].eval()
    before = [module.training for module in model.modules()]

    def score(model: nn.Module) -> torch.Tensor:
        y = model(x)
        assert not y.requires_grad
        return y.sum()

    first, again = (delora.choose_strength(model, score).tried for _ in range(2))
    assert first == again
    assert [module.training for module in model.modules()] == before


def test_a_new_head_keeps_its_strength_so_that_what_is_saved_is_what_was_chosen(tmp_path):
    base = Net()
    with torch.no_grad():
        model = shake(delora.inject(Net(), DeLoRA(r=2), ["q", "v"], also_train=["classifier"])).eval()
    body = {key: value for key, value in delora.eject(copy.deepcopy(model)).state_dict().items() if "classifier" not in key}
    base.load_state_dict(body, strict=False)  # another head, as wherever a checkpoint has none
    delora.choose_strength(model, in_turn([0, 1, 0]), strengths=[0, 0.5, 1])
    assert {layer: placed.strength for layer, placed in adapters(model).items()} == {"q": 0.5, "v": 0.5, "classifier": 1.0}
    again = delora.load(base, delora.save(model, tmp_path)).eval()
    x = ids()
    torch.testing.assert_close(again(x), model(x))
    delora.strength(model, 1)
    delora.choose_strength(model, in_turn([0, 1, 0]), strengths=[0, 0.5, 1], whole=True)
    assert strengths(model) == {0.5}


def test_what_is_trained_whole_alone_is_turned_on_demand():
    model = delora.inject(Holder(nn.Linear(3, 3)), delora.Full(), ["layer"])
    with pytest.raises(ValueError, match="all 1 layers were trained whole, such as 'layer': whole=True turns these"):
        delora.choose_strength(model, lambda model: 0.0)
    assert delora.choose_strength(model, in_turn([0, 1]), strengths=[0, 2], whole=True).strength == 2


def test_the_curve_shows_all_that_was_tried():
    choice = delora.choose_strength(
        trained(), in_turn([0.5, 0.75, 0.8]), strengths=[0, 0.5, 1], forgotten=in_turn([1, 2, 3]), budget=2
    )
    lines = str(choice).splitlines()
    assert len(lines) == 4
    assert lines[2].split() == ["0.5", "0.75", "2", "<-", "chosen"]
    assert lines[3].endswith("over the budget of 2")


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    """A finished experiment of two seeds, of which one is delivered."""
    folder = tmp_path_factory.mktemp("dial")
    sources = tiny.make_model(folder / "model"), tiny.make_sentences(folder / "data")
    values = tiny.recipe(*sources, folder / "out", seeds=[3, 4], train__epochs=1)
    experiments.train(classification, parse(values), QUIET)
    return folder / "out"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def words(text: str) -> str:
    return " ".join(text.split())


def test_the_commands_score_of_strength_1_is_that_of_the_run(done):
    code, out, _ = run("tune-strength", done, "--strengths", "1", "--dry-run")
    assert code == 0
    summary = json.loads((done / "summary.json").read_text())
    best = next(Result(**r) for r in summary["results"] if r["name"] == summary["delivered"])
    assert f"1 {best.validation:.4f} {best.distance:.4f} <- chosen" in words(out)


def test_a_dry_run_writes_nothing(done):
    before = contents(done)
    code, out, _ = run("tune-strength", done, "--strengths", "0.5", "--dry-run")
    assert (code, "has strength 1" in words(out)) == (0, True)
    assert contents(done) == before


def test_a_budget_that_nothing_fits_writes_nothing(done):
    before = contents(done)
    code, _, err = run("tune-strength", done, "--strengths", "0.5,1", "--budget", "0.0001")
    assert (code, "raise the budget, or try lower strengths" in err) == (1, True)
    assert contents(done) == before


def test_the_command_writes_what_it_chose_and_tells_what_is_of_the_old_strength(done, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = shutil.copytree(done, Path("moved"))  # the recipe's own `out` is elsewhere
    code, shown, _ = run("tune-strength", out, "--strengths", "0.5")
    assert code == 0
    assert "Written to moved/adapter: strength 0.5" in shown
    assert [f"moved/{form} is still of strength 1" in shown for form in ("merged", "peft")] == [True, True]
    was, now = contents(done), contents(out)
    assert {key for key in now if was.get(key) != now[key]} == {"adapter/adapter.json", "adapter/README.md"}
    layers = json.loads(now["adapter/adapter.json"])["layers"]
    assert {layer.get("strength", 1) for layer in layers.values()} == {0.5}
    code, shown, _ = run("tune-strength", out, "--strengths", "0.5")
    assert (code, "has strength 0.5 already" in words(shown)) == (0, True)
    assert contents(out) == now


def test_what_cannot_be_tuned_is_told(done, tmp_path):
    code, _, err = run("tune-strength", done / "variants")
    assert (code, "config.json" in err) == (2, True)
    code, _, err = run("tune-strength", done / "misspelt")
    assert (code, "is no run's folder" in words(err), "recipe" in words(err)) == (2, True, False)
    (tmp_path / "config.json").write_bytes((done / "config.json").read_bytes())
    code, _, err = run("tune-strength", tmp_path)
    assert (code, "is a run that is not finished" in words(err)) == (1, True)
    code, _, err = run("tune-strength", done, "--strengths", "a")
    assert (code, "expected numbers separated by commas" in words(err)) == (2, True)


def test_a_language_model_is_tuned_by_what_its_run_measured(tmp_path):
    other = tmp_path / "other.txt"
    other.write_text(" ".join(tiny.OTHER * 20))
    rows = [{"instruction": f"word{i % 20}", "input": "", "output": "great" if i % 2 else "dull"} for i in range(24)]
    (tmp_path / "alpaca.json").write_text(json.dumps(rows))
    model = tiny.make_language_model(tmp_path / "model")
    values = instruction_recipe(model, str(tmp_path / "alpaca.json"), tmp_path / "out", evaluate={"text": str(other)})
    (result,) = experiments.train(instructions, parse(values), QUIET).results
    tuned = tune(experiments.Task.of(instructions), parse(values), tmp_path / "out", [0, 1], None, write=False)
    base, full = tuned.choice.tried
    assert (tuned.metric, tuned.forgets) == ("likelihood", "perplexity")
    assert full.score == pytest.approx(result.validation, rel=1e-5)
    assert full.forgotten == pytest.approx(result.scores["perplexity"], rel=1e-5)
    assert base.forgotten == pytest.approx(result.scores["perplexity before"], rel=1e-5)


@pytest.mark.parametrize(("scores", "expected"), [((1, 2, 2, 2, 2), 1.0), ((0, 2, 1, 1, 2), 0.5), ((3, 2, 2, 2, 3), 0.0)])
def test_of_equal_scores_the_one_nearest_to_what_was_trained_is_taken(scores, expected):
    """An accuracy has many: a strength far below 1 would cost the answers their certainty for nothing."""
    values = in_turn(scores)
    assert delora.choose_strength(trained(), values, strengths=(0, 0.5, 1, 1.25, 2)).strength == expected
