"""Choose the next token, and see when a stop string is complete."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgeprune.errors import EdgePruneError, UsageError


@dataclass(frozen=True)
class Sampling:
    """How to generate.

    `temperature` 0 is greedy; `top_p` in (0, 1] is the nucleus; `seed` makes sampling repeatable; `max_tokens` bounds the answer;
    `stop` strings end it and are not part of it.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    max_tokens: int = 128
    stop: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UsageError(f"temperature must be 0 or more, not {self.temperature}.")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p must be in (0, 1], not {self.top_p}.")
        if self.max_tokens < 1:
            raise UsageError(f"max_tokens must be 1 or more, not {self.max_tokens}.")
        if self.seed is not None and self.seed < 0:
            raise UsageError(f"seed must be 0 or more, not {self.seed}.")
        if isinstance(self.stop, str) or any(not text for text in self.stop):
            raise UsageError("stop must be a list of texts that are not empty.")


class Sampler:
    """Picks tokens for one answer."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._rng = np.random.default_rng(sampling.seed)

    def pick(self, logits: np.ndarray) -> int:
        """Return the id of the next token for logits [vocabulary]; ties go to the lowest id."""
        if np.isnan(logits).any():
            raise EdgePruneError("The model returned logits that are not numbers.", hint="Check it with: edgeprune verify")
        if self.sampling.temperature == 0:
            return int(logits.argmax())
        scaled = logits.astype(np.float64) / self.sampling.temperature
        probabilities = np.exp(scaled - scaled.max())
        probabilities /= probabilities.sum()
        order = np.argsort(-probabilities, kind="stable")
        mass = np.cumsum(probabilities[order])
        nucleus = order[: int(np.searchsorted(mass, self.sampling.top_p * mass[-1])) + 1]
        chosen = probabilities[nucleus]
        return int(self._rng.choice(nucleus, p=chosen / chosen.sum()))


class StopWatch:
    """Holds back text that may be the beginning of a stop string; `stopped` tells that one is complete."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Add text and return what can be shown; after a stop string nothing can."""
        if self.stopped:
            return ""
        self._held += text
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            shown, self._held = self._held[: min(found)], ""
            return shown
        keep = max((self._overlap(stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def flush(self) -> str:
        """Return what is held back, at the end of the answer."""
        shown, self._held = self._held, ""
        return shown

    def _overlap(self, stop: str) -> int:
        # The longest end of the held text that begins the stop string.
        return next((n for n in range(len(stop) - 1, 0, -1) if self._held.endswith(stop[:n])), 0)
