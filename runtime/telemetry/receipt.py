"""What every answer carries: what was pruned where, how long each stage took, and why generation ended."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class CutReceipt:
    """One cut as it happened: visual tokens before and after, and which (`kept`, indices in the image: [after], of a cache [heads,
    after]).
    """

    cut: str
    before: int
    after: int
    kept: np.ndarray


@dataclass(frozen=True)
class ImageCuts:
    """The cuts of one image, or video: those that took tokens from all that follows, and those of KV `caches`, which are shown as
    one.
    """

    tokens: tuple[CutReceipt, ...]
    caches: tuple[CutReceipt, ...]


@dataclass(frozen=True)
class StageSpan:
    """When a stage began and ended, in nanoseconds of the system's clock."""

    name: str
    began_ns: int
    ended_ns: int


@dataclass
class Times:
    """Milliseconds of each stage; `decode_ms` has one entry for every decode step, picking the token included, and `graph_ms`
    what the decoder's graph alone took of it, where the engine says so. `stages`: the same as they happened, decoding as one.
    """

    preprocess_ms: float = 0.0
    vision_ms: float = 0.0
    select_ms: float = 0.0
    prefill_ms: float = 0.0
    decode_ms: list[float] = field(default_factory=list)
    graph_ms: list[float] = field(default_factory=list)
    stages: list[StageSpan] = field(default_factory=list)
    _nested_s: float = 0.0  # seconds of the stages inside the one that runs

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time of the block to `name`_ms, that of stages inside it left out."""
        outer, self._nested_s = self._nested_s, 0.0
        began_ns, started = time.time_ns(), time.perf_counter()
        try:
            yield
        finally:
            took = time.perf_counter() - started
            before: float = getattr(self, f"{name}_ms")
            setattr(self, f"{name}_ms", before + 1e3 * (took - self._nested_s))
            self._nested_s = outer + took
            self.stages.append(StageSpan(name, began_ns, began_ns + int(1e9 * took)))

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


@dataclass(frozen=True)
class ImageUsage:
    """What happened to one image: its visual tokens, the KV entries it would have unpruned (`whole`) and has, its cuts."""

    tokens: int
    whole: int
    stored: int
    cuts: tuple[CutReceipt, ...]


@dataclass
class Receipt:
    """The account of one answer.

    `pruned` tells whether the plan was applied, and `reason` why not. `finish_reason`: "end" (the model ended its turn), "stop" (a
    stop string), "length" (max_tokens), "deadline" (another token would have come too late), "kv_limit" (max_kv_bytes),
    "cancelled", "error" or "running".

    `text_tokens` and `visual_tokens`: of the prompt, as far as the conversation did not hold it; `recalled_tokens`: those of
    them that another conversation had taken in.

    `tier`: of a bundle with several plans the one that was used, and `tier_reason` why: "default", "asked for", "deadline" or
    "max_kv_bytes". `reused`: what had been computed for an earlier question: "vision", "input cut", "prefix". `captured`: when the
    newest frame was, in seconds of the monotonic clock, if that is known; `frame_age_ms`: how old it was when the first token came;
    `frames_dropped`: those that came since the last question and were not looked at. `energy_j`: of the whole machine.

    Visual KV entries are counted over the layers, one for each token in one layer: `visual_whole` without pruning,
    `visual_stored` after prefill, `visual_reads` at each decode step. `decode_shares`: the share of its visual cache that the
    decode cut left each step.
    """

    pruned: bool
    reason: str
    visual_tokens: int = 0
    text_tokens: int = 0
    recalled_tokens: int = 0
    generated_tokens: int = 0
    cuts: tuple[CutReceipt, ...] = ()
    times: Times = field(default_factory=Times)
    kv_bytes: int = 0
    visual_whole: int = 0
    visual_stored: int = 0
    visual_reads: list[int] = field(default_factory=list)
    decode_shares: list[float] = field(default_factory=list)
    finish_reason: str = "running"
    tier: str | None = None
    tier_reason: str | None = None
    deadline_ms: float | None = None
    reused: tuple[str, ...] = ()
    captured: float | None = None
    frame_age_ms: float | None = None
    frames_dropped: int | None = None
    energy_j: float | None = None

    def account(self, image: ImageUsage) -> None:
        """Add what happened to an image."""
        self.visual_tokens += image.tokens
        self.visual_whole += image.whole
        self.visual_stored += image.stored
        self.cuts += image.cuts

    def cuts_by_image(self, images: int) -> tuple[ImageCuts, ...]:
        """Return the cuts of each of the answer's images: what was recorded one image after the other."""
        each = len(self.cuts) // images if images else 0
        return tuple(_by_kind(self.cuts[each * number : each * (number + 1)]) for number in range(images))

    def reuse(self, what: str) -> None:
        """Note that something was not computed again."""
        if what not in self.reused:
            self.reused += (what,)

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
            "recalled_tokens": self.recalled_tokens,
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
            "tier": self.tier,
            "tier_reason": self.tier_reason,
            "deadline_ms": self.deadline_ms,
            "reused": list(self.reused),
            "frame_age_ms": self.frame_age_ms,
            "frames_dropped": self.frames_dropped,
            "energy_j": self.energy_j,
        }


def _by_kind(cuts: Sequence[CutReceipt]) -> ImageCuts:
    # What a cache's cut kept has an axis for the heads.
    return ImageCuts(*(tuple(cut for cut in cuts if np.ndim(cut.kept) == axes) for axes in (1, 2)))
