"""What computes, as the generation loop sees it, and how a bundle's graphs name what goes in and out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from edgeprune.plan import KeepPlan
from edgeprune.runtime.cache import Arrays, KvCache
from edgeprune.runtime.interrupt import Interrupt

SEGMENTS = ("prefix", "visual", "suffix")
TIER = "tier"  # a marker: one long for the first tier, two for the second, and so on
SIGNALS = ("vision_attention", "vision_keys")


@dataclass(frozen=True)
class Tokens:
    """Consecutive tokens: `embeds` [1, n, hidden] and `positions` [axes, n]; n may be 0."""

    embeds: np.ndarray
    positions: np.ndarray

    def then(self, other: Tokens) -> Tokens:
        """Return these tokens followed by others."""
        return Tokens(
            np.concatenate([self.embeds, other.embeds], axis=1), np.concatenate([self.positions, other.positions], axis=1)
        )

    def only(self, indices: np.ndarray, embeds: np.ndarray) -> Tokens:
        """Return the tokens at some indices, with new embeddings."""
        return Tokens(embeds, self.positions[:, indices])


@dataclass(frozen=True)
class Seen:
    """What the vision encoder says of an image: visual tokens `embeds` [1, V, hidden] and `signals` for input methods that need
    them. `kept` of every vision cut: indices in the image [V], ascending; of the last one those of the tokens.
    """

    embeds: np.ndarray
    signals: Mapping[str, np.ndarray] = field(default_factory=dict)
    kept: tuple[np.ndarray, ...] = ()

    @property
    def order(self) -> np.ndarray:
        """Indices in the image [V] of the visual tokens."""
        return self.kept[-1] if self.kept else np.arange(self.embeds.shape[1])


@dataclass(frozen=True)
class StepInput:
    """The new tokens of one forward. `order` [V]: indices of the visual tokens in the image; `groups` [text, 3]: for each text
    key, past and new, 1 in the column of its group (system, instruction, generated). `tier`: the number of the plan whose budgets
    count. `interrupt`: what may end the forward early, with Interrupted, where the engine can stop.
    """

    prefix: Tokens
    visual: Tokens
    suffix: Tokens
    order: np.ndarray
    groups: np.ndarray
    tier: int = 0
    interrupt: Interrupt | None = None


@dataclass(frozen=True)
class Step:
    """One forward: `logits` [vocabulary] of the last token; `rows` [n, kv heads, head_dim] that the caches are to take in, of the
    prefix, of the visual tokens that stay and of the suffix; `kept` of every layer and cache cut; `split` [layers, 4] of a plan
    whose rate follows attention, else None. `run_ms`: of the graph alone; None where it goes on after the call.
    """

    logits: np.ndarray
    rows: Arrays
    kept: tuple[np.ndarray, ...]
    split: np.ndarray | None
    run_ms: float | None = None


class Engine(Protocol):
    """The model as the generation loop sees it."""

    def see(self, patches: np.ndarray, *, whole: bool = False, interrupt: Interrupt | None = None) -> Seen:
        """Return what the vision encoder says of patches [patches, patch pixels]; `whole`: of all, whatever its cuts are.

        `interrupt`: what may end it early, with Interrupted, where the engine can stop.
        """
        ...

    def select(self, seen: Seen, prompt: np.ndarray, tier: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Apply a plan's input cut, given the embeddings of the prompt [1, M, hidden]: return embeddings [1, K, hidden], indices
        [K]. `tier`: the number of the plan.
        """
        ...

    def embed(self, ids: Sequence[int]) -> np.ndarray:
        """Return embeddings [1, n, hidden]."""
        ...

    def step(self, tokens: StepInput, cache: KvCache) -> Step:
        """Run new tokens on top of a cache."""
        ...

    def rate(self, split: np.ndarray, step: int) -> float:
        """Return the share of visual tokens that the plan's predictor keeps for decode step `step`, given the attention split."""
        ...


def cache_name(layer: int, part: str) -> str:
    """Return the graph's name for the "key" or "value" cache of a layer's text [1 + T, kv heads, head_dim]."""
    return f"past_key_values.{layer}.{part}"


def visual_cache_name(layer: int, part: str) -> str:
    """Return the graph's name for the "key" or "value" cache of a layer's visual tokens [1 + K, kv heads, head_dim]."""
    return f"visual_{cache_name(layer, part)}"


def rows_name(layer: int, part: str) -> str:
    """Return the graph's name for what a step adds to a layer's "key" or "value" caches [n, kv heads, head_dim]."""
    return f"present.{layer}.{part}"


def kept_name(cut: int) -> str:
    """Return the graph's name for the kept indices of the plan's cut of that number."""
    return f"kept.{cut}"


def kept_names(plan: KeepPlan, *sites: str) -> list[str]:
    """Return the graphs' names for the kept indices of the plan's cuts at some sites."""
    return [kept_name(index) for index, cut in enumerate(plan.cuts) if cut.site in sites]


def decoder_inputs(plan: KeepPlan, *, tiers: bool = False) -> list[str]:
    """Return the names of the decoder's inputs, in its order; `tiers`: there are several."""
    layers = [(layer, part) for layer in range(plan.layers) for part in ("key", "value")]
    names = [f"{name}_embeds" for name in SEGMENTS] + [f"{name}_positions" for name in SEGMENTS]
    names += ["visual_order", *([TIER] if tiers else []), *(["text_groups"] if plan.live else [])]
    return names + [cache_name(*layer) for layer in layers] + [visual_cache_name(*layer) for layer in layers]


def decoder_outputs(plan: KeepPlan) -> list[str]:
    """Return the names of the decoder's outputs, in its order."""
    layers = [(layer, part) for layer in range(plan.layers) for part in ("key", "value")]
    names = ["logits", *(rows_name(*layer) for layer in layers), *kept_names(plan, "layer", "cache")]
    return names + (["attention_split"] if plan.live else [])
