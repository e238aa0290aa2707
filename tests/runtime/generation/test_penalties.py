"""Penalties, suppressed tokens and top-k change logits as transformers' processors do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import NoBadWordsLogitsProcessor, RepetitionPenaltyLogitsProcessor, TopKLogitsWarper

from edgeprune.bundle import GenerationDefaults
from edgeprune.errors import UsageError
from edgeprune.runtime.generation.sampling import LogitPenalties, Sampler, Sampling, _keep_largest

VOCABULARY = 50


def logits(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(VOCABULARY).astype(np.float32)


@pytest.mark.parametrize("penalty", [1.05, 0.5, 3.0])
def test_repetition_is_penalized_as_in_transformers(penalty: float) -> None:
    ids, theirs = [3, 7, 7, 11], RepetitionPenaltyLogitsProcessor(penalty)
    penalties = LogitPenalties(Sampling(), GenerationDefaults(penalty))
    penalties.begin(ids)
    for step in range(5):
        given = logits(step)
        expected = theirs(torch.tensor([ids]), torch.from_numpy(given)[None])[0].numpy()
        kept = given.copy()
        np.testing.assert_array_equal(penalties.apply(given), expected)
        assert np.array_equal(given, kept)
        ids.append(int(expected.argmax()))
        penalties.add(ids[-1])


def test_a_request_may_have_another_penalty_than_the_checkpoint() -> None:
    one = LogitPenalties(Sampling(repetition_penalty=1.0), GenerationDefaults(1.5))
    one.begin([1, 2])
    assert one.apply(given := logits(0)) is given


def test_suppressed_tokens_are_those_of_bad_words() -> None:
    theirs = NoBadWordsLogitsProcessor([[5], [9]], eos_token_id=torch.tensor([2]))
    given = logits(1)
    expected = theirs(torch.tensor([[1, 2]]), torch.from_numpy(given)[None])[0].numpy()
    np.testing.assert_array_equal(LogitPenalties(Sampling(), GenerationDefaults(1.0, (5, 9))).apply(given), expected)


@pytest.mark.parametrize("count", [1, 3, VOCABULARY - 1])
def test_top_k_keeps_what_transformers_keeps(count: int) -> None:
    given = np.round(logits(2), 1)  # with ties
    expected = TopKLogitsWarper(count)(torch.tensor([[0]]), torch.from_numpy(given)[None])[0].numpy()
    np.testing.assert_array_equal(_keep_largest(given, count), expected)


def test_samples_stay_within_top_k() -> None:
    given = logits(3)
    best = set(np.argsort(-given)[:4].tolist())
    drawn = {Sampler(Sampling(temperature=3.0, top_k=4, seed=seed)).sample(given) for seed in range(200)}
    assert drawn == best


def test_presence_and_frequency_count_the_answer_alone() -> None:
    penalties = LogitPenalties(Sampling(presence_penalty=0.5, frequency_penalty=0.25), GenerationDefaults())
    penalties.begin([1, 2])
    for token in (4, 4, 6):
        penalties.add(token)
    expected = np.zeros(VOCABULARY, np.float32)
    expected[[4, 6]] = -1.0, -0.75
    np.testing.assert_allclose(penalties.apply(np.zeros(VOCABULARY, np.float32)), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": -1},
        {"top_k": 2.5},
        {"repetition_penalty": 0},
        {"repetition_penalty": float("nan")},
        {"presence_penalty": "much"},
        {"frequency_penalty": float("inf")},
    ],
)
def test_values_out_of_range_are_refused_by_name(options: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        Sampling(**options)  # type: ignore[arg-type]
