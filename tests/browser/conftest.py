"""A headless Chromium. Without it, or without playwright, these tests are skipped; with CI_BROWSER=1 they fail."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
QUIET = (
    *("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"),
    *("--disable-sync", "--no-first-run"),
)


def missing(why: str) -> None:
    """Skip, or fail where a browser was promised."""
    (pytest.fail if os.environ.get("CI_BROWSER") == "1" else pytest.skip)(f"no browser: {why}")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Yield the browser; it ends with the module, for playwright holds an event loop meanwhile."""
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        missing("playwright is not installed; run: pip install playwright")
    place = next(filter(None, map(shutil.which, NAMES)), None)
    if place is None:
        missing(f"none of {', '.join(NAMES)} is on the path")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=place, args=list(QUIET))
        yield opened
        opened.close()
