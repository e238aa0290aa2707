"""Print what 8-bit activations are expected to cost the products of a model, with and without SmoothQuant's factors.

python examples/quantized/activations.py tabletop --data fit/dataset.jsonl --limit 8
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from edgeprune.calibration.data.samples import WeightSamples
from edgeprune.calibration.replay.ranges import collect_ranges, roundings_tried
from edgeprune.checkpoint.loading import LoadedModel, load_model, resolve_model
from edgeprune.plan import KeepPlan
from edgeprune.plan.presets import unpruned_plan


def main() -> None:
    """Print the largest relative error by kind of input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="tabletop")
    parser.add_argument("--data", type=Path, required=True, help="samples whose activations are measured")
    parser.add_argument("--limit", type=int, help="only the first N samples")
    request = parser.parse_args()
    data = WeightSamples.read(request.data, "exact")
    loaded = load_model(resolve_model(request.model))
    plan = unpruned_plan(loaded.folder.model_type, loaded.decoder_shape().layers, loaded.geometry(None))
    for kind, (plain, smoothed) in measure(loaded, plan, replace(data, samples=data.samples[: request.limit])).items():
        print(f"{kind:28} {plain:6.1%} {smoothed:6.1%}")


def measure(loaded: LoadedModel, plan: KeepPlan, data: WeightSamples) -> dict[str, tuple[float, float]]:
    """Return the largest expected error of a product by kind of input, with one scale and smoothed."""
    matrices, ranges = collect_ranges(loaded, plan, data)
    found: dict[str, tuple[float, float]] = {}
    for first, tried in roundings_tried(matrices, ranges):
        errors = [max(each.values()) for _, each in tried]
        kind = f"{first.partition('.')[0]}, {'norms' if ranges.normed[first] else first.rpartition('.')[2]}"
        before = found.get(kind, (0.0, 0.0))
        found[kind] = max(before[0], errors[0]), max(before[1], min(errors))
    return found


if __name__ == "__main__":
    main()
