"""What a backend was given and returned, kept, and how far the results of two backends are apart."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from edgeprune.runtime.backends.interface import Backend, BackendProxy, CancellationToken, DecoderOutput, VisionOutput
from edgeprune.runtime.backends.kv_cache import DecoderInput, KvCache

Pairs = Iterable[tuple[np.ndarray, np.ndarray]]  # expected and actual


class RecordingBackend(BackendProxy):
    """A backend that keeps what can be compared: `seen` of each image, `selected` [K] of each input cut, `steps` with their logits
    and kept indices.

    `replayable`: keep what went in as well, so that it can be given to another backend: `patches`, `prompts` and `inputs`, of each
    step its tokens and cache. Without it nothing is held that may lie in a device's memory.
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
        """Look at patches, and keep what was seen."""
        vision_output = self._backend.encode_image(patches, unpruned=unpruned, cancellation=cancellation)
        self.patches += [patches] if self._replayable else []
        self.seen.append(
            vision_output if self._replayable else VisionOutput(_on_host(vision_output.embeds), kept=vision_output.kept)
        )
        return vision_output

    def select_tokens(self, vision_output: VisionOutput, prompt: np.ndarray, tier: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Apply a plan's input cut, and keep its indices."""
        embeds, kept = self._backend.select_tokens(vision_output, prompt, tier)
        self.prompts += [prompt] if self._replayable else []
        self.selected.append(kept)
        return embeds, kept

    def forward(self, tokens: DecoderInput, cache: KvCache, *, cancellation: CancellationToken | None = None) -> DecoderOutput:
        """Run new tokens, and keep the logits and the kept indices."""
        step = self._backend.forward(tokens, cache, cancellation=cancellation)
        self.inputs += [(tokens, cache)] if self._replayable else []
        self.steps.append(DecoderOutput(step.logits, (), step.kept, None))
        return step

    @property
    def kept(self) -> list[np.ndarray]:
        """The indices that cuts kept: of the encoder, the input, layers and caches; steps without an image have none."""
        cuts = [*(vision_output.kept for vision_output in self.seen), self.selected, *(step.kept for step in self.steps)]
        return [kept for cut in cuts for kept in cut if kept.size]


def largest_difference(pairs: Pairs) -> float:
    """Return the largest difference, relative to the largest magnitude that is expected in its array.

    It is infinite where shapes differ or a number is not finite.
    """
    worst = 0.0
    for expected, actual in pairs:
        if expected.shape != actual.shape or not np.isfinite(actual).all():
            return float("inf")
        worst = max(worst, float(np.abs(expected - actual).max() / max(np.abs(expected).max(), 1e-6)))
    return worst


def differing_indices(pairs: Pairs) -> int:
    """Return how many kept indices [K] or [heads, K] are in one set and not in the other.

    Sets are compared head by head: the order in a cache does not matter to attention.
    """
    rows = (both for pair in pairs for both in zip(*map(np.atleast_2d, pair), strict=True))
    return sum(len(np.setxor1d(*both)) for both in rows)


def _on_host(array: Any) -> np.ndarray:
    copied: np.ndarray = array.numpy() if hasattr(array, "numpy") else array
    return copied
