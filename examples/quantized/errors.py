"""Compare what int4 costs each matrix of a decoder: rounded to the nearest, and fitted to samples by GPTQ.

python examples/quantized/errors.py --data fit/dataset.jsonl --unseen unseen/dataset.jsonl
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

from edgeprune.calibration.data.samples import WeightSamples, read_samples
from edgeprune.calibration.replay.episodes import ask
from edgeprune.calibration.replay.layerwise import Hessians, check_fitting, fitted_int4
from edgeprune.calibration.replay.reference import TorchBackend, reference_model
from edgeprune.checkpoint.loading import LoadedModel, load_model, resolve_model
from edgeprune.model.quantization import quantize
from edgeprune.plan import KeepPlan
from edgeprune.plan.presets import unpruned_plan
from edgeprune.targets import TARGETS, Lowering

INT4 = Lowering(TARGETS["jetpack6"], "int4")


def main() -> None:
    """Print the relative error of the products of all matrices, on samples that nothing was fitted to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="tabletop")
    parser.add_argument("--data", type=Path, required=True, help="samples that weights are fitted to")
    parser.add_argument("--unseen", type=Path, required=True, help="other samples, to measure with")
    parser.add_argument("--limit", type=int, help="only the first N samples of each")
    request = parser.parse_args()
    loaded = load_model(resolve_model(request.model))
    plan = unpruned_plan(loaded.folder.model_type, loaded.decoder_shape().layers, loaded.geometry(None))
    data = WeightSamples.read(request.data, "exact")
    errors = measure(loaded, plan, replace(data, samples=data.samples[: request.limit]), request.unseen, request.limit)
    for name, by_matrix in errors.items():
        print(f"{name:10} {statistics.mean(by_matrix.values()):.4f} (mean of {len(by_matrix)} matrices)")


def measure(
    loaded: LoadedModel, plan: KeepPlan, data: WeightSamples, unseen: Path, limit: int | None = None
) -> dict[str, dict[str, float]]:
    """Return the relative error of the products of each matrix: "rounding" and "gptq"."""
    check_fitting(loaded, INT4)
    weights, hessians = met(loaded, plan, unseen, limit)
    rounded = {name: quantize(weight, "int4", torch.float16).restored() for name, weight in weights.items()}
    with TemporaryDirectory() as folder, fitted_int4(loaded, plan, data, INT4, Path(folder)):
        fitted = {name: matrix.weight.stored.rows(0, matrix.out_features) for name, matrix in matrices(loaded, plan).items()}
    return {
        way: {name: relative_error(weights[name], restored[name], hessians.of(name)) for name in weights}
        for way, restored in (("rounding", rounded), ("gptq", fitted))
    }


def met(loaded: LoadedModel, plan: KeepPlan, unseen: Path, limit: int | None) -> tuple[dict[str, torch.Tensor], Hessians]:
    """Return the weights, and X^T X of what they multiply in the answers of the model as it is."""
    model = reference_model(loaded, plan)
    linear = matrices(loaded, plan)
    hessians = Hessians(linear)
    with torch.no_grad(), hessians.collecting():
        for sample in read_samples(unseen)[:limit]:
            ask(model, sample, "exact", most=16)
    return {name: matrix.weight.detach() for name, matrix in linear.items()}, hessians


def matrices(loaded: LoadedModel, plan: KeepPlan) -> dict[str, nn.Linear]:
    """Return the linear layers of the decoder that int4 quantizes, by their names in the graph."""
    backend = reference_model(loaded, plan).backend
    assert isinstance(backend, TorchBackend)
    return {name: matrix for name, matrix in backend.matrices().items() if name.startswith("decoder.layers.")}


def relative_error(weight: torch.Tensor, restored: torch.Tensor, hessian: torch.Tensor | None) -> float:
    """Return |X W' - X W| / |X W| from X^T X."""
    assert hessian is not None
    lost, whole = (float(((matrix @ hessian) * matrix).sum()) for matrix in (restored - weight, weight))
    return (lost / whole) ** 0.5


if __name__ == "__main__":
    main()
