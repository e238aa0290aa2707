"""Statistics: sums that add exactly, survive being written, and know what they belong to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgeprune.calibration.data.statistics import STEPS, Statistics, StatisticsSource, merge_files
from edgeprune.errors import UsageError
from edgeprune.plan import Geometry

SOURCE = StatisticsSource("qwen2_vl", 3, 2, "abc", Geometry(84, 112, 14, 2), "last", "mean", False)


def some(count: int, seed: int) -> Statistics:
    rng = np.random.default_rng(seed)
    statistics = Statistics.empty(SOURCE)
    for _ in range(count):
        statistics = statistics.with_sample({name: rng.random(shape) for name, shape in SOURCE.shapes().items()})
    return statistics


def same(left: Statistics, right: Statistics) -> bool:
    return left.samples == right.samples and all(np.array_equal(sums, right.sums[name]) for name, sums in left.sums.items())


def test_adding_is_exact_in_any_order() -> None:
    parts = [some(3, seed) for seed in range(4)]
    forward = parts[0] + parts[1] + parts[2] + parts[3]
    assert same(forward, parts[3] + (parts[1] + parts[0]) + parts[2])
    assert forward.samples == 12


def test_means_are_those_of_the_samples() -> None:
    rng = np.random.default_rng(0)
    values = [{name: rng.random(shape) for name, shape in SOURCE.shapes().items()} for _ in range(5)]
    statistics = Statistics.empty(SOURCE)
    for value in values:
        statistics = statistics.with_sample(value)
    assert np.allclose(statistics.mean("cache_kl"), np.mean([value["cache_kl"] for value in values], axis=0), atol=1e-9)


def test_files_survive(tmp_path: Path) -> None:
    statistics = some(2, 1)
    statistics.save(tmp_path / "s")
    loaded = Statistics.load(tmp_path / "s")
    assert same(loaded, statistics) and loaded.source == SOURCE


def test_merging_files_adds_them(tmp_path: Path) -> None:
    parts = [some(2, seed) for seed in range(3)]
    for index, part in enumerate(parts):
        part.save(tmp_path / str(index))
    merged = merge_files([tmp_path / str(index) for index in range(3)], tmp_path / "all")
    assert same(merged, parts[0] + parts[1] + parts[2]) and same(Statistics.load(tmp_path / "all"), merged)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weights_sha256": "other"}, "another weights sha256"),
        ({"layers": 4}, "another layers"),
        ({"rows": "peak"}, "another rows"),
    ],
)
def test_other_sources_are_refused(change: dict[str, object], words: str) -> None:
    other = Statistics.empty(replace(SOURCE, **change))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=words):
        some(1, 0) + other


@pytest.mark.parametrize("content", [b"", b"hello", b"\x08\x00\x00\x00\x00\x00\x00\x00{}      "])
def test_broken_files_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "s").write_bytes(content)
    with pytest.raises(UsageError):
        Statistics.load(tmp_path / "s")


def test_a_missing_sum_is_refused(tmp_path: Path) -> None:
    statistics = some(1, 0)
    Statistics(SOURCE, 1, {name: sums for name, sums in statistics.sums.items() if name != "gamma"}).save(tmp_path / "s")
    with pytest.raises(UsageError, match="lacks sums"):
        Statistics.load(tmp_path / "s")


def test_no_samples_have_no_mean() -> None:
    with pytest.raises(UsageError, match="no samples"):
        Statistics.empty(SOURCE).mean("gamma")


def test_steps_that_no_answer_reached_are_unknown() -> None:
    values = {name: np.zeros(shape) for name, shape in SOURCE.shapes().items()}
    values["split"][0], values["steps"][0] = 0.25, 1.0
    split = Statistics.empty(SOURCE).with_sample(values).attention_split()
    assert np.allclose(split[0], 0.25) and np.isnan(split[1 : STEPS - 1]).all()


def test_the_prior_lists_places_by_attention() -> None:
    values = {name: np.zeros(shape) for name, shape in SOURCE.shapes().items()}
    values["habit"][1, 0] = np.arange(12)
    prior = Statistics.empty(SOURCE).with_sample(values).prior()
    assert prior[1][0] == list(range(11, -1, -1)) and prior[0][1] == list(range(12))
