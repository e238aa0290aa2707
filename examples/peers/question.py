"""The question that every contender is asked, and its report of what the answers cost: one line of JSON.

Only the standard library: this runs in each peer's own environment.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Question:
    """What is asked. `images`: one to warm up on, then one for each answer that counts; `options`: the contender's own settings."""

    folder: Path
    images: tuple[Path, ...]
    prompt: str
    tokens: int
    threads: int
    keep: float
    options: dict[str, str]


@dataclass(frozen=True)
class Cost:
    """What one answer cost in milliseconds; None for what the peer does not tell or does not do.

    `vision_ms`: from a decoded image to the visual embeddings that enter the decoder, preprocessing and the cut before it included;
    `prefill_ms`: from there to the first token; `ms_per_token`: the median of those after it; `tokens`: how many came; `entered`:
    how many, of text and image, entered the decoder's first layer.
    """

    ttft_ms: float | None
    vision_ms: float | None
    prefill_ms: float | None
    ms_per_token: float
    tokens: int
    entered: int | None


Ask = Callable[[Path], Cost]


def asked() -> Question:
    """Return the question on the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("images", type=Path, nargs="+")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--keep", type=float, default=1.0)
    parser.add_argument("--option", action="append", default=[])
    given = parser.parse_args()
    options = dict(option.split("=", 1) for option in given.option)
    return Question(given.folder, tuple(given.images), given.prompt, given.tokens, given.threads, given.keep, options)


def answer(question: Question, load: Callable[[Question], Ask], *packages: str) -> None:
    """Load, ask about every image, and print the report. The first answer warms up and does not count."""
    started = time.perf_counter()
    ask = load(question)
    loaded = time.perf_counter() - started
    costs = [_cost(ask, image, question.tokens) for image in question.images][1:]
    versions = {package: version(package) for package in packages}
    print(json.dumps({"costs": costs, "load_s": loaded, "peak_rss": peak_rss(), "versions": versions}))


def _cost(ask: Ask, image: Path, tokens: int) -> dict[str, Any]:
    # `cpu_s`, over all threads: on a machine that others use, it says more than the wall clock.
    busy = time.process_time()
    cost = ask(image)
    if cost.tokens != tokens:
        raise SystemExit(f"{cost.tokens} tokens came instead of {tokens}.")
    return asdict(cost) | {"cpu_s": time.process_time() - busy}


def peak_rss() -> int:
    """Return the most memory that this process has held, in bytes; pages of mapped files count."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024


class Clock:
    """Notes when tokens come, in milliseconds since it was made."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self.tokens: list[float] = []

    def now(self) -> float:
        """Return the time."""
        return (time.perf_counter() - self._started) * 1e3

    def token(self) -> None:
        """Note a token."""
        self.tokens.append(self.now())

    def cost(self, vision_ms: float | None, entered: int | None) -> Cost:
        """Return what was noted. `vision_ms`: when the visual embeddings were there."""
        first, gaps = self.tokens[0], [after - before for before, after in zip(self.tokens, self.tokens[1:], strict=False)]
        prefill = None if vision_ms is None else first - vision_ms
        return Cost(first, vision_ms, prefill, statistics.median(gaps), len(self.tokens), entered)
