"""What a model has taken in of a conversation: text and images, at their positions, in its KV caches.

Positions of text and image tokens, as the model was trained with them.

With mRoPE (three axes: time, height, width; Qwen2-VL, section 2.1 of arXiv 2409.12191) a text token has one number on all axes,
an image spans its grid, and text goes on after the largest number used. Pruning never renumbers: kept tokens stay where they
were and the next token comes after the unpruned length.

The decode cut at work: how much of the visual cache each step of an answer reads (DyRate, arXiv 2501.14204).

A share never grows within an answer: what was dropped is not missed twice. By a schedule it depends on the step alone; a live
predictor looks at where the newest token's attention went.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from edgeprune.plan import Cut, KeepPlan, View
from edgeprune.runtime.backends.interface import Backend, CancellationToken, DecoderOutput, VisionOutput
from edgeprune.runtime.backends.kv_cache import DecoderInput, KvCache, TokenSegment
from edgeprune.runtime.generation.pipeline import Pipeline
from edgeprune.runtime.telemetry.receipt import CutReceipt, ImageUsage, Receipt

SYSTEM, INSTRUCTION, GENERATED = 0, 1, 2
_ONE_HOT = np.eye(3, dtype=np.float32)


def text_positions(start: int, count: int, axes: int) -> np.ndarray:
    """Return the positions [axes, count] of `count` text tokens from `start`."""
    return np.tile(np.arange(start, start + count, dtype=np.int64), (axes, 1))


def span_positions(start: int, views: Sequence[View], axes: int) -> tuple[np.ndarray, int]:
    """Return the positions [axes, tokens] of visual tokens without text between them, and the position of the token after them.

    With mRoPE the views lie over each other at their times, which are those of a video's frames. Text goes on after the largest
    position, as it was in training; transformers 5.23 goes on after the grid alone, which is the same but for videos with more
    steps in time than tokens along a side.
    """
    tokens = sum(view.tokens for view in views)
    if axes == 1:
        return text_positions(start, tokens, axes), start + tokens
    grids = [np.indices((1, view.rows, view.columns), dtype=np.int64).reshape(3, -1) for view in views]
    for grid, view in zip(grids, views, strict=True):
        grid[0] += view.time - views[0].time
    positions = start + np.concatenate(grids, axis=1)
    return positions, int(positions.max()) + 1


class DecodeKeepRatio:
    """The rate of one answer, asked before each of its decode steps."""

    def __init__(self, backend: Backend, cut: Cut | None) -> None:
        self._backend, self._cut = backend, cut
        self._step, self.keep_ratio = 0, 1.0

    def apply(self, cache: KvCache, before: DecoderOutput, receipt: Receipt) -> KvCache:
        """Return the cache for the next decode step. `before`: the step whose token it takes in."""
        if self._cut is None:
            return cache
        share = (
            self._scheduled()
            if before.attention_shares is None
            else self._backend.predict_keep_ratio(before.attention_shares, self._step)
        )
        self._step += 1
        if self._cut.options.get("monotone", True):
            share = min(share, self.keep_ratio)
        receipt.decode_shares.append(share)
        if share == self.keep_ratio:
            return cache
        self.keep_ratio = share
        return cache.limit_visual(share, self._cut.layer)

    def _scheduled(self) -> float:
        assert self._cut is not None
        steps, shares = self._cut.options["steps"], self._cut.options["shares"]
        entry = bisect_right(steps, self._step) - 1
        return float(shares[entry]) if entry >= 0 else 1.0


def cut_receipts(plan: KeepPlan, encoded: Sequence[np.ndarray], order: np.ndarray, step: DecoderOutput) -> tuple[CutReceipt, ...]:
    """Return what each cut of the image turn did. `encoded`: what each vision cut kept; `order`: what entered the decoder."""
    receipts, left = list[CutReceipt](), plan.geometry.tokens
    entered = [] if plan.input is None else [(plan.input, order)]
    for cut, kept in [*zip(plan.vision_cuts, encoded, strict=True), *entered]:
        receipts.append(CutReceipt(str(cut), left, len(kept), kept))
        left = len(kept)
    before = {cut: plan.tokens_at_layer(cut.layer - (cut.site == "layer")) for cut in (*plan.layer_cuts, *plan.cache_cuts)}
    for cut, kept in zip((*plan.layer_cuts, *plan.cache_cuts), step.kept, strict=True):
        receipts.append(CutReceipt(str(cut), before[cut], kept.shape[-1], kept))
    return tuple(receipts)


@dataclass(frozen=True)
class SelectedTokens:
    """An image as it enters the decoder: `embeds` [1, K, width] of the tokens with indices `order` [K], of what was
    `vision_output`.
    """

    vision_output: VisionOutput
    embeds: np.ndarray
    order: np.ndarray


@dataclass(frozen=True)
class PrefixSnapshot:
    """A conversation up to the end of an image, to be gone on from again and again."""

    ids: tuple[int, ...]
    cache: KvCache
    position: int
    length: int
    accounts: tuple[ImageUsage, ...]


class SequenceState:
    """The caches and where the next token stands.

    `ids`: what they hold, each span of an image as one; the prefill sets them. `length`: of the sequence, as if nothing had been
    pruned. `images`: how many there are.
    """

    def __init__(self, pipeline: Pipeline, spans: tuple[tuple[View, ...], ...], *, prune: bool) -> None:
        self._pipeline, self._spans, self._prune = pipeline, spans, prune
        self.ids: list[int] = []
        shape = pipeline.decoder
        self.cache = KvCache.empty(shape)
        self._nothing = TokenSegment(np.zeros((1, 0, shape.width), np.float32), np.zeros((shape.position_axes, 0), np.int64))
        self.length = self.images = 0
        self._position = 0
        self._accounts: tuple[ImageUsage, ...] = ()
        self._groups = bytearray()  # of the text in the caches: SYSTEM, INSTRUCTION, GENERATED or none of them

    def reserve(self, tokens: int) -> None:
        """Make room for so many more tokens of text at once; what earlier answers could spare, the next one may need."""
        self.cache = self.cache.limit_visual(1.0, 0).reserve(min(tokens, self._pipeline.decoder.context))

    def append_text(
        self, ids: Sequence[int], cancellation: CancellationToken | None = None, *, group: int = INSTRUCTION
    ) -> DecoderOutput:
        """Take in text without an image, at least one token."""
        nothing = self._nothing
        return self._step(DecoderInput(nothing, nothing, self._text(ids), _NO_ORDER, _NO_GROUPS), group, cancellation)

    def append_image(
        self, parts: Sequence[Sequence[int]], chosen: SelectedTokens, tier: int = 0, cancellation: CancellationToken | None = None
    ) -> tuple[DecoderOutput, ImageUsage]:
        """Take in an image with the text before, between and after its spans, under the budgets of a tier.

        Of an unpruned conversation all tokens count as text.
        """
        plan, geometry = self._pipeline.plans[tier], self._pipeline.plan.geometry
        prefix, visual = self._image_segments(parts[:-1], chosen.embeds if self._prune else chosen.vision_output.embeds)
        suffix, before = self._text(parts[-1]), self.cache.visual_entries_read
        whole = geometry.tokens * plan.layers
        if self._prune:
            # Positions are those of every token until `only` takes those of the tokens that stay.
            visual = visual.gather(chosen.order, chosen.embeds)
            step = self._step(DecoderInput(prefix, visual, suffix, chosen.order, _NO_GROUPS, tier), INSTRUCTION, cancellation)
            cuts = cut_receipts(plan, chosen.vision_output.kept, chosen.order, step)
            account = ImageUsage(geometry.tokens, whole, self.cache.visual_entries_read - before, cuts)
        else:
            tokens = DecoderInput(prefix.concat(visual), self._nothing, suffix, _NO_ORDER, _NO_GROUPS)
            step = self._step(tokens, INSTRUCTION, cancellation)
            account = ImageUsage(geometry.tokens, whole, whole, ())
        self.images += 1
        self._accounts += (account,)
        return step, account

    def append_generated(
        self, token: int, before: DecoderOutput, keep_ratio: DecodeKeepRatio | None, receipt: Receipt
    ) -> DecoderOutput:
        """Take in a token of the answer. `before`: the step that it came from; `keep_ratio`: what the step may read of the
        images.
        """
        if keep_ratio is not None:
            self.cache = keep_ratio.apply(self.cache, before, receipt)
        # Unpruned, visual tokens lie among the text and are all read.
        receipt.visual_reads.append(self.cache.visual_entries_read if self._prune else receipt.visual_whole)
        step = self.append_text([token], group=GENERATED)
        self.ids.append(token)
        return step

    def snapshot(self, ids: Sequence[int], text: int) -> PrefixSnapshot:
        """Return what was taken in up to the newest image, whose ids are `ids`; the last `text` tokens after it are left out."""
        cache = self.cache.copy_prefix(self.cache.length - text)
        return PrefixSnapshot(tuple(ids), cache, self._position - text, self.length - text, self._accounts)

    def restore(self, prefix: PrefixSnapshot) -> tuple[ImageUsage, ...]:
        """Go on from a prefix, in place of what was taken in; return what happened to its images.

        Its groups are not known: plans whose rate follows attention have cuts that see the question, and no prefixes.
        """
        self.cache, self._position, self.length = prefix.cache, prefix.position, prefix.length
        self._accounts, self.images = prefix.accounts, len(prefix.accounts)
        self._groups, self.ids = bytearray([SYSTEM] * (prefix.cache.length - 1)), list(prefix.ids)
        return prefix.accounts

    def _step(self, tokens: DecoderInput, group: int, cancellation: CancellationToken | None) -> DecoderOutput:
        before, after = tokens.prefix.embeds.shape[1], tokens.suffix.embeds.shape[1]
        self._groups += bytes([SYSTEM] * before + [group] * after)
        groups = _ONE_HOT[np.frombuffer(self._groups, np.uint8)]
        step = self._pipeline.backend.forward(replace(tokens, text_groups=groups), self.cache, cancellation=cancellation)
        self.cache = self.cache.append(step.new_kv, before, after)
        return replace(step, new_kv=())

    def _image_segments(self, before: Sequence[Sequence[int]], embeds: np.ndarray) -> tuple[TokenSegment, TokenSegment]:
        # The text before each span, and the visual tokens of all, each at its own position.
        axes = self._pipeline.decoder.position_axes
        text, spans = [], []
        for ids, views in zip(before, self._spans, strict=True):
            text.append(text_positions(self._position, len(ids), axes))
            span, self._position = span_positions(self._position + len(ids), views, axes)
            spans.append(span)
        ids = [token for part in before for token in part]
        visual = TokenSegment(embeds, np.concatenate(spans, axis=1))
        self.length += visual.positions.shape[1] + len(ids)
        return (
            TokenSegment(self._pipeline.backend.embed_tokens(ids), np.concatenate(text, axis=1)) if ids else self._nothing
        ), visual

    def _text(self, ids: Sequence[int]) -> TokenSegment:
        if not ids:
            return self._nothing
        positions = text_positions(self._position, len(ids), self._pipeline.decoder.position_axes)
        self._position += len(ids)
        self.length += len(ids)
        return TokenSegment(self._pipeline.backend.embed_tokens(ids), positions)


_NO_ORDER, _NO_GROUPS = np.zeros(0, np.int64), np.zeros((0, 3), np.float32)
