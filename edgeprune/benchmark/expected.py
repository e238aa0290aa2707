"""What a bundle's graphs answer on the machine that exported them, for `edgeprune selftest` on a device.

`export` holds one conversation about a drawn scene on ONNX Runtime's CPU and stores it in the bundle: questions, frames, and the
outputs of every graph. A device repeats it with its engines. It continues every answer with the stored logits, so that both sides
take the same tokens and every step can be compared; and it needs neither ONNX Runtime nor the memory of a second model.

expected/conversation.npz holds, in float16 where float16 can:
prompts [turns]                 the questions; those after the first continue the conversation
frames [frames, H, W, 3]        the image or video of the first question
embeds, vision_kept.N           the vision encoder's tokens [1, V, hidden], and the indices of each of its cuts
selected                        the indices [K] of the input cut
logits [steps, vocabulary]      of every forward pass
kept.S.N                        the indices of cut N in pass S, if there are any
ratios [steps]                  what the predictor said, if the plan has one
"""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from edgeprune.bundle import EXPECTED, Bundle
from edgeprune.errors import BundleError, EdgePruneError
from edgeprune.io.files import write_bytes
from edgeprune.runtime.api.loading import runtime_on
from edgeprune.runtime.api.session import Runtime
from edgeprune.runtime.backends.compare import differing_indices, on_host
from edgeprune.runtime.backends.interface import Backend, BackendProxy, CancellationToken, DecoderOutput, VisionOutput
from edgeprune.runtime.backends.kv_cache import DecoderInput, KvCache
from edgeprune.runtime.backends.onnxruntime import OnnxRuntimeBackend
from edgeprune.runtime.telemetry.receipt import Times
from edgeprune.tabletop.dataset import frames_for

TOKENS = 8  # of each answer
PROMPTS = ("What is on the table?", "What else?")  # the second has no image and continues the KV caches of the first


def write_expected(bundle: Bundle) -> None:
    """Hold the conversation on ONNX Runtime's CPU and write EXPECTED into the bundle's folder.

    Weights stay in their files, so it takes little memory, and products are as TensorRT's: quantized weights, float inputs.
    Raises EdgePruneError if the graphs cannot answer, as when float16 does not hold their numbers.
    """
    frames = frames_for(bundle.plan.geometry)
    recorder = _Recorder(OnnxRuntimeBackend(bundle, exact=True, mapped=True))
    try:
        converse(runtime_on(bundle, recorder), PROMPTS, frames)
    except EdgePruneError as error:
        raise EdgePruneError(
            f"The exported graphs do not answer: {error.message}", hint="Export it with --precision fp32."
        ) from error
    arrays = {"prompts": np.array(PROMPTS), "frames": np.stack([np.asarray(frame) for frame in frames]), **recorder.arrays()}
    bundle.file(EXPECTED).parent.mkdir(exist_ok=True)
    written = io.BytesIO()
    np.savez_compressed(written, allow_pickle=False, **arrays)
    write_bytes(bundle.file(EXPECTED), written.getbuffer())


def converse(runtime: Runtime, prompts: Sequence[str], frames: list[Image.Image]) -> Times:
    """Ask the prompts in one conversation, the first about the frames; return the times of the first answer."""
    chat, receipts = runtime.chat(), []
    for number, prompt in enumerate(prompts):
        stream = chat.ask(prompt, None if number else frames, max_tokens=TOKENS)
        "".join(stream)
        receipts.append(stream.receipt)
    return receipts[0].times


class _Recorder(BackendProxy):
    # Keeps all outputs. The answers go on with the logits as they are stored, so that a device takes the same tokens.

    def __init__(self, backend: Backend) -> None:
        super().__init__(backend)
        self._single: dict[str, np.ndarray] = {}
        self._logits: list[np.ndarray] = []
        self._ratios: list[float] = []

    def encode_image(
        self, patches: np.ndarray, *, unpruned: bool = False, cancellation: CancellationToken | None = None
    ) -> VisionOutput:
        output = self._backend.encode_image(patches, unpruned=unpruned, cancellation=cancellation)
        self._single["embeds"] = _compact(output.embeds)
        self._single |= {f"vision_kept.{cut}": kept for cut, kept in enumerate(output.kept)}
        return output

    def select_tokens(self, vision_output: VisionOutput, prompt: np.ndarray, tier: int = 0) -> tuple[np.ndarray, ...]:
        selected = self._backend.select_tokens(vision_output, prompt, tier)
        self._single["selected"] = selected[1]
        return selected

    def forward(self, tokens: DecoderInput, cache: KvCache, *, cancellation: CancellationToken | None = None) -> DecoderOutput:
        step = self._backend.forward(tokens, cache, cancellation=cancellation)
        number, stored = len(self._logits), _compact(step.logits)
        self._single |= {f"kept.{number}.{cut}": kept for cut, kept in enumerate(step.kept) if kept.size}
        self._logits.append(stored)
        return _continued(step, stored)

    def predict_keep_ratio(self, split: np.ndarray, step: int) -> float:
        self._ratios.append(self._backend.predict_keep_ratio(split, step))
        return self._ratios[-1]

    def arrays(self) -> dict[str, np.ndarray]:
        ratios = {"ratios": np.array(self._ratios)} if self._ratios else {}
        return {**self._single, "logits": np.stack(self._logits), **ratios}


@dataclass(frozen=True)
class Expected:
    """The stored conversation; `arrays` has what the module's docstring lists."""

    prompts: tuple[str, ...]
    frames: list[Image.Image]
    arrays: dict[str, np.ndarray]

    def cuts(self, name: str) -> list[np.ndarray]:
        """Return the indices of the cuts `name`.0, `name`.1 and so on."""
        return [self.arrays[key] for key in self.arrays if key.rpartition(".")[0] == name]


def read_expected(bundle: Bundle) -> Expected:
    """Read the stored conversation; raise BundleError if the bundle has none, or one that cannot be read."""
    if EXPECTED not in bundle.manifest.files:
        manifest = bundle.manifest
        target = manifest.target if manifest.lowering.target.tensorrt else "jetpack6"
        why = "was exported by an older version" if manifest.lowering.target.tensorrt else f"is for target {manifest.target}"
        raise BundleError(
            f"{bundle.path} {why}, without the outputs that engines are compared with.",
            hint=f"Export it again: edgeprune export MODEL -o BUNDLE --target {target} --precision {manifest.precision}",
        )
    try:
        with np.load(bundle.path / EXPECTED, allow_pickle=False) as stored:
            arrays = {str(name): stored[name] for name in stored}
        prompts, frames = arrays.pop("prompts"), arrays.pop("frames")
        if arrays["logits"].shape[1:] != (bundle.manifest.decoder.vocabulary,) or arrays["embeds"].ndim != 3:
            raise ValueError("shapes that are not the model's")
        return Expected(tuple(map(str, prompts)), [Image.fromarray(frame) for frame in frames], arrays)
    except (OSError, ValueError, TypeError, KeyError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        raise BundleError(f"Cannot read {EXPECTED} of {bundle.path}: {error}.", hint="Export it again.") from error


class ComparingBackend(BackendProxy):
    """A backend proxy that compares every output with the stored one as it comes, and continues with the stored logits.

    `vision`: the largest difference of the visual tokens that both kept. `logits`: that of each step. Differences are relative to
    the largest stored magnitude, and infinite for a shape that differs or a value that is not finite. `equal`: steps whose most
    probable token is the same. `moved`, `kept`: indices that only one side kept, of so many. `ratio`: largest difference.
    """

    def __init__(self, backend: Backend, expected: Expected) -> None:
        super().__init__(backend)
        self._expected = expected
        self._ratios = list(expected.arrays.get("ratios", ()))
        self.vision, self.ratio = 0.0, 0.0
        self.logits: list[float] = []
        self.equal = self.moved = self.kept = 0

    @property
    def steps(self) -> int:
        """Forward passes of the stored conversation."""
        return len(self._expected.arrays["logits"])

    def encode_image(
        self, patches: np.ndarray, *, unpruned: bool = False, cancellation: CancellationToken | None = None
    ) -> VisionOutput:
        """Encode an image and compare its visual tokens and cuts."""
        output = self._backend.encode_image(patches, unpruned=unpruned, cancellation=cancellation)
        cuts = self._expected.cuts("vision_kept")
        self._compare_kept(cuts, output.kept)
        stored, actual = self._expected.arrays["embeds"], on_host(output.embeds)
        if cuts:
            indices = cuts[-1], output.kept[-1]
            stored, actual = stored[:, np.isin(indices[0], indices[1])], actual[:, np.isin(indices[1], indices[0])]
        self.vision = max(self.vision, _difference(stored[0], actual[0]))
        return output

    def select_tokens(self, vision_output: VisionOutput, prompt: np.ndarray, tier: int = 0) -> tuple[np.ndarray, ...]:
        """Apply the input cut and compare its indices."""
        selected = self._backend.select_tokens(vision_output, prompt, tier)
        self._compare_kept([self._expected.arrays["selected"]], [selected[1]])
        return selected

    def forward(self, tokens: DecoderInput, cache: KvCache, *, cancellation: CancellationToken | None = None) -> DecoderOutput:
        """Run a forward pass, compare its logits and indices, and return the stored logits."""
        step = self._backend.forward(tokens, cache, cancellation=cancellation)
        number = len(self.logits)
        if number == self.steps:  # the stored conversation has ended
            return step
        stored = self._expected.arrays["logits"][number]
        self._compare_kept(self._expected.cuts(f"kept.{number}"), [kept for kept in step.kept if kept.size])
        self.logits.append(_difference(stored[None], step.logits[None]))
        self.equal += int(stored.argmax() == step.logits.argmax())
        return _continued(step, stored)

    def predict_keep_ratio(self, split: np.ndarray, step: int) -> float:
        """Predict a keep ratio, compare it and return the stored one."""
        ratio = self._backend.predict_keep_ratio(split, step)
        stored = float(self._ratios.pop(0)) if self._ratios else ratio
        self.ratio = max(self.ratio, abs(stored - ratio))
        return stored

    def _compare_kept(self, stored: Sequence[np.ndarray], actual: Sequence[np.ndarray]) -> None:
        self.moved += differing_indices(list(zip(stored, actual, strict=True)))
        self.kept += sum(cut.size for cut in stored)


def _compact(array: np.ndarray) -> np.ndarray:
    # float16 has a smaller error than the kernels that are compared. What it does not hold stays as it is.
    return array.astype(np.float16) if np.abs(array).max(initial=0) < np.finfo(np.float16).max else array


def _continued(step: DecoderOutput, stored: np.ndarray) -> DecoderOutput:
    return replace(step, logits=stored.astype(np.float32))


def _difference(stored: np.ndarray, actual: np.ndarray) -> float:
    # Row by row, so that a model's visual tokens are not held once more in float32.
    if stored.shape != actual.shape:
        return float("inf")
    scale = max(float(stored.max(initial=0)), -float(stored.min(initial=0)), 1e-6)
    rows = [np.abs(one.astype(np.float32) - other).max(initial=0) for one, other in zip(stored, actual, strict=True)]
    worst = float(np.max(rows, initial=0)) / scale  # NumPy's maximum keeps what is not a number
    return worst if np.isfinite(worst) else float("inf")
