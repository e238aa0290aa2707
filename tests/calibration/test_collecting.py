"""The pass over samples: interrupted and resumed, in shards, on a local Ray cluster, with the same result bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgeprune.calibration.collect.run import CollectOptions, collect, collect_on_ray
from edgeprune.calibration.data.samples import Sample, draw_samples, read_samples
from edgeprune.calibration.data.statistics import Statistics
from edgeprune.checkpoint.loading import LoadedModel, resolve_model
from edgeprune.errors import UsageError
from edgeprune.plan import Geometry
from edgeprune.tabletop.dataset import write_dataset

GEOMETRY = Geometry(84, 84, 14, 2)
REQUEST = CollectOptions(GEOMETRY, rows="peak", spread=True, max_tokens=4)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    folder = tmp_path_factory.mktemp("data") / "scenes"
    write_dataset(folder, 2, 5)
    return read_samples(folder / "dataset.jsonl")[:13]


@pytest.fixture(scope="module")
def whole(tiny: LoadedModel, samples: list[Sample], tmp_path_factory: pytest.TempPathFactory) -> Statistics:
    return collect(tiny, samples, REQUEST, tmp_path_factory.mktemp("whole") / "s")


def same(left: Statistics, right: Statistics) -> bool:
    return left.samples == right.samples and all(np.array_equal(sums, right.sums[name]) for name, sums in left.sums.items())


def test_the_sums_make_sense(whole: Statistics) -> None:
    assert whole.samples == 13
    assert np.allclose(whole.mean("gamma").sum(axis=1), 1.0)
    assert np.allclose(whole.total("habit").sum(axis=2), 13)
    assert (np.diff(whole.mean("coverage"), axis=2) >= 0).all()
    assert (whole.mean("withdrawn_kl") > 0).all()
    assert (whole.mean("cache_kl")[:, 0] > 0).all()
    assert np.allclose(np.nansum(whole.attention_split()[0], axis=1), 1.0, atol=1e-5)
    assert whole.mean("fitprune")[0].tolist() == [9.0, 9.0, 9.0]


@pytest.mark.parametrize("after", [1, 11])
def test_an_interrupted_pass_resumes(
    after: int, tiny: LoadedModel, samples: list[Sample], whole: Statistics, tmp_path: Path
) -> None:
    def interrupt(done: int) -> None:
        if done == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(tiny, samples, REQUEST, tmp_path / "s", interrupt)
    assert not (tmp_path / "s").exists()
    seen: list[int] = []
    assert same(collect(tiny, samples, REQUEST, tmp_path / "s", seen.append), whole)
    assert seen[0] == after
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_another_request_does_not_go_on_from_it(tiny: LoadedModel, samples: list[Sample], tmp_path: Path) -> None:
    def interrupt(done: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(tiny, samples, REQUEST, tmp_path / "s", interrupt)
    seen: list[int] = []
    collect(tiny, samples[:3], REQUEST, tmp_path / "s", seen.append)
    assert seen[0] == 0


def test_shards_add_up_to_the_whole(tiny: LoadedModel, samples: list[Sample], whole: Statistics, tmp_path: Path) -> None:
    parts = [
        collect(tiny, samples, CollectOptions(GEOMETRY, rows="peak", spread=True, max_tokens=4, shard=(i, 3)), tmp_path / str(i))
        for i in (1, 2, 3)
    ]
    assert same(parts[2] + parts[0] + parts[1], whole)


@pytest.mark.slow
def test_a_ray_cluster_gives_the_same(tiny_folder: Path, samples: list[Sample], whole: Statistics, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    found = collect_on_ray(resolve_model(str(tiny_folder)), samples, REQUEST, tmp_path / "s", "local", lambda done: None)
    assert found.samples == 13
    for name, sums in whole.sums.items():
        assert np.allclose(found.total(name), sums / 2.0**32, atol=1e-4), name


def test_impossible_shards_are_refused(tiny: LoadedModel, samples: list[Sample], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no shard 3/2"):
        CollectOptions(GEOMETRY, shard=(3, 2))
    with pytest.raises(UsageError, match="is empty"):
        collect(tiny, samples[:2], CollectOptions(GEOMETRY, shard=(3, 3)), tmp_path / "s")


def test_samples_are_drawn_by_the_seed(samples: list[Sample]) -> None:
    first, again, other = (draw_samples(samples, 5, seed) for seed in (0, 0, 1))
    assert first == again != other
    assert [samples.index(sample) for sample in first] == sorted(samples.index(sample) for sample in first)
    assert draw_samples(samples, None, 0) == samples
