"""What computes: the three graphs of a bundle on ONNX Runtime, behind the interface that the generation loop uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnxruntime

from edgeprune.bundle import DECODER, EMBED, VISION, Bundle
from edgeprune.errors import BundleError

SEGMENTS = ("prefix", "visual", "suffix")


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


@dataclass(frozen=True)
class Step:
    """One forward: `logits` [vocabulary] of the last token, `caches` with it appended, `kept` [K] of every cut."""

    logits: np.ndarray
    caches: Any
    kept: tuple[np.ndarray, ...]


class Engine(Protocol):
    """The model as the generation loop sees it. Caches are the engine's own; the loop only hands them back."""

    def see(self, patches: np.ndarray) -> np.ndarray:
        """Return visual tokens [1, V, hidden] of patches [patches, patch pixels]."""
        ...

    def embed(self, ids: Sequence[int]) -> np.ndarray:
        """Return embeddings [1, n, hidden]."""
        ...

    def step(self, prefix: Tokens, visual: Tokens, suffix: Tokens, caches: Any) -> Step:
        """Run the tokens of three segments on top of `caches` (None: empty ones)."""
        ...

    def cache_bytes(self, caches: Any) -> int:
        """Return the bytes that the keys and values take."""
        ...


def cache_name(layer: int, part: str, *, present: bool = False) -> str:
    """Return the graph's name for the "key" or "value" cache of a layer, as an input or (`present`) as an output."""
    return f"{'present' if present else 'past_key_values'}.{layer}.{part}"


def kept_name(cut: int) -> str:
    """Return the graph's name for the kept indices of a cut."""
    return f"kept.{cut}"


class OnnxEngine:
    """A bundle's graphs on ONNX Runtime's CPU provider."""

    def __init__(self, bundle: Bundle, threads: int | None = None) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        self._shape = bundle.manifest.decoder
        self._vision = _open(bundle.file(VISION), options)
        self._embed = _open(bundle.file(EMBED), options)
        self._decoder = _open(bundle.file(DECODER), options)
        layers = range(self._shape.layers)
        self._inputs = [cache_name(i, part) for i in layers for part in ("key", "value")]
        self._outputs = ["logits", *(cache_name(i, part, present=True) for i in layers for part in ("key", "value"))]
        self._outputs += [kept_name(i) for i in range(len(bundle.plan.cuts))]

    def see(self, patches: np.ndarray) -> np.ndarray:
        """Return visual tokens [1, V, hidden] of patches [patches, patch pixels]."""
        visual: np.ndarray = self._vision.run(["visual_embeds"], {"pixel_values": patches})[0]
        return visual

    def embed(self, ids: Sequence[int]) -> np.ndarray:
        """Return embeddings [1, n, hidden]."""
        embeds: np.ndarray = self._embed.run(["embeds"], {"ids": np.array([ids], np.int64)})[0]
        return embeds

    def step(self, prefix: Tokens, visual: Tokens, suffix: Tokens, caches: Any) -> Step:
        """Run the tokens of three segments on top of `caches` (None: empty ones)."""
        feeds: dict[str, Any] = {}
        for name, tokens in zip(SEGMENTS, (prefix, visual, suffix), strict=True):
            feeds[f"{name}_embeds"], feeds[f"{name}_positions"] = tokens.embeds, tokens.positions
        feeds.update(zip(self._inputs, self._empty() if caches is None else caches, strict=True))
        logits, *rest = self._decoder.run(self._outputs, feeds)
        split = len(self._inputs)
        return Step(logits[0, 0], rest[:split], tuple(rest[split:]))

    def cache_bytes(self, caches: Any) -> int:
        """Return the bytes that the keys and values take."""
        return sum(part.nbytes for part in caches or ())

    def _empty(self) -> list[np.ndarray]:
        empty = np.zeros((1, self._shape.kv_heads, 0, self._shape.head_dim), np.float32)
        return [empty] * len(self._inputs)


def _open(path: Path, options: Any) -> Any:
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime raises types of its own, without a common base
        first = str(error).splitlines()[0]
        raise BundleError(f"ONNX Runtime cannot load {path}: {first}.", hint="Export it again.") from error
