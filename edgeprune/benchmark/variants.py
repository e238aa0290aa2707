"""Who is compared in a benchmark: the bundle itself, the same without pruning, chosen without looking, and other bundles.

"random" and "uniform" enter as many visual tokens as make the same work in prefill, K, the mean over the layers of those that the
plan leaves alive, rounded. They pass every layer, at their original positions, and the graphs are those of the bundle: what is
measured is whether a plan's time is more than that of its number of tokens. Which tokens they are changes no time, so that
"uniform" takes every n-th of the sequence, not the farthest points of the method of that name.

What every contender of a benchmark is asked.
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
from edgeprune.runtime.api.session import Pictures, Runtime
from edgeprune.runtime.backends.interface import BackendProxy, Engine, Interrupt, Seen, Step
from edgeprune.runtime.backends.kv_cache import KvCache, StepInput, Tokens
from edgeprune.runtime.backends.providers import ENGINES
from edgeprune.runtime.generation.conversation import Stream
from edgeprune.runtime.generation.pipeline import Model, State
from edgeprune.runtime.media.images import read_image
from edgeprune.runtime.telemetry.receipt import Receipt
from edgeprune.runtime.text.tokenizer import TextCodec
from edgeprune.tabletop.dataset import frames_for

OWN = "pruned"
WHOLE = "none"
BLIND = ("random", "uniform")  # they choose without looking
WORDS = (WHOLE, *BLIND)
_RECALL = 1 << 30  # bytes: more than one image takes

PROMPT = "What is on the table?"


@dataclass(frozen=True)
class Contender:
    """One of those compared. `path`: its bundle; `runtime` ends no answer before its length; `picture`: what it is shown; `alive`:
    visual tokens of each layer in prefill.
    """

    name: str
    path: Path
    runtime: Runtime
    picture: Pictures
    prune: bool
    alive: tuple[int, ...]

    @property
    def silent(self) -> Runtime:
        """The same, whose answers end before their first token: nothing but a prefill, and no answer that is read back otherwise
        than it was written.
        """
        model = self.runtime._model
        every = cast("tuple[int, ...]", range(model.decoder.vocabulary))  # asked only whether a token is among them
        return Runtime(replace(model, end_tokens=every))

    @property
    def forgetful(self) -> Contender:
        """The same, which has seen nothing yet, and will recall what it sees."""
        return replace(self, runtime=Runtime(replace(self.runtime._model, state=State(_RECALL))))

    @property
    def codec(self) -> TextCodec:
        """The tokenizer."""
        return self.runtime._model.codec

    @property
    def longest(self) -> int:
        """The most tokens that a conversation may have."""
        return self.runtime._model.decoder.context


def contenders(
    path: Path,
    compare: Sequence[str] = (WHOLE,),
    image: Path | None = None,
    *,
    threads: int | None = None,
    provider: str = "cpu",
) -> list[Contender]:
    """Return a bundle, named OWN, and after it what it is compared with: words of WHOLE and BLIND, or paths of other bundles.

    `image` None: a TableTop scene of each bundle's own size. No bundle is loaded twice. Raises UsageError for another word or one
    named twice, ImageError, and BundleError and EngineError from loading.
    """
    check_names(compare, provider)
    own = own_contender(OWN, path, load(path, threads=threads, provider=provider, cache_bytes=0), image)
    found = [own]
    for name in compare:
        if name in WORDS:
            found.append(variant(own, name))
        else:
            found.append(own_contender(name, Path(name), load(name, threads=threads, provider=provider, cache_bytes=0), image))
    return found


def own_contender(name: str, path: Path, runtime: Runtime, image: Path | None = None) -> Contender:
    """Return a bundle under its own plan."""
    plan = runtime.plan
    picture: Pictures = frames_for(plan.geometry) if image is None else read_image(image)
    return Contender(name, path, _endless(runtime._model), picture, True, tuple(map(plan.alive, range(plan.layers))))


def variant(own: Contender, name: str) -> Contender:
    """Return the same bundle with its plan left out: WHOLE, or one of BLIND."""
    plan = own.runtime.plan
    if name in BLIND:
        return blind(own, name, equal_work_tokens(plan))
    return replace(own, name=name, prune=False, alive=(plan.geometry.tokens,) * plan.layers)


def blind(own: Contender, name: str, keep: int) -> Contender:
    """Return the same bundle with `keep` visual tokens in every layer, chosen by one of BLIND."""
    plan, model = own.runtime.plan, own.runtime._model
    whole = plan.geometry.tokens
    model = replace(model, engine=FixedSelectionBackend(model.engine, chosen_tokens(name, whole, keep), whole))
    return replace(own, name=name, runtime=Runtime(model), prune=False, alive=(keep,) * plan.layers)


def check_names(compare: Sequence[str], provider: str = "cpu") -> None:
    """Raise UsageError for what cannot be compared."""
    for index, name in enumerate(compare):
        if name in compare[:index] or name == OWN:
            raise UsageError(f"{name} is compared twice.", hint="Name each once.")
        if name in BLIND and provider == ENGINES:
            raise UsageError(
                f"{name} cannot run on TensorRT engines, whose visual tokens stay on the device.",
                hint=f"Export a bundle with --method {name}, build it, and give its path.",
            )
        if name not in WORDS:
            _check_bundle(name)


def equal_work_tokens(plan: KeepPlan) -> int:
    """Return K: the mean over the layers of the visual tokens that a plan leaves alive in prefill, rounded, at least one."""
    return max(1, round(sum(map(plan.alive, range(plan.layers))) / plan.layers))


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

    def __init__(self, backend: Engine, kept: np.ndarray, tokens: int) -> None:
        super().__init__(backend)
        self._kept, self._tokens = kept, tokens

    def see(self, patches: np.ndarray, *, whole: bool = False, interrupt: Interrupt | None = None) -> Seen:
        """Return the chosen visual tokens [1, K, hidden]."""
        seen = self._backend.see(patches, whole=whole, interrupt=interrupt)
        return replace(seen, embeds=seen.embeds[:, self._kept])

    def step(self, tokens: StepInput, cache: KvCache, *, interrupt: Interrupt | None = None) -> Step:
        """Run new tokens on top of a cache; where an image is among them, with the positions of the chosen ones alone."""
        prefix = tokens.prefix
        missing = prefix.positions.shape[1] - prefix.embeds.shape[1]
        if missing:  # the image's tokens are the last of the prefix
            text = prefix.positions.shape[1] - self._tokens
            places = np.concatenate([np.arange(text), text + self._kept])
            tokens = replace(tokens, prefix=Tokens(prefix.embeds, prefix.positions[:, places]))
        return self._backend.step(tokens, cache, interrupt=interrupt)


def _endless(model: Model) -> Runtime:
    # Its own state: what another engine said of an image must not be recalled.
    return Runtime(replace(model, end_tokens=(), state=State()))


def _check_bundle(name: str) -> None:
    if is_bundle(Path(name)):
        return
    if name == "resize":
        raise UsageError(
            "A smaller image needs graphs of another geometry, which this bundle has not.",
            hint="Export one with --image-size, and give its path: --compare small.bundle",
        )
    raise UsageError(f"Cannot compare with {name!r}.", hint=f"Name {', '.join(WORDS)}, or the path of another bundle.")


@dataclass(frozen=True)
class Question:
    """A prompt, and the length of the answer in tokens. `fit`: what to do with an image of another aspect than a bundle's."""

    prompt: str
    tokens: int
    fit: str

    def stream(self, asked: Contender) -> Stream:
        """Return the answer of a contender in a new conversation, of exactly `tokens` tokens."""
        return asked.runtime.stream(asked.picture, self.prompt, prune=asked.prune, fit=self.fit, max_tokens=self.tokens)

    def answer(self, asked: Contender) -> Receipt:
        """Return the receipt of that answer."""
        stream = self.stream(asked)
        "".join(stream)
        return stream.receipt

    def again(self, asked: Contender) -> tuple[Receipt, Receipt]:
        """Return the receipts, up to the first token, of the question in another conversation, and of a second one after it there.

        The first answer is empty, so that the conversation reads it as it wrote it and keeps its caches.
        """
        chat = asked.silent.chat(prune=asked.prune, fit=self.fit)
        first = chat.ask(self.prompt, asked.picture)
        "".join(first)
        second = chat.ask(self.prompt)
        "".join(second)
        return first.receipt, second.receipt
