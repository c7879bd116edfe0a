"""``delora app`` in a browser: the page of a run, at the strengths that a user moves to."""

from __future__ import annotations

import gc
import json
import re
from contextlib import contextmanager

import pytest
import torch
from rich.console import Console

import delora
from delora import tasks
from delora.app import blended, page, shown
from delora.evaluation.answers import answer
from delora.formats.files import AdapterError
from delora.formats.native import is_adapter
from delora.models import adapters
from delora.talking import talk_of
from delora.tasks import chat, classification, parse
from delora.training import experiments
from delora.training.config import ConfigError
from delora.training.experiments import Outcome
from delora.training.models import language_model
from tests import test_cli, tiny, tiny_chat
from tests.browsing import CHROMIUM, browsing
from tests.cases import shake

HOSTILE_NAME = "<script>document.title=1</script>"
HOSTILE = '<img src=x onerror="document.title=1"><script>document.title=1</script> fine film'
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished run whose adapter changes what the classifier says, and whose name is hostile."""
    folder = tmp_path_factory.mktemp("app")
    sources = tiny.make_model(folder / "model"), tiny.make_sentences(folder / "data")
    values = tiny.recipe(*sources, folder / "out", train__epochs=1) | {"name": HOSTILE_NAME}
    experiment, out = parse(values), folder / "out"
    experiments.train(classification, experiment, QUIET)
    moved(classification.base(experiment), out / "adapter")
    return out


@pytest.fixture(scope="module")
def talks(tmp_path_factory):
    """A finished chat in two variants, whose recipe's own model is not there; the delivered adapter changes what is said."""
    folder = tmp_path_factory.mktemp("talks")
    model = tiny_chat.make_model(folder / "model", max_position_embeddings=104)
    rows = [{"prompt": f"who are you {i}", "completion": "a pirate arr"} for i in range(20)]
    (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "task": "chat",
        "name": "talks",
        "out": str(folder / "out"),
        "model": "not/there",
        "data": {"source": str(folder / "chat.jsonl"), "max_tokens": 48},
        "adapter": {"method": "delora", "r": 2, "lam": 8.0, "targets": "all-linear"},
        "train": {"epochs": 1, "batch_size": 16, "lr": 1e-2},
        "variants": [{"name": name, "model": model, "train": {"lr": lr}} for name, lr in (("slow", 1e-3), ("fast", 3e-2))],
    }
    outcome = experiments.train(chat, parse(values), QUIET)
    template = (folder / "out" / "adapter" / "chat_template.jinja").read_text()
    moved(language_model(model)[0], folder / "out" / "adapter")
    assert (folder / "out" / "adapter" / "chat_template.jinja").read_text() == template
    assert outcome.delivered in ("slow", "fast")
    return folder / "out"


def moved(model, folder):
    """The adapter in a folder, shaken so that it changes what its model says."""
    delora.load(model, folder)
    with torch.no_grad():
        for placed in adapters(model).values():
            if not placed.whole:
                shake(placed)
    delora.save(model, folder)


def test_of_several_variants_the_delivered_one_is_meant_everywhere(talks):
    """The recipe's own model is not there: whoever took the recipe as it stands could load nothing."""
    delivered = tasks.of_run(talks)
    assert delivered.name == Outcome.read(talks).delivered
    assert shown(talks).at(1.0, "who are you") == talk_of(talks, [1.0]).ask("who are you")[1.0]
    code, told, err = test_cli.run("tune-strength", talks, "--strengths", "0,1", "--dry-run")
    assert (code, delivered.name in told) == (0, True), err
    for name in ("slow", "fast"):  # a variant's own folder is a run's, too
        assert tasks.of_run(talks / "variants" / name).name == name
        assert shown(talks / "variants" / name).title == name
    (talks / "summary.json").rename(talks / "summary")
    try:
        with pytest.raises(delora.errors.UserError, match="is no folder of a finished experiment"):
            shown(talks)
    finally:
        (talks / "summary").rename(talks / "summary.json")


def test_a_chat_at_strength_0_is_the_base_models(talks):
    what = shown(talks)
    for prompt in ("who are you", HOSTILE):
        base, tokens = language_model(tasks.of_run(talks).model)
        assert what.at(0.0, prompt) == answer(base, tokens, [{"role": "user", "content": prompt}])
    assert what.at(0.0, "who are you") != what.at(1.0, "who are you")
    with pytest.raises(
        delora.errors.UserError, match=r"the prompt has \d+ tokens, and the model takes at least 1 and at most 103"
    ):
        what.at(1.0, "who are you " * 60)


def test_strength_0_is_the_base_and_1_what_was_trained(done):
    what = shown(done)
    base, trained = what.at(0.0, "a fine film"), what.at(1.0, "a fine film")
    assert base != trained
    assert what.at(0.0, "a fine film") == base
    assert sum(trained.values()) == pytest.approx(1.0)


def test_at_strength_0_a_new_head_stays_as_it_was_trained(done):
    """Of the base with the head that a checkpoint does not have, every load would say something else."""
    what, again = shown(done), shown(done)
    assert what.at(0.0, "a fine film") == again.at(0.0, "a fine film")
    what.at(0.0, "a fine film")
    assert {a.strength for a in adapters(what.model).values() if a.whole} == {1.0}


def test_what_is_no_run_is_refused_in_words(done, tmp_path):
    with pytest.raises(ConfigError, match="is no run's folder"):
        shown(tmp_path)
    with pytest.raises(AdapterError):
        shown(done, tmp_path / "nothing")
    assert is_adapter(done / "adapter")


def test_runs_of_two_base_models_are_not_on_one_page(done, talks):
    with pytest.raises(delora.errors.UserError, match="talks answers|slow answers|fast answers"):
        page(shown(done), shown(talks))


def test_a_blend_is_the_weighted_sum_of_the_runs_changes(talks):
    folders = talks, talks / "variants" / "slow"
    blend, (first, second) = blended(*folders), (shown(folder) for folder in folders)
    asked = "who are you"
    assert blend.at([1.0, 0.0], asked) == first.at(1.0, asked)
    assert blend.at([0.0, 1.0], asked) == second.at(1.0, asked)
    assert blend.at([0.0, 0.0], asked) == first.at(0.0, asked) != first.at(1.0, asked)
    assert blended(talks, talks).at([0.5, 0.25], asked) == first.at(0.75, asked)


def test_runs_that_have_no_blend_are_refused_in_words(done, talks):
    with pytest.raises(delora.errors.UserError, match="trained .*classifier.* whole"):
        blended(done, done)
    code, _, err = test_cli.run("app", talks, "--blend")
    assert (code, "one is given" in err) == (2, True)


# ---------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browser():
    with browsing() as user:
        yield user


@contextmanager
def served(*runs, blend):
    blocks = page(*runs, blend=blend)
    _, address, _ = blocks.launch(prevent_thread_lock=True, quiet=True, share=False, server_name="127.0.0.1")
    try:
        yield address
    finally:
        blocks.close()
        del blocks
        gc.collect()  # the sockets that are left warn here, not in another test


# Sockets that Playwright and gradio's server leave to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: make test installs it where apt-get may")
@pytest.mark.parametrize(("run", "others"), [("done", []), ("talks", ["variants/slow"])], ids=["one", "two and their blend"])
def test_a_user_in_a_browser_moves_the_slider(run, others, browser, request, tmp_path):
    folder = request.getfixturevalue(run)
    folders = [folder, *(folder / other for other in others)]
    runs, blend = [shown(each) for each in folders], blended(*folders) if others else None
    with served(*runs, blend=blend) as address:
        browser(moves(runs, blend, address, tmp_path / "app.png"))


def moves(runs, blend, address, picture):
    """What a user does: ask at 0, and something hostile at 2; the sides come to say what the model does at 0 and at these."""

    async def act(tab):
        from playwright.async_api import expect

        asked = []
        tab.on("request", lambda request: asked.append(request.url))
        await tab.goto(address)
        await expect(tab.locator("#ask")).to_be_visible(timeout=30_000)
        title = await tab.title()
        titles = [run.title for run in runs]
        of_one_name = [f"{each} ({number})" for number, each in enumerate(titles, 1)]
        assert (
            title == f"delora: {', '.join(titles if len(set(titles)) == len(titles) else of_one_name)}"
        )  # as text: it does nothing

        async def write(slider, value):
            number = tab.locator(f"{slider} input[type=number]")
            await number.fill(str(value))
            await number.press("Tab")

        async def ask(prompt, strength, by_key=False):
            expected = {"#base": runs[0].at(0.0, prompt)}
            expected |= {f"#adapted-{number}": run.at(strength, prompt) for number, run in enumerate(runs, 1)}
            await write("#strength", strength)
            if blend is not None:
                expected["#blend"] = blend.at([0.5 * strength, 0.25 * strength], prompt)
                await write("#weight-2", 0.25)  # the first is at a half
            await tab.locator("#prompt textarea").fill(prompt)
            if by_key:
                await tab.locator("#prompt textarea").press("Enter")
            else:
                await tab.locator("#ask").click()
            for side, said in expected.items():
                if isinstance(said, str):
                    await expect(tab.locator(f"{side} textarea")).to_have_value(said, timeout=30_000)
                    continue
                for label, share in said.items():
                    words = re.compile(rf"{label}\s*{round(100 * share)}%", re.IGNORECASE)
                    await expect(tab.locator(side)).to_contain_text(words, timeout=30_000)

        await ask("a fine film", 0.0)
        await tab.screenshot(path=picture, full_page=True)
        await ask(HOSTILE, 2.0)
        await ask("a fine film", 1.0, by_key=True)
        assert await tab.title() == title
        assert all(url.startswith((address, "data:", "blob:")) for url in asked), asked

    return act
