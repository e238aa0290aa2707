"""State that all conversations of a loaded bundle share: the pipeline, latency estimates, and an LRU cache.

The cache holds image embeddings, results of input cuts and prefixes. It evicts the least recently used entry first.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from edgeprune.bundle import DecoderShape, GenerationDefaults, ImageText
from edgeprune.plan import KeepPlan
from edgeprune.plan.tiers import tier_number
from edgeprune.processors import ImageSpec
from edgeprune.runtime.backends.interface import Backend, CancellationToken
from edgeprune.runtime.backends.shared import FifoLock
from edgeprune.runtime.generation.request import LatencyEstimate
from edgeprune.runtime.media.likeness import Likeness
from edgeprune.runtime.telemetry.receipt import Receipt
from edgeprune.runtime.text.grammar import GrammarCompiler
from edgeprune.runtime.text.prompt import PromptEncoder
from edgeprune.runtime.text.tokenizer import TextTokenizer

ReceiptCallback = Callable[[Receipt], None]


class LruCache:
    """A thread-safe cache of at most `budget` bytes that evicts the least recently used entry.

    It does not store a value larger than the budget.
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
            entry = self._entries.get(key)
            if entry is None:
                return None
            self._entries.move_to_end(key)
            return entry[0]

    def put(self, key: Hashable, value: Any, size: int) -> None:
        """Store a value of `size` bytes unless it exceeds the budget."""
        if size > self.budget:
            return
        with self._lock:
            self.bytes += size - self._entries.pop(key, (None, 0))[1]
            self._entries[key] = (value, size)
            while self.bytes > self.budget:
                _, (_, freed) = self._entries.popitem(last=False)
                self.bytes -= freed

    def clear(self) -> None:
        """Remove all entries."""
        with self._lock:
            self._entries.clear()
            self.bytes = 0


class EnergyReader(Protocol):
    """An energy counter."""

    @property
    def joules(self) -> float | None:
        """Energy in joules since the counter started, or None without a reading."""
        ...


class SharedState:
    """The mutable state of a loaded model: cache, latency estimate, number of running answers, and receipt callbacks."""

    def __init__(self, cache_bytes: int = 0, energy: EnergyReader | None = None, latency: LatencyEstimate | None = None) -> None:
        self.feature_cache, self.latency, self.energy = LruCache(cache_bytes), latency or LatencyEstimate(), energy
        self.watchers: list[ReceiptCallback] = []
        self.running = 0
        self.closed = False
        self._lock = threading.Lock()

    @contextmanager
    def track_answer(self, receipt: Receipt) -> Iterator[None]:
        """Count an answer as running; when it ends, even by an error, complete its receipt."""
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

    def notify(self, receipt: Receipt) -> None:
        """Call the watchers with a final receipt. One that raises is logged; neither the answer nor the other watchers change."""
        for watcher in tuple(self.watchers):
            try:
                watcher(receipt)
            except Exception:
                import logging  # takes 5 ms to import

                logging.getLogger("edgeprune").exception("A watcher of answers failed.")


@dataclass(frozen=True)
class Pipeline:
    """Everything that conversations share: backend, prompts, image processing and plan.

    `tiers`: names and plans, highest quality first, empty for a single plan; `plan` is the first. `input_cut_ignores_prompt`: the
    input cut does not depend on the prompt. `max_kv_bytes`: limit per conversation, unless a request overrides it. `lock`:
    serializes access to the backend. `shared_steps`: decode steps of several conversations run together, and take no turns here.
    `likeness`: the images that the input cut was learned from, if it was.
    """

    backend: Backend
    prompts: PromptEncoder
    image_spec: ImageSpec
    eos_token_ids: tuple[int, ...]
    generation: GenerationDefaults
    decoder: DecoderShape
    plan: KeepPlan
    name: str = ""
    tiers: tuple[tuple[str, KeepPlan], ...] = ()
    input_cut_ignores_prompt: bool = False
    max_kv_bytes: int | None = None
    lock: FifoLock = field(default_factory=FifoLock)
    shared_steps: bool = False
    state: SharedState = field(default_factory=SharedState)
    likeness: Likeness | None = None

    @property
    def tokenizer(self) -> TextTokenizer:
        """The tokenizer of prompts and answers."""
        return self.prompts.tokenizer

    def step_turn(self, cancellation: CancellationToken) -> AbstractContextManager[None]:
        """Return the context in which a decode step runs. Raises Cancelled if the request is cancelled before its turn."""
        return nullcontext() if self.shared_steps else self.lock.acquire(cancellation)

    @property
    def image(self) -> ImageText:
        """The text that represents an image in a prompt."""
        return self.prompts.image

    @cached_property
    def grammars(self) -> GrammarCompiler:
        """The compiler for structured answers; it loads the tokenizer on first use."""
        return GrammarCompiler(self.tokenizer.to_json, self.eos_token_ids)

    @property
    def plans(self) -> tuple[KeepPlan, ...]:
        """The plans of all tiers, highest quality first."""
        return tuple(plan for _, plan in self.tiers) or (self.plan,)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of the keys and values of one text token in all layers."""
        return self.kv_bytes_per_token_layer * len(self.decoder.attention_layers)

    @property
    def kv_bytes_per_token_layer(self) -> int:
        """Bytes of the key and value of one token in one layer."""
        return 2 * self.decoder.kv_heads * self.decoder.head_dim * int(np.dtype(self.decoder.row_type).itemsize)

    def tier(self, name: str) -> int:
        """Return the index of a tier; raise UsageError for an unknown name."""
        return tier_number([known for known, _ in self.tiers], name)

    def kv_bytes_per_image(self, tier: int, *, prune: bool) -> int:
        """Return the KV cache bytes of one image under a tier, without cuts if not `prune`."""
        return self._image_bytes[tier][prune]

    @cached_property
    def _image_bytes(self) -> tuple[tuple[int, int], ...]:
        # (unpruned, pruned) for each tier.
        layers = self.decoder.attention_layers
        entry_bytes, unpruned = self.kv_bytes_per_token_layer, self.plan.geometry.tokens * len(layers)
        pruned = [sum(map(plan.tokens_cached, layers)) for plan in self.plans]
        return tuple((entry_bytes * unpruned, entry_bytes * entries) for entries in pruned)
