"""Stop strings that overlap themselves or each other, against a search in all of the text so far."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
    watch, shown, end = StopStringFilter(stops), "", 0
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


@given(st.text("abc", max_size=40), st.lists(st.text("abc", min_size=1, max_size=6), max_size=6), st.integers(1, 9))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_random_texts_stop_strings_and_pieces(text: str, stops: list[str], size: int) -> None:
    check(text or "a", stops, size)


class Counted(list[int]):
    """A list that counts how often it is read."""

    reads = 0

    def __getitem__(self, index: Any) -> Any:
        self.reads += 1
        return super().__getitem__(index)


@pytest.mark.parametrize("letters", ["a", "ab"])
def test_the_work_is_linear_in_the_text(letters: str) -> None:
    stops = [letters * 500 + str(number) for number in range(64)]  # all of the text may begin all of them
    watch, shown = StopStringFilter(stops), ""
    watch._fallback = fallbacks = Counted(watch._fallback)
    for _ in range(4000):
        shown += watch.push(letters)
        assert len(watch._pending) <= 500 * len(letters)
    assert shown + watch.flush() == letters * 4000
    assert fallbacks.reads <= 4000 * len(letters)


def test_an_automaton_is_no_larger_than_its_stop_strings() -> None:
    watch = StopStringFilter(["abcd", "abce", "abcd"])
    assert len(watch._next) == 6
