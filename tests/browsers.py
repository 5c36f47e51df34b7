"""Chromium for tests, and everything that a page should not do."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

WRITTEN = re.compile(r"characters? written")
CHROMIUM = Path("/usr/bin/chromium")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """One Chromium for all tests."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM.exists():
        pytest.skip(f"there is no browser {CHROMIUM}")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@contextmanager
def watched(browser: Any, *allowed: str) -> Iterator[tuple[Any, list[str]]]:
    """Yield a browser context and the list of its troubles, which must be empty at the end.

    Args:
        browser: see `browser`.
        allowed: how the addresses of requests may begin.
    """
    context = browser.new_context(reduced_motion="reduce")
    troubles: list[str] = []

    def note_request(request: Any) -> None:
        if not request.url.startswith(allowed):
            troubles.append(f"a request of {request.url[:200]}")

    def note_message(message: Any) -> None:
        if message.type in ("error", "warning"):
            troubles.append(f"{message.type}: {message.text}")

    def note_error(error: Any) -> None:
        troubles.append(f"uncaught: {error.error}")

    context.on("request", note_request)
    context.on("console", note_message)
    context.on("weberror", note_error)
    yield context, troubles
    context.close()
    assert not troubles, troubles


def write(page: Any, prompt: str, **settings: object) -> str:
    """Write from a prompt, as a user does; return the whole text."""
    page.fill("#prompt", prompt)
    page.locator("#settings").evaluate("details => { details.open = true; }")
    for name, value in settings.items():
        page.fill(f"#{name}", str(value))
    page.click("#go")
    return settled(page)


def settled(page: Any) -> str:
    """Wait until a text is finished, and return it."""
    page.locator("#text[aria-busy=false]").wait_for()
    page.locator("#status", has_text=WRITTEN).wait_for()
    return str(page.locator("#text").text_content())
