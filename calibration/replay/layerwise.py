"""Fit the int4 weights of a decoder to samples by GPTQ, layer by layer, so that the weights of one layer are in memory.

As in section 4 of the paper (arXiv 2210.17323), what enters a layer has gone through the layers before it as they are quantized.
Each sample is one prompt without pruning, followed by its answer if it has one. Between two layers the hidden states of all samples
are kept: 4 bytes for each token and dimension, several times that for DeepStack.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from edgeprune.calibration.data.samples import WeightSamples
from edgeprune.calibration.replay.episodes import ask, beside_others
from edgeprune.calibration.replay.products import read_when_used
from edgeprune.calibration.replay.reference import TorchBackend, reference_model
from edgeprune.checkpoint.loading import LoadedModel
from edgeprune.checkpoint.packed import PackedMatrix
from edgeprune.errors import UsageError
from edgeprune.io.progress import SILENT, Progress
from edgeprune.model import PrunedDecoder, Segment
from edgeprune.model.attention import TokenRows
from edgeprune.model.gptq import FittedMatrix, gptq
from edgeprune.model.quantization import BLOCKS, Quantized, kind_for, quantize
from edgeprune.plan import KeepPlan
from edgeprune.runtime.backends.interface import Backend, BackendProxy, CancellationToken, DecoderOutput
from edgeprune.runtime.backends.kv_cache import DecoderInput, KvCache
from edgeprune.runtime.generation.pipeline import Pipeline
from edgeprune.targets import Lowering

_TYPES = {"float16": torch.float16, "float32": torch.float32}


def check_fitting(loaded: LoadedModel, lowering: Lowering) -> None:
    """Raise UsageError for a precision or a model of which samples decide nothing."""
    lowering.check_samples(given=True)
    matrices = named_matrices(loaded.family.decoder().layers)
    if any(isinstance(getattr(matrix.weight, "stored", None), PackedMatrix) for matrix in matrices.values()):
        raise UsageError(
            f"{loaded.folder.name} is quantized, and its integers are kept.",
            hint="Give the original weights, or export with --precision int4 or int8, without --data.",
        )
    kind, block = lowering.precision, BLOCKS.get(lowering.precision)
    if block is not None and all(matrix.in_features % block for matrix in matrices.values()):
        instead, hint = ("int8", "Leave out --data.") if kind == "int4" else ("fp16", "Choose --precision fp8.")
        raise UsageError(
            f"No matrix of {loaded.folder.name} divides into blocks of {block} inputs, so that {kind} keeps all of them in "
            f"{instead}.",
            hint=hint,
        )


@contextmanager
def fitted_int4(
    loaded: LoadedModel, plan: KeepPlan, data: WeightSamples, lowering: Lowering, folder: Path, progress: Progress = SILENT
) -> Iterator[None]:
    """Let the decoder's matrices of whole int4 blocks be those that GPTQ finds, in files in `folder`; restore them on exit.

    The model may be one whose large matrices are still in their files. Raises BadSampleError for a sample that cannot be used.
    """
    unpruned = replace(plan, cuts=())
    pipeline = reference_model(loaded, unpruned)
    assert isinstance(pipeline.backend, TorchBackend)
    decoder = PrunedDecoder(loaded.family.decoder(), unpruned).eval()
    with torch.no_grad():
        with read_when_used((*pipeline.backend.matrices().values(), decoder.shape.embed_tokens)):
            samples = prompts_and_answers(pipeline, decoder, data, progress)
        found = _fit(decoder, samples, lowering, folder, progress)
    before = [(weight, getattr(weight, "stored", None)) for weight, _ in found]
    for weight, matrix in found:
        weight.stored = matrix
    try:
        yield
    finally:
        for weight, stored in before:
            weight.stored = stored


def _fit(
    decoder: PrunedDecoder, samples: list[list[TokenRows]], lowering: Lowering, folder: Path, progress: Progress
) -> list[tuple[Any, FittedMatrix]]:
    # The weights of all layers, each with what was found for it. A sample runs through a layer twice: as it is, and quantized.
    layers, found = len(decoder.layers), list[tuple[Any, FittedMatrix]]()
    passed, steps = progress.count("fitting int4 weights, samples by layers", 2 * layers * len(samples)), itertools.count(1)

    def run(index: int) -> Iterator[list[TokenRows]]:
        for parts in samples:
            yield run_layer(decoder, index, parts)
            passed(next(steps))

    for index in range(layers):
        matrices = named_matrices(decoder.layers[index : index + 1], first=index)
        with in_memory(matrices) as own:
            hessians = Hessians(matrices)
            with hessians.collecting():
                for _ in run(index):
                    pass
            for name, matrix in matrices.items():
                quantized = _quantized(name, matrix, hessians, lowering)
                if quantized.kind == "int4":
                    found.append((own[name], FittedMatrix.save(quantized, folder / f"{name}.safetensors")))
                matrix.weight = nn.Parameter(quantized.restored(), requires_grad=False)
            for number, parts in enumerate(run(index)):
                samples[number] = parts  # the states before the layer are not kept
    return found


def _quantized(name: str, matrix: nn.Linear, hessians: Hessians, lowering: Lowering) -> Quantized:
    scale_type = _TYPES["float32" if name in lowering.wide else lowering.products]
    hessian = hessians.of(name)
    if hessian is None or kind_for(matrix.in_features, "int4") != "int4":
        return quantize(matrix.weight, "int4", scale_type)
    return gptq(matrix.weight, hessian, scale_type)


class Hessians:
    """X^T X [in, in] of the rows X that each of some matrices multiplies; matrices that multiply the same states share one."""

    def __init__(self, matrices: Mapping[str, nn.Linear]) -> None:
        self._matrices = matrices
        self._sums: dict[str, torch.Tensor] = {}
        self._owners: dict[str, str] = {}  # the matrix that met the same states first
        self._last: tuple[str, torch.Tensor] | None = None

    def of(self, name: str) -> torch.Tensor | None:
        """Return the sum of a matrix, None if it has multiplied nothing."""
        return self._sums.get(self._owners.get(name, name))

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Add up what the matrices multiply inside the block."""
        with ExitStack() as hooks:
            for name, matrix in self._matrices.items():
                hooks.callback(matrix.register_forward_pre_hook(partial(self._add, name)).remove)
            yield
        self._last = None

    def _add(self, name: str, matrix: nn.Linear, inputs: tuple[torch.Tensor, ...]) -> None:
        states = inputs[0]
        if self._last is not None and states is self._last[1]:
            self._owners[name] = self._last[0]
            return
        self._last = name, states
        if name not in self._sums:
            self._sums[name] = states.new_zeros(matrix.in_features, matrix.in_features)
        rows = states.flatten(0, -2)
        self._sums[name].addmm_(rows.T, rows)


def run_layer(decoder: PrunedDecoder, index: int, parts: Sequence[TokenRows]) -> list[TokenRows]:
    """Return what is behind one layer of a prompt and the answer behind it, if there is one."""
    cache, outputs = decoder.empty_caches()[index], list[TokenRows]()
    for number, tokens in enumerate(parts):
        behind, rows = decoder.run_layer(index, tokens, cache, every_logit=number > 0)
        cache = cache.append(rows, tokens.sizes[0], tokens.sizes[2])
        outputs.append(behind)
    return outputs


def prompts_and_answers(
    pipeline: Pipeline, decoder: PrunedDecoder, data: WeightSamples, progress: Progress
) -> list[list[TokenRows]]:
    """Return prompt and answer of each sample as they enter the first layer."""
    asked, found = replace(pipeline, backend=_Prompts(pipeline.backend, pipeline.decoder.vocabulary)), list[list[TokenRows]]()
    read = progress.count("reading samples", len(data.samples))
    for done, sample in enumerate(data.samples, start=1):
        recorder, images, _ = ask(asked, sample, data.fit, most=1)
        prompt = beside_others(recorder.inputs[:images], images - 1)
        segments = [
            Segment(torch.from_numpy(part.embeds), torch.from_numpy(part.positions))
            for part in (prompt.prefix, prompt.visual, prompt.suffix)
        ]
        parts, ids = [decoder.rows_of(*segments)], pipeline.tokenizer.encode(sample.answer)
        if ids:
            positions = segments[2].positions[:, -1:] + 1 + torch.arange(len(ids))
            answer = Segment(torch.from_numpy(pipeline.backend.embed_tokens(ids)), positions)
            nothing = Segment(answer.embeds[:, :0], positions[:, :0])
            parts.append(decoder.rows_of(nothing, nothing, answer, every_logit=True))
        found.append(parts)
        read(done)
    return found


class _Prompts(BackendProxy):
    # A decoder that is not run: what it would be given is all that matters.
    def __init__(self, backend: Backend, vocabulary: int) -> None:
        super().__init__(backend)
        self._logits = np.zeros(vocabulary, np.float32)

    def forward(self, tokens: DecoderInput, cache: KvCache, *, cancellation: CancellationToken | None = None) -> DecoderOutput:
        new = sum(part.embeds.shape[1] for part in (tokens.prefix, tokens.visual, tokens.suffix))
        rows = tuple(np.zeros((new, *old.shape[1:]), old.dtype) for old in cache.buffers)
        return DecoderOutput(self._logits, rows, (), None, states=cache.states)


def named_matrices(layers: Iterable[nn.Module], first: int = 0) -> dict[str, nn.Linear]:
    """Return the linear layers of decoder layers by their names in the graph. `first`: the index of the first layer."""
    return {
        name: module
        for index, layer in enumerate(layers, start=first)
        for name, module in layer.named_modules(prefix=f"decoder.layers.{index}")
        if isinstance(module, nn.Linear)
    }


@contextmanager
def in_memory(matrices: Mapping[str, nn.Linear]) -> Iterator[dict[str, Any]]:
    """Read the weights that are in their files; the layers get their own, which are yielded by name, back on exit."""
    own: dict[str, Any] = {name: matrix.weight for name, matrix in matrices.items()}
    for name, matrix in matrices.items():
        source = getattr(own[name], "stored", None)
        if source is not None and not any(own[name].stride()):
            matrix.weight = nn.Parameter(source.rows(0, matrix.out_features), requires_grad=False)
    try:
        yield own
    finally:
        for name, matrix in matrices.items():
            matrix.weight = own[name]
