"""Sampling picks what it should, repeats by seed, and stop strings never leak."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.errors import EdgePruneError, UsageError
from edgeprune.runtime.generation.request import RequestLimits
from edgeprune.runtime.generation.sampling import Sampler, Sampling
from edgeprune.runtime.text.grammar import TokenConstraint
from edgeprune.runtime.text.tokenizer import StopStringFilter

LOGITS = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))


def picks(count: int, **options: Any) -> list[int]:
    sampler = Sampler(Sampling(**options))
    return [sampler.sample(LOGITS) for _ in range(count)]


def test_greedy_takes_the_highest_and_the_lowest_id_on_ties() -> None:
    assert picks(1) == [0]
    assert Sampler(Sampling()).sample(np.array([1.0, 3.0, 3.0])) == 1


def test_frequencies_follow_the_probabilities() -> None:
    counts = np.bincount(picks(4000, temperature=1.0, seed=0), minlength=4) / 4000
    assert np.abs(counts - [0.5, 0.3, 0.15, 0.05]).max() < 0.03


def test_a_high_temperature_flattens() -> None:
    assert np.bincount(picks(2000, temperature=50.0, seed=0), minlength=4).min() > 400


@pytest.mark.parametrize(("top_p", "allowed"), [(0.01, {0}), (0.5, {0}), (0.79, {0, 1}), (0.9, {0, 1, 2}), (1.0, {0, 1, 2, 3})])
def test_the_nucleus_is_the_smallest_set_with_the_mass(top_p: float, allowed: set[int]) -> None:
    assert set(picks(600, temperature=1.0, top_p=top_p, seed=1)) == allowed


def in_nucleus(weights: np.ndarray, top_p: float) -> np.ndarray:
    """Return the ids of the nucleus by a sort: the plain definition."""
    order = np.argsort(-weights, kind="stable")
    mass = np.cumsum(weights[order].astype(np.float64))
    return order[: int(np.searchsorted(mass, top_p * mass[-1])) + 1]


@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.5, 0.1])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_samples_follow_the_distribution(temperature: float, top_p: float) -> None:
    logits = np.random.default_rng(3).normal(size=40, scale=2).astype(np.float32)
    weights = np.exp(logits.astype(np.float64) / temperature)
    nucleus = in_nucleus(weights, top_p)
    expected = np.zeros(40)
    expected[nucleus] = weights[nucleus] / weights[nucleus].sum()
    sampler = Sampler(Sampling(temperature=temperature, top_p=top_p, seed=11))
    count = 20_000
    counts = np.bincount([sampler.sample(logits) for _ in range(count)], minlength=40)
    assert not counts[expected == 0].any()
    likely = expected * count >= 5  # for the others the statistic has no chi-square distribution
    statistic = float(((counts - count * expected)[likely] ** 2 / (count * expected[likely])).sum())
    free = max(int(likely.sum()) - 1, 0)
    assert statistic <= free + 4 * (2 * free) ** 0.5


@given(
    st.one_of(
        st.lists(st.floats(-200, 20, width=32), min_size=1, max_size=40),
        st.lists(st.sampled_from([0.0, -1.0, -2.0]), min_size=1, max_size=40),  # ties
    ),
    st.floats(0.01, 0.99),
    st.integers(0, 1000),
)
@settings(max_examples=400, deadline=None, derandomize=True)
def test_a_sample_is_the_fastest_of_the_nucleus(values: list[float], top_p: float, seed: int) -> None:
    logits = np.array(values, np.float32)
    weights = np.exp(logits - logits.max())
    speeds = weights / np.random.default_rng(seed).standard_exponential(len(weights))
    nucleus = np.sort(in_nucleus(weights, top_p))
    assert Sampler(Sampling(temperature=1.0, top_p=top_p, seed=seed)).sample(logits) == nucleus[speeds[nucleus].argmax()]


def test_rounding_does_not_change_the_sample_of_a_seed() -> None:
    exact = np.random.default_rng(5).normal(size=2000, scale=3).astype(np.float32)
    rounded = exact * (1 + np.random.default_rng(6).normal(size=2000, scale=1e-7).astype(np.float32))
    for top_p in (1.0, 0.9):
        first, second = (Sampler(Sampling(temperature=1.0, top_p=top_p, seed=2)) for _ in range(2))
        same = [first.sample(exact) == second.sample(rounded) for _ in range(300)]
        assert sum(same) >= 299


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 0}, {"temperature": 1.0, "top_p": 0.5, "seed": 0}])
def test_infinite_logits_are_certain_or_impossible(options: dict[str, Any]) -> None:
    sampler, low, high = Sampler(Sampling(**options)), -np.inf, np.inf
    assert sampler.sample(np.array([1, high, 2], np.float32)) == 1
    assert sampler.sample(np.array([low, low, 2], np.float32)) == 2
    assert sampler.sample(np.array([low, low, low], np.float32)) == 0


def test_the_same_seed_repeats() -> None:
    assert picks(50, temperature=1.0, seed=7) == picks(50, temperature=1.0, seed=7) != picks(50, temperature=1.0, seed=8)


def test_logits_that_are_no_numbers_are_refused() -> None:
    for constraint in (None, cast(TokenConstraint, Odd())):
        with pytest.raises(EdgePruneError, match="not numbers"):
            Sampler(Sampling(), constraint).sample(np.array([0.0, 1.0, np.nan]))


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"max_tokens": 0},
        {"seed": -1},
        {"temperature": True},
        {"temperature": "1"},
        {"temperature": 10**400},
        {"top_p": None},
        {"top_p": float("nan")},
        {"top_p": True},
        {"max_tokens": 3.5},
        {"max_tokens": 3.0},
        {"max_tokens": True},
        {"max_tokens": float("nan")},
        {"max_tokens": "3"},
        {"max_tokens": None},
        {"seed": 1.0},
        {"seed": False},
        {"seed": float("nan")},
        {"seed": "1"},
        {"stop": "text"},
        {"stop": b"text"},
        {"stop": None},
        {"stop": 5},
        {"stop": {"text"}},
        {"stop": [""]},
        {"stop": ["text", b"text"]},
        {"stop": ["text", None]},
        {"stop": ["\ud800"]},
        {"stop": ["text"] * 65},
        {"stop": ["x" * 1025]},
        {"choices": []},
        {"choices": "yes"},
        {"choices": ["yes", ""]},
        {"choices": ["yes", 5]},
        {"choices": ["\ud800"]},
        {"choices": ["yes"], "json_schema": {}},
        {"json_schema": "{}"},
        {"json_schema": []},
        {"json_schema": {"const": float("nan")}},
        {"json_schema": {"const": object()}},
        {"json_schema": {"const": "\ud800"}},
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        Sampling(**options)


@pytest.mark.parametrize(
    "limits",
    [
        {"tier": 3},
        {"tier": b"fast"},
        {"deadline_ms": "x"},
        {"deadline_ms": True},
        {"deadline_ms": float("inf")},
        {"max_kv_bytes": 1.5},
        {"max_kv_bytes": True},
        {"max_kv_bytes": "1"},
    ],
)
def test_limits_of_the_wrong_type_are_refused(limits: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(limits))):
        RequestLimits(**limits)


def test_numbers_of_numpy_are_numbers() -> None:
    sampling = Sampling(temperature=np.float32(0.5), top_p=np.float64(0.9), seed=np.int64(1), max_tokens=np.int32(3))
    assert Sampler(sampling).sample(LOGITS) == Sampler(Sampling(temperature=0.5, top_p=0.9, seed=1)).sample(LOGITS)
    assert RequestLimits(deadline_ms=np.float32(5), max_kv_bytes=np.int64(9)).max_kv_bytes == 9


class Odd:
    """Allows odd ids, until three were taken."""

    def __init__(self) -> None:
        self.taken: list[int] = []

    @property
    def done(self) -> bool:
        return len(self.taken) == 3

    def allowed_ids(self, size: int) -> np.ndarray:
        return np.arange(1, size, 2)

    def accept(self, token: int) -> None:
        self.taken.append(token)


@pytest.mark.parametrize(
    ("options", "seen"), [({}, {1}), ({"temperature": 1.0, "seed": 0}, {1, 3}), ({"temperature": 2.0, "top_p": 0.5}, {1})]
)
def test_a_constraint_leaves_the_best_of_what_it_allows(options: dict[str, Any], seen: set[int]) -> None:
    constraint = Odd()
    sampler = Sampler(Sampling(**options), cast(TokenConstraint, constraint))
    assert not sampler.done
    assert {sampler.sample(LOGITS) for _ in range(3)} <= seen
    assert sampler.done
    assert set(constraint.taken) | {sampler.sample(LOGITS) for _ in range(200)} == seen
    assert len(constraint.taken) == 203


def test_a_constraint_holds_where_the_model_rules_everything_out() -> None:
    sampler = Sampler(Sampling(), cast(TokenConstraint, Odd()))
    assert sampler.sample(np.array([5.0, -np.inf, 3.0, -np.inf])) == 1


def test_a_free_answer_is_never_done() -> None:
    assert not Sampler(Sampling()).done


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_a_stop_string_never_leaks(size: int) -> None:
    text = "one two STOP three"
    watch = StopStringFilter(["STOP", "nothing"])
    shown = "".join(watch.push(text[i : i + size]) for i in range(0, len(text), size)) + watch.flush()
    assert shown == "one two "
    assert watch.stopped


def test_a_beginning_of_a_stop_string_is_shown_in_the_end() -> None:
    watch = StopStringFilter(["STOP"])
    assert watch.push("one ST") == "one "
    assert watch.push("ILL") == "STILL"
    assert watch.push(" STO") == " "
    assert watch.flush() == "STO"


def test_the_first_stop_string_wins() -> None:
    watch = StopStringFilter(["cc", "b"])
    assert watch.push("abcc") == "a"


def test_a_tiny_temperature_is_greedy() -> None:
    assert Sampler(Sampling(temperature=1e-320, seed=1)).sample(np.array([1.0, 3.0, 2.0], np.float32)) == 1
