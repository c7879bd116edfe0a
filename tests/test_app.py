"""``delora app`` in a browser: the page of a run, at the strengths that a user moves to."""

from __future__ import annotations

import asyncio
import gc
import re
import shutil

import pytest
import torch
from rich.console import Console

import delora
from delora.app import page, shown
from delora.formats.files import AdapterError
from delora.formats.native import is_adapter
from delora.models import adapters
from delora.tasks import classification, parse
from delora.training import experiments
from delora.training.runs import RunError
from tests import tiny
from tests.cases import shake

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
HOSTILE_NAME = "<script>document.title=1</script>"
HOSTILE = '<img src=x onerror="document.title=1"><script>document.title=1</script> fine film'


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished run whose adapter changes what the classifier says, and whose name is hostile."""
    folder = tmp_path_factory.mktemp("app")
    sources = tiny.make_model(folder / "model"), tiny.make_sentences(folder / "data")
    values = tiny.recipe(*sources, folder / "out", train__epochs=1) | {"name": HOSTILE_NAME}
    experiment, out = parse(values), folder / "out"
    experiments.train(classification, experiment, Console(quiet=True))
    model = delora.load(classification.base(experiment), out / "adapter")
    with torch.no_grad():
        for placed in adapters(model).values():
            if not placed.whole:
                shake(placed)
    delora.save(model, out / "adapter")
    return out


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
    with pytest.raises(RunError, match="is no run's folder"):
        shown(tmp_path)
    with pytest.raises(AdapterError):
        shown(done, tmp_path / "nothing")
    assert is_adapter(done / "adapter")


# Sockets that Playwright and gradio's server leave to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: make test installs it where apt-get may")
def test_a_user_in_a_browser_moves_the_slider(done, tmp_path):
    what = shown(done)
    blocks = page(what)
    _, address, _ = blocks.launch(prevent_thread_lock=True, quiet=True, share=False, server_name="127.0.0.1")
    try:
        asyncio.run(in_a_browser(what, address, tmp_path / "app.png"))
    finally:
        blocks.close()
        del blocks
        gc.collect()  # the sockets that are left warn here, not in another test


async def in_a_browser(what, address, picture):
    """What a user does. Not by the synchronous interface: its greenlets confuse the compiler of Python 3.11."""
    from playwright.async_api import async_playwright, expect

    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    async with async_playwright() as play:
        browser = await play.chromium.launch(executable_path=CHROMIUM, args=[*flags, "--no-first-run"])
        tab = await browser.new_page()
        asked: list[str] = []
        tab.on("request", lambda request: asked.append(request.url))
        await tab.goto(address)
        await expect(tab.locator("#ask")).to_be_visible(timeout=30_000)
        title = await tab.title()
        assert "<script>" in title  # the name is shown as it is, and does nothing

        async def ask(prompt: str, strength: float) -> None:
            """Both sides come to say what the model says at 0 and at the strength."""
            expected = {"#base": what.at(0.0, prompt), "#adapted": what.at(strength, prompt)}
            await tab.locator("#prompt textarea").fill(prompt)
            number = tab.locator("#strength input[type=number]")
            await number.fill(str(strength))
            await number.press("Tab")
            await tab.locator("#ask").click()
            for side, said in expected.items():
                for label, share in said.items():
                    words = re.compile(rf"{label}\s*{round(100 * share)}%", re.IGNORECASE)
                    await expect(tab.locator(side)).to_contain_text(words, timeout=30_000)

        await ask("a fine film", 0.0)
        await ask("a fine film", 1.0)
        await tab.screenshot(path=picture, full_page=True)
        await ask(HOSTILE, 2.0)
        assert await tab.title() == title
        assert all(url.startswith((address, "data:", "blob:")) for url in asked), asked
        await browser.close()
