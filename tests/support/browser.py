"""A headless Chromium for tests of pages; skips where there is none."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

NARROW_PX, WIDE_PX = 360, 1440
HEIGHT_PX = 900
# Other work on the machine makes pages slow, not wrong.
TIMEOUT_MILLISECONDS = 120_000


@contextmanager
def browser() -> Iterator[Any]:
    """A browser; its pages are made with `new_page`. Skips without Playwright or Chromium."""
    playwright = pytest.importorskip("playwright.sync_api", reason="the test extra is not installed")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no Chromium on this machine")
    with playwright.sync_playwright() as session:
        # Sound needs no device, and may start without a click.
        options = ["--no-sandbox", "--mute-audio", "--autoplay-policy=no-user-gesture-required"]
        chromium = session.chromium.launch(executable_path=path, args=options)
        try:
            yield chromium
        finally:
            chromium.close()


@contextmanager
def watched_page(chromium: Any, width_px: int, offline: bool) -> Iterator[tuple[Any, list[str]]]:
    """A page, and the list of everything that went wrong on it: console errors, exceptions, failed requests."""
    context = chromium.new_context(viewport={"width": width_px, "height": HEIGHT_PX}, offline=offline)
    page = context.new_page()
    page.set_default_timeout(TIMEOUT_MILLISECONDS)
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("requestfailed", lambda request: wrong.append(f"{request.url[:100]} {request.failure}"))
    try:
        yield page, wrong
    finally:
        context.close()


def assert_pictures_are_seen(page: Any, width_px: int) -> None:
    """Every picture has been decoded, lies within the width of the window and is not a mere line."""
    boxes = page.eval_on_selector_all(
        "img",
        """images => images.map(image => {
            const box = image.getBoundingClientRect();
            return [image.complete && image.naturalWidth > 0, box.left, box.right, box.height];
        })""",
    )
    assert boxes
    for decoded, left, right, height in boxes:
        assert decoded
        assert 0 <= left < right <= width_px
        assert height > 40


def assert_page_does_not_scroll_sideways(page: Any, width_px: int) -> None:
    """What is too wide for the window scrolls by itself."""
    assert page.evaluate("document.documentElement.scrollWidth") <= width_px


def assert_players_play(page: Any) -> None:
    """Every player knows how long its sound is, and time passes when it is started."""
    played = page.evaluate(
        """async () => {
            const results = [];
            for (const player of document.querySelectorAll('audio')) {
                player.muted = true;
                await player.play();
                await new Promise(done => setTimeout(done, 300));
                results.push([player.duration, player.currentTime, player.error === null]);
                player.pause();
            }
            return results;
        }"""
    )
    assert played
    for duration, moment, sound in played:
        assert duration > 0
        assert moment > 0
        assert sound
