"""Staged parity of a bundle with the eager PyTorch reference under the same plan.

The reference answers once; every input it gave to its model is replayed on the bundle, so that the first stage that differs is
the one at fault: processor pixels, vision embeddings, kept indices of each cut, prefill logits, the logits of every generated
token, and last the text that the bundle generates by itself. The reference has the weights and the roundings of the bundle's
precision: what is compared is the graph, not what quantization costs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from edgeprune.bundle import PREPROCESSOR, Bundle
from edgeprune.calibration.replay.reference import TorchBackend, reference_model
from edgeprune.checkpoint.loading import LoadedModel
from edgeprune.errors import VerificationError
from edgeprune.processors import read_image_spec
from edgeprune.runtime import load
from edgeprune.runtime.backends.compare import RecordingBackend, differing_indices, largest_difference
from edgeprune.runtime.backends.onnxruntime import OnnxRuntimeBackend
from edgeprune.runtime.generation.conversation import Conversation, ImageOrFrames
from edgeprune.runtime.generation.pipeline import Pipeline
from edgeprune.runtime.generation.sampling import Sampling
from edgeprune.tabletop.dataset import frames_for
from edgeprune.tabletop.questions import DESCRIBE_PROMPT

GENERATED = 32
Comparison = tuple[str, float, str]  # stage, worst difference, what was compared
_FP32 = {"pixels": 1e-5, "vision kept": 0.0, "vision": 1e-4, "kept": 0.0, "prefill": 1e-3, "generation": 1e-3, "text": 0.0}
# Half precision rounds at 5e-4, and a tower of rounded layers adds up; scores that are nearly equal change places.
_ROUNDED = {"pixels": 1e-5, "vision kept": 0.02, "vision": 5e-3, "kept": 0.02, "prefill": 3e-3, "generation": 5e-3}
# Where states are rounded to 8 bits as well, a difference in the last digit of one becomes a step of 1/255 of their range.
_EIGHT_BITS = {**_ROUNDED, "vision": 0.03, "prefill": 0.02, "generation": 0.02}
TOLERANCES = {"fp32": _FP32, "fp16": _ROUNDED, "int8": _ROUNDED, "int4": _ROUNDED}


@dataclass(frozen=True)
class ParityStage:
    """One line of the report: the `worst` difference found, the `tolerance`, and what was compared.

    Numbers are relative to the largest magnitude of the reference; for kept indices, `worst` is the share of indices that differ,
    and for text 1 where it does.
    """

    name: str
    worst: float
    tolerance: float
    compared: str

    @property
    def passed(self) -> bool:
        """Whether the difference is within the tolerance."""
        return self.worst <= self.tolerance


def verify(
    bundle: Bundle, loaded: LoadedModel, progress: Callable[[str], None] = lambda stage: None, tier: str | None = None
) -> list[ParityStage]:
    """Compare a bundle, of several tiers the first or `tier`, with its model, stage by stage.

    Raises VerificationError when the model is not the one exported, UsageError for an unknown tier.
    """
    if loaded.folder.source().weights_sha256 != bundle.manifest.source.weights_sha256:
        raise VerificationError(
            f"{loaded.folder.name} has other weights than the model that {bundle.path} was exported from.",
            hint="Give that model with --against.",
        )
    lowering = bundle.manifest.lowering
    number = bundle.tier(tier)
    reference = replace(reference_model(loaded, (bundle.plan, *bundle.lower_tiers)[number]), decoder=bundle.manifest.decoder)
    frames = frames_for(bundle.plan.geometry)
    picture: ImageOrFrames = frames if bundle.manifest.image.kind == "video" else frames[0]
    progress("reference")
    recorder = RecordingBackend(reference.backend)
    assert isinstance(reference.backend, TorchBackend)
    with reference.backend.lowered(lowering):
        text = _describe(reference, recorder, picture)
    backend = OnnxRuntimeBackend(bundle, exact=True)
    # What transformers makes of a video needs torchvision; a frame is prepared as an image is.
    found = [_pixels(loaded, bundle, frames[0])] if len(frames) == 1 else []
    progress("vision")
    found += _vision(backend, recorder)
    progress("decoder")
    found += _replay(backend, recorder, number)
    tolerances = _EIGHT_BITS if lowering.rounds(lowering.precision) else TOLERANCES[lowering.precision]
    if "text" not in tolerances:  # one near tie would change every word after it: `eval` judges what such a bundle says
        return _judged(found, tolerances)
    progress("text")
    alone = load(bundle.path).generate(frames, DESCRIBE_PROMPT, max_tokens=GENERATED, tier=tier).text
    found.append(("text", float(alone != text), f"{len(text.split())} words"))
    return _judged(found, tolerances)


def _judged(found: list[Comparison], tolerances: Mapping[str, float]) -> list[ParityStage]:
    return [ParityStage(name, worst, tolerances[name], compared) for name, worst, compared in found]


def _describe(pipeline: Pipeline, recorder: RecordingBackend, picture: ImageOrFrames) -> str:
    conversation = Conversation(replace(pipeline, backend=recorder))
    return "".join(conversation.ask(DESCRIBE_PROMPT, [picture], Sampling(max_tokens=GENERATED)))


def _vision(backend: OnnxRuntimeBackend, recorder: RecordingBackend) -> list[Comparison]:
    expected, actual = recorder.seen[0], backend.encode_image(recorder.patches[0])
    # Of the tokens that both have: where rounding changed the set, the others say nothing of the graph.
    rows, own = (np.isin(one.token_indices, other.token_indices) for one, other in ((expected, actual), (actual, expected)))
    pairs = [(expected.embeds[:, rows], actual.embeds[:, own])]
    pairs += [(expected.signals[name][rows], actual.signals[name][own]) for name in expected.signals]
    found = [_stage("vision", pairs, f"{int(rows.sum())} tokens")]
    if not expected.kept:
        return found
    return [_kept("vision kept", [*zip(expected.kept, actual.kept, strict=True)]), *found]


def _pixels(loaded: LoadedModel, bundle: Bundle, image: Image.Image) -> Comparison:
    from transformers import AutoImageProcessor

    own, frozen = loaded.folder.processor, loaded.settings(bundle.plan.geometry)
    changed = {name: value for name, value in frozen.items() if name in own and value != own[name]}
    processor = AutoImageProcessor.from_pretrained(loaded.folder.path, local_files_only=True, backend="pil")
    expected = processor(images=[image], return_tensors="np", **changed)["pixel_values"]
    if expected.ndim > 2:
        expected = _patches(expected.reshape(-1, *expected.shape[-3:]), bundle.plan.geometry.patch)
    actual = read_image_spec(bundle.file(PREPROCESSOR)).patches([image])
    return _stage("pixels", [(expected, actual)], f"{actual.shape[0]} patches")


def _patches(views: np.ndarray, side: int) -> np.ndarray:
    # Of pictures [views, 3, height, width], as the patch convolution of a vision encoder takes them.
    rows, columns = views.shape[2] // side, views.shape[3] // side
    blocks = views[:, :, : rows * side, : columns * side].reshape(len(views), 3, rows, side, columns, side)
    return np.ascontiguousarray(blocks.transpose(0, 2, 4, 1, 3, 5)).reshape(-1, 3 * side * side)


def _replay(backend: OnnxRuntimeBackend, recorder: RecordingBackend, tier: int) -> list[Comparison]:
    # Every step starts from the reference's cache, so that one wrong step does not spoil the next.
    selections = zip(recorder.prompts, recorder.selected, strict=True)
    kept = [(expected, backend.select_tokens(recorder.seen[0], prompt, tier)[1]) for prompt, expected in selections]
    logits: list[tuple[np.ndarray, np.ndarray]] = []
    for (tokens, cache), expected in zip(recorder.inputs, recorder.steps, strict=True):
        actual = backend.forward(replace(tokens, tier=tier), cache)
        logits.append((expected.logits, actual.logits))
        kept += zip(expected.kept, actual.kept, strict=True)
    return [
        _kept("kept", kept),
        _stage("prefill", logits[:1], "logits of the last prompt token"),
        _stage("generation", logits[1:], f"logits of {len(logits) - 1} generated tokens"),
    ]


def _kept(name: str, pairs: list[tuple[np.ndarray, np.ndarray]]) -> Comparison:
    counts = ", ".join(str(expected.shape[-1]) for expected, _ in pairs if expected.size) or "no cuts"
    return (name, differing_indices(pairs) / max(sum(expected.size for expected, _ in pairs), 1), f"tokens kept: {counts}")


def _stage(name: str, pairs: list[tuple[np.ndarray, np.ndarray]], compared: str) -> Comparison:
    worst = largest_difference(pairs)
    if np.isinf(worst):
        expected, actual = next(pair for pair in pairs if np.isinf(largest_difference([pair])))
        compared = f"shapes {expected.shape} and {actual.shape}"
    return (name, worst, compared)
