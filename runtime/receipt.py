"""What every answer carries: what was pruned where, how long each stage took, and why generation ended."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class CutReceipt:
    """One cut as it happened: visual tokens before and after, and which (`kept` [after], indices in the image)."""

    cut: str
    before: int
    after: int
    kept: np.ndarray


@dataclass
class Times:
    """Milliseconds of each stage; `decode_ms` has one entry for every decode step."""

    preprocess_ms: float = 0.0
    vision_ms: float = 0.0
    prefill_ms: float = 0.0
    decode_ms: list[float] = field(default_factory=list)

    @property
    def ttft_ms(self) -> float:
        """Time to first token: preprocessing, vision encoder, and prefill with its selection."""
        return self.preprocess_ms + self.vision_ms + self.prefill_ms

    @property
    def ms_per_token(self) -> float:
        """Median of the decode steps; 0 when there was none."""
        return statistics.median(self.decode_ms) if self.decode_ms else 0.0


@dataclass
class Receipt:
    """The account of one answer.

    `pruned` tells whether the plan was applied, and `reason` why not. `finish_reason`: "end" (the model ended its turn), "stop" (a
    stop string), "length" (max_tokens), "cancelled" (the stream was closed early), "error" or "running".
    """

    pruned: bool
    reason: str
    visual_tokens: int = 0
    text_tokens: int = 0
    generated_tokens: int = 0
    cuts: tuple[CutReceipt, ...] = ()
    times: Times = field(default_factory=Times)
    kv_bytes: int = 0
    finish_reason: str = "running"

    def to_dict(self) -> dict[str, Any]:
        """Return the receipt as JSON data."""
        times = self.times
        return {
            "pruned": self.pruned,
            "reason": self.reason,
            "visual_tokens": self.visual_tokens,
            "text_tokens": self.text_tokens,
            "generated_tokens": self.generated_tokens,
            "cuts": [
                {"cut": c.cut, "before": c.before, "after": c.after, "kept": [int(index) for index in c.kept]} for c in self.cuts
            ],
            "times_ms": {
                "preprocess": times.preprocess_ms,
                "vision": times.vision_ms,
                "prefill": times.prefill_ms,
                "ttft": times.ttft_ms,
                "per_token": times.ms_per_token,
            },
            "kv_bytes": self.kv_bytes,
            "finish_reason": self.finish_reason,
        }
