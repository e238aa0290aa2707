"""An image of a conversation, from its pixels to what enters the decoder.

The prefill of a turn: which budgets it is given, what of it was computed before, and the forwards that are left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from edgeprune.errors import UsageError
from edgeprune.plan import KeepPlan
from edgeprune.runtime.backends.interface import DecoderOutput, VisionOutput
from edgeprune.runtime.generation.pipeline import Pipeline
from edgeprune.runtime.generation.request import DEADLINE, REQUESTED, Request, choose_tier
from edgeprune.runtime.generation.sequence import PrefixSnapshot, SelectedTokens, SequenceState
from edgeprune.runtime.telemetry.receipt import ImageUsage
from edgeprune.runtime.text.prompt import ImagePlaceholders


@dataclass
class ImageInput:
    """An image and the words it was shown with, which an input cut may ask for.

    `patches`: computes them [patches, patch pixels]. `key`: a hash of its pixels and of how they are fitted, None where nothing is
    recalled. `features`: what the vision encoder says of it, once it was asked.
    """

    question: str
    patches: Callable[[], np.ndarray]
    key: bytes | None
    features: VisionOutput | None = None


class Prefill:
    """One turn up to its first token. `tier`: whose budgets count; `max_kv_bytes`: the most bytes of caches, None for no limit."""

    def __init__(self, pipeline: Pipeline, layout: ImagePlaceholders, request: Request, *, prune: bool) -> None:
        self._pipeline, self._layout, self._request, self._prune = pipeline, layout, request, prune
        self._feature_cache, self._receipt = pipeline.state.feature_cache, request.receipt
        self.tier = 0
        self.max_kv_bytes = request.limits.max_kv_bytes or pipeline.max_kv_bytes

    @property
    def plan(self) -> KeepPlan:
        """The plan of the tier."""
        return self._pipeline.plans[self.tier]

    def encode(self, image: ImageInput) -> None:
        """Have the vision encoder look at an image, unless it has seen the same one. Raises Cancelled."""
        self._request.cancellation.raise_if_cancelled()
        found: VisionOutput | None = self._feature_cache.get(("seen", image.key)) if image.key else None
        if found is None:
            with self._receipt.times.stage("preprocess"):
                patches = image.patches()
            with self._receipt.times.stage("vision"), self._request.cancellation.deadline(self._request.remaining):
                found = self._pipeline.backend.encode_image(
                    patches, unpruned=not self._prune, cancellation=self._request.cancellation
                )
            if image.key:
                self._feature_cache.put(("seen", image.key), found, _bytes(found.embeds, *found.signals.values(), *found.kept))
        else:
            self._receipt.reuse("vision")
        image.features = found

    def choose_tier(self, held: int, images: int, text: int) -> None:
        """Choose the tier for a turn of so many new images and text tokens, in caches that hold `held` bytes.

        Raises UsageError when max_kv_bytes is too little for the turn.
        """
        base = held + text * self._pipeline.kv_bytes_per_token_layer * self._pipeline.decoder.layers
        plans = range(len(self._pipeline.plans))
        sizes = [base + images * self._pipeline.kv_bytes_per_image(tier, prune=self._prune) for tier in plans]
        tiered, asked = bool(self._pipeline.tiers) and self._prune, self._request.limits.tier
        if asked is not None:
            self.tier, reason = self._pipeline.tier(asked), REQUESTED
        elif tiered and images:
            most, latency = self._request.sampler.sampling.max_tokens, self._pipeline.state.latency
            remaining = None if self._request.remaining is None else 1e3 * self._request.remaining
            self.tier, reason = choose_tier(
                [latency.expected_ms(tier, images, most) for tier in plans], remaining, sizes, self.max_kv_bytes
            )
            for slow in range(self.tier if reason == DEADLINE else 0):
                latency.decay(slow)
        if tiered and images:
            self._receipt.tier, self._receipt.tier_reason = self._pipeline.tiers[self.tier][0], reason
        if self.max_kv_bytes is not None and sizes[self.tier] > self.max_kv_bytes:
            raise UsageError(
                f"The turn needs {sizes[self.tier]} bytes of KV cache, but max_kv_bytes is {self.max_kv_bytes}.",
                hint="Raise max_kv_bytes, begin a new conversation, or ask with fewer images.",
            )

    def run(self, sequence: SequenceState, ids: list[int], images: Sequence[ImageInput], answer: int) -> DecoderOutput:
        """Take in what is new of `ids`, with the images from the first that is not in the caches, and return the last forward.

        `answer`: the most tokens that will follow.
        """
        recalled = 0 if sequence.ids else self._resume(sequence, ids, images)
        new = ids[len(sequence.ids) :]
        turns = self._layout.split_at_images(new)
        visual = 0 if self._prune else len(turns) * self._pipeline.plan.geometry.tokens
        sequence.reserve(len(new) + visual + answer)
        self._receipt.text_tokens = recalled + (sum(len(part) for turn in turns for part in turn) if turns else len(new))
        if not turns:
            step = sequence.append_text(new, self._request.cancellation)
        for parts in turns:
            self._request.cancellation.raise_if_cancelled()
            step = self._image(sequence, parts, ids, images)
        sequence.ids = ids
        return step

    def _image(
        self, sequence: SequenceState, parts: list[list[int]], ids: list[int], images: Sequence[ImageInput]
    ) -> DecoderOutput:
        image = images[sequence.images]
        step, account = sequence.append_image(parts, self._selected(image), self.tier, self._request.cancellation)
        self._account(account)
        self._store_prefix(sequence, ids, images, len(parts[-1]))
        return step

    def _selected(self, image: ImageInput) -> SelectedTokens:
        assert image.features is not None  # every image was looked at when it was shown
        plan, vision_output = self.plan, image.features
        if plan.input is None or not self._prune:
            return SelectedTokens(vision_output, vision_output.embeds, vision_output.token_indices)
        key = ("selected", image.key, self.tier) if image.key and self._pipeline.input_cut_ignores_prompt else None
        found: SelectedTokens | None = self._feature_cache.get(key) if key else None
        if found is not None:
            self._receipt.reuse("input cut")
            return found
        with self._receipt.times.stage("select"):
            prompt = self._pipeline.backend.embed_tokens(self._pipeline.tokenizer.encode(image.question))
            found = SelectedTokens(vision_output, *self._pipeline.backend.select_tokens(vision_output, prompt, self.tier))
        if key:
            self._feature_cache.put(key, found, _bytes(found.embeds, found.order))
        return found

    def _resume(self, sequence: SequenceState, ids: list[int], images: Sequence[ImageInput]) -> int:
        # Takes the longest beginning that an earlier conversation shared, and returns how much text it has.
        if not self._prefix_cacheable(images):
            return 0
        for count in range(len(images), 0, -1):
            found: PrefixSnapshot | None = self._feature_cache.get(self._prefix_key(ids, images[:count]))
            if found is not None:
                for account in sequence.restore(found):
                    self._account(account)
                text = len(found.ids) - count * len(self._layout.spans)
                self._receipt.recalled_tokens = text + self._receipt.visual_tokens
                self._receipt.reuse("prefix")
                return text
        return 0

    def _store_prefix(self, sequence: SequenceState, ids: list[int], images: Sequence[ImageInput], text: int) -> None:
        shown = images[: sequence.images]
        size = sequence.cache.bytes
        if self._prefix_cacheable(shown) and size <= self._feature_cache.budget:
            end = self._layout.image_ends(ids)[len(shown) - 1]
            self._feature_cache.put(self._prefix_key(ids, shown), sequence.snapshot(ids[:end], text), size)

    def _account(self, account: ImageUsage) -> None:
        self._receipt.account(account)
        why_not = "the plan has no cuts" if self._prune else "pruning was switched off"
        self._receipt.pruned, self._receipt.reason = bool(self._receipt.cuts), "" if self._receipt.cuts else why_not

    def _prefix_cacheable(self, images: Sequence[ImageInput]) -> bool:
        keys = all(image.key for image in images)
        return (
            keys
            and bool(self._feature_cache.budget)
            and prefix_cacheable(self.plan, prune=self._prune, input_cut_ignores_prompt=self._pipeline.input_cut_ignores_prompt)
        )

    def _prefix_key(self, ids: list[int], images: Sequence[ImageInput]) -> tuple[object, ...]:
        end = self._layout.image_ends(ids)[len(images) - 1]
        return ("prefix", tuple(ids[:end]), tuple(image.key for image in images), self.tier)


def _bytes(*arrays: np.ndarray) -> int:
    return sum(int(array.nbytes) for array in arrays)


def prefix_cacheable(plan: KeepPlan, *, prune: bool, input_cut_ignores_prompt: bool) -> bool:
    """Tell whether what the decoder keeps of an image is the same whatever is asked: no cut of the plan looks at the question."""
    if not prune:
        return True
    return not plan.layer_cuts and not plan.cache_cuts and (plan.input is None or input_cut_ignores_prompt)
