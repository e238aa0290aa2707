"""Stop strings that overlap themselves or each other, against a search in all of the text so far."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import pytest

from edgeprune.runtime.text.tokenizer import StopStringFilter

WORDS = ["".join(letters) for length in range(1, 8) for letters in product("ab", repeat=length)]
STOPS = [word for word in WORDS if len(word) <= 4]


def expected(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """Return what may be shown of all the text so far, and whether a stop string is in it: nothing is remembered."""
    found = [text.index(stop) for stop in stops if stop in text]
    if found:
        return text[: min(found)], True
    held = max(length for length in range(len(text) + 1) if not length or any(s.startswith(text[-length:]) for s in stops))
    return text[: len(text) - held], False


def check(text: str, stops: Sequence[str], size: int) -> None:
    watch, shown = StopStringFilter(stops), ""
    for end in range(size, len(text) + size, size):
        shown += watch.push(text[end - size : end])
        assert (shown, watch.stopped) == expected(text[:end], stops), (text[:end], stops, size)
        if watch.stopped:
            break
    shown += watch.flush()
    assert shown == (expected(text[:end], stops)[0] if watch.stopped else text), (text, stops, size)


@pytest.mark.parametrize(
    ("text", "stop", "pieces"),
    [
        ("aaab", "aab", ["", "", "a", ""]),  # the third "a" is the second of a match that began later
        ("ababac", "abac", ["", "", "", "ab", "", ""]),
        ("\n\n\n.", "\n\n.", ["", "", "\n", ""]),
    ],
)
def test_a_match_that_begins_inside_one_that_failed(text: str, stop: str, pieces: list[str]) -> None:
    watch = StopStringFilter([stop])
    assert [watch.push(letter) for letter in text] == pieces
    assert watch.stopped
    assert watch.flush() == ""


@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_short_text_and_stop_string(size: int) -> None:
    for text, stop in product(WORDS, STOPS):
        check(text, [stop], size)


def test_two_stop_strings_that_overlap_each_other() -> None:
    for text in WORDS[-128:]:
        for stops in product(STOPS[2:14], repeat=2):
            check(text, stops, 1)
