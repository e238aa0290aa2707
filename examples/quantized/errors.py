"""Compare what int4 costs a decoder: rounded to the nearest, and fitted to samples by GPTQ.

python examples/quantized/errors.py --data fit/dataset.jsonl --unseen unseen/dataset.jsonl
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from edgeprune.calibration.data.samples import Sample, WeightSamples, read_samples
from edgeprune.calibration.replay.episodes import Recorder, divergence
from edgeprune.calibration.replay.layerwise import Hessians, check_fitting, fitted_int4, named_matrices
from edgeprune.calibration.replay.reference import TorchBackend, reference_model
from edgeprune.checkpoint.loading import LoadedModel, load_model, resolve_model
from edgeprune.model.quantization import Quantized, quantize
from edgeprune.plan import KeepPlan
from edgeprune.plan.presets import unpruned_plan
from edgeprune.targets import TARGETS, Lowering

INT4 = Lowering(TARGETS["jetpack6"], "int4")


@dataclass(frozen=True)
class Loss:
    """What is lost: |X W' - X W| / |X W| by matrix, and nats of each answer's next token (KL divergence)."""

    products: dict[str, float]
    nats: list[float]


def main() -> None:
    """Print what both ways lose on samples that nothing was fitted to."""
    for way, loss in measure(*requested(__doc__)).items():
        products, nats = statistics.mean(loss.products.values()), statistics.mean(loss.nats)
        print(f"{way:10} products {products:.4f} ({len(loss.products)} matrices), answers {nats:.1e} nats a token")


def requested(description: str | None) -> tuple[LoadedModel, KeepPlan, WeightSamples, list[Sample]]:
    """Return what the command line names: a model, its plan without cuts, samples to fit to and others to measure with."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="tabletop")
    parser.add_argument("--data", type=Path, required=True, help="samples that weights or scales are fitted to")
    parser.add_argument("--unseen", type=Path, required=True, help="other samples with answers, to measure with")
    parser.add_argument("--limit", type=int, help="only the first N samples of each")
    request = parser.parse_args()
    loaded = load_model(resolve_model(request.model))
    plan = unpruned_plan(loaded.folder.model_type, loaded.decoder_shape().layers, loaded.geometry(None))
    data = WeightSamples.read(request.data, "exact")
    limited = replace(data, samples=data.samples[: request.limit])
    return loaded, plan, limited, read_samples(request.unseen)[: request.limit]


def measure(loaded: LoadedModel, plan: KeepPlan, data: WeightSamples, unseen: list[Sample]) -> dict[str, Loss]:
    """Return what int4 loses by "rounding" and by "gptq"."""
    check_fitting(loaded, INT4)
    matrices: dict[str, Any] = named_matrices(loaded.family.decoder().layers)
    rounded = {name: quantize(matrix.weight, "int4", torch.float16) for name, matrix in matrices.items()}
    with TemporaryDirectory() as folder, fitted_int4(loaded, plan, data, INT4, Path(folder)):
        fitted = {name: matrix.weight.stored.quantized(0, matrix.out_features) for name, matrix in matrices.items()}
    recorder, hessians = Recorder(loaded, plan, 1, "cpu"), Hessians(matrices)
    with hessians.collecting():
        expected = logits(recorder, unseen)
    found: dict[str, Loss] = {}
    for way, quantized in {"rounding": rounded, "gptq": fitted}.items():
        products = {}
        for name, matrix in matrices.items():
            products[name] = relative_error(matrix.weight.detach(), quantized[name].restored(), hessians.of(name))
        actual = quantized_logits(recorder, loaded, plan, unseen, quantized)
        nats = [float(divergence(*both).mean()) for both in zip(expected, actual, strict=True)]
        found[way] = Loss(products, nats)
    return found


def logits(recorder: Recorder, samples: list[Sample]) -> list[torch.Tensor]:
    """Return the logits of the answers to samples [tokens, vocabulary], before each token and after the last."""
    tokenizer = recorder.tokenizer
    return [recorder.teacher_forced_logits(sample, tokenizer.encode(sample.answer), "exact") for sample in samples]


def quantized_logits(
    recorder: Recorder, loaded: LoadedModel, plan: KeepPlan, samples: list[Sample], quantized: Mapping[str, Quantized]
) -> list[torch.Tensor]:
    """Return the logits of a decoder with these int4 matrices."""
    backend = reference_model(loaded, plan).backend
    assert isinstance(backend, TorchBackend)
    with backend.lowered(INT4, quantized):
        return logits(recorder, samples)


def relative_error(weight: torch.Tensor, restored: torch.Tensor, hessian: torch.Tensor | None) -> float:
    """Return |X W' - X W| / |X W| from X^T X."""
    assert hessian is not None
    lost, whole = (float(((matrix @ hessian) * matrix).sum()) for matrix in (restored - weight, weight))
    return float((lost / whole) ** 0.5)


if __name__ == "__main__":
    main()
