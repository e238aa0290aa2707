"""An image of a conversation, from its pixels to what enters the decoder.

The prefill of a turn: which budgets it is given, what of it was computed before, and the forwards that are left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from edgeprune.errors import UsageError
from edgeprune.plan import KeepPlan
from edgeprune.runtime.backends.interface import Seen, Step
from edgeprune.runtime.generation.pipeline import Model
from edgeprune.runtime.generation.request import ASKED, DEADLINE, Asked, choose_tier
from edgeprune.runtime.generation.sequence import Intake, Prefix, Selected
from edgeprune.runtime.telemetry.receipt import ImageAccount
from edgeprune.runtime.text.prompt import ImageLayout


@dataclass
class Shown:
    """An image and the words it was shown with, which an input cut may ask for.

    `patches`: computes them [patches, patch pixels]. `key`: a hash of its pixels and of how they are fitted, None where nothing is
    recalled. `seen`: what the vision encoder says of it, once it was asked.
    """

    words: str
    patches: Callable[[], np.ndarray]
    key: bytes | None
    seen: Seen | None = None


class Prefill:
    """One turn up to its first token. `tier`: whose budgets count; `room`: the most bytes of caches, None for no limit."""

    def __init__(self, model: Model, layout: ImageLayout, asked: Asked, *, prune: bool) -> None:
        self._model, self._layout, self._asked, self._prune = model, layout, asked, prune
        self._recall, self._receipt = model.state.recall, asked.receipt
        self.tier = 0
        self.room = asked.terms.max_kv_bytes or model.max_kv_bytes

    @property
    def plan(self) -> KeepPlan:
        """The plan of the tier."""
        return self._model.plans[self.tier]

    def see(self, image: Shown) -> None:
        """Have the vision encoder look at an image, unless it has seen the same one. Raises Interrupted."""
        self._asked.interrupt.check()
        found: Seen | None = self._recall.get(("seen", image.key)) if image.key else None
        if found is None:
            with self._receipt.times.stage("preprocess"):
                patches = image.patches()
            with self._receipt.times.stage("vision"), self._asked.interrupt.due(self._asked.remaining):
                found = self._model.engine.see(patches, whole=not self._prune, interrupt=self._asked.interrupt)
            if image.key:
                self._recall.put(("seen", image.key), found, _bytes(found.embeds, *found.signals.values(), *found.kept))
        else:
            self._receipt.reuse("vision")
        image.seen = found

    def choose(self, held: int, images: int, text: int) -> None:
        """Choose the tier for a turn of so many new images and text tokens, in caches that hold `held` bytes.

        Raises UsageError when max_kv_bytes is too little for the turn.
        """
        base = held + text * self._model.entry_bytes * self._model.decoder.layers
        plans = range(len(self._model.plans))
        sizes = [base + images * self._model.image_bytes(tier, prune=self._prune) for tier in plans]
        tiered, asked = bool(self._model.tiers) and self._prune, self._asked.terms.tier
        if asked is not None:
            self.tier, reason = self._model.tier(asked), ASKED
        elif tiered and images:
            most, pace = self._asked.sampler.sampling.max_tokens, self._model.state.pace
            remaining = None if self._asked.remaining is None else 1e3 * self._asked.remaining
            self.tier, reason = choose_tier([pace.expected_ms(tier, images, most) for tier in plans], remaining, sizes, self.room)
            for slow in range(self.tier if reason == DEADLINE else 0):
                pace.passed_over(slow)
        if tiered and images:
            self._receipt.tier, self._receipt.tier_reason = self._model.tiers[self.tier][0], reason
        if self.room is not None and sizes[self.tier] > self.room:
            raise UsageError(
                f"The turn needs {sizes[self.tier]} bytes of KV cache, but max_kv_bytes is {self.room}.",
                hint="Raise max_kv_bytes, begin a new conversation, or ask with fewer images.",
            )

    def run(self, intake: Intake, ids: list[int], images: Sequence[Shown], answer: int) -> Step:
        """Take in what is new of `ids`, with the images from the first that is not in the caches, and return the last forward.

        `answer`: the most tokens that will follow.
        """
        recalled = 0 if intake.ids else self._resume(intake, ids, images)
        new = ids[len(intake.ids) :]
        turns = self._layout.turns(new)
        visual = 0 if self._prune else len(turns) * self._model.plan.geometry.tokens
        intake.announce(len(new) + visual + answer)
        self._receipt.text_tokens = recalled + (sum(len(part) for turn in turns for part in turn) if turns else len(new))
        if not turns:
            step = intake.text(new, self._asked.interrupt)
        for parts in turns:
            self._asked.interrupt.check()
            step = self._image(intake, parts, ids, images)
        intake.ids = ids
        return step

    def _image(self, intake: Intake, parts: list[list[int]], ids: list[int], images: Sequence[Shown]) -> Step:
        image = images[intake.images]
        step, account = intake.image(parts, self._selected(image), self.tier, self._asked.interrupt)
        self._account(account)
        self._remember(intake, ids, images, len(parts[-1]))
        return step

    def _selected(self, image: Shown) -> Selected:
        assert image.seen is not None  # every image was looked at when it was shown
        plan, seen = self.plan, image.seen
        if plan.input is None or not self._prune:
            return Selected(seen, seen.embeds, seen.order)
        key = ("selected", image.key, self.tier) if image.key and self._model.prompt_free else None
        found: Selected | None = self._recall.get(key) if key else None
        if found is not None:
            self._receipt.reuse("input cut")
            return found
        with self._receipt.times.stage("select"):
            prompt = self._model.engine.embed(self._model.codec.encode(image.words))
            found = Selected(seen, *self._model.engine.select(seen, prompt, self.tier))
        if key:
            self._recall.put(key, found, _bytes(found.embeds, found.order))
        return found

    def _resume(self, intake: Intake, ids: list[int], images: Sequence[Shown]) -> int:
        # Takes the longest beginning that an earlier conversation shared, and returns how much text it has.
        if not self._resumable(images):
            return 0
        for count in range(len(images), 0, -1):
            found: Prefix | None = self._recall.get(self._prefix_key(ids, images[:count]))
            if found is not None:
                for account in intake.resume(found):
                    self._account(account)
                text = len(found.ids) - count * len(self._layout.spans)
                self._receipt.recalled_tokens = text + self._receipt.visual_tokens
                self._receipt.reuse("prefix")
                return text
        return 0

    def _remember(self, intake: Intake, ids: list[int], images: Sequence[Shown], text: int) -> None:
        shown = images[: intake.images]
        size = intake.cache.bytes
        if self._resumable(shown) and size <= self._recall.budget:
            end = self._layout.ends(ids)[len(shown) - 1]
            self._recall.put(self._prefix_key(ids, shown), intake.prefix(ids[:end], text), size)

    def _account(self, account: ImageAccount) -> None:
        self._receipt.account(account)
        why_not = "the plan has no cuts" if self._prune else "pruning was switched off"
        self._receipt.pruned, self._receipt.reason = bool(self._receipt.cuts), "" if self._receipt.cuts else why_not

    def _resumable(self, images: Sequence[Shown]) -> bool:
        keys = all(image.key for image in images)
        return (
            keys and bool(self._recall.budget) and can_be_resumed(self.plan, prune=self._prune, prompt_free=self._model.prompt_free)
        )

    def _prefix_key(self, ids: list[int], images: Sequence[Shown]) -> tuple[object, ...]:
        end = self._layout.ends(ids)[len(images) - 1]
        return ("prefix", tuple(ids[:end]), tuple(image.key for image in images), self.tier)


def _bytes(*arrays: np.ndarray) -> int:
    return sum(int(array.nbytes) for array in arrays)


def can_be_resumed(plan: KeepPlan, *, prune: bool, prompt_free: bool) -> bool:
    """Tell whether what the decoder keeps of an image is the same whatever is asked: no cut of the plan looks at the question."""
    if not prune:
        return True
    return not plan.layer_cuts and not plan.cache_cuts and (plan.input is None or prompt_free)
