"""The page in a real browser: a picture in, streamed answers out, and what was kept drawn over it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from server_double import Double, serving

from edgeprune.plan import Cut
from edgeprune.runtime import PreparedImage
from edgeprune.runtime.server import ServerLimits

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
from playwright.sync_api import Browser, Page, expect  # noqa: E402 (only where it is there)


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
        expect(opened.locator("#model")).to_contain_text("double")
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


def pictures(asked: dict[str, Any]) -> np.ndarray:
    """Return the one picture of a question, or its frames [frames, height, width, 3], as they reached the model."""
    (image,) = (part for part in asked["parts"] if isinstance(part, PreparedImage))
    return image.patches()


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
    expect(page.locator("#kept-text")).to_have_text("3 of 6 visual tokens (50 %); the rest is dark")
    expect(page.get_by_role("row", name="reading the prompt")).to_contain_text("ms")
    assert (shown(page) > 200).tolist() == [[True, True, False], [False, False, True]]
    page.select_option("#cut", "")
    assert (shown(page) > 200).all()
    assert pictures(double.asked[0]).shape == (1, 56, 84, 3) and double.asked[0]["tier"] is None


def test_both_answers_stand_side_by_side(page: Page, double: Double, picture: Path) -> None:
    page.set_input_files("#file", picture)
    ask(page, "a red cup")
    expect(page.locator("#progress")).to_contain_text("done")
    expect(page.locator("#answer")).to_have_text("a red cup")
    expect(page.locator("#answer-whole")).to_have_text("a red cup")
    assert [asked["prune"] for asked in double.asked] == [True, False]
    cells = page.get_by_role("row", name="visual tokens in a layer").get_by_role("cell")
    assert cells.all_text_contents() == ["4 of 6", "6 of 6"]
    first, second = (page.locator(place).bounding_box() for place in ("#first", "#second"))
    assert first and second and first["y"] == second["y"] and first["x"] + first["width"] < second["x"]
    page.select_option("#mode", "pruned")
    ask(page, "a blue cup")
    expect(page.locator("#progress")).to_contain_text("done")
    expect(page.locator("#second")).to_be_hidden()
    page.select_option("#mode", "whole")
    ask(page, "a green cup")
    expect(page.locator("#progress")).to_contain_text("done")
    expect(page.locator("#first")).to_have_text(re.compile("Without pruning\\s+a green cup"))
    assert [asked["prune"] for asked in double.asked] == [True, False, True, False]


def test_a_picture_of_another_shape_gets_bars_or_is_cropped(page: Page, double: Double, tmp_path: Path) -> None:
    Image.new("RGB", (30, 90), (255, 255, 255)).save(tmp_path / "tall.png")
    page.set_input_files("#file", tmp_path / "tall.png")
    expect(page.locator("#crop")).to_be_visible()
    for crop, corner in (False, 128), (True, 255):
        page.locator("#crop").set_checked(crop)
        ask(page, "cup")
        expect(page.locator("#progress")).to_contain_text("done")
        assert pictures(double.asked[-1])[0, 1, 1, 0] == corner


def test_the_budget(page: Page, double: Double, picture: Path) -> None:
    page.set_input_files("#file", picture)
    slider = page.get_by_label("Keep")
    expect(page.locator("#tier-name")).to_have_text("automatic")
    slider.focus()
    for name in ("high", "middle", "low"):
        page.keyboard.press("ArrowLeft")
        expect(page.locator("#tier-name")).to_have_text(name)
    ask(page, "cup")
    expect(page.locator("#progress")).to_contain_text("done")
    assert [asked["tier"] for asked in double.asked] == ["low", None]  # without pruning there are no tiers


def test_settings_reach_the_runtime(page: Page, double: Double, picture: Path) -> None:
    page.set_input_files("#file", picture)
    page.get_by_text("Settings").click()
    page.get_by_label("Longest answer").fill("9")
    page.get_by_label("Temperature").fill("0.5")
    page.get_by_label("Time limit").fill("60000")
    page.get_by_role("combobox", name="Answer").select_option("without pruning")
    ask(page, "cup")
    expect(page.locator("#progress")).to_contain_text("done")
    asked = double.asked[-1]
    assert (asked["max_tokens"], asked["temperature"], asked["prune"]) == (9, 0.5, False) and asked["deadline_ms"] > 50_000


def test_stop_ends_the_answer(page: Page, double: Double, picture: Path) -> None:
    page.set_input_files("#file", picture)
    ask(page, "endless")
    expect(page.locator("#answer")).to_contain_text("endless endless")
    expect(page.get_by_role("row", name="each further token")).to_contain_text("ms")
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
    assert pictures(double.asked[0]).std() > 5  # the fake camera's test picture
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
        expect(page.locator("#model")).to_contain_text("double")
        page.set_input_files("#file", picture)
        ask(page, "a cup")
        expect(page.locator("#answer")).to_have_text("a cup")
        expect(page.locator("#budget")).to_be_hidden()  # one plan
        page.close()


def test_a_refusal_is_shown(browser: Browser, picture: Path) -> None:
    with serving(Double(), limits=ServerLimits(max_pixels=10)) as url:
        page = browser.new_page()
        page.goto(url)
        expect(page.locator("#model")).to_contain_text("double")
        page.set_input_files("#file", picture)
        ask(page, "a cup")
        expect(page.get_by_role("alert")).to_contain_text("--max-pixels")
        page.close()


@pytest.mark.parametrize(("field", "value"), [("tokens", "0"), ("tokens", "2.5"), ("temperature", "3"), ("deadline", "-1")])
def test_a_wrong_setting_is_told_beside_its_field(page: Page, double: Double, picture: Path, field: str, value: str) -> None:
    page.set_input_files("#file", picture)
    page.locator(f"#{field}").evaluate("(field, value) => { field.value = value; }", value)  # the settings are closed
    ask(page, "a cup")
    wrong = page.locator(f"#{field}-wrong")
    expect(wrong).to_be_visible()
    expect(wrong).to_contain_text("Give a")
    expect(page.locator(f"#{field}")).to_be_focused()
    expect(page.locator(f"#{field}")).to_have_accessible_description(wrong.text_content() or "?")
    assert not double.asked
    page.fill(f"#{field}", "1")
    expect(wrong).to_be_hidden()


def test_an_empty_question_is_told(page: Page, picture: Path) -> None:
    expect(page.locator("#hint")).to_have_text("Choose a picture first.")
    page.set_input_files("#file", picture)
    expect(page.locator("#hint")).to_be_hidden()
    ask(page, "  ")
    expect(page.locator("#prompt-wrong")).to_have_text("Type a question first.")


def test_what_the_server_says_of_a_field_stands_beside_it(browser: Browser, picture: Path) -> None:
    double = Double(tiers=("high", "low"))
    with serving(double) as url:
        page = browser.new_page()
        page.goto(url)
        expect(page.locator("#model")).to_contain_text("double")
        page.set_input_files("#file", picture)
        double.tiers = ("other",)
        page.get_by_label("Keep").press("ArrowLeft")
        ask(page, "a cup")
        expect(page.get_by_role("alert")).to_contain_text("no tier 'high'")
        expect(page.locator("#tier-wrong")).to_contain_text("no tier 'high'")
        page.close()


def test_parts_and_caches_are_drawn(browser: Browser, picture: Path) -> None:
    double = Double()
    double.plan = double.plan.with_cuts(Cut("cache", "plphp", 2, 1))
    with serving(double) as url:
        page = browser.new_page(viewport={"width": 360, "height": 740}, color_scheme="dark")
        page.goto(url)
        expect(page.locator("#model")).to_contain_text("double")
        page.set_input_files("#file", picture)
        ask(page, "a cup")
        expect(page.locator("#progress")).to_contain_text("done")
        names = page.locator("#cut option").all_text_contents()
        assert names == ["the whole picture", "kept by fastv @ layer 1", "kept by KV caches"]
        expect(page.locator("#kept-text")).to_contain_text("the brighter, the more")
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
        expect(page.locator("#model")).to_contain_text("2 frames of 84")
        page.set_input_files("#file", tmp_path / "first.png")
        expect(page.get_by_role("alert")).to_contain_text("Choose 2 pictures")
        page.set_input_files("#file", [tmp_path / "first.png", tmp_path / "second.png"])
        ask(page, "a cup")
        expect(page.locator("#progress")).to_contain_text("done")
        assert pictures(double.asked[0])[:, 0, 0, 0].tolist() == [90, 180]
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
        first, second = pictures(double.asked[2])
        assert (first != second).any()
        page.close()


def sampled() -> Double:
    """Return a model with the name of the bundled one, which has samples."""
    double = Double(tiers=("high", "low"))
    double.name = "tabletop"
    return double


def test_a_sample_and_its_questions(browser: Browser) -> None:
    double = sampled()
    with serving(double) as url:
        page = browser.new_page()
        page.goto(url)
        expect(page.locator("#note")).to_contain_text("toy model")
        samples = page.get_by_role("button", name=re.compile("^Sample "))
        expect(samples).to_have_count(6)
        samples.nth(2).click()
        expect(samples.nth(2)).to_have_attribute("aria-pressed", "true")
        page.get_by_role("button", name="What does the label say?").click()
        expect(page.locator("#truth")).to_have_text("The true answer: B8")
        assert len(double.asked) == 2
        ask(page, "Something else")
        expect(page.locator("#progress")).to_contain_text("done")
        expect(page.locator("#truth")).to_be_hidden()
        page.close()


@pytest.mark.parametrize("height", [844, 664])  # a phone's screen, and what its browser leaves of it
def test_on_a_phone_the_answer_is_in_sight(browser: Browser, height: int) -> None:
    with serving(sampled()) as url:
        page = browser.new_page(viewport={"width": 390, "height": height})
        page.goto(url)
        page.get_by_role("button", name="Sample 1 of 6").click()
        page.get_by_role("button", name="What does the label say?").click()
        expect(page.locator("#truth")).to_be_visible()
        for place in ("#answer", "#answer-whole"):
            expect(page.locator(place)).to_be_in_viewport(ratio=1)
        expect(page.locator("#canvas")).to_be_in_viewport(ratio=0.4)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_axe_finds_nothing(browser: Browser, scheme: Any, width: int) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed").Axe()
    with serving(sampled()) as url:
        page = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)

        def findings() -> Any:
            return axe.run(page).response["violations"]

        page.goto(url)
        expect(page.locator("#samples button")).to_have_count(6)
        assert findings() == []
        page.get_by_role("button", name="Sample 1 of 6").click()
        page.get_by_role("button", name="What does the label say?").click()
        expect(page.locator("#truth")).to_be_visible()
        assert findings() == []
        page.get_by_text("Settings").click()
        page.get_by_text("Ask from a program").click()
        page.fill("#tokens", "0")
        ask(page, "")
        expect(page.locator("#tokens-wrong")).to_be_visible()
        assert findings() == []
        page.close()


def test_the_page_asks_nobody_else(page: Page, picture: Path) -> None:
    seen: list[str] = []
    page.on("request", lambda request: seen.append(request.url))
    page.reload()
    expect(page.locator("#model")).to_contain_text("double")
    page.set_input_files("#file", picture)
    ask(page, "a cup")
    expect(page.locator("#progress")).to_contain_text("done")
    own = page.url
    assert seen and all(address.startswith(own) for address in seen)
