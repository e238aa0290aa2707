"""What computes: the three graphs of a bundle on ONNX Runtime, behind the interface that the generation loop uses."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnxruntime

from edgeprune.background import at_once
from edgeprune.bundle import DECODER, EMBED, PREDICTOR, SELECTOR, VISION, VISION_UNPRUNED, Bundle
from edgeprune.errors import BundleError, EngineError
from edgeprune.plan import KeepPlan
from edgeprune.runtime.cache import Arrays, KvCache

CPU = "CPUExecutionProvider"
SEGMENTS = ("prefix", "visual", "suffix")
SIGNALS = ("vision_attention", "vision_keys")
# It joins a product and the residual stream to a Gemm, which then multiplies weights that it has to restore from their integers
# at every step: six times the time of a decode step at int8 (ONNX Runtime 1.31.1, 0.5B decoder).
_NOT = "MatMulAddFusion"
_GPU_PACKAGE = "onnxruntime-gpu (on a Jetson, NVIDIA's own wheel)"
_PACKAGES = {"OpenVINOExecutionProvider": "onnxruntime-openvino"}


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
    key, past and new, 1 in the column of its group (system, instruction, generated).
    """

    prefix: Tokens
    visual: Tokens
    suffix: Tokens
    order: np.ndarray
    groups: np.ndarray


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

    def see(self, patches: np.ndarray, *, whole: bool = False) -> Seen:
        """Return what the vision encoder says of patches [patches, patch pixels]; `whole`: of all, whatever its cuts are."""
        ...

    def select(self, seen: Seen, prompt: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Apply the plan's input cut, given the embeddings of the prompt [1, M, hidden]: return embeddings [1, K, hidden], indices
        [K].
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


def decoder_inputs(plan: KeepPlan) -> list[str]:
    """Return the names of the decoder's inputs, in its order."""
    layers = [(layer, part) for layer in range(plan.layers) for part in ("key", "value")]
    names = [f"{name}_embeds" for name in SEGMENTS] + [f"{name}_positions" for name in SEGMENTS]
    names += ["visual_order", *(["text_groups"] if plan.live else [])]
    return names + [cache_name(*layer) for layer in layers] + [visual_cache_name(*layer) for layer in layers]


def decoder_outputs(plan: KeepPlan) -> list[str]:
    """Return the names of the decoder's outputs, in its order."""
    layers = [(layer, part) for layer in range(plan.layers) for part in ("key", "value")]
    names = ["logits", *(rows_name(*layer) for layer in layers), *kept_names(plan, "layer", "cache")]
    return names + (["attention_split"] if plan.live else [])


class OnnxEngine:
    """A bundle's graphs on ONNX Runtime.

    `providers`: execution providers, the one that is wanted first; EngineError is raised where it cannot be had. `exact`: multiply
    quantized weights in floating point, as TensorRT does. ONNX Runtime rounds what they meet to int8 otherwise.
    """

    def __init__(
        self, bundle: Bundle, threads: int | None = None, *, providers: Sequence[str] = (CPU,), exact: bool = False
    ) -> None:
        plan = self._plan = bundle.plan
        options = _options(threads, providers, exact)
        graphs = [DECODER, VISION, EMBED, *([SELECTOR] if plan.input else []), *([PREDICTOR] if plan.live else [])]
        opening = {graph: partial(_open, bundle.file(graph), options, providers) for graph in graphs}
        # Other providers share a device, and it is not known of all that they may be started at once.
        opened = at_once(opening) if providers[0] == CPU else {graph: opens() for graph, opens in opening.items()}
        self._vision, self._embed, self._decoder = opened[VISION], opened[EMBED], opened[DECODER]
        self._selector, self._predictor = opened.get(SELECTOR), opened.get(PREDICTOR)
        # Only an unpruned answer needs it.
        self._open_unpruned, self._unpruned = partial(_open, bundle.file(VISION_UNPRUNED), options, providers), None
        self._kept = kept_names(bundle.plan, "vision")
        self._inputs, self._outputs = decoder_inputs(bundle.plan), decoder_outputs(bundle.plan)
        # A graph without cuts does not ask which tokens these are.
        self._wanted = {node.name for node in self._decoder.get_inputs()}

    def see(self, patches: np.ndarray, *, whole: bool = False) -> Seen:
        """Return what the vision encoder says of patches [patches, patch pixels]; `whole`: of all, whatever its cuts are."""
        vision = self._vision
        if whole and self._plan.vision_cuts:
            vision = self._unpruned = self._unpruned or self._open_unpruned()
        names = [output.name for output in vision.get_outputs()]
        outputs = dict(zip(names, vision.run(names, {"pixel_values": patches}), strict=True))
        signals = {name: outputs[name] for name in SIGNALS if name in outputs}
        return Seen(outputs["visual_embeds"], signals, tuple(outputs[name] for name in self._kept if name in outputs))

    def select(self, seen: Seen, prompt: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Apply the plan's input cut, given the embeddings of the prompt [1, M, hidden]: return embeddings [1, K, hidden], indices
        [K].
        """
        assert self._selector is not None
        offered = {"visual_embeds": seen.embeds, "prompt_embeds": prompt, "visual_order": seen.order, **seen.signals}
        feeds = {node.name: offered[node.name] for node in self._selector.get_inputs()}
        embeds, kept = self._selector.run(["kept_embeds", *kept_names(self._plan, "input")], feeds)
        return embeds, kept

    def embed(self, ids: Sequence[int]) -> np.ndarray:
        """Return embeddings [1, n, hidden]."""
        embeds: np.ndarray = self._embed.run(["embeds"], {"ids": np.array([ids], np.int64)})[0]
        return embeds

    def step(self, tokens: StepInput, cache: KvCache) -> Step:
        """Run new tokens on top of a cache."""
        segments = (tokens.prefix, tokens.visual, tokens.suffix)
        values = [*(part.embeds for part in segments), *(part.positions for part in segments), tokens.order]
        values += [*([tokens.groups] if self._plan.live else []), *cache.text, *cache.visual]
        feeds = {name: value for name, value in zip(self._inputs, values, strict=True) if name in self._wanted}
        started = time.perf_counter()
        logits, *rest = self._decoder.run(self._outputs, feeds)
        run_ms = 1e3 * (time.perf_counter() - started)
        split = rest.pop() if self._plan.live else None
        count = 2 * self._plan.layers
        return Step(logits[0, 0], tuple(rest[:count]), tuple(rest[count:]), split, run_ms)

    def rate(self, split: np.ndarray, step: int) -> float:
        """Return the share of visual tokens that the plan's predictor keeps for decode step `step`, given the attention split."""
        assert self._predictor is not None
        offered = {"attention_split": split, "step": np.array([step], np.float32)}
        feeds = {node.name: offered[node.name] for node in self._predictor.get_inputs()}
        return float(self._predictor.run(["share"], feeds)[0][0])


def _options(threads: int | None, providers: Sequence[str], exact: bool) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if exact:
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if threads is not None:
        options.intra_op_num_threads = threads
    if providers[0] == CPU:
        # A pattern is one block beside the pieces that the first run left in the arena: memory twice, and no time is gained.
        options.enable_mem_pattern = False
        _share_arena()
        options.add_session_config_entry("session.use_env_allocators", "1")
    return options


@cache
def _share_arena() -> None:
    # The graphs run one after the other: what the vision encoder needed for an image serves the decoder next.
    kind, memory = onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, onnxruntime.OrtMemType.DEFAULT
    try:
        onnxruntime.create_and_register_allocator(onnxruntime.OrtMemoryInfo("Cpu", kind, 0, memory), None)
    except Exception:  # the program around us has registered its own; ONNX Runtime raises types without a common base
        return


def _open(path: Path, options: Any, providers: Sequence[str]) -> Any:
    _check_offered(providers[0])
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=list(providers), disabled_optimizers=[_NOT])
    except Exception as error:  # ONNX Runtime raises types of its own, without a common base
        first = str(error).splitlines()[0]
        raise BundleError(f"ONNX Runtime cannot load {path}: {first}.", hint="Export it again.") from error
    if session.get_providers()[0] != providers[0]:  # it goes on with the next one when a library is missing
        raise EngineError(f"ONNX Runtime could not start {providers[0]}.", hint="See: edgeprune doctor, or use --provider cpu")
    return session


def _check_offered(provider: str) -> None:
    offered = onnxruntime.get_available_providers()
    if provider not in offered:
        raise EngineError(
            f"This ONNX Runtime has no {provider}; it has {', '.join(offered)}.",
            hint=f"Replace onnxruntime by {_PACKAGES.get(provider, _GPU_PACKAGE)}, or use --provider cpu.",
        )
