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
from edgeprune.runtime.backends.interface import Engine, Interrupt, Seen, Step
from edgeprune.runtime.backends.kv_cache import KvCache, StepInput, Tokens
from edgeprune.runtime.generation.pipeline import Model
from edgeprune.runtime.telemetry.receipt import CutReceipt, ImageAccount, Receipt

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


class Rate:
    """The rate of one answer, asked before each of its decode steps."""

    def __init__(self, engine: Engine, cut: Cut | None) -> None:
        self._engine, self._cut = engine, cut
        self._step, self.share = 0, 1.0

    def shorten(self, cache: KvCache, before: Step, receipt: Receipt) -> KvCache:
        """Return the cache for the next decode step. `before`: the step whose token it takes in."""
        if self._cut is None:
            return cache
        share = self._scheduled() if before.split is None else self._engine.rate(before.split, self._step)
        self._step += 1
        if self._cut.options.get("monotone", True):
            share = min(share, self.share)
        receipt.decode_shares.append(share)
        if share == self.share:
            return cache
        self.share = share
        return cache.shortened(share, self._cut.layer)

    def _scheduled(self) -> float:
        assert self._cut is not None
        steps, shares = self._cut.options["steps"], self._cut.options["shares"]
        entry = bisect_right(steps, self._step) - 1
        return float(shares[entry]) if entry >= 0 else 1.0


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


@dataclass(frozen=True)
class Selected:
    """An image as it enters the decoder: `embeds` [1, K, width] of the tokens with indices `order` [K], of what was `seen`."""

    seen: Seen
    embeds: np.ndarray
    order: np.ndarray


@dataclass(frozen=True)
class Prefix:
    """A conversation up to the end of an image, to be gone on from again and again."""

    ids: tuple[int, ...]
    cache: KvCache
    position: int
    length: int
    accounts: tuple[ImageAccount, ...]


class Intake:
    """The caches and where the next token stands.

    `ids`: what they hold, each span of an image as one; the prefill sets them. `length`: of the sequence, as if nothing had been
    pruned. `images`: how many there are.
    """

    def __init__(self, model: Model, spans: tuple[tuple[View, ...], ...], *, prune: bool) -> None:
        self._model, self._spans, self._prune = model, spans, prune
        self.ids: list[int] = []
        shape = model.decoder
        self.cache = KvCache.empty(shape)
        self._nothing = Tokens(np.zeros((1, 0, shape.width), np.float32), np.zeros((shape.position_axes, 0), np.int64))
        self.length = self.images = 0
        self._position = 0
        self._accounts: tuple[ImageAccount, ...] = ()
        self._groups = bytearray()  # of the text in the caches: SYSTEM, INSTRUCTION, GENERATED or none of them

    def announce(self, tokens: int) -> None:
        """Make room for so many more tokens of text at once; what earlier answers could spare, the next one may need."""
        self.cache = self.cache.shortened(1.0, 0).reserved(min(tokens, self._model.decoder.context))

    def text(self, ids: Sequence[int], interrupt: Interrupt | None = None, *, group: int = INSTRUCTION) -> Step:
        """Take in text without an image, at least one token."""
        nothing = self._nothing
        return self._step(StepInput(nothing, nothing, self._text(ids), _NO_ORDER, _NO_GROUPS), group, interrupt)

    def image(
        self, parts: Sequence[Sequence[int]], chosen: Selected, tier: int = 0, interrupt: Interrupt | None = None
    ) -> tuple[Step, ImageAccount]:
        """Take in an image with the text before, between and after its spans, under the budgets of a tier.

        Of an unpruned conversation all tokens count as text.
        """
        plan, geometry = self._model.plans[tier], self._model.plan.geometry
        prefix, visual = self._interleaved(parts[:-1], chosen.embeds if self._prune else chosen.seen.embeds)
        suffix, before = self._text(parts[-1]), self.cache.visual_reads
        whole = geometry.tokens * plan.layers
        if self._prune:
            # Positions are those of every token until `only` takes those of the tokens that stay.
            visual = visual.only(chosen.order, chosen.embeds)
            step = self._step(StepInput(prefix, visual, suffix, chosen.order, _NO_GROUPS, tier), INSTRUCTION, interrupt)
            cuts = cut_receipts(plan, chosen.seen.kept, chosen.order, step)
            account = ImageAccount(geometry.tokens, whole, self.cache.visual_reads - before, cuts)
        else:
            tokens = StepInput(prefix.then(visual), self._nothing, suffix, _NO_ORDER, _NO_GROUPS)
            step = self._step(tokens, INSTRUCTION, interrupt)
            account = ImageAccount(geometry.tokens, whole, whole, ())
        self.images += 1
        self._accounts += (account,)
        return step, account

    def generated(self, token: int, before: Step, rate: Rate | None, receipt: Receipt) -> Step:
        """Take in a token of the answer. `before`: the step that it came from; `rate`: what the step may read of the images."""
        if rate is not None:
            self.cache = rate.shorten(self.cache, before, receipt)
        # Unpruned, visual tokens lie among the text and are all read.
        receipt.visual_reads.append(self.cache.visual_reads if self._prune else receipt.visual_whole)
        step = self.text([token], group=GENERATED)
        self.ids.append(token)
        return step

    def prefix(self, ids: Sequence[int], text: int) -> Prefix:
        """Return what was taken in up to the newest image, whose ids are `ids`; the last `text` tokens after it are left out."""
        cache = self.cache.head(self.cache.length - text)
        return Prefix(tuple(ids), cache, self._position - text, self.length - text, self._accounts)

    def resume(self, prefix: Prefix) -> tuple[ImageAccount, ...]:
        """Go on from a prefix, in place of what was taken in; return what happened to its images.

        Its groups are not known: plans whose rate follows attention have cuts that see the question, and no prefixes.
        """
        self.cache, self._position, self.length = prefix.cache, prefix.position, prefix.length
        self._accounts, self.images = prefix.accounts, len(prefix.accounts)
        self._groups, self.ids = bytearray([SYSTEM] * (prefix.cache.length - 1)), list(prefix.ids)
        return prefix.accounts

    def _step(self, tokens: StepInput, group: int, interrupt: Interrupt | None) -> Step:
        before, after = tokens.prefix.embeds.shape[1], tokens.suffix.embeds.shape[1]
        self._groups += bytes([SYSTEM] * before + [group] * after)
        groups = _ONE_HOT[np.frombuffer(self._groups, np.uint8)]
        step = self._model.engine.step(replace(tokens, groups=groups), self.cache, interrupt=interrupt)
        self.cache = self.cache.grown(step.rows, before, after)
        return replace(step, rows=())

    def _interleaved(self, before: Sequence[Sequence[int]], embeds: np.ndarray) -> tuple[Tokens, Tokens]:
        # The text before each span, and the visual tokens of all, each at its own position.
        axes = self._model.decoder.position_axes
        text, spans = [], []
        for ids, views in zip(before, self._spans, strict=True):
            text.append(text_positions(self._position, len(ids), axes))
            span, self._position = span_positions(self._position + len(ids), views, axes)
            spans.append(span)
        ids = [token for part in before for token in part]
        visual = Tokens(embeds, np.concatenate(spans, axis=1))
        self.length += visual.positions.shape[1] + len(ids)
        return (Tokens(self._model.engine.embed(ids), np.concatenate(text, axis=1)) if ids else self._nothing), visual

    def _text(self, ids: Sequence[int]) -> Tokens:
        if not ids:
            return self._nothing
        positions = text_positions(self._position, len(ids), self._model.decoder.position_axes)
        self._position += len(ids)
        self.length += len(ids)
        return Tokens(self._model.engine.embed(ids), positions)


_NO_ORDER, _NO_GROUPS = np.zeros(0, np.int64), np.zeros((0, 3), np.float32)
