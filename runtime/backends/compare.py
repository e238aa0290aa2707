"""Record the calls of a backend, and compare the results of two backends."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from edgeprune.runtime.backends.interface import Backend, BackendProxy, CancellationToken, DecoderOutput, VisionOutput
from edgeprune.runtime.backends.kv_cache import DecoderInput, KvCache

Pairs = Iterable[tuple[np.ndarray, np.ndarray]]  # expected and actual


class RecordingBackend(BackendProxy):
    """A backend proxy that records comparable results.

    `seen`: encoder output per image. `selected`: indices [K] per input cut. `steps`: logits and kept indices per forward pass.
    `replayable`: also record the inputs for another backend: `patches`, `prompts`, and `inputs` (tokens and KV cache per forward
    pass). Without it the recorder holds no device memory.
    """

    def __init__(self, backend: Backend, *, replayable: bool = True) -> None:
        super().__init__(backend)
        self._replayable = replayable
        self.patches: list[np.ndarray] = []
        self.seen: list[VisionOutput] = []
        self.prompts: list[np.ndarray] = []
        self.selected: list[np.ndarray] = []
        self.inputs: list[tuple[DecoderInput, KvCache]] = []
        self.steps: list[DecoderOutput] = []

    def encode_image(
        self, patches: np.ndarray, *, unpruned: bool = False, cancellation: CancellationToken | None = None
    ) -> VisionOutput:
        """Encode an image and record the output."""
        vision_output = self._backend.encode_image(patches, unpruned=unpruned, cancellation=cancellation)
        self.patches += [patches] if self._replayable else []
        self.seen.append(
            vision_output if self._replayable else VisionOutput(on_host(vision_output.embeds), kept=vision_output.kept)
        )
        return vision_output

    def select_tokens(self, vision_output: VisionOutput, prompt: np.ndarray, tier: int = 0) -> tuple[np.ndarray, ...]:
        """Apply the input cut and record its indices."""
        selected = self._backend.select_tokens(vision_output, prompt, tier)
        self.prompts += [prompt] if self._replayable else []
        self.selected.append(selected[1])
        return selected

    def forward(self, tokens: DecoderInput, cache: KvCache, *, cancellation: CancellationToken | None = None) -> DecoderOutput:
        """Run a forward pass and record its logits, kept indices and states."""
        step = self._backend.forward(tokens, cache, cancellation=cancellation)
        self.inputs += [(tokens, cache)] if self._replayable else []
        states = step.states if self._replayable else ()
        self.steps.append(DecoderOutput(step.logits, (), step.kept, None, states=states))
        return step

    @property
    def kept(self) -> list[np.ndarray]:
        """The non-empty kept indices of all vision, input, layer and cache cuts. Forward passes without an image have none."""
        cuts = [*(vision_output.kept for vision_output in self.seen), self.selected, *(step.kept for step in self.steps)]
        return [kept for cut in cuts for kept in cut if kept.size]


def largest_difference(pairs: Pairs) -> float:
    """Return the largest absolute difference over all pairs, relative to the largest magnitude in the expected array.

    The result is infinite if shapes differ or an actual value is not finite.
    """
    worst = 0.0
    for expected, actual in pairs:
        if expected.shape != actual.shape or not np.isfinite(actual).all():
            return float("inf")
        worst = max(worst, float(np.abs(expected - actual).max() / max(np.abs(expected).max(), 1e-6)))
    return worst


def differing_indices(pairs: Pairs) -> int:
    """Return the number of kept indices that are in only one of the two sets. Arrays are [K] or [heads, K].

    Sets are compared head by head, because attention does not depend on the order in the cache.
    """
    rows = (both for pair in pairs for both in zip(*map(np.atleast_2d, pair), strict=True))
    return sum(len(np.setxor1d(*both)) for both in rows)


def on_host(array: Any) -> np.ndarray:
    """Return an array of a device as one of the host; others as they are."""
    on_host: np.ndarray = array.numpy() if hasattr(array, "numpy") else array
    return on_host
