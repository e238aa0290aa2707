"""What a model has taken in of a conversation: text and images, at their positions, in its KV caches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from edgeprune.plan import KeepPlan, View
from edgeprune.runtime.backends.interface import Interrupt, Seen, Step, StepInput, Tokens
from edgeprune.runtime.backends.kv_cache import KvCache
from edgeprune.runtime.model import Model
from edgeprune.runtime.positions import span_positions, text_positions
from edgeprune.runtime.rate import Rate
from edgeprune.runtime.telemetry.receipt import ImageAccount, Receipt, cut_receipts

SYSTEM, INSTRUCTION, GENERATED = 0, 1, 2
_ONE_HOT = np.eye(3, dtype=np.float32)


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
        self.cache = KvCache.empty(model.decoder)
        self.length = self.images = 0
        self._position = 0
        self._accounts: tuple[ImageAccount, ...] = ()
        self._groups = bytearray()  # of the text in the caches: SYSTEM, INSTRUCTION, GENERATED or none of them

    def announce(self, tokens: int) -> None:
        """Make room for so many more tokens of text at once; what earlier answers could spare, the next one may need."""
        self.cache = self.cache.shortened(1.0, 0).reserved(min(tokens, self._model.decoder.context))

    def text(self, ids: Sequence[int], interrupt: Interrupt | None = None, *, group: int = INSTRUCTION) -> Step:
        """Take in text without an image, at least one token."""
        nothing = self._no_tokens()
        return self._step(StepInput(nothing, nothing, self._text(ids), _NO_ORDER, _NO_GROUPS, interrupt=interrupt), group)

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
            step = self._step(StepInput(prefix, visual, suffix, chosen.order, _NO_GROUPS, tier, interrupt), INSTRUCTION)
            cuts = cut_receipts(plan, chosen.seen.kept, chosen.order, step)
            account = ImageAccount(geometry.tokens, whole, self.cache.visual_reads - before, cuts)
        else:
            nothing = self._no_tokens()
            step = self._step(
                StepInput(prefix.then(visual), nothing, suffix, _NO_ORDER, _NO_GROUPS, interrupt=interrupt), INSTRUCTION
            )
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

    def _step(self, tokens: StepInput, group: int) -> Step:
        before, after = tokens.prefix.embeds.shape[1], tokens.suffix.embeds.shape[1]
        self._groups += bytes([SYSTEM] * before + [group] * after)
        groups = _ONE_HOT[np.frombuffer(self._groups, np.uint8)]
        step = self._model.engine.step(replace(tokens, groups=groups), self.cache)
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
        return (Tokens(self._model.engine.embed(ids), np.concatenate(text, axis=1)) if ids else self._no_tokens()), visual

    def _text(self, ids: Sequence[int]) -> Tokens:
        if not ids:
            return self._no_tokens()
        positions = text_positions(self._position, len(ids), self._model.decoder.position_axes)
        self._position += len(ids)
        self.length += len(ids)
        return Tokens(self._model.engine.embed(ids), positions)

    def _no_tokens(self) -> Tokens:
        shape = self._model.decoder
        return Tokens(np.zeros((1, 0, shape.width), np.float32), np.zeros((shape.position_axes, 0), np.int64))


_NO_ORDER, _NO_GROUPS = np.zeros(0, np.int64), np.zeros((0, 3), np.float32)


def can_be_resumed(plan: KeepPlan, *, prune: bool, prompt_free: bool) -> bool:
    """Tell whether what the decoder keeps of an image is the same whatever is asked: no cut of the plan looks at the question."""
    if not prune:
        return True
    return not plan.layer_cuts and not plan.cache_cuts and (plan.input is None or prompt_free)
