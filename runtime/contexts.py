"""Decode steps at given context lengths.

A context is reached honestly: the image is asked about with a question of as many text tokens (one word again and again), which go
through the prefill of each contender, its cuts included. The steps after it are timed a few at a time, the contenders in turns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from edgeprune.errors import UsageError
from edgeprune.runtime.chat import TextCodec
from edgeprune.runtime.contenders import Contender
from edgeprune.runtime.figures import AtContext, median, spread
from edgeprune.runtime.questions import Question
from edgeprune.runtime.stream import Stream

STEPS = 4  # of one contender in a row
_WORDS = (" a", " the", " is", " on", " cube")  # one of them is a single token of nearly every tokenizer
_SHORT = 8


def measure_contexts(
    compared: Sequence[Contender], question: Question, contexts: Sequence[int], rounds: int
) -> dict[str, tuple[AtContext, ...]]:
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


def filler(codec: TextCodec, tokens: int) -> str:
    """Return a text of as many tokens, or of nearly as many where no word of ours is a single token."""
    word = next((word for word in _WORDS if len(codec.encode(word * 64)) == 64), _WORDS[0])
    return word * max(1, round(tokens * 64 / len(codec.encode(word * 64))))


def _bare(each: Contender, question: Question) -> int:
    # Text tokens that the chat template adds to a question.
    text = filler(each.codec, _SHORT)
    stream = _asked(each, question, text, 1)
    next(stream)
    stream.close()
    return stream.receipt.text_tokens - len(each.codec.encode(text))


def _check_context(each: Contender, context: int, bare: int, steps: int) -> None:
    if context <= bare:
        raise UsageError(
            f"A question to {each.name} has more than {bare} text tokens, not {context}.", hint="Ask for a longer context."
        )
    needed = context + each.runtime.plan.geometry.tokens + steps
    if needed > each.longest:
        raise UsageError(
            f"{context} text tokens, the image and {steps} timed steps are {needed} tokens; {each.name} takes {each.longest}.",
            hint="Ask for a shorter context, or for fewer repeats.",
        )


def _at(
    compared: Sequence[Contender], question: Question, context: int, bare: Mapping[str, int], rounds: int
) -> dict[str, AtContext]:
    streams = {}
    for each in compared:
        text = filler(each.codec, context - bare[each.name])
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
        found[name] = AtContext(context, stream.receipt.text_tokens, spread(taken[name]), ratio, stream.receipt.kv_bytes)
    return found


def _asked(each: Contender, question: Question, text: str, tokens: int) -> Stream:
    return replace(question, prompt=text, tokens=tokens).stream(each)
