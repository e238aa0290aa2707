"""The graphs of a bundle on ONNX Runtime."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from edgeprune.bundle import DECODER, EMBED, PREDICTOR, SELECTOR, VISION, VISION_UNPRUNED, Bundle, tier_selector
from edgeprune.bundle.graph_io import SIGNALS, decoder_inputs, decoder_outputs, kept_names
from edgeprune.errors import BundleError, EngineError
from edgeprune.io.background import run_in_threads
from edgeprune.runtime.backends.interface import CancellationToken, Cancelled, DecoderOutput, VisionOutput
from edgeprune.runtime.backends.kv_cache import DecoderInput, KvCache, decoder_feeds

CPU = "CPUExecutionProvider"
# It joins a product and the residual stream to a Gemm, which then multiplies weights that it has to restore from their integers
# at every step: six times the time of a decode step at int8 (ONNX Runtime 1.31.1, 0.5B decoder).
_DISABLED_OPTIMIZERS = "MatMulAddFusion"
_GPU_PACKAGE = "onnxruntime-gpu (on a Jetson, NVIDIA's own wheel)"
_PACKAGES = {"OpenVINOExecutionProvider": "onnxruntime-openvino"}


class OnnxRuntimeBackend:
    """A bundle's graphs on ONNX Runtime.

    `providers`: execution providers, the one that is wanted first; EngineError is raised where it cannot be had. `exact`: multiply
    quantized weights in floating point, as TensorRT does. ONNX Runtime rounds what they meet to int8 otherwise.
    """

    def __init__(
        self, bundle: Bundle, threads: int | None = None, *, providers: Sequence[str] = (CPU,), exact: bool = False
    ) -> None:
        self._plan, self._live = bundle.plan, bundle.plan.follows_attention
        options = _options(threads, providers, exact)
        selectors = [SELECTOR, *map(tier_selector, bundle.manifest.tiers[1:])] if bundle.plan.input else []
        graphs = [DECODER, VISION, EMBED, *selectors, *([PREDICTOR] if self._live else [])]
        opening = {graph: partial(_open, bundle.file(graph), options, providers) for graph in graphs}
        # Other providers share a device, and it is not known of all that they may be started at once.
        opened = run_in_threads(opening) if providers[0] == CPU else {graph: opens() for graph, opens in opening.items()}
        self._vision, self._embed, self._decoder = opened[VISION], opened[EMBED], opened[DECODER]
        self._selectors, self._predictor = [opened[graph] for graph in selectors], opened.get(PREDICTOR)
        # Only an unpruned answer needs it.
        self._open_unpruned, self._unpruned = partial(_open, bundle.file(VISION_UNPRUNED), options, providers), None
        self._kept = kept_names(bundle.plan, "vision")
        self._inputs, self._outputs = decoder_inputs(bundle.plan, tiers=bool(bundle.lower_tiers)), decoder_outputs(bundle.plan)
        # A graph without cuts does not ask which tokens these are.
        self._wanted = {node.name for node in self._decoder.get_inputs()}

    def encode_image(
        self, patches: np.ndarray, *, unpruned: bool = False, cancellation: CancellationToken | None = None
    ) -> VisionOutput:
        """Return what the vision encoder says of patches [patches, patch pixels]; `unpruned`: of all, whatever its cuts are."""
        vision = self._vision
        if unpruned and self._plan.vision_cuts:
            vision = self._unpruned = self._unpruned or self._open_unpruned()
        names = [output.name for output in vision.get_outputs()]
        outputs = dict(zip(names, _run(vision, names, {"pixel_values": patches}, cancellation), strict=True))
        signals = {name: outputs[name] for name in SIGNALS if name in outputs}
        return VisionOutput(outputs["visual_embeds"], signals, tuple(outputs[name] for name in self._kept if name in outputs))

    def select_tokens(self, vision_output: VisionOutput, prompt: np.ndarray, tier: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Apply the plan's input cut, given the embeddings of the prompt [1, M, hidden]: return embeddings [1, K, hidden], indices
        [K].
        """
        selector = self._selectors[tier]
        offered = {
            "visual_embeds": vision_output.embeds,
            "prompt_embeds": prompt,
            "visual_order": vision_output.token_indices,
            **vision_output.signals,
        }
        feeds = {node.name: offered[node.name] for node in selector.get_inputs()}
        embeds, kept = selector.run(["kept_embeds", *kept_names(self._plan, "input")], feeds)
        return embeds, kept

    def embed_tokens(self, ids: Sequence[int]) -> np.ndarray:
        """Return embeddings [1, n, hidden]."""
        embeds: np.ndarray = self._embed.run(["embeds"], {"ids": np.array([ids], np.int64)})[0]
        return embeds

    def forward(self, tokens: DecoderInput, cache: KvCache, *, cancellation: CancellationToken | None = None) -> DecoderOutput:
        """Run new tokens on top of a cache."""
        offered = decoder_feeds(self._inputs, tokens, cache)
        feeds = {name: value for name, value in offered.items() if name in self._wanted}
        started = time.perf_counter()
        logits, *rest = _run(self._decoder, self._outputs, feeds, cancellation)
        run_ms = 1e3 * (time.perf_counter() - started)
        split = rest.pop() if self._live else None
        count = 2 * self._plan.layers
        return DecoderOutput(logits[0, 0], tuple(rest[:count]), tuple(rest[count:]), split, run_ms)

    def predict_keep_ratio(self, split: np.ndarray, step: int) -> float:
        """Return the share of visual tokens that the plan's predictor keeps for decode step `step`, given the attention split."""
        assert self._predictor is not None
        offered = {"attention_split": split, "step": np.array([step], np.float32)}
        feeds = {node.name: offered[node.name] for node in self._predictor.get_inputs()}
        return float(self._predictor.run(["share"], feeds)[0][0])


def _run(
    session: Any, names: Sequence[str], feeds: Mapping[str, np.ndarray], cancellation: CancellationToken | None
) -> list[np.ndarray]:
    # ONNX Runtime looks at `terminate` between two nodes.
    options = onnxruntime.RunOptions()
    options.log_severity_level = 4  # being stopped is no error, and what is one is raised
    with cancellation.on_cancel(partial(setattr, options, "terminate", True)) if cancellation else nullcontext():
        try:
            found: list[np.ndarray] = session.run(names, feeds, options)
            return found
        except Exception as error:  # ONNX Runtime raises types of its own, without a common base
            if cancellation is not None and cancellation.reason is not None:
                raise Cancelled from error
            raise


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
        session = onnxruntime.InferenceSession(
            str(path), options, providers=list(providers), disabled_optimizers=[_DISABLED_OPTIMIZERS]
        )
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
