"""Collect statistics over the calibration samples: resumable, sharded, in constant memory; on a Ray cluster, one task per shard."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from edgeprune.calibration.cluster import Cluster
from edgeprune.calibration.collect.measure import SampleMeter
from edgeprune.calibration.data.samples import Sample, asked_digest, digest
from edgeprune.calibration.data.statistics import FINGERPRINTS, PARTS, Statistics, StatisticsSource
from edgeprune.calibration.replay.episodes import Recorder
from edgeprune.calibration.replay.reference import check_device
from edgeprune.checkpoint.loading import LoadedModel, ModelFolder, load_model
from edgeprune.errors import EdgePruneError, UsageError
from edgeprune.io.files import move
from edgeprune.io.progress import Count, Progress
from edgeprune.plan import Geometry, Weights
from edgeprune.plan.presets import ranked_plan, unpruned_plan

SAVE_EVERY = 10  # samples between checkpoints


@dataclass(frozen=True)
class CollectOptions:
    """Options of the collection.

    `shard` (i, n): every n-th sample starting with the i-th, counted from 1. `rows`, `reduce`, `spread`: the ranking of caches (see
    `edgeprune.methods.plphp`), and `weights` those of a learned one. `parts`: what is measured, of `PARTS`. Raises UsageError for
    an invalid shard or device.
    """

    geometry: Geometry
    rows: str = "last"
    reduce: str = "mean"
    spread: bool = False
    shard: tuple[int, int] = (1, 1)
    max_tokens: int = 128
    fit: str = "exact"
    device: str = "cpu"
    weights: Weights | None = None
    parts: tuple[str, ...] = tuple(PARTS)

    def __post_init__(self) -> None:
        index, count = self.shard
        if not 1 <= index <= count:
            raise UsageError(f"There is no shard {index}/{count}.", hint="Shards are 1/n to n/n.")
        check_device(self.device)


def load_or_collect(
    loaded: LoadedModel,
    samples: Sequence[Sample],
    request: CollectOptions,
    path: Path,
    progress: Progress,
    ray_address: str | None = None,
) -> Statistics:
    """Return the statistics in the file `path`; collect the parts of the request that are not there, and write them.

    `ray_address`: address of a cluster to collect on. Raises UsageError if the file belongs to another model or request, or if it
    lacks parts and was collected over other samples.
    """
    gather = partial(_collect, loaded, samples, progress=progress, ray_address=ray_address)
    if not path.is_file():
        return gather(request, path)
    statistics = Statistics.load(path)
    statistics.check(source_of(loaded, request))
    missing = tuple(part for part in request.parts if part not in statistics.parts)
    if not missing:
        return statistics
    again = "Give the samples that they were collected from, or --statistics of another name."
    if statistics.fingerprint != _fingerprint(_shard(samples, request), request):
        raise UsageError(f"{path} has no statistics of {', '.join(missing)}, and is of other samples or --max-tokens.", hint=again)
    more = path.with_name(f".{path.name}.more")
    statistics = statistics.with_parts(gather(replace(request, parts=missing), more))
    statistics.save(path)
    more.unlink()
    return statistics


def _collect(
    loaded: LoadedModel,
    samples: Sequence[Sample],
    request: CollectOptions,
    path: Path,
    progress: Progress,
    ray_address: str | None,
) -> Statistics:
    report = progress.count("statistics, samples", len(_shard(samples, request)))
    if ray_address is not None:
        return collect_on_ray(loaded.folder, samples, request, path, ray_address, report)
    return collect(loaded, samples, request, path, report)


def _shard(samples: Sequence[Sample], request: CollectOptions) -> Sequence[Sample]:
    index, count = request.shard
    return samples[index - 1 :: count]


def _fingerprint(samples: Sequence[Sample], request: CollectOptions) -> int:
    # Of what is asked about what, and of how it is answered: 0 for no samples, the sum of those of any split of them.
    total = 0
    for sample in samples:
        content = [sample.image_names, sample.prompt, request.max_tokens, request.fit]
        total += int.from_bytes(hashlib.sha256(json.dumps(content).encode()).digest()[:7], "big")
    return total % FINGERPRINTS


def source_of(loaded: LoadedModel, request: CollectOptions) -> StatisticsSource:
    """Return the source that statistics of this model and request record."""
    shape = loaded.decoder_shape()
    weights = loaded.folder.source().weights_sha256
    return StatisticsSource(
        loaded.folder.model_type,
        shape.layers,
        shape.kv_heads,
        weights,
        request.geometry,
        request.rows,
        request.reduce,
        request.spread,
    )


def collect(
    loaded: LoadedModel, samples: Sequence[Sample], request: CollectOptions, output: Path, progress: Count = lambda done: None
) -> Statistics:
    """Measure the shard's samples, write the statistics to `output` and return them.

    A run that is interrupted, or that a bad sample ends, leaves a partial file next to `output`. The same request resumes from it
    with the same result. `progress` is called with the number of finished samples. Raises UsageError if the shard is empty, and
    BadSampleError for a sample that cannot be used.
    """
    shard = _shard(list(samples), request)
    if not shard:
        index, count = request.shard
        raise UsageError(f"Shard {index}/{count} of {len(samples)} samples is empty.", hint="Ask for fewer shards.")
    source = source_of(loaded, request)
    partial = output.with_name(f".{output.name}.{_digest(source, shard, request)}.partial")
    statistics = Statistics.load(partial) if partial.is_file() else Statistics.empty(source, request.parts)
    base = unpruned_plan(source.family, source.layers, request.geometry)
    recorder = Recorder(loaded, ranked_plan(base, weights=request.weights, **source.ranking), request.max_tokens, request.device)
    meter = SampleMeter(loaded, base, source, recorder)
    try:
        for sample in shard[statistics.samples :]:
            progress(statistics.samples)
            measured = meter.measure(recorder.record(sample, request.fit), request.parts)
            statistics = statistics.with_sample(measured, _fingerprint([sample], request))
            if statistics.samples % SAVE_EVERY == 0:
                statistics.save(partial)
    except (KeyboardInterrupt, EdgePruneError):
        statistics.save(partial)
        raise
    progress(statistics.samples)
    statistics.save(partial)
    move(partial, output)
    return statistics


def _digest(source: StatisticsSource, samples: Sequence[Sample], request: CollectOptions) -> str:
    # Part of the partial file's name, so that another request does not resume from it.
    how = {**asdict(replace(request, weights=None)), "weights": request.weights and request.weights.sha256}
    return digest(asdict(source), how, asked_digest(samples))


def collect_on_ray(
    model: ModelFolder,
    samples: Sequence[Sample],
    request: CollectOptions,
    output: Path,
    address: str,
    progress: Count,
) -> Statistics:
    """Like `collect`, on the Ray cluster at `address`. Raises EdgePruneError if the cluster is unreachable."""
    total: Statistics | None = None
    with Cluster(address) as cluster:
        count = cluster.parts(len(samples))
        shards = [(model, list(samples), replace(request, shard=(index, count))) for index in range(1, count + 1)]
        for part in cluster.run(collect_shard, shards):
            total = part if total is None else total + part
            progress(total.samples)
    assert total is not None
    total.save(output)
    return total


def collect_shard(model: ModelFolder, samples: list[Sample], request: CollectOptions) -> Statistics:
    """Return the statistics of one shard. Runs as a Ray task."""
    with tempfile.TemporaryDirectory() as folder:
        return collect(load_model(model), samples, request, Path(folder) / "shard.safetensors")
