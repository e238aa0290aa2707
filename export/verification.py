"""Verify a bundle stage by stage against the eager PyTorch reference under the same plan.

The reference generates one answer. All inputs of its model are replayed on the bundle, so that the first stage that differs is
the faulty one. Stages: prompts, processor pixels, vision embeddings, kept indices of each cut, prefill logits, logits of every
generated token, and the text that the bundle generates by itself. The reference uses the weights and rounding of the bundle's
precision, so the comparison covers the graph, not the quantization error.

Int4 weights that were fitted to samples are taken from the bundle, since the samples are not in it. They must stand for the model's
own: how far they are from these is a stage too. So are weights in FP4, which have to be those of the model bit for bit.

Prompts, pixels and an answer without pruning are compared with transformers itself (`edgeprune.export.upstream`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
import torch

from edgeprune.bundle import DECODER, ROUNDINGS, Bundle
from edgeprune.calibration.replay.layerwise import named_matrices
from edgeprune.calibration.replay.reference import TorchBackend, reference_model
from edgeprune.checkpoint.loading import LoadedModel
from edgeprune.errors import VerificationError
from edgeprune.export.passes.fusion import PROJECTIONS
from edgeprune.export.upstream import Comparison, Upstream
from edgeprune.io.progress import SILENT, Progress
from edgeprune.model.quantization import Quantized, quantize
from edgeprune.model.smoothquant import load_roundings
from edgeprune.runtime import load
from edgeprune.runtime.backends.compare import RecordingBackend, differing_indices, largest_difference
from edgeprune.runtime.backends.onnxruntime import OnnxRuntimeBackend
from edgeprune.runtime.generation.conversation import Conversation, ImageOrFrames
from edgeprune.runtime.generation.sampling import Sampling
from edgeprune.tabletop.dataset import frames_for
from edgeprune.tabletop.questions import DESCRIBE_PROMPT
from edgeprune.targets import Lowering

STAGES = ("prompts", "reference", "vision", "decoder", "text")
MAX_TOKENS = 32  # generated tokens
# Fitted weights leave the model's own further than rounded ones do (0.1): where inputs hardly vary, any weight will do. Weights of
# another matrix, or in another order, differ by 1.4.
_INPUTS = {"prompts": 0.0, "pixels": 1e-5, "weights": 0.7}
_FP32 = {"vision kept": 0.0, "vision": 1e-4, "kept": 0.0, "prefill": 1e-3, "generation": 1e-3, "text": 0.0, "unpruned text": 0.0}
_FP32 = {**_INPUTS, **_FP32, "states": 1e-3}
# Half precision rounds at 5e-4, and errors accumulate over the layers; nearly equal scores may swap ranks.
_FP16 = {**_INPUTS, "vision kept": 0.02, "vision": 5e-3, "kept": 0.02, "prefill": 3e-3, "generation": 5e-3}
_FP16["states"] = 0.02  # sums over all tokens before them
# bfloat16 rounds eight times as coarsely.
_BF16 = {**_FP16, "vision kept": 0.05, "vision": 0.04, "kept": 0.05, "prefill": 0.024, "generation": 0.04, "states": 0.1}
# If activations are quantized to 8 bits too, a difference in the last digit may become a step of 1/255 of their range.
_DYNAMIC_INT8 = {**_FP16, "vision": 0.03, "prefill": 0.02, "generation": 0.02, "states": 0.05}
# Steps of a fixed size: a number close to the middle between two is rounded either way, and a few layers later no rounding is that
# of the reference. Both are then as far from each other as from the model: 2 to 3 % of the bundled one.
_STATIC_INT8 = {**_DYNAMIC_INT8, "vision": 0.06, "prefill": 0.05, "generation": 0.06}
# Steps of FP8 are up to an eighth of a number, where those of int8 are 1/127 of the largest.
_STATIC_FP8 = {**_STATIC_INT8, "vision": 0.1, "prefill": 0.1, "generation": 0.1}
# Steps of FP4 are up to half of a number, so 30 layers differ by 14 % in logits. Its weights are compared by themselves.
_FP4 = {**_FP16, "weights": 0.0, "prefill": 0.2, "generation": 0.2}
# What torch has no NumPy arrays of.
_HELD_AS = {
    ir.DataType.INT4: np.int8,
    ir.DataType.FLOAT4E2M1: np.float32,
    ir.DataType.FLOAT8E4M3FN: np.float32,
}
_KV_INT8 = 0.02  # of logits: five times what the bundled model loses
_TEXTS = ("text", "unpruned text")
TOLERANCES = {"fp32": _FP32, "fp16": _FP16, "bf16": _BF16, "int8": _FP16, "w8a8": _STATIC_INT8, "fp8": _STATIC_FP8, "int4": _FP16}
TOLERANCES["nvfp4"] = _FP4


@dataclass(frozen=True)
class ParityStage:
    """One stage of the report: the `worst` difference, the `tolerance`, and a description of the compared values.

    Differences are relative to the largest magnitude of the reference. For kept indices, `worst` is the share of indices that
    differ; for prompts, the share of conversations with other ids; for text, it is 1 if the text differs. It is None if nothing
    could be compared; `compared` then says why.
    """

    name: str
    worst: float | None
    tolerance: float
    compared: str

    @property
    def passed(self) -> bool:
        """Whether no difference beyond the tolerance was found."""
        return self.worst is None or self.worst <= self.tolerance


def verify(bundle: Bundle, loaded: LoadedModel, progress: Progress = SILENT, tier: str | None = None) -> list[ParityStage]:
    """Compare a bundle under `tier` (default: the first) with its model, stage by stage.

    Raises VerificationError if the bundle was exported from other weights, UsageError for an unknown tier.
    """
    if loaded.folder.source().weights_sha256 != bundle.manifest.source.weights_sha256:
        adapter = bundle.manifest.source.adapter
        raise VerificationError(
            f"{loaded.folder.name} has other weights than the model that {bundle.path} was exported from.",
            hint=f"Give that model with --against{f', and its adapter with --adapter: {adapter}' if adapter else ''}.",
        )
    lowering = bundle.manifest.lowering
    tier_index = bundle.tier(tier)
    reference = replace(reference_model(loaded, (bundle.plan, *bundle.lower_tiers)[tier_index]), decoder=bundle.manifest.decoder)
    frames = frames_for(bundle.plan.geometry)
    image: ImageOrFrames = frames if bundle.manifest.image.kind == "video" else frames[0]
    upstream = Upstream(loaded, bundle, frames)
    progress.begin("prompts")
    comparisons = [upstream.compare_prompts(), upstream.compare_pixels()]
    fitted = {} if bundle.manifest.gptq is None else fitted_weights(bundle)
    comparisons += [_compare_weights(loaded, fitted)] if fitted else []
    comparisons += [_compare_fp4(loaded, bundle)] if lowering.precision == "nvfp4" else []
    progress.begin("reference")
    recorder = RecordingBackend(reference.backend)
    assert isinstance(reference.backend, TorchBackend)
    if bundle.manifest.smoothing is not None:
        lowering = replace(lowering, roundings=load_roundings(bundle.file(ROUNDINGS), lowering.inputs))
    with reference.backend.lowered(lowering, fitted):
        conversation = Conversation(replace(reference, backend=recorder))
        text = "".join(conversation.ask(DESCRIBE_PROMPT, [image], Sampling(max_tokens=MAX_TOKENS)))
    backend = OnnxRuntimeBackend(bundle, exact=True)
    progress.begin("vision")
    comparisons += _compare_vision(backend, recorder)
    progress.begin("decoder")
    comparisons += _compare_decoder(backend, recorder, tier_index)
    tolerances = _tolerances(lowering)
    if "text" in tolerances:  # with rounding, one near tie changes all later text; `edgeprune eval` scores such bundles
        progress.begin("text")
        runtime = load(bundle.path)
        generated = runtime.generate(frames, DESCRIBE_PROMPT, max_tokens=MAX_TOKENS, tier=tier).text
        comparisons.append(Comparison("text", float(generated != text), f"{len(text.split())} words"))
        comparisons.append(upstream.compare_answer(runtime, DESCRIBE_PROMPT, MAX_TOKENS))
    return [ParityStage(name, worst, tolerances[name], compared) for name, worst, compared in comparisons]


def _tolerances(lowering: Lowering) -> Mapping[str, float]:
    tolerances = _DYNAMIC_INT8 if lowering.rounds(lowering.precision) else TOLERANCES[lowering.precision]
    if lowering.kv == "same":
        return tolerances
    exact = {name: limit for name, limit in tolerances.items() if name not in _TEXTS}
    return {**exact, "generation": max(exact["generation"], _KV_INT8)}


def fitted_weights(bundle: Bundle) -> dict[str, Quantized]:
    """Return the int4 matrices of a bundle's decoder by name, such as decoder.layers.0.mlp.down_proj."""
    stored = {name: value.const_value for name, value in ir.load(bundle.file(DECODER)).graph.initializers.items()}
    found: dict[str, Quantized] = {}
    for weight in [name for name, tensor in stored.items() if tensor is not None and tensor.dtype == ir.DataType.INT4]:
        name = weight.removesuffix(".weight.int4")
        values, scales = (_transposed(stored[key]) for key in (weight, f"{name}.weight.scales"))
        sizes, names = [len(values)], [name]
        if f"{name}.sizes" in stored:  # query, key and value in one, for CPUs
            sizes, layer = _transposed(stored[f"{name}.sizes"]).tolist(), name.rpartition(".")[0]
            names = [f"{layer}.{projection}" for projection in PROJECTIONS]
        parts = zip(names, torch.split(values, sizes), torch.split(scales, sizes), strict=True)
        found |= {name: Quantized("int4", integers, steps) for name, integers, steps in parts}
    return found


def fp4_weights(bundle: Bundle) -> dict[str, Quantized]:
    """Return the FP4 matrices of a bundle's decoder by name, such as decoder.layers.0.mlp.down_proj."""
    stored = {name: value.const_value for name, value in ir.load(bundle.file(DECODER)).graph.initializers.items()}
    found: dict[str, Quantized] = {}
    for weight in [name for name, tensor in stored.items() if tensor is not None and tensor.dtype == ir.DataType.FLOAT4E2M1]:
        name = weight.removesuffix(".nvfp4")
        values, scales, scale = (_transposed(stored[key]) for key in (weight, f"{name}.scales", f"{name}.scale"))
        found[name.removesuffix(".weight")] = Quantized("nvfp4", values, scales, float(scale))
    return found


def _transposed(tensor: ir.TensorProtocol | None) -> torch.Tensor:
    assert tensor is not None
    numbers, kind = tensor.numpy(), _HELD_AS.get(tensor.dtype)
    return torch.from_numpy((numbers if kind is None else numbers.astype(kind)).T.copy())


def _compare_weights(loaded: LoadedModel, fitted: Mapping[str, Quantized]) -> Comparison:
    matrices, worst = named_matrices(loaded.family.decoder().layers), 0.0
    for name, quantized in fitted.items():
        own = matrices[name].weight.detach()
        worst = max(worst, float((quantized.restored() - own).norm() / own.norm().clamp(min=1e-9)))
    return Comparison("weights", worst, f"{len(fitted)} matrices in int4, fitted to samples")


def _compare_fp4(loaded: LoadedModel, bundle: Bundle) -> Comparison:
    matrices, worst, found = named_matrices(loaded.family.decoder().layers), 0.0, fp4_weights(bundle)
    for name, stored in found.items():
        own = quantize(matrices[name].weight, "nvfp4", torch.float16).restored()
        worst = max(worst, float((stored.restored() - own).norm() / own.norm().clamp(min=1e-9)))
    return Comparison("weights", worst, f"{len(found)} matrices in FP4")


def _compare_vision(backend: OnnxRuntimeBackend, recorder: RecordingBackend) -> list[Comparison]:
    expected, actual = recorder.seen[0], backend.encode_image(recorder.patches[0])
    # Only tokens that both kept are compared: where rounding changed the set, other tokens say nothing about the graph.
    expected_rows = np.isin(expected.token_indices, actual.token_indices)
    actual_rows = np.isin(actual.token_indices, expected.token_indices)
    pairs = [(expected.embeds[:, expected_rows], actual.embeds[:, actual_rows])]
    pairs += [(expected.signals[name][expected_rows], actual.signals[name][actual_rows]) for name in expected.signals]
    comparison = _compare("vision", pairs, f"{int(expected_rows.sum())} tokens")
    if not expected.kept:
        return [comparison]
    return [_compare_kept("vision kept", [*zip(expected.kept, actual.kept, strict=True)]), comparison]


def _compare_decoder(backend: OnnxRuntimeBackend, recorder: RecordingBackend, tier: int) -> list[Comparison]:
    # Every step starts from the reference's cache, so that errors do not propagate to later steps.
    selections = zip(recorder.prompts, recorder.selected, strict=True)
    kept = [(expected, backend.select_tokens(recorder.seen[0], prompt, tier)[1]) for prompt, expected in selections]
    logits, states = list[tuple[np.ndarray, np.ndarray]](), list[tuple[np.ndarray, np.ndarray]]()
    for (tokens, cache), expected in zip(recorder.inputs, recorder.steps, strict=True):
        actual = backend.forward(replace(tokens, tier=tier), cache)
        logits.append((expected.logits, actual.logits))
        states += zip(expected.states, actual.states, strict=True)
        kept += zip(expected.kept, actual.kept, strict=True)
    return [
        _compare_kept("kept", kept),
        _compare("prefill", logits[:1], "logits of the last prompt token"),
        _compare("generation", logits[1:], f"logits of {len(logits) - 1} generated tokens"),
        *([_compare("states", states, "states of layers without attention")] if states else []),
    ]


def _compare_kept(name: str, pairs: list[tuple[np.ndarray, np.ndarray]]) -> Comparison:
    counts = ", ".join(str(expected.shape[-1]) for expected, _ in pairs if expected.size) or "no cuts"
    return Comparison(
        name, differing_indices(pairs) / max(sum(expected.size for expected, _ in pairs), 1), f"tokens kept: {counts}"
    )


def _compare(name: str, pairs: list[tuple[np.ndarray, np.ndarray]], compared: str) -> Comparison:
    worst = largest_difference(pairs)
    if np.isinf(worst):
        expected, actual = next(pair for pair in pairs if np.isinf(largest_difference([pair])))
        compared = f"shapes {expected.shape} and {actual.shape}"
    return Comparison(name, worst, compared)
