"""The variants that a benchmark compares, and the prompts that they answer.

Variants are the bundle itself, the same bundle without pruning, with tokens chosen without looking at the image, and other
bundles.

"random" and "uniform" enter K visual tokens, where K makes the same prefill work as the plan: the mean, over the layers, of the
tokens that the plan leaves there, rounded. They pass every layer at their original positions, in the graphs of the bundle. The
comparison shows whether a plan takes more time than its number of tokens does. The choice of tokens changes no time, so "uniform"
takes every n-th token of the sequence, not the farthest points of the method of that name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np

from edgeprune.bundle import is_bundle
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
CONTENT_FREE = ("random", "uniform")  # they choose without looking
BUILTIN = (UNPRUNED, *CONTENT_FREE)
_RECALL = 1 << 30  # bytes: more than one image takes

PROMPT = "What is on the table?"


@dataclass(frozen=True)
class Variant:
    """One of those compared. `path`: its bundle; `runtime` ends no answer before its length; `picture`: what it is shown; `alive`:
    visual tokens of each layer in prefill.
    """

    name: str
    path: Path
    runtime: Runtime
    picture: ImageOrImages
    prune: bool
    alive: tuple[int, ...]

    @property
    def prefill_only(self) -> Runtime:
        """The same, whose answers end before their first token: nothing but a prefill, and no answer that is read back otherwise
        than it was written.
        """
        pipeline = self.runtime._pipeline
        every = cast("tuple[int, ...]", range(pipeline.decoder.vocabulary))  # asked only whether a token is among them
        return Runtime(replace(pipeline, eos_token_ids=every))

    @property
    def with_empty_cache(self) -> Variant:
        """The same, which has seen nothing yet, and will recall what it sees."""
        return replace(self, runtime=Runtime(replace(self.runtime._pipeline, state=SharedState(_RECALL))))

    @property
    def tokenizer(self) -> TextTokenizer:
        """The tokenizer."""
        return self.runtime._pipeline.tokenizer

    @property
    def max_context(self) -> int:
        """The most tokens that a conversation may have."""
        return self.runtime._pipeline.decoder.context


def load_variants(
    path: Path,
    compare: Sequence[str] = (UNPRUNED,),
    image: Path | None = None,
    *,
    threads: int | None = None,
    provider: str = "cpu",
) -> list[Variant]:
    """Return a bundle, named PRUNED, and after it what it is compared with: words of UNPRUNED and CONTENT_FREE, or paths of other
    bundles.

    `image` None: a TableTop scene of each bundle's own size. No bundle is loaded twice. Raises UsageError for another word or one
    named twice, ImageError, and BundleError and EngineError from loading.
    """
    check_names(compare, provider)
    own = bundle_variant(PRUNED, path, load(path, threads=threads, provider=provider, cache_bytes=0), image)
    found = [own]
    for name in compare:
        if name in BUILTIN:
            found.append(builtin_variant(own, name))
        else:
            found.append(bundle_variant(name, Path(name), load(name, threads=threads, provider=provider, cache_bytes=0), image))
    return found


def bundle_variant(name: str, path: Path, runtime: Runtime, image: Path | None = None) -> Variant:
    """Return a bundle under its own plan."""
    plan = runtime.plan
    picture: ImageOrImages = frames_for(plan.geometry) if image is None else read_image(image)
    return Variant(name, path, _without_eos(runtime._pipeline), picture, True, tuple(map(plan.tokens_at_layer, range(plan.layers))))


def builtin_variant(own: Variant, name: str) -> Variant:
    """Return the same bundle with its plan left out: UNPRUNED, or one of CONTENT_FREE."""
    plan = own.runtime.plan
    if name in CONTENT_FREE:
        return content_free_variant(own, name, equal_work_tokens(plan))
    return replace(own, name=name, prune=False, alive=(plan.geometry.tokens,) * plan.layers)


def content_free_variant(own: Variant, name: str, keep: int) -> Variant:
    """Return the same bundle with `keep` visual tokens in every layer, chosen by one of CONTENT_FREE."""
    plan, pipeline = own.runtime.plan, own.runtime._pipeline
    whole = plan.geometry.tokens
    pipeline = replace(pipeline, backend=FixedSelectionBackend(pipeline.backend, chosen_tokens(name, whole, keep), whole))
    return replace(own, name=name, runtime=Runtime(pipeline), prune=False, alive=(keep,) * plan.layers)


def check_names(compare: Sequence[str], provider: str = "cpu") -> None:
    """Raise UsageError for what cannot be compared."""
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


def equal_work_tokens(plan: KeepPlan) -> int:
    """Return K: the mean over the layers of the visual tokens that a plan leaves alive in prefill, rounded, at least one."""
    return max(1, round(sum(map(plan.tokens_at_layer, range(plan.layers))) / plan.layers))


def chosen_tokens(name: str, tokens: int, keep: int) -> np.ndarray:
    """Return `keep` of `tokens` indices in ascending order, evenly for "uniform", by a lot that is always the same for "random"."""
    if name == "uniform":
        return (np.arange(keep) * tokens + tokens // 2) // keep
    return np.sort(np.random.default_rng(0).permutation(tokens)[:keep])


class FixedSelectionBackend(BackendProxy):
    """A backend that lets only some visual tokens of each image into an unpruned prefill, at their original positions.

    The conversation above it takes the image for whole, so that positions go on after the unpruned length; what it says of visual
    tokens in its receipts is of the whole image too.
    """

    def __init__(self, backend: Backend, kept: np.ndarray, tokens: int) -> None:
        super().__init__(backend)
        self._kept, self._tokens = kept, tokens

    def encode_image(
        self, patches: np.ndarray, *, unpruned: bool = False, cancellation: CancellationToken | None = None
    ) -> VisionOutput:
        """Return the chosen visual tokens [1, K, hidden]."""
        vision_output = self._backend.encode_image(patches, unpruned=unpruned, cancellation=cancellation)
        return replace(vision_output, embeds=vision_output.embeds[:, self._kept])

    def forward(self, tokens: DecoderInput, cache: KvCache, *, cancellation: CancellationToken | None = None) -> DecoderOutput:
        """Run new tokens on top of a cache; where an image is among them, with the positions of the chosen ones alone."""
        prefix = tokens.prefix
        missing = prefix.positions.shape[1] - prefix.embeds.shape[1]
        if missing:  # the image's tokens are the last of the prefix
            text = prefix.positions.shape[1] - self._tokens
            places = np.concatenate([np.arange(text), text + self._kept])
            tokens = replace(tokens, prefix=TokenSegment(prefix.embeds, prefix.positions[:, places]))
        return self._backend.forward(tokens, cache, cancellation=cancellation)


def _without_eos(pipeline: Pipeline) -> Runtime:
    # Its own state: what another engine said of an image must not be recalled.
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


@dataclass(frozen=True)
class BenchmarkPrompt:
    """A prompt, and the length of the answer in tokens. `fit`: what to do with an image of another aspect than a bundle's."""

    prompt: str
    tokens: int
    fit: str

    def stream(self, asked: Variant) -> Stream:
        """Return the answer of a contender in a new conversation, of exactly `tokens` tokens."""
        return asked.runtime.stream(asked.picture, self.prompt, prune=asked.prune, fit=self.fit, max_tokens=self.tokens)

    def answer(self, asked: Variant) -> Receipt:
        """Return the receipt of that answer."""
        stream = self.stream(asked)
        "".join(stream)
        return stream.receipt

    def ask_twice(self, asked: Variant) -> tuple[Receipt, Receipt]:
        """Return the receipts, up to the first token, of the question in another conversation, and of a second one after it there.

        The first answer is empty, so that the conversation reads it as it wrote it and keeps its caches.
        """
        chat = asked.prefill_only.chat(prune=asked.prune, fit=self.fit)
        first = chat.ask(self.prompt, asked.picture)
        "".join(first)
        second = chat.ask(self.prompt)
        "".join(second)
        return first.receipt, second.receipt
