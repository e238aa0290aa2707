"""How the first token grows with the visual tokens that enter the decoder: the same graphs, evenly chosen tokens, no cuts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from edgeprune.errors import UsageError
from edgeprune.runtime.contenders import Contender, blind
from edgeprune.runtime.figures import Spread, spread
from edgeprune.runtime.questions import Question


@dataclass(frozen=True)
class AtKept:
    """The first token with `kept` visual tokens in every layer of the decoder; `tokens` are these and the text's."""

    kept: int
    tokens: int
    ttft_ms: Spread
    prefill_ms: Spread


@dataclass(frozen=True)
class Line:
    """A straight line through the prefills: `ms_per_token`, `ms_at_none` without a token, and the `farthest` prefill from it, as a
    share of the line.
    """

    ms_per_token: float
    ms_at_none: float
    farthest: float


def measure_growth(own: Contender, question: Question, counts: Sequence[int], rounds: int) -> tuple[AtKept, ...]:
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
    asking, first = [blind(own, "uniform", count) for count in counts], replace(question, tokens=1)
    taken: dict[int, list[tuple[float, float]]] = {count: [] for count in counts}
    texts = 0
    for number in range(-1, rounds):  # the first round warms up
        for count, each in list(zip(counts, asking, strict=True))[:: -1 if number % 2 else 1]:
            receipt = first.answer(each)
            texts = receipt.text_tokens
            if number >= 0:
                taken[count].append((receipt.times.ttft_ms, receipt.times.prefill_ms))
    return tuple(AtKept(count, count + texts, *(spread(times) for times in zip(*taken[count], strict=True))) for count in counts)


def line_through(grown: Sequence[AtKept]) -> Line | None:
    """Return the line that fits the prefills, errors weighed as shares of what was measured; None for fewer than three."""
    if len(grown) < 3:
        return None
    tokens, times = np.array([at.tokens for at in grown], float), np.array([at.prefill_ms.p50 for at in grown])
    slope, start = np.polyfit(tokens, times, 1, w=1 / times)
    return Line(float(slope), float(start), float(np.abs(times / (slope * tokens + start) - 1).max()))
