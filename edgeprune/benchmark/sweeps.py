"""Decode time over the context length, and time to first token over the number of visual tokens.

A context is filled by a real prefill: a question of as many text tokens (one word repeated) goes through each variant, its cuts
included. The steps after it are timed a few at a time, the variants in turns. The sweep over visual tokens runs the same graphs
with evenly chosen tokens and no cuts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from edgeprune.benchmark.results import ContextPoint, Spread, median, spread
from edgeprune.benchmark.variants import BenchmarkPrompt, Variant, content_free_variant
from edgeprune.errors import UsageError
from edgeprune.runtime.generation.conversation import Stream
from edgeprune.runtime.text.tokenizer import TextTokenizer

STEPS = 4  # of one contender in a row
_WORDS = (" a", " the", " is", " on", " cube")  # one of them is a single token of nearly every tokenizer
_SHORT = 8


def sweep_contexts(
    compared: Sequence[Variant], question: BenchmarkPrompt, contexts: Sequence[int], rounds: int
) -> dict[str, tuple[ContextPoint, ...]]:
    """Return, by the names of contenders, what a token costs them at each context; the second is the baseline, or else the first.

    Raises UsageError, before anything is timed, for a context that is too short for a question or too long for a model.
    """
    steps = STEPS * (rounds + 1) + 1
    bare = {each.name: _bare(each, question) for each in compared} if contexts else {}
    for context in contexts:
        for each in compared:
            _check_context(each, context, bare[each.name], steps)
    at = [_at(compared, question, context, bare, rounds) for context in contexts]
    return {each.name: tuple(found[each.name] for found in at) for each in compared}


def filler(tokenizer: TextTokenizer, tokens: int) -> str:
    """Return a text of as many tokens, or of nearly as many where no word of ours is a single token."""
    word = next((word for word in _WORDS if len(tokenizer.encode(word * 64)) == 64), _WORDS[0])
    return word * max(1, round(tokens * 64 / len(tokenizer.encode(word * 64))))


def _bare(each: Variant, question: BenchmarkPrompt) -> int:
    # Text tokens that the chat template adds to a question.
    text = filler(each.tokenizer, _SHORT)
    stream = _asked(each, question, text, 1)
    next(stream)
    stream.close()
    return stream.receipt.text_tokens - len(each.tokenizer.encode(text))


def _check_context(each: Variant, context: int, bare: int, steps: int) -> None:
    if context <= bare:
        raise UsageError(
            f"A question to {each.name} has more than {bare} text tokens, not {context}.", hint="Ask for a longer context."
        )
    needed = context + each.runtime.plan.geometry.tokens + steps
    if needed > each.max_context:
        raise UsageError(
            f"{context} text tokens, the image and {steps} timed steps are {needed} tokens; {each.name} takes {each.max_context}.",
            hint="Ask for a shorter context, or for fewer repeats.",
        )


def _at(
    compared: Sequence[Variant], question: BenchmarkPrompt, context: int, bare: Mapping[str, int], rounds: int
) -> dict[str, ContextPoint]:
    streams = {}
    for each in compared:
        text = filler(each.tokenizer, context - bare[each.name])
        streams[each.name] = _asked(each, question, text, STEPS * (rounds + 1) + 2)  # one is left, so that no stream ends
        next(streams[each.name])  # prefill and the first token
    taken: dict[str, list[float]] = {each.name: [] for each in compared}
    for number in range(-1, rounds):  # the first round warms up
        for name, stream in list(streams.items())[:: -1 if number % 2 else 1]:
            for _ in range(STEPS):
                next(stream)
            if number >= 0:
                taken[name].append(median(stream.receipt.times.decode_ms[-STEPS:]))
    baseline = taken[compared[min(1, len(compared) - 1)].name]
    found = {}
    for name, stream in streams.items():
        stream.close()
        ratio = median([own / base for own, base in zip(taken[name], baseline, strict=True)])
        found[name] = ContextPoint(context, stream.receipt.text_tokens, spread(taken[name]), ratio, stream.receipt.kv_bytes)
    return found


def _asked(each: Variant, question: BenchmarkPrompt, text: str, tokens: int) -> Stream:
    return replace(question, prompt=text, tokens=tokens).stream(each)


@dataclass(frozen=True)
class KeptPoint:
    """The first token with `kept` visual tokens in every layer of the decoder; `tokens` are these and the text's."""

    kept: int
    tokens: int
    ttft_ms: Spread
    prefill_ms: Spread


@dataclass(frozen=True)
class LinearFit:
    """A straight line through the prefills: `ms_per_token`, `ms_at_none` without a token, and the `farthest` prefill from it, as a
    share of the line.
    """

    ms_per_token: float
    ms_at_none: float
    farthest: float


def sweep_kept_tokens(own: Variant, question: BenchmarkPrompt, counts: Sequence[int], rounds: int) -> tuple[KeptPoint, ...]:
    """Return what the first token takes a bundle with each of `counts` visual tokens, measured in turns.

    Raises UsageError, before anything is timed, for a count that the bundle's image does not have.
    """
    whole = own.runtime.plan.geometry.tokens
    for count in counts:
        if not 0 < count <= whole:
            raise UsageError(
                f"{own.path} has {whole} visual tokens; {count} of them cannot be kept.",
                hint="Ask for fewer with --kept, or export for a larger image with --image-size.",
            )
    asking, first = [content_free_variant(own, "uniform", count) for count in counts], replace(question, tokens=1)
    taken: dict[int, list[tuple[float, float]]] = {count: [] for count in counts}
    texts = 0
    for number in range(-1, rounds):  # the first round warms up
        for count, each in list(zip(counts, asking, strict=True))[:: -1 if number % 2 else 1]:
            receipt = first.answer(each)
            texts = receipt.text_tokens
            if number >= 0:
                taken[count].append((receipt.times.ttft_ms, receipt.times.prefill_ms))
    return tuple(KeptPoint(count, count + texts, *(spread(times) for times in zip(*taken[count], strict=True))) for count in counts)


def line_through(grown: Sequence[KeptPoint]) -> LinearFit | None:
    """Return the line that fits the prefills, errors weighed as shares of what was measured; None for fewer than three."""
    if len(grown) < 3:
        return None
    tokens, times = np.array([at.tokens for at in grown], float), np.array([at.prefill_ms.p50 for at in grown])
    slope, start = np.polyfit(tokens, times, 1, w=1 / times)
    return LinearFit(float(slope), float(start), float(np.abs(times / (slope * tokens + start) - 1).max()))
