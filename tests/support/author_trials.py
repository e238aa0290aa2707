"""Inputs for the authors' code and ours, made from a seed by numpy alone, and the kept sets that the authors' code gave on them.

tests/methods/authors/README.md has the repositories and commits. A trial is everything that follows from the name of a method and a
seed: the kind of features, the number of tokens and the share that stays.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

METHODS = (
    "cdpruner", "dart", "divprune", "evit", "evs", "fastv", "fitprune", "pyramiddrop", "sparsevlm", "visionzip", "vtw", "zspaprune",
)  # fmt: skip  # the number of a method is part of its seeds
RECORD = Path(__file__).parent.parent / "methods" / "authors" / "kept_sets.npz"
LAYERS, HEADS, WIDTH, INNER = 8, 8, 64, 96  # of the decoders
PREFIX, WORDS = 5, 11  # text tokens before and after the image
_TOKENS = (36, 64, 100, 144, 196, 256, 324, 576, 729)


@dataclass(frozen=True)
class Trial:
    """One trial: `tokens` visual tokens of `width` features, of which a `share` stays; `rng` makes its inputs in order."""

    rng: np.random.Generator
    realistic: bool
    tokens: int
    width: int
    share: float

    def features(self, tokens: int | None = None, width: int | None = None) -> np.ndarray:
        """Return float32 features [tokens, width]: gaussian, or with a common mean, low rank, like neighbours and varied norms."""
        rows, columns = tokens or self.tokens, width or self.width
        if not self.realistic:
            return self.gaussian(rows, columns)
        rank = max(8, columns // 3)
        low = self.rng.standard_normal((rows, rank))
        low = low + np.roll(low, 1, axis=0) + np.roll(low, 2, axis=0)
        mixed = low @ self.rng.standard_normal((rank, columns)) / np.sqrt(rank)
        mixed += 2.0 * self.rng.standard_normal(columns) + 0.3 * self.rng.standard_normal((rows, columns))
        scaled: np.ndarray = (mixed * self.rng.lognormal(0.0, 0.4, (rows, 1))).astype(np.float32)
        return scaled

    def gaussian(self, *shape: int, scale: float = 1.0) -> np.ndarray:
        """Return gaussian numbers in float32."""
        return (scale * self.rng.standard_normal(shape)).astype(np.float32)


def trial(method: str, seed: int) -> Trial:
    """Return the trial of a seed."""
    rng = np.random.default_rng([METHODS.index(method), seed])
    tokens = int(rng.choice(_TOKENS))
    width = int(rng.choice((48, 64, 96, 128)))
    return Trial(rng, bool(seed % 2), tokens, width, round(float(rng.uniform(0.08, 0.8)), 2))


def decoder_weights(made: Trial, kv_heads: int, layers: int = LAYERS) -> dict[str, np.ndarray]:
    """Return the weights of a Llama decoder by transformers' names, without embeddings and head, whose attention is uneven."""
    head = WIDTH // HEADS
    weights = {"norm.weight": np.ones(WIDTH, np.float32)}
    for layer in range(layers):
        shapes = {
            "self_attn.q_proj": (WIDTH, WIDTH),
            "self_attn.k_proj": (kv_heads * head, WIDTH),
            "self_attn.v_proj": (kv_heads * head, WIDTH),
            "self_attn.o_proj": (WIDTH, WIDTH),
            "mlp.gate_proj": (INNER, WIDTH),
            "mlp.up_proj": (INNER, WIDTH),
            "mlp.down_proj": (WIDTH, INNER),
        }
        for name, shape in shapes.items():
            weights[f"layers.{layer}.{name}.weight"] = made.gaussian(*shape, scale=0.15)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"layers.{layer}.{name}.weight"] = np.ones(WIDTH, np.float32)
    return weights


def embeddings(made: Trial, tokens: int | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the embeddings of the text before the image, the visual tokens and the text after it."""
    return made.gaussian(PREFIX, WIDTH), made.features(tokens, WIDTH), made.gaussian(WORDS, WIDTH)


@dataclass(frozen=True)
class Recorded:
    """What the authors' code gave: `kept` holds the positions of each set, `values` further numbers of each trial."""

    seed: int
    kept: tuple[tuple[int, ...], ...]
    values: tuple[float, ...]


def recorded(method: str) -> list[Recorded]:
    """Return the record of every trial of a method."""
    with np.load(RECORD) as stored:
        seeds, lengths, values = (stored[f"{method}.{part}"] for part in ("seeds", "lengths", "values"))
        bits = np.unpackbits(stored[f"{method}.bits"]).astype(bool)
    found, start = [], 0
    for row, seed in enumerate(seeds):
        sets = []
        for length in lengths[row]:
            sets.append(tuple(int(index) for index in np.flatnonzero(bits[start : start + length])))
            start += int(length)
        found.append(Recorded(int(seed), tuple(sets), tuple(float(value) for value in values[row])))
    return found


def packed(method: str, trials: list[tuple[int, list[tuple[list[int], int]], list[float]]]) -> dict[str, Any]:
    """Return the arrays of a record; a trial is its seed, its kept sets, each with the number of tokens, and its values."""
    bits: list[np.ndarray] = []
    for _, sets, _ in trials:
        for kept, length in sets:
            row = np.zeros(length, bool)
            row[kept] = True
            bits.append(row)
    return {
        f"{method}.seeds": np.array([seed for seed, _, _ in trials], np.int32),
        f"{method}.lengths": np.array([[length for _, length in sets] for _, sets, _ in trials], np.int32).reshape(len(trials), -1),
        f"{method}.bits": np.packbits(np.concatenate(bits)) if bits else np.zeros(0, np.uint8),
        f"{method}.values": np.array([values for _, _, values in trials], np.float32).reshape(len(trials), -1),
    }
