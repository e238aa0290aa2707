"""Spread the pass over samples on a Ray cluster: one task a shard, the statistics added here."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from edgeprune.calibration.collecting import Request, collect
from edgeprune.calibration.samples import Sample
from edgeprune.calibration.statistics import Statistics
from edgeprune.checkpoint.loading import ModelFolder, load_model
from edgeprune.errors import EdgePruneError, require_extra

LOCAL = "local"
SHARDS_EACH = 4  # per CPU of the cluster: small enough that a slow machine does not hold up the rest


def collect_on_ray(
    model: ModelFolder, samples: Sequence[Sample], request: Request, output: Path, address: str, progress: Callable[[int], None]
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


def collect_shard(model: ModelFolder, samples: list[Sample], request: Request) -> Statistics:
    """Return the statistics of one shard; what runs on a machine of the cluster."""
    with tempfile.TemporaryDirectory() as folder:
        return collect(load_model(model), samples, request, Path(folder) / "shard.safetensors")
