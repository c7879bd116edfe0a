"""A headless Chromium, driven by Playwright, for the tests that a user's page needs."""

from __future__ import annotations

import asyncio
import gc
import shutil
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["CHROMIUM", "browsing"]

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync"]


@contextmanager
def browsing() -> Iterator[Callable[[Callable[[Any], Awaitable[None]]], None]]:
    """A function that lets ``act(tab)`` run in a new tab of one browser.

    Not by the synchronous interface: its greenlets confuse the compiler of Python 3.11.
    """
    from playwright.async_api import async_playwright

    loop = asyncio.new_event_loop()
    manager = async_playwright()
    play = loop.run_until_complete(manager.__aenter__())
    browser = loop.run_until_complete(play.chromium.launch(executable_path=CHROMIUM, args=[*FLAGS, "--no-first-run"]))

    def user(act: Callable[[Any], Awaitable[None]]) -> None:
        async def visit() -> None:
            tab = await browser.new_page()
            try:
                await act(tab)
            finally:
                await tab.close()

        loop.run_until_complete(visit())

    try:
        yield user
    finally:
        loop.run_until_complete(browser.close())
        loop.run_until_complete(manager.__aexit__())
        loop.close()
        gc.collect()  # the sockets that are left warn here, not in another test
