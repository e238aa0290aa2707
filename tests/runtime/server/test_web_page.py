"""The page in a real browser: a picture in, a streamed answer out, and what was kept drawn over it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from server_double import Double, serving

from edgeprune.plan import Cut
from edgeprune.runtime.server import ServerLimits

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
from playwright.sync_api import Browser, Page, expect, sync_playwright  # noqa: E402 (only where it is there)

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FAKE_CAMERA = ("--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no browser is installed: none of {', '.join(BROWSERS)}")
    with sync_playwright() as each:
        opened = each.chromium.launch(executable_path=found, args=["--no-sandbox", *FAKE_CAMERA])
        yield opened
        opened.close()


@pytest.fixture
def double() -> Double:
    return Double(tiers=("high", "middle", "low"))


@pytest.fixture
def page(browser: Browser, double: Double) -> Iterator[Page]:
    """Yield the page of a server; nothing may be wrong in its console."""
    wrong: list[str] = []
    with serving(double) as url:
        opened = browser.new_page()
        opened.set_default_timeout(10_000)
        opened.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        opened.on("pageerror", lambda error: wrong.append(str(error)))
        opened.goto(url)
        expect(opened.locator("#model")).to_have_text("double")
        yield opened
        opened.close()
    assert not wrong


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    file = tmp_path / "white.png"
    Image.new("RGB", (84, 56), (255, 255, 255)).save(file)
    return file


def ask(page: Page, words: str) -> None:
    page.fill("#prompt", words)
    page.click("#ask")


def shown(page: Page) -> np.ndarray:
    """Return the mean brightness of each visual token's place on the stage [2, 3]."""
    values: list[Any] = page.locator("#canvas").evaluate(
        """canvas => [0, 1, 2, 3, 4, 5].map(token => {
            const [w, h] = [canvas.width / 3, canvas.height / 2];
            const at = [(token % 3 + .5) * w, (Math.floor(token / 3) + .5) * h];
            return canvas.getContext("2d").getImageData(at[0], at[1], 1, 1).data[0];
        })"""
    )
    return np.array(values).reshape(2, 3)


def test_a_file_is_asked_about_and_what_was_kept_is_drawn(page: Page, double: Double, picture: Path) -> None:
    expect(page.locator("#ask")).to_be_disabled()
    page.set_input_files("#file", picture)
    expect(page.locator("#kept")).to_be_hidden()
    ask(page, "a red cup")
    expect(page.locator("#answer")).to_have_text("a red cup")
    expect(page.locator("#progress")).to_contain_text("done")
    expect(page.locator("#kept-text")).to_have_text("3 of 6 visual tokens (50 %)")
    expect(page.locator("#visual")).to_have_text(re.compile("^6 → 4"))
    expect(page.locator("#legend")).to_contain_text("prefill")
    assert (shown(page) > 200).tolist() == [[True, True, False], [False, False, True]]
    page.select_option("#cut", "")
    assert (shown(page) > 200).all()
    (image,) = double.asked[0]["image"]
    assert image.size == (84, 56) and double.asked[0]["tier"] is None


def test_a_picture_of_another_shape_gets_bars_or_is_cropped(page: Page, double: Double, tmp_path: Path) -> None:
    Image.new("RGB", (30, 90), (255, 255, 255)).save(tmp_path / "tall.png")
    page.set_input_files("#file", tmp_path / "tall.png")
    for crop, corner in (False, 128), (True, 255):
        page.locator("#crop").set_checked(crop)
        ask(page, "cup")
        expect(page.locator("#progress")).to_contain_text("done")
        assert double.asked[-1]["image"][0].getpixel((1, 1))[0] == corner


def test_the_budget(page: Page, double: Double, picture: Path) -> None:
    page.set_input_files("#file", picture)
    slider = page.get_by_label("Budget")
    expect(page.locator("#tier-name")).to_have_text("best in time")
    slider.focus()
    for name in ("high", "middle", "low"):
        page.keyboard.press("ArrowLeft")
        expect(page.locator("#tier-name")).to_have_text(name)
    ask(page, "cup")
    expect(page.locator("#progress")).to_contain_text("done")
    assert double.asked[-1]["tier"] == "low"


def test_settings_reach_the_runtime(page: Page, double: Double, picture: Path) -> None:
    page.set_input_files("#file", picture)
    page.get_by_text("Settings").click()
    page.get_by_label("Longest answer, tokens").fill("9")
    page.get_by_label("Temperature").fill("0.5")
    page.get_by_label("Deadline, ms").fill("60000")
    page.get_by_label("Prune visual tokens").uncheck()
    ask(page, "cup")
    expect(page.locator("#progress")).to_contain_text("done")
    asked = double.asked[-1]
    assert (asked["max_tokens"], asked["temperature"], asked["prune"]) == (9, 0.5, False) and asked["deadline_ms"] > 50_000


def test_stop_ends_the_answer(page: Page, double: Double, picture: Path) -> None:
    page.set_input_files("#file", picture)
    ask(page, "endless")
    expect(page.locator("#answer")).to_contain_text("endless endless")
    expect(page.locator("#per-token")).to_contain_text("ms")
    page.click("#stop")
    expect(page.locator("#progress")).to_have_text("stopped")
    double.wait(lambda: len(double.receipts) == 1)
    assert double.receipts[0].finish_reason == "cancelled"
    ask(page, "cup")
    expect(page.locator("#answer")).to_have_text("cup")


def test_the_camera(page: Page, double: Double) -> None:
    page.click("#camera")
    expect(page.locator("#camera")).to_have_text("Camera off")
    ask(page, "a cup")
    expect(page.locator("#progress")).to_contain_text("done")
    assert np.asarray(double.asked[0]["image"][0]).std() > 5  # the fake camera's test picture
    expect(page.locator("#camera")).to_have_text("Next picture")
    page.click("#camera")
    expect(page.locator("#kept")).to_be_hidden()
    page.click("#camera")
    expect(page.locator("#camera")).to_have_text("Camera")
    expect(page.locator("#ask")).to_be_disabled()


def test_a_key_is_asked_for(browser: Browser, picture: Path) -> None:
    with serving(Double(), keys=["sesame"]) as url:
        page = browser.new_page()
        page.goto(url)
        for key in ("wrong", "sesame"):
            expect(page.locator("#key-dialog")).to_be_visible()
            page.get_by_role("textbox", name="Key of this server").fill(key)
            page.keyboard.press("Enter")
        expect(page.locator("#model")).to_have_text("double")
        page.set_input_files("#file", picture)
        ask(page, "a cup")
        expect(page.locator("#answer")).to_have_text("a cup")
        expect(page.locator("#budget")).to_be_hidden()  # one plan
        page.close()


def test_a_refusal_is_shown(browser: Browser, picture: Path) -> None:
    with serving(Double(), limits=ServerLimits(max_pixels=10)) as url:
        page = browser.new_page()
        page.goto(url)
        expect(page.locator("#model")).to_have_text("double")
        page.set_input_files("#file", picture)
        ask(page, "a cup")
        expect(page.get_by_role("alert")).to_contain_text("--max-pixels")
        page.close()


def test_parts_and_caches_are_drawn(browser: Browser, picture: Path) -> None:
    double = Double()
    double.plan = double.plan.with_cuts(Cut("cache", "plphp", 2, 1))
    with serving(double) as url:
        page = browser.new_page(viewport={"width": 360, "height": 740}, color_scheme="dark")
        page.goto(url)
        expect(page.locator("#model")).to_have_text("double")
        page.set_input_files("#file", picture)
        ask(page, "a cup")
        expect(page.locator("#progress")).to_contain_text("done")
        names = page.locator("#cut option").all_text_contents()
        assert names == ["nothing: the input", "fastv @ layer 1", "KV caches"]
        assert page.locator("#cut").input_value() == "1"
        assert np.unique(shown(page)).size == 3  # in no cache, in one of two, in both
        assert page.evaluate_handle("document.documentElement.scrollWidth <= innerWidth").json_value()  # nothing hangs over
        page.close()


def test_the_frames_of_a_video(browser: Browser, tmp_path: Path) -> None:
    for name, grey in ("first", 90), ("second", 180):
        Image.new("RGB", (84, 56), (grey, grey, grey)).save(tmp_path / f"{name}.png")
    double = Double(kind="video")
    with serving(double) as url:
        page = browser.new_page()
        page.goto(url)
        expect(page.locator("#geometry")).to_contain_text("2 frames of 84")
        page.set_input_files("#file", tmp_path / "first.png")
        expect(page.get_by_role("alert")).to_contain_text("Choose 2 pictures")
        page.set_input_files("#file", [tmp_path / "first.png", tmp_path / "second.png"])
        ask(page, "a cup")
        expect(page.locator("#progress")).to_contain_text("done")
        assert [frame.getpixel((0, 0))[0] for frame in double.asked[0]["image"]] == [90, 180]
        assert (shown(page) == 90).sum() == 3  # all that was kept is of the first frame
        page.get_by_label("Part of the picture").select_option("1")
        assert shown(page).max() < 90
        page.select_option("#cut", "")
        assert (shown(page) == 180).all()
        page.locator("#file").set_input_files([])
        page.click("#camera")
        expect(page.locator("#camera")).to_have_text("Camera off")
        ask(page, "a cup")
        expect(page.locator("#progress")).to_contain_text("done")
        first, second = (np.asarray(frame) for frame in double.asked[1]["image"])
        assert (first != second).any()
        page.close()


def test_the_page_asks_nobody_else(page: Page, picture: Path) -> None:
    seen: list[str] = []
    page.on("request", lambda request: seen.append(request.url))
    page.reload()
    expect(page.locator("#model")).to_have_text("double")
    page.set_input_files("#file", picture)
    ask(page, "a cup")
    expect(page.locator("#progress")).to_contain_text("done")
    own = page.url
    assert seen and all(address.startswith(own) for address in seen)
