"""Find how inputs of matrices are rounded (SmoothQuant, FP8 or NVFP4), by what the matrices multiply in samples.

Each sample is one prompt without pruning, followed by its answer if it has one, as for GPTQ. The decoder runs layer by layer, so
that the weights of one layer are in memory; matrices of the vision tower are read in slices.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from edgeprune.calibration.data.samples import WeightSamples
from edgeprune.calibration.replay.layerwise import in_memory, named_matrices, prompts_and_answers, run_layer
from edgeprune.calibration.replay.products import read_when_used
from edgeprune.calibration.replay.reference import TorchBackend, reference_model
from edgeprune.checkpoint.loading import LoadedModel
from edgeprune.checkpoint.weights import InMemoryMatrix, Matrix
from edgeprune.io.progress import SILENT, Progress
from edgeprune.model import PrunedDecoder
from edgeprune.model.quantization import BLOCKS, norm_outputs
from edgeprune.model.smoothquant import STRENGTHS, InputRange, Rounding, input_scale, smoothing_factors
from edgeprune.plan import KeepPlan

LOSSY = 0.1  # relative error of products from which inputs stay float16
_LAYERS = "decoder.layers."
_HEAD = "decoder.lm_head"  # as usual, its inputs are not rounded: every token's probability is one of its products
_WORTH = 0.75  # of the error is to be left where smoothing takes a node of its own, since no norm wrote the input


@dataclass(frozen=True)
class Roundings:
    """Roundings by the names of matrices, and the expected `errors` of the `lossy` ones among the others.

    `left`: matrices of the decoder's layers that nvfp4 leaves in float16, because their inputs are no blocks of 16 or no sample had
    any.
    """

    found: Mapping[str, Rounding]
    lossy: Mapping[str, float]
    left: tuple[str, ...] = ()


class InputRanges:
    """What each of some matrices multiplies; those that multiply the same states are a group, named by the first."""

    def __init__(self, matrices: Mapping[str, nn.Linear]) -> None:
        self._matrices = matrices
        self.groups: dict[str, list[str]] = {}
        self.inputs: dict[str, InputRange] = {}  # of each group
        self.products: dict[str, float] = {}  # of each matrix without bias, a sum of squares
        self.normed: dict[str, bool] = {}  # whether a group's inputs are always what a norm wrote
        self._last: tuple[str, torch.Tensor] | None = None

    @contextmanager
    def collecting(self, norms: nn.Module) -> Iterator[None]:
        """Take in what the matrices multiply inside the block. `norms`: the module with the norms before them."""
        with norm_outputs(norms.modules()) as normed, ExitStack() as hooks:
            for name, matrix in self._matrices.items():
                hooks.callback(matrix.register_forward_hook(partial(self._add, name, normed)).remove)
            yield
        self._last = None

    def _add(
        self, name: str, normed: list[torch.Tensor], matrix: nn.Linear, inputs: tuple[torch.Tensor, ...], output: torch.Tensor
    ) -> None:
        states = inputs[0]
        product = output if matrix.bias is None else output - matrix.bias
        self.products[name] = self.products.get(name, 0.0) + float(product.square().sum())
        if self._last is not None and states is self._last[1]:
            if name not in self.groups[self._last[0]]:
                self.groups[self._last[0]].append(name)
            return
        self._last, seen = (name, states), InputRange.of(states)
        self.groups.setdefault(name, [name])
        self.inputs[name] = self.inputs[name] | seen if name in self.inputs else seen
        self.normed[name] = self.normed.get(name, True) and any(states is each for each in normed)


def input_roundings(
    loaded: LoadedModel, plan: KeepPlan, data: WeightSamples, progress: Progress = SILENT, *, kind: str = "int8"
) -> Roundings:
    """Return how to round the inputs of a model's matrices to `kind`, "int8", "fp8", or, in the decoder's layers, "nvfp4".

    The model may be one whose large matrices are still in their files. Raises BadSampleError for a sample that cannot be used.
    """
    matrices, ranges = collect_ranges(loaded, plan, data, progress)
    if kind == "int8":
        return find_roundings(matrices, ranges)
    layers = [name for name in matrices if name.startswith(_LAYERS)]
    found = _unsmoothed(ranges, kind)
    if kind == "fp8":
        return Roundings(found, {})
    found = {name: found[name] for name in layers if name in found and matrices[name].in_features % BLOCKS[kind] == 0}
    return Roundings(found, {}, tuple(name for name in layers if name not in found))


def collect_ranges(
    loaded: LoadedModel, plan: KeepPlan, data: WeightSamples, progress: Progress = SILENT
) -> tuple[dict[str, nn.Linear], InputRanges]:
    """Run the samples through a model without pruning; return its matrices, without its head, and what they multiplied."""
    unpruned = replace(plan, cuts=())
    pipeline = reference_model(loaded, unpruned)
    backend = pipeline.backend
    assert isinstance(backend, TorchBackend)
    matrices = {name: matrix for name, matrix in backend.matrices().items() if name != _HEAD}
    decoder, ranges = PrunedDecoder(loaded.family.decoder(), unpruned).eval(), InputRanges(matrices)
    with torch.no_grad():
        with read_when_used((*matrices.values(), decoder.shape.embed_tokens)), ranges.collecting(backend.tower):
            samples = prompts_and_answers(pipeline, decoder, data, progress)
        passed = progress.count("measuring inputs, layers", len(decoder.layers))
        for index in range(len(decoder.layers)):
            with in_memory(named_matrices(decoder.layers[index : index + 1], first=index)), ranges.collecting(decoder.layers):
                samples = [run_layer(decoder, index, parts) for parts in samples]
            passed(index + 1)
    return matrices, ranges


def _unsmoothed(ranges: InputRanges, kind: str) -> dict[str, Rounding]:
    # Inputs that no sample had keep their type, as in `find_roundings`.
    found = dict[str, Rounding]()
    for first, group in ranges.groups.items():
        seen = ranges.inputs[first]
        if seen.rows:
            rounding = Rounding(torch.ones_like(seen.largest), input_scale(float(seen.largest.max()), kind), kind)
            found |= dict.fromkeys(group, rounding)
    return found


def find_roundings(matrices: Mapping[str, nn.Linear], ranges: InputRanges) -> Roundings:
    """Return how to round the inputs of each group of matrices, and what is left as it is."""
    found, lossy = dict[str, Rounding](), dict[str, float]()
    for first, tried in roundings_tried(matrices, ranges):
        apart = 1.0 if ranges.normed[first] else _WORTH
        costs = [max(errors.values()) / (apart if rounding.smooths else 1.0) for rounding, errors in tried]
        rounding, errors = tried[costs.index(min(costs))]
        if max(errors.values()) > LOSSY:
            lossy |= errors
        elif ranges.inputs[first].rows:
            found |= dict.fromkeys(errors, rounding)
    return Roundings(found, lossy)


def roundings_tried(
    matrices: Mapping[str, nn.Linear], ranges: InputRanges
) -> Iterator[tuple[str, list[tuple[Rounding, dict[str, float]]]]]:
    """Yield each group's first matrix with roundings of its inputs and the errors that are expected of its matrices.

    The first rounding does not smooth; the others have the factors of STRENGTHS.
    """
    for first, group in ranges.groups.items():
        inputs, sources = ranges.inputs[first], {name: _source(matrices[name]) for name in group}
        weights = {name: source.rows(0, source.shape[0]).detach() for name, source in sources.items()}
        columns = torch.stack([weight.abs().amax(dim=0) for weight in weights.values()]).amax(dim=0)
        tried = []
        for factors in (torch.ones_like(columns), *(smoothing_factors(inputs.largest, columns, each) for each in STRENGTHS)):
            rounding = Rounding(factors, input_scale(float((inputs.largest / factors).max())))
            tried.append((rounding, {name: rounding.error(weights[name], inputs, ranges.products[name]) for name in group}))
        yield first, tried


def _source(matrix: nn.Linear) -> Matrix:
    stored: Matrix | None = getattr(matrix.weight, "stored", None)
    return InMemoryMatrix(matrix.weight) if stored is None else stored
