"""The page's files and samples, as far as they can be checked without a browser."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image
from server_double import Double, serving

import edgeprune.runtime.server
from edgeprune.tabletop.dataset import scenes
from edgeprune.tabletop.drawing import draw_scene

WEB = Path(edgeprune.runtime.server.__file__).parent / "web"
SCRIPTS = sorted(WEB.glob("*.js"))


class Elements(HTMLParser):
    """The ids of a page, and what its elements refer to."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.references: set[str] = set()
        self.files: set[str] = set()
        self.inline: list[str] = []
        self.feed((WEB / "index.html").read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            elif name in ("for", "aria-describedby", "aria-labelledby"):
                self.references |= set((value or "").split())
            elif name in ("src", "href"):
                self.files.add(value or "")
            elif name == "style" or name.startswith("on"):
                self.inline.append(f"{tag} {name}")


@pytest.fixture(scope="module")
def elements() -> Elements:
    return Elements()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    double = Double()
    double.name = "tabletop"
    with serving(double, keys=["sesame"]) as address:
        yield address


def test_whatever_is_referred_to_is_there(elements: Elements) -> None:
    assert len(elements.ids) == len(set(elements.ids))
    assert elements.references <= set(elements.ids)
    used = {found for script in SCRIPTS for found in re.findall(r'\$\("([\w-]+)"\)', script.read_text())}
    assert used and used <= set(elements.ids)
    styled = set(re.findall(r"#([a-z][\w-]*)(?=[^{};]*\{)", (WEB / "style.css").read_text()))
    assert styled <= set(elements.ids)


def test_the_policy_allows_the_page(elements: Elements, url: str) -> None:
    answer = httpx.get(url)
    assert not elements.inline  # style-src and script-src are 'self'
    assert "script-src 'self'; style-src 'self'" in answer.headers["content-security-policy"]
    imported = {name for script in SCRIPTS for name in re.findall(r'from "\./(.*?)"', script.read_text())}
    assert imported and imported < {script.name for script in SCRIPTS}
    for name in elements.files | imported:
        served = httpx.get(f"{url}/{name}")
        assert served.status_code == 200 and served.content == (WEB / name).read_bytes()


def test_samples_have_pictures_and_true_answers(url: str) -> None:
    head = {"authorization": "Bearer sesame"}
    found = httpx.get(f"{url}/samples", headers=head).json()
    assert "toy model" in found["note"] and len(found["samples"]) == 6
    for sample, (scene, questions) in zip(found["samples"], scenes(7, 6), strict=True):
        answer = httpx.get(f"{url}/{sample['picture']}", headers=head)
        assert answer.headers["content-type"] == "image/png"
        assert (np.asarray(Image.open(io.BytesIO(answer.content))) == np.asarray(draw_scene(scene))).all()
        true = {question.prompt: question.answer for question in questions}
        asked = {question["prompt"]: question["answer"] for question in sample["questions"]}
        assert len(asked) >= 4 and asked.items() <= true.items()
    assert httpx.get(f"{url}/samples/6.png", headers=head).status_code == 404
    assert httpx.get(f"{url}/samples/x.png", headers=head).status_code == 404
    assert [httpx.get(url + path).status_code for path in ("/samples", "/samples/0.png")] == [401, 401]


@pytest.mark.parametrize(("name", "kind"), [("double", "image"), ("tabletop", "video")])
def test_other_models_have_no_samples(name: str, kind: str) -> None:
    double = Double(kind=kind)
    double.name = name
    with serving(double) as address:
        assert httpx.get(f"{address}/samples").json() == {"note": "", "samples": []}


def test_the_larger_model_of_tabletop_has_samples_too() -> None:
    double = Double(kind="image")
    double.name = "tabletop-l"
    with serving(double) as address:
        found = httpx.get(f"{address}/samples").json()
    assert found["note"].startswith("tabletop-l is a toy model") and len(found["samples"]) == 6
