"""What every answer carries: what was pruned where, how long each stage took, and why generation ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgeprune.plan import KeepPlan
from edgeprune.runtime.engine import Step


@dataclass(frozen=True)
class CutReceipt:
    """One cut as it happened: visual tokens before and after, and which (`kept`, indices in the image: [after], of a cache [heads,
    after]).
    """

    cut: str
    before: int
    after: int
    kept: np.ndarray


@dataclass
class Times:
    """Milliseconds of each stage; `decode_ms` has one entry for every decode step, picking the token included, and `graph_ms`
    what the decoder's graph alone took of it, where the engine says so.
    """

    preprocess_ms: float = 0.0
    vision_ms: float = 0.0
    select_ms: float = 0.0
    prefill_ms: float = 0.0
    decode_ms: list[float] = field(default_factory=list)
    graph_ms: list[float] = field(default_factory=list)

    @property
    def ttft_ms(self) -> float:
        """Time to first token: preprocessing, vision encoder, the input cut, and prefill with the selection inside."""
        return self.preprocess_ms + self.vision_ms + self.select_ms + self.prefill_ms

    @property
    def ms_per_token(self) -> float:
        """Median of the decode steps; 0 when there was none."""
        return float(np.median(self.decode_ms)) if self.decode_ms else 0.0

    @property
    def overhead(self) -> float | None:
        """What a decode step takes beside its graph, as a share of the graph's time; the median, None where it is not known."""
        pairs = zip(self.decode_ms, self.graph_ms, strict=True) if self.graph_ms else ()
        shares = [whole / graph - 1 for whole, graph in pairs]
        return float(np.median(shares)) if shares else None


@dataclass
class Receipt:
    """The account of one answer.

    `pruned` tells whether the plan was applied, and `reason` why not. `finish_reason`: "end" (the model ended its turn), "stop" (a
    stop string), "length" (max_tokens), "cancelled" (the stream was closed early), "error" or "running".

    Visual KV entries are counted over the layers, one for each token in one layer: `visual_whole` without pruning,
    `visual_stored` after prefill, `visual_reads` at each decode step. `decode_shares`: the share of its visual cache that the
    decode cut left each step.
    """

    pruned: bool
    reason: str
    visual_tokens: int = 0
    text_tokens: int = 0
    generated_tokens: int = 0
    cuts: tuple[CutReceipt, ...] = ()
    times: Times = field(default_factory=Times)
    kv_bytes: int = 0
    visual_whole: int = 0
    visual_stored: int = 0
    visual_reads: list[int] = field(default_factory=list)
    decode_shares: list[float] = field(default_factory=list)
    finish_reason: str = "running"

    @property
    def visual_kv_share(self) -> float:
        """Visual KV entries held after prefill, as a share of the unpruned; 1 for a turn without an image."""
        return self.visual_stored / self.visual_whole if self.visual_whole else 1.0

    @property
    def visual_read_share(self) -> float:
        """Visual KV entries that the decode steps read, as a share of the unpruned; 1 where there was nothing to read."""
        whole = self.visual_whole * len(self.visual_reads)
        return sum(self.visual_reads) / whole if whole else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Return the receipt as JSON data."""
        times = self.times
        return {
            "pruned": self.pruned,
            "reason": self.reason,
            "visual_tokens": self.visual_tokens,
            "text_tokens": self.text_tokens,
            "generated_tokens": self.generated_tokens,
            "cuts": [{"cut": c.cut, "before": c.before, "after": c.after, "kept": np.asarray(c.kept).tolist()} for c in self.cuts],
            "times_ms": {
                "preprocess": times.preprocess_ms,
                "vision": times.vision_ms,
                "select": times.select_ms,
                "prefill": times.prefill_ms,
                "ttft": times.ttft_ms,
                "per_token": times.ms_per_token,
            },
            "kv_bytes": self.kv_bytes,
            "visual_kv_share": self.visual_kv_share,
            "visual_read_share": self.visual_read_share,
            "decode_shares": self.decode_shares,
            "finish_reason": self.finish_reason,
        }


def cut_receipts(plan: KeepPlan, encoded: Sequence[np.ndarray], order: np.ndarray, step: Step) -> tuple[CutReceipt, ...]:
    """Return what each cut of the image turn did. `encoded`: what each vision cut kept; `order`: what entered the decoder."""
    receipts, left = list[CutReceipt](), plan.geometry.tokens
    entered = [] if plan.input is None else [(plan.input, order)]
    for cut, kept in [*zip(plan.vision_cuts, encoded, strict=True), *entered]:
        receipts.append(CutReceipt(str(cut), left, len(kept), kept))
        left = len(kept)
    before = {cut: plan.alive(cut.layer - (cut.site == "layer")) for cut in (*plan.layer_cuts, *plan.cache_cuts)}
    for cut, kept in zip((*plan.layer_cuts, *plan.cache_cuts), step.kept, strict=True):
        receipts.append(CutReceipt(str(cut), before[cut], kept.shape[-1], kept))
    return tuple(receipts)
