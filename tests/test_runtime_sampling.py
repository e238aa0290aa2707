"""Sampling picks what it should, repeats by seed, and stop strings never leak."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edgeprune.errors import EdgePruneError, UsageError
from edgeprune.runtime.sampling import Sampler, Sampling, StopWatch

LOGITS = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))


def picks(count: int, **options: Any) -> list[int]:
    sampler = Sampler(Sampling(**options))
    return [sampler.pick(LOGITS) for _ in range(count)]


def test_greedy_takes_the_highest_and_the_lowest_id_on_ties() -> None:
    assert picks(1) == [0]
    assert Sampler(Sampling()).pick(np.array([1.0, 3.0, 3.0])) == 1


def test_frequencies_follow_the_probabilities() -> None:
    counts = np.bincount(picks(4000, temperature=1.0, seed=0), minlength=4) / 4000
    assert np.abs(counts - [0.5, 0.3, 0.15, 0.05]).max() < 0.03


def test_a_high_temperature_flattens() -> None:
    assert np.bincount(picks(2000, temperature=50.0, seed=0), minlength=4).min() > 400


@pytest.mark.parametrize(("top_p", "allowed"), [(0.01, {0}), (0.5, {0}), (0.79, {0, 1}), (0.9, {0, 1, 2}), (1.0, {0, 1, 2, 3})])
def test_the_nucleus_is_the_smallest_set_with_the_mass(top_p: float, allowed: set[int]) -> None:
    assert set(picks(600, temperature=1.0, top_p=top_p, seed=1)) == allowed


def test_the_same_seed_repeats() -> None:
    assert picks(50, temperature=1.0, seed=7) == picks(50, temperature=1.0, seed=7) != picks(50, temperature=1.0, seed=8)


def test_logits_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(EdgePruneError, match="not numbers"):
        Sampler(Sampling()).pick(np.array([0.0, np.nan]))


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"max_tokens": 0},
        {"seed": -1},
        {"stop": "text"},
        {"stop": [""]},
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        Sampling(**options)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_a_stop_string_never_leaks(size: int) -> None:
    text = "one two STOP three"
    watch = StopWatch(["STOP", "nothing"])
    shown = "".join(watch.push(text[i : i + size]) for i in range(0, len(text), size)) + watch.flush()
    assert shown == "one two "
    assert watch.stopped


def test_a_beginning_of_a_stop_string_is_shown_in_the_end() -> None:
    watch = StopWatch(["STOP"])
    assert watch.push("one ST") == "one "
    assert watch.push("ILL") == "STILL"
    assert watch.push(" STO") == " "
    assert watch.flush() == "STO"


def test_the_first_stop_string_wins() -> None:
    watch = StopWatch(["cc", "b"])
    assert watch.push("abcc") == "a"
