"""The state of a sequence: token ids, positions, the KV cache, and the decode cut.

Positions follow the model's training. With mRoPE (three axes: time, height, width; Qwen2-VL, section 2.1 of arXiv 2409.12191) a
text token has the same number on all axes, an image spans its grid, and text continues after the largest number. Pruning never
renumbers: kept tokens keep their positions and the next token follows the unpruned length.

The decode cut limits the share of the visual cache that each decode step reads (DyRate, arXiv 2501.14204). By default the share
never grows within an answer. A schedule depends on the step only; a live predictor uses the attention of the newest token. By
classes (PLPHP, arXiv 2502.14504) each layer has a share of its own, which follows the attention of the last prompt token.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from edgeprune.errors import UsageError
from edgeprune.plan import CLASSES, Cut, KeepPlan, View
from edgeprune.runtime.backends.interface import Backend, CancellationToken, DecoderOutput, VisionOutput
from edgeprune.runtime.backends.kv_cache import GENERATED, INSTRUCTION, SYSTEM, DecoderInput, KvCache, TokenSegment
from edgeprune.runtime.generation.pipeline import Pipeline
from edgeprune.runtime.telemetry.receipt import CutReceipt, ImageUsage, Receipt

IMAGE = 1  # the column of an image among attention shares: system, image, instruction, generated
_ONE_HOT = np.eye(3, dtype=np.float32)
_NO_ORDER, _NO_GROUPS = np.zeros(0, np.int64), np.zeros((0, 3), np.float32)


def text_positions(start: int, count: int, axes: int) -> np.ndarray:
    """Return the positions [axes, count] of `count` text tokens that begin at `start`."""
    return np.tile(np.arange(start, start + count, dtype=np.int64), (axes, 1))


def span_positions(start: int, views: Sequence[View], axes: int) -> tuple[np.ndarray, int]:
    """Return the positions [axes, tokens] of a span of visual tokens, and the position of the next token.

    With mRoPE all views share the same grid and differ in time, as the frames of a video do. The next token follows the largest
    position, as in training. transformers 5.23 continues after the grid only, which differs for videos with more time steps than
    tokens along a side. With two axes the second is the last position that a token attends to: the end of the span.
    """
    tokens = sum(view.tokens for view in views)
    if axes < 3:
        positions = text_positions(start, tokens, axes)
        positions[1:] = start + tokens - 1
        return positions, start + tokens
    grids = [np.indices((1, view.rows, view.columns), dtype=np.int64).reshape(3, -1) for view in views]
    for grid, view in zip(grids, views, strict=True):
        grid[0] += view.time - views[0].time
    positions = start + np.concatenate(grids, axis=1)
    return positions, int(positions.max()) + 1


class DecodeKeepRatio:
    """Applies the decode cut of one answer. `keep_ratio`: the share of visual tokens that the last decode step read."""

    def __init__(self, backend: Backend, cut: Cut | None) -> None:
        self._backend, self._cut = backend, cut
        self._step, self.keep_ratio = 0, 1.0

    def apply(self, cache: KvCache, before: DecoderOutput) -> KvCache:
        """Return the cache for the next decode step, whose share is then `keep_ratio`. `before`: the step that gave its token."""
        if self._cut is None:
            return cache
        if self._cut.options.get("form") == CLASSES:
            return self._by_class(self._cut, cache, before)
        share = (
            self._scheduled()
            if before.attention_shares is None
            else self._backend.predict_keep_ratio(before.attention_shares, self._step)
        )
        self._step += 1
        if self._cut.options.get("monotone", True):
            share = min(share, self.keep_ratio)
        if share == self.keep_ratio:
            return cache
        self.keep_ratio = share
        return cache.limit_visual(share, self._cut.layer)

    def _by_class(self, cut: Cut, cache: KvCache, before: DecoderOutput) -> KvCache:
        # The classes are those of the prompt's last token, for the whole answer.
        if self._step == 0:
            assert before.attention_shares is not None
            scores = before.attention_shares[cut.layer :, IMAGE]
            shares = np.asarray(cut.options["shares"])[np.searchsorted(cut.options["thresholds"], scores, side="right")]
            self.keep_ratio = float(shares.mean())
            cache = cache.limit_visual([1.0] * cut.layer + shares.tolist(), cut.layer)
        self._step += 1
        return cache

    def record(self, receipt: Receipt) -> None:
        """Add the share of a step to the receipt."""
        receipt.decode_shares += [] if self._cut is None else [self.keep_ratio]

    def _scheduled(self) -> float:
        assert self._cut is not None
        steps, shares = self._cut.options["steps"], self._cut.options["shares"]
        entry = bisect_right(steps, self._step) - 1
        return float(shares[entry]) if entry >= 0 else 1.0


def cut_receipts(plan: KeepPlan, encoded: Sequence[np.ndarray], order: np.ndarray, step: DecoderOutput) -> tuple[CutReceipt, ...]:
    """Return a receipt for each cut of one image.

    `encoded`: indices kept by each vision cut. `order` [K]: indices of the tokens that enter the decoder. `step`: prefill output.
    """
    receipts, tokens = list[CutReceipt](), plan.geometry.tokens
    input_cut = [] if plan.input is None else [(plan.input, order)]
    for cut, kept in [*zip(plan.vision_cuts, encoded, strict=True), *input_cut]:
        receipts.append(CutReceipt(str(cut), tokens, len(kept), kept))
        tokens = len(kept)
    before = {cut: plan.tokens_at_layer(cut.layer - (cut.site == "layer")) for cut in (*plan.layer_cuts, *plan.cache_cuts)}
    for cut, kept in zip((*plan.layer_cuts, *plan.cache_cuts), step.kept, strict=True):
        receipts.append(CutReceipt(str(cut), before[cut], kept.shape[-1], kept))
    return tuple(receipts)


@dataclass(frozen=True)
class SelectedTokens:
    """The visual tokens that enter the decoder.

    `embeds` [1, K, width]: embeddings of the tokens with indices `order` [K]. `vision_output`: output of the vision encoder.
    `weights` [K]: the logarithms of how many tokens each stands for, None for one each.
    """

    vision_output: VisionOutput
    embeds: np.ndarray
    order: np.ndarray
    weights: np.ndarray | None = None


@dataclass(frozen=True)
class PrefixSnapshot:
    """A sequence up to the end of an image, from which any number of conversations can continue."""

    ids: tuple[int, ...]
    cache: KvCache
    position: int
    length: int
    accounts: tuple[ImageUsage, ...]
    tiers: tuple[int, ...]


class SequenceState:
    """The KV cache of a conversation and the position of the next token.

    `ids`: the tokens in the cache, one per span of an image; `Prefill.run` sets them. `length`: unpruned length of the sequence.
    `tiers`: the tier of each image in the cache.
    """

    def __init__(self, pipeline: Pipeline, spans: tuple[tuple[View, ...], ...], *, prune: bool) -> None:
        self._pipeline, self._spans, self._prune = pipeline, spans, prune
        self.ids: list[int] = []
        shape = pipeline.decoder
        self.cache = KvCache.empty(shape, pipeline.plan)
        self._empty = TokenSegment(np.zeros((1, 0, shape.width), np.float32), np.zeros((shape.position_axes, 0), np.int64))
        self.tiers: tuple[int, ...] = ()
        self.length = self._position = 0
        self._usages: tuple[ImageUsage, ...] = ()
        self._groups = b""  # SYSTEM, INSTRUCTION or GENERATED for each text token in the cache

    @property
    def images(self) -> int:
        """Number of images in the cache."""
        return len(self.tiers)

    def continued_by(self, ids: Sequence[int]) -> bool:
        """Return whether `ids` are the tokens in the cache and at least one more, which the next forward pass can run."""
        return len(ids) > len(self.ids) and ids[: len(self.ids)] == self.ids

    def reserve(self, tokens: int) -> None:
        """Reserve room for `tokens` more text tokens, and undo the decode cut of the previous answer."""
        self.cache = self.cache.limit_visual(1.0, 0).reserve(min(tokens, self._pipeline.decoder.context))

    def append_text(
        self, ids: Sequence[int], cancellation: CancellationToken | None = None, *, group: int = INSTRUCTION
    ) -> DecoderOutput:
        """Run a forward pass over text without an image, at least one token. Cancelled before its end it changes nothing."""
        empty = self._empty
        positions = text_positions(self._position, len(ids), self._pipeline.decoder.position_axes)
        tokens = DecoderInput(empty, empty, self._segment(ids, [positions]), _NO_ORDER, _NO_GROUPS)
        step = self._step(tokens, group, cancellation)
        self._position += len(ids)
        self.length += len(ids)
        return step

    def append_image(
        self,
        parts: Sequence[Sequence[int]],
        chosen: SelectedTokens,
        tier: int = 0,
        cancellation: CancellationToken | None = None,
        *,
        later: Sequence[Sequence[Sequence[int]]] = (),
    ) -> tuple[DecoderOutput, ImageUsage]:
        """Run a forward pass over an image with the text before, between and after its spans, with the keep budgets of a tier.

        `later`: the text parts of the images that follow in the same prefill. Where the decoder ranks, the text after each of them
        enters this forward pass too, at its own positions, so that every image is ranked after the question (ADR 16). Its rows are
        dropped, and computed again after the later images. Models with states cannot drop a token: their images are ranked by the
        text up to the next one.

        In an unpruned conversation all visual tokens are passed as text. A forward pass ends with a text token: a layer that keeps
        no visual token would otherwise have nothing to compute. If none stands between the image and the next one, the first
        after later images is taken, and dropped. Raises UsageError instead if the model has states.
        """
        plan, geometry = self._pipeline.plans[tier], self._pipeline.plan.geometry
        ranked = self._prune and plan.ranks_in_decoder
        texts, spans, end = self._positions(self._position, parts)
        ahead, places = self._ahead(end, later, ranked=ranked, alone=not parts[-1])
        dropped, early = len(ahead), ranked and bool(later and self.cache.states)
        prefix = self._segment([token for part in parts[:-1] for token in part], texts[:-1])
        suffix = self._segment([*parts[-1], *ahead], [texts[-1], places])
        visual = TokenSegment(chosen.embeds if self._prune else chosen.vision_output.embeds, np.concatenate(spans, axis=1))
        self.length += sum(map(len, parts)) + visual.positions.shape[1]
        self._position, before = end, self.cache.visual_entries_read
        unpruned = geometry.tokens * len(self._pipeline.decoder.attention_layers)
        if self._prune:
            visual = visual.gather(chosen.order, chosen.embeds)
            tokens = DecoderInput(prefix, visual, suffix, chosen.order, _NO_GROUPS, tier, chosen.weights)
            step = self._step(tokens, INSTRUCTION, cancellation, dropped=dropped)
            cuts = cut_receipts(plan, chosen.vision_output.kept, chosen.order, step)
            usage = ImageUsage(geometry.tokens, unpruned, self.cache.visual_entries_read - before, cuts, dropped, early)
        else:
            tokens = DecoderInput(prefix.concat(visual), self._empty, suffix, _NO_ORDER, _NO_GROUPS)
            step = self._step(tokens, INSTRUCTION, cancellation, dropped=dropped)
            usage = ImageUsage(geometry.tokens, unpruned, unpruned, (), dropped)
        self.tiers += (tier,)
        self._usages += (usage,)
        return step, usage

    def append_generated(
        self,
        token: int,
        before: DecoderOutput,
        keep_ratio: DecodeKeepRatio | None,
        receipt: Receipt,
        cancellation: CancellationToken | None = None,
    ) -> DecoderOutput:
        """Run a decode step for a generated token. Raises Cancelled, with the token not taken in.

        `before`: the step that produced the token. `keep_ratio`: the decode cut to apply, None for none.
        """
        if keep_ratio is not None:
            self.cache = keep_ratio.apply(self.cache, before)
        step = self.append_text([token], cancellation, group=GENERATED)
        if keep_ratio is not None:
            keep_ratio.record(receipt)
        # In an unpruned conversation visual tokens are part of the text, and every step reads all of them.
        receipt.visual_reads.append(self.cache.visual_entries_read if self._prune else receipt.visual_whole)
        self.ids.append(token)
        if step.launched:
            receipt.launches[step.launched] = receipt.launches.get(step.launched, 0) + 1
        return step

    def snapshot(self, ids: Sequence[int], text: int) -> PrefixSnapshot:
        """Return the prefix that ends with the newest image. `ids`: its tokens. `text`: number of later text tokens, left out.

        With states `text` must be 0.
        """
        cache = self.cache.copy_prefix(self.cache.length - text)
        return PrefixSnapshot(tuple(ids), cache, self._position - text, self.length - text, self._usages, self.tiers)

    def restore(self, prefix: PrefixSnapshot) -> tuple[ImageUsage, ...]:
        """Replace the state by a prefix; return the usage of its images.

        Token groups are not restored: only plans whose decode cut follows attention use them, and those depend on the prompt and
        have no prefixes.
        """
        self.cache, self._position, self.length = prefix.cache, prefix.position, prefix.length
        self._usages, self.tiers = prefix.accounts, prefix.tiers
        self._groups, self.ids = bytes([SYSTEM] * (prefix.cache.length - 1)), list(prefix.ids)
        return prefix.accounts

    def _step(self, tokens: DecoderInput, group: int, cancellation: CancellationToken | None, *, dropped: int = 0) -> DecoderOutput:
        # `dropped`: tokens at the end of the suffix that are not part of the sequence yet.
        before, after = tokens.prefix.embeds.shape[1], tokens.suffix.embeds.shape[1]
        groups = self._groups + bytes([SYSTEM] * before + [group] * after)
        one_hot = _ONE_HOT[np.frombuffer(groups, np.uint8)]
        step = self._pipeline.backend.forward(replace(tokens, text_groups=one_hot), self.cache, cancellation=cancellation)
        self._groups = groups[: len(groups) - dropped]
        rows = tuple(new[: len(new) - dropped] for new in step.new_kv) if dropped else step.new_kv
        self.cache = self.cache.append(rows, before, after - dropped, step.states)
        return replace(step, new_kv=(), states=())

    def _positions(self, start: int, parts: Sequence[Sequence[int]]) -> tuple[list[np.ndarray], list[np.ndarray], int]:
        # The positions of an image's text parts and of its spans, if the first part begins at `start`, and the next position.
        axes = self._pipeline.decoder.position_axes
        texts, spans, end = [text_positions(start, len(parts[0]), axes)], [], start + len(parts[0])
        for ids, views in zip(parts[1:], self._spans, strict=True):
            span, end = span_positions(end, views, axes)
            spans.append(span)
            texts.append(text_positions(end, len(ids), axes))
            end += len(ids)
        return texts, spans, end

    def _ahead(
        self, start: int, later: Sequence[Sequence[Sequence[int]]], *, ranked: bool, alone: bool
    ) -> tuple[list[int], np.ndarray]:
        # The text after later images that enters this forward pass, and its positions. `start`: where the first of them begins.
        # Text between the spans of an image says nothing about others.
        ids, positions = list[int](), [text_positions(0, 0, self._pipeline.decoder.position_axes)]
        for parts in later:
            texts, _, start = self._positions(start, parts)
            ids += parts[-1]
            positions.append(texts[-1])
        if alone and ids and self.cache.states:
            raise UsageError("This model cannot take two images without text between them.", hint="Put a word between them.")
        count = 0 if self.cache.states else len(ids) if ranked else int(alone)
        return ids[:count], np.concatenate(positions, axis=1)[:, :count]

    def _segment(self, ids: Sequence[int], positions: Sequence[np.ndarray]) -> TokenSegment:
        return TokenSegment(self._pipeline.backend.embed_tokens(ids), np.concatenate(positions, axis=1)) if ids else self._empty
