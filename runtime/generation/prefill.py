"""The prefill of a turn: encode its images, choose the tier, reuse cached results, and run the remaining forward passes."""

from __future__ import annotations

import math
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

_DISTANCE_BYTES = 8


@dataclass
class ImageInput:
    """An image and the prompt of its turn, which an input cut may depend on.

    `patches`: computes the array [patches, patch pixels]. `key`: a hash of the pixels and the fit mode, None without a cache.
    `features`: the output of the vision encoder, None until `Prefill.encode`.
    """

    question: str
    patches: Callable[[], np.ndarray]
    key: bytes | None
    features: VisionOutput | None = None


class Prefill:
    """The prefill of one turn. `max_kv_bytes`: limit of the KV cache, None for no limit.

    `choose_tier` sets `tier`, the index of the chosen tier, `images`, those of the turn, and `expected_ms`, what the answer is
    expected to take under that tier, infinite without tiers.
    """

    def __init__(self, pipeline: Pipeline, layout: ImagePlaceholders, request: Request, *, prune: bool) -> None:
        self._pipeline, self._layout, self._request, self._prune = pipeline, layout, request, prune
        self._feature_cache, self._receipt = pipeline.state.feature_cache, request.receipt
        # Tokens after an image that belong to its prefix: every forward pass ends with text, and a state cannot drop a token.
        self._tail = 1 if pipeline.decoder.states else 0
        self.tier = self.images = 0
        self.expected_ms = math.inf
        self.max_kv_bytes = request.limits.max_kv_bytes or pipeline.max_kv_bytes

    @property
    def plan(self) -> KeepPlan:
        """The plan of the chosen tier."""
        return self._pipeline.plans[self.tier]

    def encode(self, image: ImageInput) -> None:
        """Run the vision encoder on an image, unless its output is cached. Raises Cancelled."""
        self._request.cancellation.raise_if_cancelled()
        output: VisionOutput | None = self._feature_cache.get(("vision", image.key)) if image.key else None
        if output is None:
            with self._receipt.times.stage("preprocess"):
                patches = image.patches()
            with self._receipt.times.stage("vision"), self._request.cancellation.deadline(self._request.remaining):
                output = self._pipeline.backend.encode_image(
                    patches, unpruned=not self._prune, cancellation=self._request.cancellation
                )
            if image.key:
                size = _bytes(output.embeds, *output.signals.values(), *output.kept)
                self._feature_cache.put(("vision", image.key), output, size)
        else:
            self._receipt.reuse("vision")
        image.features = output
        self._compare(image)

    def _compare(self, image: ImageInput) -> None:
        # Notes how far an image is from those that the selection was learned from.
        likeness = self._pipeline.likeness
        if likeness is None or not self._prune:
            return
        assert image.features is not None
        key = ("distance", image.key)
        distance: float | None = self._feature_cache.get(key) if image.key else None
        if distance is None:
            with self._receipt.times.stage("select"):
                distance = likeness.distance(image.features.embeds)
            if image.key:
                self._feature_cache.put(key, distance, _DISTANCE_BYTES)
        self._receipt.image_distances.append(distance)

    def choose_tier(self, held: int, images: int, text: int) -> None:
        """Choose the tier for a turn with `images` new images and `text` new text tokens, on a KV cache of `held` bytes.

        Raises UsageError when the turn does not fit into max_kv_bytes.
        """
        base = held + text * self._pipeline.kv_bytes_per_token
        tiers = range(len(self._pipeline.plans))
        sizes = [base + images * self._pipeline.kv_bytes_per_image(tier, prune=self._prune) for tier in tiers]
        self.images = images
        tiered, requested = bool(self._pipeline.tiers) and self._prune, self._request.limits.tier
        expected = self._expected_ms() if tiered and images else []
        if requested is not None:
            self.tier, reason = self._pipeline.tier(requested), REQUESTED
        elif expected:
            remaining = None if self._request.remaining is None else 1e3 * self._request.remaining
            self.tier, reason = choose_tier(expected, remaining, sizes, self.max_kv_bytes)
            for skipped in range(self.tier if reason == DEADLINE else 0):
                self._pipeline.state.latency.skip(skipped)
        self.expected_ms = expected[self.tier] if expected else math.inf
        if tiered and images:
            self._receipt.tier, self._receipt.tier_reason = self._pipeline.tiers[self.tier][0], reason
        if self.max_kv_bytes is not None and sizes[self.tier] > self.max_kv_bytes:
            raise UsageError(
                f"The turn needs {sizes[self.tier]} bytes of KV cache, but max_kv_bytes is {self.max_kv_bytes}.",
                hint="Raise max_kv_bytes, begin a new conversation, or ask with fewer images.",
            )

    def _expected_ms(self) -> list[float]:
        work = [sum(map(plan.tokens_at_layer, range(plan.layers))) for plan in self._pipeline.plans]
        times, most = self._receipt.times, self._request.sampler.sampling.max_tokens
        return self._pipeline.state.latency.expected_ms(work, self.images, most, times.preprocess_ms + times.vision_ms)

    def run(self, sequence: SequenceState, ids: list[int], images: Sequence[ImageInput], answer: int) -> DecoderOutput:
        """Append the part of `ids` that is not yet in `sequence`, with its images; return the output of the last forward pass.

        `images`: all images of the conversation. `answer`: the maximum number of generated tokens.
        """
        restored = 0 if sequence.ids else self._restore_prefix(sequence, ids, images)
        new = ids[len(sequence.ids) :]
        turns = self._layout.split_at_images(new)
        visual = 0 if self._prune else len(turns) * self._pipeline.plan.geometry.tokens
        sequence.reserve(len(new) + visual + answer)
        self._receipt.text_tokens = restored + (sum(len(part) for turn in turns for part in turn) if turns else len(new))
        if not turns:
            step = sequence.append_text(new, self._request.cancellation)
        for number, parts in enumerate(turns, start=1):
            self._request.cancellation.raise_if_cancelled()
            selected = self._select(images[sequence.images])
            parts, later = self._split_after_prefix(parts, images[: sequence.images + 1])
            step, usage = sequence.append_image(parts, selected, self.tier, self._request.cancellation, later=turns[number:])
            self._record(usage)
            self._store_prefix(sequence, ids, images, len(parts[-1]) - self._tail)
            if later:
                step = sequence.append_text(later, self._request.cancellation)
        sequence.ids = ids
        return step

    def _select(self, image: ImageInput) -> SelectedTokens:
        assert image.features is not None  # `encode` ran on every image of the turn
        vision_output = image.features
        if self.plan.input is None or not self._prune:
            return SelectedTokens(vision_output, vision_output.embeds, vision_output.token_indices)
        key = ("input cut", image.key, self.tier) if image.key and self._pipeline.input_cut_ignores_prompt else None
        selected: SelectedTokens | None = self._feature_cache.get(key) if key else None
        if selected is not None:
            self._receipt.reuse("input cut")
            return selected
        with self._receipt.times.stage("select"):
            prompt = self._pipeline.backend.embed_tokens(self._question_ids(image))
            selected = SelectedTokens(vision_output, *self._pipeline.backend.select_tokens(vision_output, prompt, self.tier))
        if key:
            self._feature_cache.put(key, selected, _bytes(selected.embeds, selected.order))
        return selected

    def _question_ids(self, image: ImageInput) -> list[int]:
        ids = self._pipeline.tokenizer.encode(image.question)
        if ids or self._pipeline.input_cut_ignores_prompt:
            return ids or [0]  # the graph takes at least one token, also where the cut does not look at it
        raise UsageError(
            "This bundle chooses visual tokens by the question, and there is none.", hint="Ask something of the image."
        )

    def _restore_prefix(self, sequence: SequenceState, ids: list[int], images: Sequence[ImageInput]) -> int:
        # Restores the longest cached prefix of `ids` and returns its number of text tokens.
        if not self._prefix_cacheable(images):
            return 0
        for count in range(len(images), 0, -1):
            prefix: PrefixSnapshot | None = self._feature_cache.get(self._prefix_key(ids, images[:count]))
            if prefix is not None and len(prefix.ids) < len(ids):  # the logits need a forward pass
                for usage in sequence.restore(prefix):
                    self._record(usage)
                text = len(prefix.ids) - count * len(self._layout.spans)
                self._receipt.recalled_tokens = text + self._receipt.visual_tokens
                self._receipt.reuse("prefix")
                return text
        return 0

    def _store_prefix(self, sequence: SequenceState, ids: list[int], images: Sequence[ImageInput], text: int) -> None:
        images, size = images[: sequence.images], sequence.cache.bytes
        if any(tier != self.tier for tier in sequence.tiers):
            return  # whoever restores a prefix wants all of its images under one tier
        if self._prefix_cacheable(images) and size <= self._feature_cache.budget:
            end = self._prefix_end(ids, len(images))
            self._feature_cache.put(self._prefix_key(ids, images), sequence.snapshot(ids[:end], text), size)

    def _split_after_prefix(self, parts: list[list[int]], images: Sequence[ImageInput]) -> tuple[list[list[int]], list[int]]:
        # The text of an image's forward pass, and that of the next one. The states of a stored prefix must be those at its end.
        if not self._tail or not self._prefix_cacheable(images):
            return parts, []
        return [*parts[:-1], parts[-1][: self._tail]], parts[-1][self._tail :]

    def _prefix_end(self, ids: list[int], images: int) -> int:
        return self._layout.image_ends(ids)[images - 1] + self._tail

    def _record(self, usage: ImageUsage) -> None:
        self._receipt.account(usage)
        why_not = "the plan has no cuts" if self._prune else "pruning was switched off"
        self._receipt.pruned, self._receipt.reason = bool(self._receipt.cuts), "" if self._receipt.cuts else why_not

    def _prefix_cacheable(self, images: Sequence[ImageInput]) -> bool:
        return (
            bool(self._feature_cache.budget)
            and all(image.key for image in images)
            and not self._pipeline.decoder.bidirectional
            and prefix_cacheable(self.plan, prune=self._prune, input_cut_ignores_prompt=self._pipeline.input_cut_ignores_prompt)
        )

    def _prefix_key(self, ids: list[int], images: Sequence[ImageInput]) -> tuple[object, ...]:
        end = self._prefix_end(ids, len(images))
        return ("prefix", tuple(ids[:end]), tuple(image.key for image in images), self.tier)


def prefix_cacheable(plan: KeepPlan, *, prune: bool, input_cut_ignores_prompt: bool) -> bool:
    """Return whether the cuts leave the KV cache of an image the same for every prompt: none of them depends on the prompt."""
    if not prune:
        return True
    return not plan.layer_cuts and not plan.cache_cuts and (plan.input is None or input_cut_ignores_prompt)


def _bytes(*arrays: np.ndarray) -> int:
    return sum(int(array.nbytes) for array in arrays)
