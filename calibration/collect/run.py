"""One pass over the calibration samples: resumable, in shards, with constant memory. On a Ray cluster, one task for each shard."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from edgeprune.calibration.collect.measure import SampleMeter
from edgeprune.calibration.data.samples import Sample
from edgeprune.calibration.data.statistics import Statistics, StatisticsSource
from edgeprune.calibration.replay.episodes import Recorder
from edgeprune.checkpoint.loading import LoadedModel, ModelFolder, load_model
from edgeprune.errors import EdgePruneError, UsageError, require_extra
from edgeprune.io.files import move
from edgeprune.plan import Geometry
from edgeprune.plan.presets import ranked_plan, unpruned_plan

SAVE_EVERY = 10  # samples, at most, that an interruption loses
Progress = Callable[[int], None]

LOCAL = "local"
SHARDS_EACH = 4  # per CPU of the cluster: small enough that a slow machine does not hold up the rest


@dataclass(frozen=True)
class CollectOptions:
    """How to collect. `shard` (i, n): every n-th sample from the i-th on, counted from 1. `rows`, `reduce`, `spread`: how
    caches are ranked.
    """

    geometry: Geometry
    rows: str = "last"
    reduce: str = "mean"
    spread: bool = False
    shard: tuple[int, int] = (1, 1)
    max_tokens: int = 128
    fit: str = "exact"
    device: str = "cpu"

    def __post_init__(self) -> None:
        index, count = self.shard
        if not 1 <= index <= count:
            raise UsageError(f"There is no shard {index}/{count}.", hint="Shards are 1/n to n/n.")
        if self.device.partition(":")[0] not in ("cpu", "cuda"):
            raise UsageError(f"Unknown device {self.device!r}.", hint="Devices are cpu and cuda.")
        if self.device != "cpu" and not torch.cuda.is_available():
            raise UsageError("torch finds no CUDA device here.", hint="Leave --device out, or install a CUDA build of torch.")


class ProgressReporter(Protocol):
    """Where long work says how far it is: `count` begins something and returns the function that is told how much of it is done."""

    def count(self, what: str, total: int) -> Callable[[int], None]:
        """Begin."""
        ...


def load_or_collect(
    loaded: LoadedModel,
    samples: Sequence[Sample],
    request: CollectOptions,
    path: Path,
    progress: ProgressReporter,
    ray_address: str | None = None,
) -> Statistics:
    """Return the statistics at a path when they are of this model and request, or newly collected ones, written there.

    `ray_address`: of a cluster to collect them on. Raises UsageError when those at the path are others.
    """
    if path.is_file():
        found = Statistics.load(path)
        found.check(source_of(loaded, request))
        return found
    index, count = request.shard
    done = progress.count("samples", len(samples[index - 1 :: count]))
    if ray_address is not None:
        return collect_on_ray(loaded.folder, samples, request, path, ray_address, done)
    return collect(loaded, samples, request, path, done)


def source_of(loaded: LoadedModel, request: CollectOptions) -> StatisticsSource:
    """Return what statistics of a model under a request belong to."""
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
    loaded: LoadedModel, samples: Sequence[Sample], request: CollectOptions, output: Path, progress: Progress = lambda done: None
) -> Statistics:
    """Measure the shard's samples, write the statistics to `output` and return them.

    An interrupted pass leaves a file beside `output` from which the same request goes on where it stopped, with the same result.
    `progress` is called with the number of samples done.
    """
    index, count = request.shard
    mine = list(samples)[index - 1 :: count]
    if not mine:
        raise UsageError(f"Shard {index}/{count} of {len(samples)} samples is empty.", hint="Ask for fewer shards.")
    source = source_of(loaded, request)
    partial = output.with_name(f".{output.name}.{_digest(source, mine, request)}.partial")
    statistics = Statistics.load(partial) if partial.is_file() else Statistics.empty(source)
    base = unpruned_plan(source.family, source.layers, request.geometry)
    recorder = Recorder(loaded, ranked_plan(base, **source.ranking), request.max_tokens, request.device)
    meter = SampleMeter(loaded, base, source, recorder)
    try:
        for sample in mine[statistics.samples :]:
            progress(statistics.samples)
            statistics = statistics.with_sample(meter.measure(recorder.record(sample, request.fit)))
            if statistics.samples % SAVE_EVERY == 0:
                statistics.save(partial)
    except KeyboardInterrupt:
        statistics.save(partial)
        raise
    progress(statistics.samples)
    statistics.save(partial)
    move(partial, output)
    return statistics


def draw_samples(samples: Sequence[Sample], limit: int | None, seed: int) -> list[Sample]:
    """Return `limit` samples drawn by a seed, in their order in the file; all of them without a limit."""
    if limit is None or limit >= len(samples):
        return list(samples)
    drawn = np.random.default_rng(seed).choice(len(samples), limit, replace=False)
    return [samples[index] for index in sorted(drawn)]


def _digest(source: StatisticsSource, samples: Sequence[Sample], request: CollectOptions) -> str:
    # Another request must not go on from this one's file.
    content = [asdict(source), asdict(request), [(str(sample.image), sample.prompt) for sample in samples]]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]


def collect_on_ray(
    model: ModelFolder,
    samples: Sequence[Sample],
    request: CollectOptions,
    output: Path,
    address: str,
    progress: Callable[[int], None],
) -> Statistics:
    """Do as `collect`, on the cluster at `address` ("local" starts one here); every machine must see the model and the images.

    Raises EdgePruneError when the cluster cannot be reached.
    """
    require_extra("ray", "ray")
    import ray

    try:
        ray.init(address=None if address == LOCAL else address, log_to_driver=False, include_dashboard=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise EdgePruneError(
            f"Cannot reach the Ray cluster at {address}: {error}.", hint="Use --ray local to start one here."
        ) from error
    try:
        count = min(len(samples), max(1, int(ray.cluster_resources().get("CPU", 1))) * SHARDS_EACH)
        task = ray.remote(max_retries=3)(collect_shard)
        pending = [task.remote(model, list(samples), replace(request, shard=(i, count))) for i in range(1, count + 1)]
        total: Statistics | None = None
        while pending:
            done, pending = ray.wait(pending)
            for part in ray.get(done):
                total = part if total is None else total + part
            progress(0 if total is None else total.samples)
    finally:
        ray.shutdown()
    assert total is not None
    total.save(output)
    return total


def collect_shard(model: ModelFolder, samples: list[Sample], request: CollectOptions) -> Statistics:
    """Return the statistics of one shard; what runs on a machine of the cluster."""
    with tempfile.TemporaryDirectory() as folder:
        return collect(load_model(model), samples, request, Path(folder) / "shard.safetensors")
