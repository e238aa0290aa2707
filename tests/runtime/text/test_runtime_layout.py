"""Where visual tokens lie among text: spans, the text between them, and marks that neighbours share."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split

from edgeprune.bundle import ImageText
from edgeprune.errors import BundleError
from edgeprune.plan import Geometry, View
from edgeprune.runtime.text.prompt import ImagePlaceholders
from edgeprune.runtime.text.tokenizer import TextTokenizer

LETTERS = {letter: number for number, letter in enumerate("abcdmi ?")}
IMAGE = LETTERS["i"]
PLAIN = Geometry(28, 28, 14, 1)
TILED = Geometry(28, 28, 14, 1, (View(0, 0, 14, 28, 1, 2), View(14, 0, 14, 28, 1, 2)))


def layout(text: str, geometry: Geometry = PLAIN, boundary: str = "") -> ImagePlaceholders:
    tokenizer = Tokenizer(WordLevel(LETTERS, unk_token="?"))
    tokenizer.pre_tokenizer = Split("", "isolated")
    return ImagePlaceholders(ImageText("image", "<image>", text, IMAGE, boundary), geometry, TextTokenizer(tokenizer))


def ids(text: str) -> list[int]:
    return [LETTERS[letter] for letter in text]


def test_one_span_holds_all_views_or_each_has_its_own() -> None:
    assert layout("i").spans == (PLAIN.layout,)
    assert layout("i", TILED).spans == (TILED.views,)
    assert layout("ambi", PLAIN).spans == (PLAIN.layout,)
    assert layout("aibi", TILED).spans == ((TILED.views[0],), (TILED.views[1],))


def test_every_row_may_have_its_own_span() -> None:
    grid, tiled = Geometry(56, 84, 14, 2), Geometry(56, 168, 14, 2, (View(0, 0, 56, 84, 2, 3), View(0, 84, 56, 84, 2, 3)))
    rows = [(View(0, 0, 28, 84, 1, 3),), (View(28, 0, 28, 84, 1, 3),)]
    assert list(layout("ibi", grid).spans) == rows
    assert layout("iiii", tiled).spans[2] == (View(0, 84, 28, 84, 1, 3),) and len(layout("iiii", tiled).spans) == 4
    assert grid.spans(3) is None


def test_a_text_that_does_not_fit_the_views_is_refused() -> None:
    with pytest.raises(BundleError, match="3 image tokens for 2 views"):
        layout("iii", TILED)


def test_turns_have_the_text_before_between_and_after() -> None:
    tiled = layout("aibi", TILED)
    assert tiled.split_at_images(ids("ddaibicc")) == [[ids("dda"), ids("b"), ids("cc")]]
    assert tiled.split_at_images(ids("daibicaibid")) == [[ids("da"), ids("b"), ids("ca")], [[], ids("b"), ids("d")]]
    assert tiled.split_at_images(ids("dd")) == []


def test_images_are_counted_whole() -> None:
    tiled = layout("aibi", TILED)
    assert [tiled.count(ids(text)) for text in ("dd", "aibi", "aibicaibi", "ai")] == [0, 1, 2, -1]


@pytest.mark.parametrize(
    ("prompt", "expanded"),
    [
        ("<image>what", "m<i>m what"),
        ("<image> what", "m<i>m what"),
        ("<image><image>what", "m<i>m<i>m what"),
        ("<image><end>", "m<i>m<end>"),
        ("<image>", "m<i>m"),
    ],
)
def test_neighbours_share_a_boundary_and_words_stand_apart(prompt: str, expanded: str) -> None:
    assert layout("m<i>m", boundary="m").expand(prompt) == expanded


def test_without_a_boundary_nothing_but_the_placeholder_changes() -> None:
    assert layout("mim").expand("a<image><image>b") == "amimmimb"
