"""Memory that runs out inside an engine, said in one line.

ONNX Runtime raises types of its own for it, without a common base, and numpy raises Python's MemoryError. An answer that meets
either ends with finish_reason "error"; its conversation and all others go on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from edgeprune.errors import EngineError
from edgeprune.runtime.cache import KvCache
from edgeprune.runtime.engine import Engine, Seen, Step, StepInput
from edgeprune.runtime.interrupt import Interrupt

_SIGNS = ("failed to allocate", "bad_alloc", "out of memory", "cannot allocate memory", "bad allocation")
_HINT = "Ask with fewer images or a lower max_kv_bytes, or close other programs."


class CandidEngine:
    """An engine that raises EngineError where memory ran out, whatever the one inside raises."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def see(self, patches: np.ndarray, *, whole: bool = False, interrupt: Interrupt | None = None) -> Seen:
        """Return what the vision encoder says of patches [patches, patch pixels]; `whole`: of all, whatever its cuts are."""
        with _said("the vision encoder"):
            return self._engine.see(patches, whole=whole, interrupt=interrupt)

    def select(self, seen: Seen, prompt: np.ndarray, tier: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Apply the plan's input cut: return embeddings [1, K, hidden], indices [K]."""
        with _said("the selection"):
            return self._engine.select(seen, prompt, tier)

    def embed(self, ids: Sequence[int]) -> np.ndarray:
        """Return embeddings [1, n, hidden]."""
        with _said("the embedding"):
            return self._engine.embed(ids)

    def step(self, tokens: StepInput, cache: KvCache) -> Step:
        """Run new tokens on top of a cache."""
        with _said("the decoder"):
            return self._engine.step(tokens, cache)

    def rate(self, split: np.ndarray, step: int) -> float:
        """Return the share of visual tokens that the plan's predictor keeps for a decode step."""
        with _said("the predictor"):
            return self._engine.rate(split, step)


@contextmanager
def _said(part: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        told = (str(error).splitlines() or [""])[0]
        if not isinstance(error, MemoryError) and not any(sign in told.lower() for sign in _SIGNS):
            raise
        raise EngineError(f"Memory ran out in {part}: {told or 'nothing more is known'}.", hint=_HINT) from error
