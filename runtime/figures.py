"""What a benchmark says of each contender, made from the receipts of its rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edgeprune.runtime.receipt import Receipt

Row = Mapping[str, float]  # the costs of one round, by name
STAGES = ("preprocess_ms", "vision_ms", "select_ms", "prefill_ms")  # they add up to ttft_ms


@dataclass(frozen=True)
class Spread:
    """Median and 95th percentile over the rounds, interpolated between them."""

    p50: float
    p95: float


@dataclass(frozen=True)
class AtContext:
    """Decode steps after a question of `keys` text tokens, with the image in the caches besides. `context`: what was asked for.

    `ratio` to the baseline's, the median over the rounds; `kv_bytes` of all caches at the end; `roofline`: the share of the least
    time, None where there are no peaks.
    """

    context: int
    keys: int
    ms_per_token: Spread
    ratio: float
    kv_bytes: int
    roofline: float | None = None


@dataclass(frozen=True)
class Startup:
    """A fresh process up to its second answer, whose image is new as well; milliseconds and bytes.

    `read_ms`: reading the files of the bundle from the system's cache, and nothing else, beside `load_ms`. `loading_rss_bytes`: the
    largest resident set up to the end of loading; `peak_rss_bytes`: while it answered (loading included where the kernel does not
    count anew); None where nobody knows.
    """

    import_ms: float
    read_ms: float
    load_ms: float
    first_ttft_ms: float
    second_ttft_ms: float
    loading_rss_bytes: int | None
    peak_rss_bytes: int | None


@dataclass(frozen=True)
class Roofline:
    """The least milliseconds that peaks allow, and their share in what was measured (`ttft`: vision encoder and prefill; `token`).

    `arithmetic` of the vision encoder's and of the decoder's weights.
    """

    vision_ms: float
    prefill_ms: float
    token_ms: float
    ttft: float
    token: float
    arithmetic: tuple[str, str]


@dataclass(frozen=True)
class Figures:
    """What one contender costs: `costs` by name, and `ratios` of them to the baseline, each the median of the rounds' own ratios.

    `visual_tokens`: the mean over the layers in prefill; `reused`: the second question about the image found its caches; `cuts`:
    visual tokens before and after each. `weight_bytes` of the bundle's graphs; `decode_kv_bytes`: what a decode step reads of the
    caches, on the average. The rest is None, or empty, where it was not measured.
    """

    name: str
    costs: Mapping[str, Spread]
    ratios: Mapping[str, float]
    generated: int
    text_tokens: int
    visual_tokens: float
    reused: bool
    cuts: tuple[tuple[str, int, int], ...]
    weight_bytes: int
    decode_kv_bytes: float
    contexts: tuple[AtContext, ...] = ()
    startup: Startup | None = None
    roofline: Roofline | None = None

    @property
    def rss_ratio(self) -> float | None:
        """Peak resident set while answering, over the bytes of weights and KV caches."""
        peak = self.startup.peak_rss_bytes if self.startup else None
        return None if peak is None else peak / (self.weight_bytes + self.costs["kv_bytes"].p50)


def row_of(first: Receipt, recalled: Receipt, second: Receipt, joules: float | None) -> Row:
    """Return the costs of one round: an answer about a new image, the first token of the same question in another conversation,
    which may be `recalled` in part, and of a second one after it.
    """
    times = first.times
    row = {name: float(getattr(times, name)) for name in STAGES}
    row |= {"ttft_ms": times.ttft_ms, "recalled_ttft_ms": recalled.times.ttft_ms, "repeated_ttft_ms": second.times.ttft_ms}
    row |= {"ms_per_token": times.ms_per_token}
    row |= {"tokens_per_second": 1e3 * len(times.decode_ms) / sum(times.decode_ms), "kv_bytes": float(first.kv_bytes)}
    known = {"overhead": times.overhead, "energy_j": joules}
    return {**row, **{name: value for name, value in known.items() if value is not None}}


def decode_kv_bytes(receipt: Receipt, entry: int) -> float:
    """Return the bytes of the caches that a decode step reads, the mean of an answer; `entry`: those of one token in one layer.

    All there are, less the visual tokens that a decode cut passes over.
    """
    passed_over = receipt.visual_stored - sum(receipt.visual_reads) / len(receipt.visual_reads)
    return receipt.kv_bytes - entry * passed_over


def spreads(rows: Sequence[Row]) -> dict[str, Spread]:
    """Return the median and the 95th percentile of each cost that every round has."""
    names = [name for name in rows[0] if all(name in row for row in rows)]
    return {name: spread([row[name] for row in rows]) for name in names}


def ratios(rows: Sequence[Row], baseline: Sequence[Row]) -> dict[str, float]:
    """Return the median over the rounds of each cost divided by the baseline's of the same round, where that is never zero."""
    names = [name for name in rows[0] if all(name in row and base.get(name) for row, base in zip(rows, baseline, strict=True))]
    return {name: median([row[name] / base[name] for row, base in zip(rows, baseline, strict=True)]) for name in names}


def spread(values: Sequence[float]) -> Spread:
    """Return the median and the 95th percentile."""
    return Spread(median(values), float(np.percentile(values, 95)))


def median(values: Sequence[float]) -> float:
    """Return the median as a plain number."""
    return float(np.median(values))
