"""The variants that a benchmark compares, and the prompts that they answer.

Variants are the bundle itself, the same bundle without pruning or with a content-free choice of tokens, and other bundles.

"random" and "uniform" keep K visual tokens in every layer at their original positions, in the bundle's graphs. K gives the same
prefill work as the plan: the rounded mean over the layers of the plan's visual tokens. The comparison shows whether a plan takes
more time than its number of tokens requires. Which tokens are kept does not affect the time, so "uniform" takes every n-th token
of the sequence instead of the farthest points of the method with that name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np

from edgeprune.bundle import is_bundle
from edgeprune.bundle.signing import TrustedKeys
from edgeprune.errors import UsageError
from edgeprune.plan import KeepPlan
from edgeprune.runtime.api.loading import load
from edgeprune.runtime.api.session import ImageOrImages, Runtime
from edgeprune.runtime.backends.interface import Backend, BackendProxy, CancellationToken, DecoderOutput, VisionOutput
from edgeprune.runtime.backends.kv_cache import DecoderInput, KvCache, TokenSegment
from edgeprune.runtime.backends.providers import TENSORRT
from edgeprune.runtime.generation.conversation import Stream
from edgeprune.runtime.generation.pipeline import Pipeline, SharedState
from edgeprune.runtime.media.images import read_image
from edgeprune.runtime.telemetry.receipt import Receipt
from edgeprune.runtime.text.tokenizer import TextTokenizer
from edgeprune.tabletop.dataset import frames_for

PRUNED = "pruned"
UNPRUNED = "none"
CONTENT_FREE = ("random", "uniform")  # they ignore the image's content
BUILTIN = (UNPRUNED, *CONTENT_FREE)
_IMAGE_CACHE_BYTES = 1 << 30  # more than one image needs

PROMPT = "What is on the table?"


@dataclass(frozen=True)
class Variant:
    """A variant of a benchmark. `path`: its bundle. `runtime` ignores end tokens. `picture`: the image or video frames.

    `alive`: visual tokens of each layer in prefill.
    """

    name: str
    path: Path
    runtime: Runtime
    picture: ImageOrImages
    prune: bool
    alive: tuple[int, ...]

    @property
    def prefill_only(self) -> Runtime:
        """A runtime whose answers end before their first token: it runs only prefill.

        An empty answer is also tokenized identically when a later turn renders the conversation again.
        """
        pipeline = self.runtime._pipeline
        all_ids = cast("tuple[int, ...]", range(pipeline.decoder.vocabulary))  # only membership is tested
        return Runtime(replace(pipeline, eos_token_ids=all_ids))

    @property
    def with_empty_cache(self) -> Variant:
        """The same variant with an empty, enabled image cache."""
        return replace(self, runtime=Runtime(replace(self.runtime._pipeline, state=SharedState(_IMAGE_CACHE_BYTES))))

    @property
    def tokenizer(self) -> TextTokenizer:
        """The tokenizer."""
        return self.runtime._pipeline.tokenizer

    @property
    def max_context(self) -> int:
        """Maximum tokens of a conversation."""
        return self.runtime._pipeline.decoder.context


@dataclass(frozen=True)
class BenchmarkPrompt:
    """A prompt, the answer's length in `tokens`, and `fit`: how to handle an image of another aspect ratio than the bundle's."""

    prompt: str
    tokens: int
    fit: str

    def stream(self, asked: Variant) -> Stream:
        """Stream the answer of a variant in a new conversation, of exactly `tokens` tokens."""
        return asked.runtime.stream(asked.picture, self.prompt, prune=asked.prune, fit=self.fit, max_tokens=self.tokens)

    def answer(self, asked: Variant) -> Receipt:
        """Run the answer and return its receipt."""
        stream = self.stream(asked)
        "".join(stream)
        return stream.receipt

    def ask_twice(self, asked: Variant) -> tuple[Receipt, Receipt]:
        """Ask the question in a new conversation, then again without the image; return both receipts. Only prefill runs.

        The answers are empty, so that the conversation's text is tokenized identically and its KV caches are reused.
        """
        chat = asked.prefill_only.chat(prune=asked.prune, fit=self.fit)
        first = chat.ask(self.prompt, asked.picture)
        "".join(first)
        second = chat.ask(self.prompt)
        "".join(second)
        return first.receipt, second.receipt


def load_variants(
    path: Path,
    compare: Sequence[str] = (UNPRUNED,),
    image: Path | None = None,
    *,
    threads: int | None = None,
    provider: str = "cpu",
    trust: TrustedKeys = (),
) -> list[Variant]:
    """Load a bundle as variant PRUNED, followed by the variants in `compare`: names in BUILTIN, or paths of other bundles.

    `image` None: a TableTop scene of each bundle's image size. No bundle is loaded twice. Raises UsageError for unknown or repeated
    names, ImageError, and BundleError and EngineError from loading.
    """
    check_names(compare, provider)
    opened = partial(load, threads=threads, provider=provider, cache_bytes=0, trust=trust)
    own = bundle_variant(PRUNED, path, opened(path), image)
    found = [own]
    for name in compare:
        if name in BUILTIN:
            found.append(builtin_variant(own, name))
        else:
            found.append(bundle_variant(name, Path(name), opened(name), image))
    return found


def check_names(compare: Sequence[str], provider: str = "cpu") -> None:
    """Raise UsageError for a variant that cannot be compared."""
    for index, name in enumerate(compare):
        if name in compare[:index] or name == PRUNED:
            raise UsageError(f"{name} is compared twice.", hint="Name each once.")
        if name in CONTENT_FREE and provider == TENSORRT:
            raise UsageError(
                f"{name} cannot run on TensorRT engines, whose visual tokens stay on the device.",
                hint=f"Export a bundle with --method {name}, build it, and give its path.",
            )
        if name not in BUILTIN:
            _check_bundle(name)


def bundle_variant(name: str, path: Path, runtime: Runtime, image: Path | None = None) -> Variant:
    """Return the variant of a bundle with its own plan."""
    plan = runtime.plan
    picture: ImageOrImages = frames_for(plan.geometry) if image is None else read_image(image)
    return Variant(name, path, _without_eos(runtime._pipeline), picture, True, tuple(map(plan.tokens_at_layer, range(plan.layers))))


def builtin_variant(own: Variant, name: str) -> Variant:
    """Return a variant of the same bundle without its plan: UNPRUNED, or one of CONTENT_FREE."""
    plan = own.runtime.plan
    if name in CONTENT_FREE:
        return content_free_variant(own, name, equal_work_tokens(plan))
    return replace(own, name=name, prune=False, alive=(plan.geometry.tokens,) * plan.layers)


def content_free_variant(own: Variant, name: str, keep: int) -> Variant:
    """Return a variant of the same bundle with `keep` visual tokens in every layer, chosen by one of CONTENT_FREE."""
    plan, pipeline = own.runtime.plan, own.runtime._pipeline
    total = plan.geometry.tokens
    pipeline = replace(pipeline, backend=FixedSelectionBackend(pipeline.backend, chosen_tokens(name, total, keep), total))
    return replace(own, name=name, runtime=Runtime(pipeline), prune=False, alive=(keep,) * plan.layers)


def equal_work_tokens(plan: KeepPlan) -> int:
    """Return K: the mean over the layers of a plan's visual tokens in prefill, rounded, at least one."""
    return max(1, round(sum(map(plan.tokens_at_layer, range(plan.layers))) / plan.layers))


def chosen_tokens(name: str, tokens: int, keep: int) -> np.ndarray:
    """Return `keep` of `tokens` indices in ascending order: evenly spaced for "uniform", with a fixed seed for "random"."""
    if name == "uniform":
        return (np.arange(keep) * tokens + tokens // 2) // keep
    return np.sort(np.random.default_rng(0).permutation(tokens)[:keep])


class FixedSelectionBackend(BackendProxy):
    """A backend that passes only some visual tokens of each image to an unpruned prefill, at their original positions.

    The conversation is unaware of this: positions continue after the unpruned length, and receipts count all visual tokens.
    """

    def __init__(self, backend: Backend, kept: np.ndarray, tokens: int) -> None:
        super().__init__(backend)
        self._kept, self._tokens = kept, tokens

    def encode_image(
        self, patches: np.ndarray, *, unpruned: bool = False, cancellation: CancellationToken | None = None
    ) -> VisionOutput:
        """Encode an image and return the chosen visual tokens [1, K, hidden]."""
        vision_output = self._backend.encode_image(patches, unpruned=unpruned, cancellation=cancellation)
        return replace(vision_output, embeds=vision_output.embeds[:, self._kept])

    def forward(self, tokens: DecoderInput, cache: KvCache, *, cancellation: CancellationToken | None = None) -> DecoderOutput:
        """Run new tokens on a KV cache; the positions of an image are reduced to those of the chosen tokens."""
        prefix = tokens.prefix
        missing = prefix.positions.shape[1] - prefix.embeds.shape[1]
        if missing:  # the image's tokens are at the end of the prefix
            text = prefix.positions.shape[1] - self._tokens
            indices = np.concatenate([np.arange(text), text + self._kept])
            tokens = replace(tokens, prefix=TokenSegment(prefix.embeds, prefix.positions[:, indices]))
        return self._backend.forward(tokens, cache, cancellation=cancellation)


def _without_eos(pipeline: Pipeline) -> Runtime:
    # A separate state, so that results cached by another backend are not reused.
    return Runtime(replace(pipeline, eos_token_ids=(), state=SharedState()))


def _check_bundle(name: str) -> None:
    if is_bundle(Path(name)):
        return
    if name == "resize":
        raise UsageError(
            "A smaller image needs graphs of another geometry, which this bundle has not.",
            hint="Export one with --image-size, and give its path: --compare small.bundle",
        )
    raise UsageError(f"Cannot compare with {name!r}.", hint=f"Name {', '.join(BUILTIN)}, or the path of another bundle.")
