"""The pass over samples: interrupted and resumed, in shards, on a local Ray cluster, with the same result bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgeprune.calibration.collect.run import CollectOptions, collect, collect_on_ray, load_or_collect
from edgeprune.calibration.data.samples import Sample, draw_samples, read_samples
from edgeprune.calibration.data.statistics import Statistics
from edgeprune.calibration.replay.episodes import Recorder
from edgeprune.calibration.replay.reference import reference_model
from edgeprune.checkpoint.loading import LoadedModel, resolve_model
from edgeprune.errors import UsageError
from edgeprune.io.progress import SILENT
from edgeprune.plan import Geometry
from edgeprune.plan.presets import ranked_plan, unpruned_plan
from edgeprune.runtime import Runtime
from edgeprune.runtime.generation.sequence import SequenceState
from edgeprune.runtime.media.images import read_image
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


@pytest.mark.parametrize("after", [1, pytest.param(11, marks=pytest.mark.slow)])
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


@pytest.mark.slow
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


@pytest.fixture(scope="module")
def pair(samples: list[Sample]) -> Sample:
    """Return a question about two images."""
    images = tuple(sorted({image for sample in samples for image in sample.images}, key=str))
    return replace(samples[0], image=images)


@pytest.fixture(scope="module")
def recorder(tiny: LoadedModel) -> Recorder:
    return Recorder(tiny, ranked_plan(unpruned_plan("qwen2_vl", 3, GEOMETRY)), 6, "cpu")


def test_each_image_is_recorded_beside_the_others(tiny: LoadedModel, recorder: Recorder, pair: Sample) -> None:
    recordings = recorder.record(pair, "exact")
    model = reference_model(tiny, unpruned_plan("qwen2_vl", 3, GEOMETRY))
    answer = Runtime(model).generate([read_image(image) for image in pair.images], pair.prompt, prune=False, max_tokens=6)
    messages: list[Any] = [{"role": "user", "content": [{"type": "image"}] * 2 + [{"type": "text", "text": pair.prompt}]}]
    length = len(model.prompts.every_id(messages))
    assert len(recordings) == 2 and answer.receipt.generated_tokens == recordings[0].steps + 1
    forced = recorder.teacher_forced_logits(pair, model.tokenizer.encode(answer.text)[: recordings[0].steps], "exact")
    for recording in recordings:
        segments = recorder.segments(recording)
        positions = torch.cat([part.positions for part in segments], dim=1)
        assert positions.shape[1] == length == len(recording.prefill.text_groups) + GEOMETRY.tokens
        assert len(torch.unique(positions, dim=1)[0]) == length
        assert np.bincount(recording.prefill.text_groups.sum(axis=1).astype(int)).tolist() == [9, length - 2 * 9]
        replayed = recorder.replay(recording, text_groups=recording.groups)
        torch.testing.assert_close(replayed.logits[0], forced[1:], rtol=1e-4, atol=1e-4)
        assert replayed.split is not None
        torch.testing.assert_close(replayed.split.sum(dim=-1), torch.ones(replayed.split.shape[:-1]))
    one, other = (recording.prefill.visual.positions[0, 0] for recording in recordings)
    assert one < other


def test_what_is_run_ahead_is_not_recorded(recorder: Recorder, pair: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = recorder.record(pair, "exact")
    ahead = SequenceState._ahead
    monkeypatch.setattr(SequenceState, "_ahead", lambda self, start, later, **kind: ahead(self, start, later[:0], **kind))
    for one, other in zip(recorder.record(pair, "exact"), expected, strict=True):
        np.testing.assert_array_equal(one.prefill.prefix.positions, other.prefill.prefix.positions)
        np.testing.assert_allclose(one.prefill.prefix.embeds, other.prefill.prefix.embeds)


def test_a_sample_of_several_images_counts_once(tiny: LoadedModel, pair: Sample, tmp_path: Path) -> None:
    twice = collect(tiny, [pair, replace(pair, image=pair.images[:1])], REQUEST, tmp_path / "s")
    assert twice.samples == 2
    assert np.allclose(twice.mean("gamma").sum(axis=1), 1.0)
    assert np.allclose(twice.total("habit").sum(axis=2), 2)
    assert np.allclose(np.nansum(twice.attention_split()[0], axis=1), 1.0, atol=1e-5)


def test_a_part_is_added_to_statistics_of_the_same_samples(
    tiny: LoadedModel, samples: list[Sample], whole: Statistics, tmp_path: Path
) -> None:
    def load(chosen: list[Sample], *parts: str) -> Statistics:
        return load_or_collect(tiny, chosen, replace(REQUEST, parts=parts), tmp_path / "s", SILENT)

    first = load(samples, "withdrawals")
    assert first.parts == ("withdrawals",) and set(first.sums) == {"withdrawn_kl"}
    with pytest.raises(UsageError, match="has no statistics of caches, and is of other samples"):
        load(samples[1:], "caches")
    more = load(samples, "caches", "attention")
    assert more.parts == ("attention", "caches", "withdrawals") and more.samples == 13
    assert all(np.array_equal(sums, whole.sums[name]) for name, sums in more.sums.items())
    assert more.fingerprint == whole.fingerprint and [path.name for path in tmp_path.iterdir()] == ["s"]
    assert same(load([], "attention"), more)  # nothing is missing, so no samples are needed
    with pytest.raises(UsageError, match="These statistics have the parts attention, caches, withdrawals"):
        more + whole
