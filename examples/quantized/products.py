"""Measure what narrow weights and inputs cost the products of a decoder, on samples that decided no scale.

python examples/quantized/products.py tabletop --data fit/dataset.jsonl --unseen unseen/dataset.jsonl
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from errors import requested

from edgeprune.calibration.data.samples import Sample, WeightSamples
from edgeprune.calibration.replay.episodes import Recorder
from edgeprune.calibration.replay.layerwise import named_matrices
from edgeprune.calibration.replay.ranges import input_roundings
from edgeprune.checkpoint.loading import LoadedModel
from edgeprune.model.quantization import quantize
from edgeprune.plan import KeepPlan

# By name: the kind of the weights, and whether inputs are rounded to it too.
WAYS = {"int4": ("int4", False), "fp8": ("fp8", True), "nvfp4, weights alone": ("nvfp4", False), "nvfp4": ("nvfp4", True)}


def main() -> None:
    """Print the relative error of the decoder's products: the mean over its matrices, and the largest."""
    for way, errors in measure(*requested(__doc__)).items():
        print(f"{way:22} {statistics.mean(errors.values()):6.1%} {max(errors.values()):6.1%} ({len(errors)} matrices)")


def measure(loaded: LoadedModel, plan: KeepPlan, data: WeightSamples, unseen: list[Sample]) -> dict[str, dict[str, float]]:
    """Return |X' W' - X W| / |X W| by way and matrix, where X' and W' are the rounded X and W, over all tokens of `unseen`."""
    matrices: dict[str, Any] = named_matrices(loaded.family.decoder().layers)
    roundings = {kind: input_roundings(loaded, plan, data, kind=kind).found for kind, rounds in WAYS.values() if rounds}
    lost: dict[tuple[str, str], float] = {}
    whole: dict[str, float] = {}

    def adding(name: str) -> Callable[..., None]:
        weights = {kind: quantize(matrices[name].weight, kind, torch.float16).restored() for kind, _ in WAYS.values()}

        def add(_: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            bias = matrices[name].bias
            exact = output if bias is None else output - bias
            whole[name] = whole.get(name, 0.0) + float(exact.square().sum())
            for way, (kind, rounds) in WAYS.items():
                states = roundings[kind][name].inputs(inputs[0]) if rounds else inputs[0]
                error = float((states @ weights[kind].T - exact).square().sum())
                lost[way, name] = lost.get((way, name), 0.0) + error

        return add

    recorder = Recorder(loaded, plan, 1, "cpu")
    with torch.no_grad(), ExitStack() as hooks:
        for name, matrix in matrices.items():
            hooks.callback(matrix.register_forward_hook(adding(name)).remove)
        for sample in unseen:
            recorder.teacher_forced_logits(sample, recorder.tokenizer.encode(sample.answer), "exact")
    return {way: {name: (lost[way, name] / whole[name]) ** 0.5 for name in matrices} for way in WAYS}


if __name__ == "__main__":
    main()
