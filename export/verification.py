"""Staged parity of a bundle with the eager PyTorch reference under the same plan.

The reference answers once; every input it gave to its model is replayed on the bundle, so that the first stage that differs is
the one at fault: processor pixels, vision embeddings, kept indices of each cut, prefill logits, the logits of every generated
token, and last the text that the bundle generates by itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from edgeprune.bundle import PREPROCESSOR, Bundle
from edgeprune.calibration.reference import Recorder, reference_model
from edgeprune.errors import VerificationError
from edgeprune.loading import LoadedModel
from edgeprune.runtime import load
from edgeprune.runtime.conversation import Conversation, Model
from edgeprune.runtime.engine import OnnxEngine
from edgeprune.runtime.preprocess import ImageSpec
from edgeprune.runtime.sampling import Sampling
from edgeprune.tabletop.drawing import draw_scene
from edgeprune.tabletop.questions import DESCRIBE_PROMPT
from edgeprune.tabletop.world import sample_scene

GENERATED = 32
TOLERANCES = {"pixels": 1e-5, "vision": 1e-4, "kept": 0.0, "prefill": 1e-3, "generation": 1e-3, "text": 0.0}


@dataclass(frozen=True)
class Stage:
    """One line of the report: the `worst` difference found, the `tolerance`, and what was compared.

    Numbers are relative to the largest magnitude of the reference; for kept indices and text, `worst` counts differences.
    """

    name: str
    worst: float
    tolerance: float
    compared: str

    @property
    def passed(self) -> bool:
        """Whether the difference is within the tolerance."""
        return self.worst <= self.tolerance


def verify(bundle: Bundle, loaded: LoadedModel, progress: Callable[[str], None] = lambda stage: None) -> list[Stage]:
    """Compare a bundle with its model, stage by stage; raise VerificationError when the model is not the one exported."""
    if loaded.folder.source().weights_sha256 != bundle.manifest.source.weights_sha256:
        raise VerificationError(
            f"{loaded.folder.name} has other weights than the model that {bundle.path} was exported from.",
            hint="Give that model with --against.",
        )
    reference = reference_model(loaded, bundle.plan)
    size = (bundle.plan.geometry.width, bundle.plan.geometry.height)
    image = draw_scene(sample_scene(np.random.default_rng(1))).resize(size, Image.Resampling.BICUBIC)
    progress("reference")
    recorder = Recorder(reference.engine)
    text = _describe(reference, recorder, image)
    engine = OnnxEngine(bundle)
    stages = [_pixels(loaded, bundle, image)]
    progress("vision")
    stages.append(_vision(engine, recorder))
    progress("decoder")
    stages += _replay(engine, recorder)
    progress("text")
    alone = load(bundle.path).generate(image, DESCRIBE_PROMPT, max_tokens=GENERATED).text
    stages.append(Stage("text", float(alone != text), TOLERANCES["text"], f"{len(text.split())} words"))
    return stages


def _describe(model: Model, recorder: Recorder, image: Image.Image) -> str:
    conversation = Conversation(replace(model, engine=recorder))
    return "".join(conversation.ask(DESCRIBE_PROMPT, image, Sampling(max_tokens=GENERATED)))


def _vision(engine: OnnxEngine, recorder: Recorder) -> Stage:
    expected, actual = recorder.seen, engine.see(recorder.patches)
    pairs = [(expected.embeds, actual.embeds), *((expected.signals[name], actual.signals[name]) for name in expected.signals)]
    return _stage("vision", pairs, f"{expected.embeds.shape[1]} tokens")


def _pixels(loaded: LoadedModel, bundle: Bundle, image: Image.Image) -> Stage:
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(loaded.folder.path, local_files_only=True, backend="pil")
    size = loaded.processor(bundle.plan.geometry)["size"]
    expected = processor(images=[image], size=size, return_tensors="np")["pixel_values"]
    spec = ImageSpec.from_processor_config(json.loads(bundle.file(PREPROCESSOR).read_text(encoding="utf-8")))
    actual, _ = spec.patches(image)
    return _stage("pixels", [(expected, actual)], f"{actual.shape[0]} patches")


def _replay(engine: OnnxEngine, recorder: Recorder) -> list[Stage]:
    # Every step starts from the reference's cache, so that one wrong step does not spoil the next.
    kept = [(expected[1], engine.select(recorder.seen, prompt)[1]) for prompt, expected in recorder.selections]
    logits: list[tuple[np.ndarray, np.ndarray]] = []
    for tokens, cache, expected in recorder.steps:
        actual = engine.step(tokens, cache)
        logits.append((expected.logits, actual.logits))
        kept += zip(expected.kept, actual.kept, strict=True)
    different = sum(_differences(expected, actual) for expected, actual in kept)
    counts = ", ".join(str(expected.shape[-1]) for expected, _ in kept if expected.size) or "no cuts"
    return [
        Stage("kept", float(different), TOLERANCES["kept"], f"tokens kept: {counts}"),
        _stage("prefill", logits[:1], "logits of the last prompt token"),
        _stage("generation", logits[1:], f"logits of {len(logits) - 1} generated tokens"),
    ]


def _differences(expected: np.ndarray, actual: np.ndarray) -> int:
    # Sets, head by head: the order in a cache does not matter to attention.
    rows = zip(np.atleast_2d(expected), np.atleast_2d(actual), strict=True)
    return sum(len(np.setxor1d(*pair)) for pair in rows)


def _stage(name: str, pairs: list[tuple[np.ndarray, np.ndarray]], compared: str) -> Stage:
    worst = 0.0
    for expected, actual in pairs:
        if expected.shape != actual.shape or not np.isfinite(actual).all():
            return Stage(name, float("inf"), TOLERANCES[name], f"shapes {expected.shape} and {actual.shape}")
        worst = max(worst, float(np.abs(expected - actual).max() / max(np.abs(expected).max(), 1e-6)))
    return Stage(name, worst, TOLERANCES[name], compared)
