"""What all conversations of a loaded bundle share.

What was computed once and may be asked for again: image embeddings, selections, prefixes. Least recently used goes first.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from edgeprune.bundle import DecoderShape, ImageText
from edgeprune.plan import KeepPlan
from edgeprune.plan.tiers import tier_number
from edgeprune.processors import ImageSpec
from edgeprune.runtime.backends.interface import Backend
from edgeprune.runtime.backends.shared import FifoLock
from edgeprune.runtime.generation.request import LatencyEstimate
from edgeprune.runtime.telemetry.receipt import Receipt
from edgeprune.runtime.text.grammar import GrammarCompiler
from edgeprune.runtime.text.prompt import ChatTemplate
from edgeprune.runtime.text.tokenizer import TextTokenizer

ReceiptCallback = Callable[[Receipt], None]


class LruCache:
    """Values by key, of at most `budget` bytes in all; the one that was not asked for the longest makes room. Thread-safe.

    A value that is larger than the budget is not kept.
    """

    def __init__(self, budget: int = 0) -> None:
        self.budget = budget
        self.bytes = 0
        self._entries: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Hashable) -> Any:
        """Return the value of a key, or None."""
        with self._lock:
            found = self._entries.get(key)
            if found is None:
                return None
            self._entries.move_to_end(key)
            return found[0]

    def put(self, key: Hashable, value: Any, size: int) -> None:
        """Keep a value of `size` bytes, if it fits at all."""
        if size > self.budget:
            return
        with self._lock:
            self.bytes += size - self._entries.pop(key, (None, 0))[1]
            self._entries[key] = (value, size)
            while self.bytes > self.budget:
                _, (_, freed) = self._entries.popitem(last=False)
                self.bytes -= freed

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._entries.clear()
            self.bytes = 0


class EnergyReader(Protocol):
    """Something that counts energy."""

    @property
    def joules(self) -> float | None:
        """Energy since it began to count, in joules; None where there is no reading."""
        ...


class SharedState:
    """What changes while a model is used: what can be recalled, how long answers take, how many run, who is told of their ends."""

    def __init__(self, cache_bytes: int = 0, energy: EnergyReader | None = None, latency: LatencyEstimate | None = None) -> None:
        self.feature_cache, self.latency, self.energy = LruCache(cache_bytes), latency or LatencyEstimate(), energy
        self.watchers: list[ReceiptCallback] = []
        self.running = 0
        self._lock = threading.Lock()

    @contextmanager
    def track_answer(self, receipt: Receipt) -> Iterator[None]:
        """Count an answer as running; at its end, whatever that is, complete its receipt and tell the watchers."""
        before = self.energy.joules if self.energy else None
        with self._lock:
            self.running += 1
        try:
            yield
        finally:
            with self._lock:
                self.running -= 1
            after = self.energy.joules if self.energy else None
            receipt.energy_j = None if before is None or after is None else after - before
            for watcher in tuple(self.watchers):
                watcher(receipt)


@dataclass(frozen=True)
class Pipeline:
    """Everything that conversations share: the engine, the text side, the image side and the plan.

    `tiers`: names and plans of prepared budgets, the best first, where there are several; `plan` is the first.
    `input_cut_ignores_prompt`: its input cut does not look at the question. `max_kv_bytes`: of each conversation, unless a question
    says otherwise. `lock`: whose the engine is, where it is shared.
    """

    backend: Backend
    tokenizer: TextTokenizer
    chat_template: ChatTemplate
    special_tokens: dict[str, str]
    image_spec: ImageSpec
    image: ImageText
    eos_token_ids: tuple[int, ...]
    decoder: DecoderShape
    plan: KeepPlan
    name: str = ""
    tiers: tuple[tuple[str, KeepPlan], ...] = ()
    input_cut_ignores_prompt: bool = False
    max_kv_bytes: int | None = None
    lock: FifoLock = field(default_factory=FifoLock)
    state: SharedState = field(default_factory=SharedState)

    @cached_property
    def grammars(self) -> GrammarCompiler:
        """What makes structured answers; it reads nothing before the first of them."""
        return GrammarCompiler(self.tokenizer.to_json, self.eos_token_ids)

    @property
    def plans(self) -> tuple[KeepPlan, ...]:
        """The plans, the best first."""
        return tuple(plan for _, plan in self.tiers) or (self.plan,)

    @property
    def kv_bytes_per_token_layer(self) -> int:
        """Bytes of the keys and values of one token in one layer."""
        return 2 * self.decoder.kv_heads * self.decoder.head_dim * int(np.dtype(self.decoder.cache_type).itemsize)

    def tier(self, name: str) -> int:
        """Return the number of a tier; raise UsageError for one that the bundle does not have."""
        return tier_number([known for known, _ in self.tiers], name)

    def kv_bytes_per_image(self, tier: int, *, prune: bool) -> int:
        """Return what the KV caches hold of one image under a tier."""
        return self._image_bytes[tier][prune]

    @cached_property
    def _image_bytes(self) -> tuple[tuple[int, int], ...]:
        # Of each tier without its cuts and with them.
        stored = [sum(map(plan.tokens_cached, range(plan.layers))) for plan in self.plans]
        whole = self.plan.geometry.tokens * self.plan.layers
        return tuple((self.kv_bytes_per_token_layer * whole, self.kv_bytes_per_token_layer * tokens) for tokens in stored)
