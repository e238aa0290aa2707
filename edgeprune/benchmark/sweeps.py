"""Sweeps: decode time over context length, and time to first token over the number of visual tokens.

Contexts are filled by a real prefill: each variant gets a question of that many text tokens (one word repeated), with its cuts.
The decode steps after it are timed a few at a time, alternating between variants. The sweep over visual tokens runs the same graphs
with evenly chosen tokens and no cuts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from edgeprune.benchmark.results import ContextPoint, Spread, median, spread
from edgeprune.benchmark.variants import BenchmarkPrompt, Variant, content_free_variant
from edgeprune.errors import UsageError
from edgeprune.io.progress import SILENT, Progress
from edgeprune.runtime.generation.conversation import Stream
from edgeprune.runtime.text.tokenizer import TextTokenizer

STEPS = 4  # consecutive decode steps of one variant
_WORDS = (" a", " the", " is", " on", " cube")  # nearly every tokenizer has one of them as a single token
_SHORT_TOKENS = 8


def sweep_contexts(
    compared: Sequence[Variant],
    question: BenchmarkPrompt,
    contexts: Sequence[int],
    rounds: int,
    progress: Progress = SILENT,
) -> dict[str, tuple[ContextPoint, ...]]:
    """Return the time per token at each context, by variant name. The baseline is the second variant, or the first if it is alone.

    Raises UsageError, before any timing, for a context that is too short for a question or too long for a model.
    """
    steps = STEPS * (rounds + 1) + 1
    template_tokens = {variant.name: _template_tokens(variant, question) for variant in compared} if contexts else {}
    for context in contexts:
        for variant in compared:
            _check_context(variant, context, template_tokens[variant.name], steps)
    measured, by_context = progress.count("context lengths", len(contexts)), list[dict[str, ContextPoint]]()
    for context in contexts:
        by_context.append(_measure_context(compared, question, context, template_tokens, rounds))
        measured(len(by_context))
    return {variant.name: tuple(found[variant.name] for found in by_context) for variant in compared}


def filler(tokenizer: TextTokenizer, tokens: int) -> str:
    """Return a text of `tokens` tokens, or approximately as many if no word in _WORDS is a single token."""
    word = next((word for word in _WORDS if len(tokenizer.encode(word * 64)) == 64), _WORDS[0])
    return word * max(1, round(tokens * 64 / len(tokenizer.encode(word * 64))))


def _template_tokens(variant: Variant, question: BenchmarkPrompt) -> int:
    # Number of text tokens that the chat template adds to a question.
    text = filler(variant.tokenizer, _SHORT_TOKENS)
    stream = _ask(variant, question, text, 1)
    next(stream)
    stream.close()
    return stream.receipt.text_tokens - len(variant.tokenizer.encode(text))


def _check_context(variant: Variant, context: int, template_tokens: int, steps: int) -> None:
    if context <= template_tokens:
        raise UsageError(
            f"A question to {variant.name} has more than {template_tokens} text tokens, not {context}.",
            hint="Ask for a longer context.",
        )
    needed = context + variant.runtime.plan.geometry.tokens + steps
    if needed > variant.max_context:
        raise UsageError(
            f"{context} text tokens, the image and {steps} timed steps are {needed} tokens; "
            f"{variant.name} takes {variant.max_context}.",
            hint="Ask for a shorter context, or for fewer repeats.",
        )


def _measure_context(
    compared: Sequence[Variant], question: BenchmarkPrompt, context: int, template_tokens: Mapping[str, int], rounds: int
) -> dict[str, ContextPoint]:
    streams = {}
    for variant in compared:
        text = filler(variant.tokenizer, context - template_tokens[variant.name])
        # One token more than used, so that no stream ends.
        streams[variant.name] = _ask(variant, question, text, STEPS * (rounds + 1) + 2)
        next(streams[variant.name])  # prefill and the first token
    samples: dict[str, list[float]] = {variant.name: [] for variant in compared}
    for number in range(-1, rounds):  # the first round warms up
        for name, stream in list(streams.items())[:: -1 if number % 2 else 1]:
            for _ in range(STEPS):
                next(stream)
            if number >= 0:
                samples[name].append(median(stream.receipt.times.decode_ms[-STEPS:]))
    baseline = samples[compared[min(1, len(compared) - 1)].name]
    found = {}
    for name, stream in streams.items():
        stream.close()
        ratio = median([own / base for own, base in zip(samples[name], baseline, strict=True)])
        found[name] = ContextPoint(context, stream.receipt.text_tokens, spread(samples[name]), ratio, stream.receipt.kv_bytes)
    return found


def _ask(variant: Variant, question: BenchmarkPrompt, text: str, tokens: int) -> Stream:
    return replace(question, prompt=text, tokens=tokens).stream(variant)


@dataclass(frozen=True)
class KeptPoint:
    """TTFT with `kept` visual tokens in every decoder layer; `tokens` includes the text tokens."""

    kept: int
    tokens: int
    ttft_ms: Spread
    prefill_ms: Spread


@dataclass(frozen=True)
class LinearFit:
    """A line fitted to prefill times: slope `ms_per_token`, intercept `ms_at_none`, and largest relative deviation `farthest`."""

    ms_per_token: float
    ms_at_none: float
    farthest: float


def sweep_kept_tokens(
    own: Variant, question: BenchmarkPrompt, counts: Sequence[int], rounds: int, progress: Progress = SILENT
) -> tuple[KeptPoint, ...]:
    """Measure TTFT of a bundle with each of `counts` visual tokens, alternating between counts.

    Raises UsageError, before any timing, for a count above the bundle's number of visual tokens or below 1.
    """
    available = own.runtime.plan.geometry.tokens
    for count in counts:
        if not 0 < count <= available:
            raise UsageError(
                f"{own.path} has {available} visual tokens; {count} of them cannot be kept.",
                hint="Ask for fewer with --visual-tokens, or export for a larger image with --image-size.",
            )
    variants, first = [content_free_variant(own, "uniform", count) for count in counts], replace(question, tokens=1)
    samples: dict[int, list[tuple[float, float]]] = {count: [] for count in counts}
    text_tokens, measured = 0, progress.count("rounds with fewer visual tokens", rounds)
    for number in range(-1, rounds):  # the first round warms up
        for count, variant in list(zip(counts, variants, strict=True))[:: -1 if number % 2 else 1]:
            receipt = first.answer(variant)
            text_tokens = receipt.text_tokens
            if number >= 0:
                samples[count].append((receipt.times.ttft_ms, receipt.times.prefill_ms))
        measured(number + 1)
    return tuple(
        KeptPoint(count, count + text_tokens, *(spread(times) for times in zip(*samples[count], strict=True))) for count in counts
    )


def line_through(grown: Sequence[KeptPoint]) -> LinearFit | None:
    """Return the line with the least squared relative error to the prefill times; None for fewer than three points."""
    if len(grown) < 3:
        return None
    tokens, times = np.array([point.tokens for point in grown], float), np.array([point.prefill_ms.p50 for point in grown])
    slope, start = np.polyfit(tokens, times, 1, w=1 / times)
    return LinearFit(float(slope), float(start), float(np.abs(times / (slope * tokens + start) - 1).max()))
