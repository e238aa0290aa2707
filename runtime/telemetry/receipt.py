"""The receipt of an answer: the cuts that were applied, the time of each stage, and why generation ended."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

RUNNING = "running"  # the finish reason of an answer that has not ended


@dataclass(frozen=True)
class CutReceipt:
    """One applied cut: visual tokens before and after. `kept`: token indices in the image [after], for a cache [heads, after]."""

    cut: str
    before: int
    after: int
    kept: np.ndarray


@dataclass(frozen=True)
class ImageCuts:
    """The cuts of one image or video: `tokens` act on all later layers, `caches` only on KV caches (drawn as one)."""

    tokens: tuple[CutReceipt, ...]
    caches: tuple[CutReceipt, ...]


@dataclass(frozen=True)
class StageSpan:
    """Start and end of a stage in nanoseconds of the system clock."""

    name: str
    began_ns: int
    ended_ns: int


@dataclass
class Times:
    """Milliseconds of each stage. `decode_ms`: one entry per decode step, sampling included. `graph_ms`: the part of each step in
    the decoder graph, if the backend reports it. `stages`: spans in order of their end, with all decode steps as one.
    """

    preprocess_ms: float = 0.0
    vision_ms: float = 0.0
    select_ms: float = 0.0
    prefill_ms: float = 0.0
    decode_ms: list[float] = field(default_factory=list)
    graph_ms: list[float] = field(default_factory=list)
    stages: list[StageSpan] = field(default_factory=list)
    _nested_s: float = 0.0  # seconds spent in stages inside the current one

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the duration of the block to the milliseconds of stage `name`, without the stages nested in it."""
        outer, self._nested_s = self._nested_s, 0.0
        began_ns, started = time.time_ns(), time.perf_counter()
        try:
            yield
        finally:
            elapsed = time.perf_counter() - started
            before: float = getattr(self, f"{name}_ms")
            setattr(self, f"{name}_ms", before + 1e3 * (elapsed - self._nested_s))
            self._nested_s = outer + elapsed
            self.stages.append(StageSpan(name, began_ns, began_ns + int(1e9 * elapsed)))

    @property
    def ttft_ms(self) -> float:
        """Time to first token: preprocessing, vision encoder, input cut, and prefill with its layer cuts."""
        return self.preprocess_ms + self.vision_ms + self.select_ms + self.prefill_ms

    @property
    def ms_per_token(self) -> float:
        """Median decode step time; 0 without decode steps."""
        return float(np.median(self.decode_ms)) if self.decode_ms else 0.0

    @property
    def overhead(self) -> float | None:
        """Median decode time outside the graph, as a share of the graph's time; None if the graph's time is not known."""
        pairs = zip(self.decode_ms, self.graph_ms, strict=True) if self.graph_ms else ()
        shares = [step / graph - 1 for step, graph in pairs]
        return float(np.median(shares)) if shares else None


@dataclass(frozen=True)
class ImageUsage:
    """The accounting of one image: visual tokens, KV entries without pruning (`whole`) and after prefill (`stored`), and cuts.

    `ahead`: tokens of later text that entered its forward pass. `early`: whether its cuts had to rank without them.
    """

    tokens: int
    whole: int
    stored: int
    cuts: tuple[CutReceipt, ...]
    ahead: int = 0
    early: bool = False


@dataclass
class Receipt:
    """The record of one answer.

    `pruned`: whether the plan was applied; `reason`: why not. `finish_reason`: "end" (the model ended its turn), "stop" (a stop
    string), "length" (max_tokens), "deadline" (the next token would have been too late), "kv_limit" (max_kv_bytes), "cancelled",
    "error" or "running".

    `text_tokens`, `visual_tokens`: tokens of the prompt that were new to the conversation. `recalled_tokens`: those of them whose
    prefill was reused from another conversation. `repeated_tokens`: text tokens that entered the forward passes of earlier images
    too, so that these are ranked after the question. `ranked_early`: images that were not, since the model has states.

    `tier`: the tier that was used, None for a bundle with one plan. `tier_reason`: "default", "asked for", "deadline" or
    "max_kv_bytes". `reused`: results reused from an earlier question: "vision", "input cut", "prefix". `captured`: capture time of
    the newest frame in seconds of the monotonic clock, if known. `frame_age_ms`: its age at the first token. `frames_dropped`:
    frames that arrived since the last question and were in no shot. `energy_j`: energy of the whole machine.

    Visual KV entries are summed over the layers, one per token and layer: `visual_whole` without pruning, `visual_stored` after
    prefill, `visual_reads` per decode step. `decode_shares`: the keep ratio of the decode cut at each step. `launches`: how many
    decode steps were one launch of a CUDA graph ("graph") or several calls ("by hand"); empty where there is no choice.

    `image_distances`: how far each new image is from those that the selection was learned from, 1 at the limit of what they are
    like; empty unless the selection was learned.
    """

    pruned: bool
    reason: str
    visual_tokens: int = 0
    text_tokens: int = 0
    recalled_tokens: int = 0
    repeated_tokens: int = 0
    ranked_early: int = 0
    generated_tokens: int = 0
    cuts: tuple[CutReceipt, ...] = ()
    times: Times = field(default_factory=Times)
    kv_bytes: int = 0
    visual_whole: int = 0
    visual_stored: int = 0
    visual_reads: list[int] = field(default_factory=list)
    decode_shares: list[float] = field(default_factory=list)
    launches: dict[str, int] = field(default_factory=dict)
    finish_reason: str = RUNNING
    tier: str | None = None
    tier_reason: str | None = None
    deadline_ms: float | None = None
    reused: tuple[str, ...] = ()
    captured: float | None = None
    frame_age_ms: float | None = None
    frames_dropped: int | None = None
    energy_j: float | None = None
    image_distances: list[float] = field(default_factory=list)

    def __repr__(self) -> str:
        kept = f", {len(self.cuts)} cuts" if self.cuts else ""
        times = f"{self.times.ttft_ms:.0f} ms to the first token, {self.times.ms_per_token:.1f} ms a token"
        return f"<Receipt {self.finish_reason}: {self.generated_tokens} tokens, {times}, {self.visual_tokens} visual tokens{kept}>"

    def account(self, image: ImageUsage) -> None:
        """Add the accounting of one image."""
        self.visual_tokens += image.tokens
        self.visual_whole += image.whole
        self.visual_stored += image.stored
        self.repeated_tokens += image.ahead
        self.ranked_early += image.early
        self.cuts += image.cuts

    def cuts_by_image(self, images: int) -> tuple[ImageCuts, ...]:
        """Return the cuts of each image. `cuts` holds them image after image, the same number for each."""
        count = len(self.cuts) // images if images else 0
        return tuple(_by_kind(self.cuts[count * number : count * (number + 1)]) for number in range(images))

    def reuse(self, what: str) -> None:
        """Record that a result was reused. See `reused` for the names."""
        if what not in self.reused:
            self.reused += (what,)

    @property
    def images_unlike(self) -> int:
        """The number of new images that look unlike those which the selection was learned from."""
        return sum(distance > 1.0 for distance in self.image_distances)

    @property
    def visual_kv_share(self) -> float:
        """Visual KV entries after prefill as a share of those without pruning; 1 for a turn without an image."""
        return self.visual_stored / self.visual_whole if self.visual_whole else 1.0

    @property
    def visual_read_share(self) -> float:
        """Visual KV entries read by decode steps as a share of those without pruning; 1 when there are none to read."""
        unpruned = self.visual_whole * len(self.visual_reads)
        return sum(self.visual_reads) / unpruned if unpruned else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Return the receipt as JSON data."""
        times = self.times
        return {
            "pruned": self.pruned,
            "reason": self.reason,
            "visual_tokens": self.visual_tokens,
            "text_tokens": self.text_tokens,
            "recalled_tokens": self.recalled_tokens,
            "repeated_tokens": self.repeated_tokens,
            "ranked_early": self.ranked_early,
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
            "launches": self.launches,
            "finish_reason": self.finish_reason,
            "tier": self.tier,
            "tier_reason": self.tier_reason,
            "deadline_ms": self.deadline_ms,
            "reused": list(self.reused),
            "frame_age_ms": self.frame_age_ms,
            "frames_dropped": self.frames_dropped,
            "energy_j": self.energy_j,
            "image_distances": list(self.image_distances),
            "images_unlike": self.images_unlike,
        }


def shorten(text: str, characters: int = 60) -> str:
    """Return the beginning of a text, for a repr."""
    return text if len(text) <= characters else f"{text[:characters]}..."


def _by_kind(cuts: Sequence[CutReceipt]) -> ImageCuts:
    # Indices kept by a cache cut have an additional axis for the KV heads.
    return ImageCuts(*(tuple(cut for cut in cuts if np.ndim(cut.kept) == axes) for axes in (1, 2)))
