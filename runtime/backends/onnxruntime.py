"""The ONNX Runtime backend."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from edgeprune.bundle import (
    DECODER,
    EMBED,
    PREDICTOR,
    SELECTOR,
    VISION,
    VISION_UNPRUNED,
    Bundle,
    float32_graph,
    own_weights_graph,
    tier_selector,
)
from edgeprune.bundle.graph_io import SIGNALS, WEIGHTS, cache_slots, decoder_inputs, decoder_outputs, kept_names, length_slots
from edgeprune.errors import BundleError, EngineError, UsageError
from edgeprune.io.background import run_in_threads
from edgeprune.runtime.backends.interface import CPU, CUDA, CancellationToken, DecoderOutput, VisionOutput
from edgeprune.runtime.backends.kv_cache import (
    DecoderInput,
    KvCache,
    bfloat16_as_float32,
    can_step,
    decoder_feeds,
    float32_as_bfloat16,
    split_outputs,
)
from edgeprune.runtime.backends.onnxruntime_steps import BoundStep, BoundSteps, empty_buffers, run, takes_several
from edgeprune.runtime.backends.step_buffers import Recent

# By default CUDA multiplies float32 in TF32, which has a mantissa of 10 bits: other tokens would be kept than on a CPU.
_EXACT = {CUDA: {"use_tf32": "0"}}
# MatMulAddFusion fuses a matrix product and the residual addition into a Gemm, which has to dequantize its weights at every step:
# an int8 decode step takes six times as long (ONNX Runtime 1.31.1, 0.5B decoder).
_DISABLED_OPTIMIZERS = "MatMulAddFusion"
_GPU_PACKAGE = "onnxruntime-gpu[cuda,cudnn] (on a Jetson, NVIDIA's own wheel)"
_PACKAGES = {"OpenVINOExecutionProvider": "onnxruntime-openvino"}


class OnnxRuntimeBackend:
    """Runs a bundle's graphs on ONNX Runtime.

    `providers`: execution providers; EngineError is raised if the first is not available, and UsageError if the bundle's decoder
    cannot run on one of them. `exact`: multiply quantized weights in
    floating point, as TensorRT does. Otherwise ONNX Runtime rounds the activations to int8. `mapped`: leave the weights in their
    files and convert each at every use: slow, and in little memory. `parallel`: how many steps `forward_steps` is given at once.
    """

    def __init__(
        self,
        bundle: Bundle,
        threads: int | None = None,
        *,
        providers: Sequence[str] = (CPU,),
        exact: bool = False,
        mapped: bool = False,
        parallel: int = 1,
    ) -> None:
        self._plan, self._follows_attention = bundle.plan, bundle.plan.follows_attention
        _check_target(bundle, providers)
        options = _session_options(threads, providers, exact=exact, integers=_rounds(bundle), mapped=mapped)
        selectors = [SELECTOR, *map(tier_selector, bundle.manifest.tiers[1:])] if bundle.plan.input else []
        graphs = [DECODER, VISION, EMBED, *selectors, *([PREDICTOR] if bundle.plan.has_rate_predictor else [])]
        given = _with_options(bundle, providers)
        loaders = {graph: partial(_open_session, _graph_file(bundle, graph), options, given) for graph in graphs}
        # Only CPU sessions start in parallel: other providers share a device, and not all are known to support that.
        sessions = run_in_threads(loaders) if providers[0] == CPU else {graph: load() for graph, load in loaders.items()}
        self._vision, self._embed, self._decoder = sessions[VISION], sessions[EMBED], sessions[DECODER]
        self._selectors, self._predictor = [sessions[graph] for graph in selectors], sessions.get(PREDICTOR)
        # Loaded with the first unpruned request.
        unpruned = _graph_file(bundle, VISION_UNPRUNED)
        self._open_unpruned, self._unpruned = partial(_open_session, unpruned, options, given), None
        self._kept_names = kept_names(bundle.plan, "vision")
        shape = bundle.manifest.decoder
        kinds = shape.local_layers, shape.states
        slots = cache_slots(bundle.plan, *kinds)
        self._lengths = length_slots(bundle.manifest.graphs[DECODER].inputs, slots)
        self._input_names = decoder_inputs(bundle.plan, *kinds, tiers=bool(bundle.lower_tiers), rows=bool(self._lengths))
        self._output_names = decoder_outputs(bundle.plan, *kinds)
        self._slots, self._states = slots, len(shape.states)
        self._in_bits = shape.cache_type == "bfloat16"
        self._has_arena = providers[0] == CPU and not mapped
        # A decoder without cuts has no input for the token indices.
        self._decoder_inputs = {node.name for node in self._decoder.get_inputs()}
        # Decoders with buffers for steps take those of other passes as empty. Other providers need not write them in place.
        self._no_buffers = empty_buffers(self._decoder)
        bound = self._no_buffers and providers[0] == CPU
        self._steps = Recent(partial(BoundStep, self._decoder, bundle)) if bound else None
        self.steps_at_once = parallel if bound and takes_several(self._decoder) else 1
        self._shared_steps = BoundSteps(self._decoder, bundle, parallel) if self.steps_at_once > 1 else None

    def encode_image(
        self, patches: np.ndarray, *, unpruned: bool = False, cancellation: CancellationToken | None = None
    ) -> VisionOutput:
        """Run the vision encoder on patches [patches, patch pixels]. `unpruned`: ignore its vision cuts."""
        vision = self._vision
        if unpruned and self._plan.vision_cuts:
            vision = self._unpruned = self._unpruned or self._open_unpruned()
        names = [output.name for output in vision.get_outputs()]
        # Prefill takes other sizes, which fit badly into what the encoder leaves; in fresh memory an answer's peak is lower.
        values = run(vision, names, {"pixel_values": patches}, cancellation, shrink=self._has_arena)
        outputs = dict(zip(names, values, strict=True))
        signals = {name: outputs[name] for name in SIGNALS if name in outputs}
        return VisionOutput(outputs["visual_embeds"], signals, tuple(outputs[name] for name in self._kept_names if name in outputs))

    def select_tokens(self, vision_output: VisionOutput, prompt: np.ndarray, tier: int = 0) -> tuple[np.ndarray, ...]:
        """Apply a tier's input cut, given prompt embeddings [1, M, hidden]; return embeddings [1, K, hidden] and indices [K].

        If the plan weighs, the logarithms of how many tokens each kept one stands for [K] are the third.
        """
        selector = self._selectors[tier]
        values = {
            "visual_embeds": vision_output.embeds,
            "prompt_embeds": prompt,
            "visual_order": vision_output.token_indices,
            **vision_output.signals,
        }
        feeds = {node.name: values[node.name] for node in selector.get_inputs()}
        weights = [WEIGHTS] if self._plan.weighs else []
        return tuple(selector.run(["kept_embeds", *kept_names(self._plan, "input"), *weights], feeds))

    def embed_tokens(self, ids: Sequence[int]) -> np.ndarray:
        """Return the embeddings [1, n, hidden] of n token ids."""
        embeds: np.ndarray = self._embed.run(["embeds"], {"ids": np.array([ids], np.int64)})[0]
        return embeds

    def forward(self, tokens: DecoderInput, cache: KvCache, *, cancellation: CancellationToken | None = None) -> DecoderOutput:
        """Run the decoder on new tokens and a KV cache."""
        if self._steps is not None and can_step(self._plan, tokens, cache):
            shared = self._shared_steps.forward([(tokens, cache)])[0] if self._shared_steps else None
            return shared or self._steps.of(cache).forward(tokens, cache, cancellation)
        values = decoder_feeds(self._input_names, tokens, cache, self._lengths)
        feeds = {name: _numbers(value) for name, value in values.items() if name in self._decoder_inputs} | self._no_buffers
        started = time.perf_counter()
        logits, *rest = run(self._decoder, self._output_names, feeds, cancellation)
        run_ms = 1e3 * (time.perf_counter() - started)
        split = rest.pop() if self._follows_attention else None
        rows, states, kept = split_outputs(rest, len(self._slots), self._states)
        rows = tuple(self._held(row, part) for row, (_, part) in zip(rows, self._slots, strict=True))
        return DecoderOutput(logits[0, 0], rows, kept, split, run_ms, states)

    def forward_steps(self, steps: Sequence[tuple[DecoderInput, KvCache]]) -> list[DecoderOutput]:
        """Run decode steps, each of another conversation; as many as the graph and the `parallel` buffers allow are one pass."""
        together = [step for step in steps if self._shared_steps is not None and can_step(self._plan, *step)]
        outputs = self._shared_steps.forward(together) if self._shared_steps is not None else []
        shared = {id(cache): output for (_, cache), output in zip(together, outputs, strict=True)}
        return [shared.get(id(cache)) or self.forward(tokens, cache) for tokens, cache in steps]

    def _held(self, row: np.ndarray, part: str) -> np.ndarray:
        return float32_as_bfloat16(row) if self._in_bits and part in ("key", "value") else row

    def predict_keep_ratio(self, split: np.ndarray, step: int) -> float:
        """Return the keep ratio for decode step `step` from the plan's predictor. `split` [layers, 4]: attention shares."""
        assert self._predictor is not None
        values = {"attention_split": split, "step": np.array([step], np.float32)}
        feeds = {node.name: values[node.name] for node in self._predictor.get_inputs()}
        return float(self._predictor.run(["share"], feeds)[0][0])


class EmbeddingTable:
    """The token embedding of a bundle for engines: on the CPU, in its file, of which only the pages that are read take memory."""

    def __init__(self, bundle: Bundle) -> None:
        options = _session_options(1, (CPU,), exact=False, integers=False, mapped=True)
        self._session = _open_session(bundle.file(EMBED), options, [(CPU, {})])

    def embed_tokens(self, ids: Sequence[int]) -> np.ndarray:
        """Return the embeddings [1, n, hidden] of n token ids, float32."""
        embeds: np.ndarray = self._session.run(["embeds"], {"ids": np.array([ids], np.int64)})[0]
        return embeds


def nodes_run(
    bundle: Bundle, tokens: DecoderInput, cache: KvCache, threads: int | None = None, *, providers: Sequence[str] = (CPU,)
) -> int:
    """Return how many nodes of the decoder run in one forward pass, after ONNX Runtime's optimization.

    Those of the branch that an `If` takes are included. The pass is profiled in a session of its own.
    """
    from tempfile import TemporaryDirectory  # a runtime that profiles nothing starts without it

    _check_target(bundle, providers)
    options = _session_options(threads, providers, exact=False, integers=_rounds(bundle))
    options.enable_profiling = True
    kinds = bundle.manifest.decoder.local_layers, bundle.manifest.decoder.states
    with TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / "step")
        session = _open_session(_graph_file(bundle, DECODER), options, _with_options(bundle, providers))
        buffers = empty_buffers(session)
        if buffers and providers[0] == CPU and can_step(bundle.plan, tokens, cache):
            BoundStep(session, bundle).forward(tokens, cache, None)
        else:
            lengths = length_slots(bundle.manifest.graphs[DECODER].inputs, cache_slots(bundle.plan, *kinds))
            names = decoder_inputs(bundle.plan, *kinds, tiers=bool(bundle.lower_tiers), rows=bool(lengths))
            values = decoder_feeds(names, tokens, cache, lengths) | buffers
            feeds = {node.name: _numbers(values[node.name]) for node in session.get_inputs()}
            run(session, decoder_outputs(bundle.plan, *kinds), feeds, None)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return sum(event.get("cat") == "Node" and event["name"].endswith("_kernel_time") for event in events)


def _graph_file(bundle: Bundle, graph: str) -> Path:
    # ONNX Runtime has no products of bfloat16, and exact ones of integers only where a graph owns them (`_session_options`).
    files, widened, owning = bundle.manifest.files, float32_graph(graph), own_weights_graph(graph)
    if owning in files and not _has_byte_products():
        return bundle.file(owning)
    return bundle.file(widened if widened in files else graph)


def _numbers(value: np.ndarray) -> np.ndarray:
    # Rows of a cache in bfloat16, which the graph in float32 takes as float32.
    return bfloat16_as_float32(value) if value.dtype == np.uint16 else value


def _rounds(bundle: Bundle) -> bool:
    # Whether products are of integers, both inputs in 8 bits.
    return bundle.manifest.lowering.rounds(bundle.manifest.precision)


def _session_options(threads: int | None, providers: Sequence[str], *, exact: bool, integers: bool, mapped: bool = False) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if exact:
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if threads is not None:
        options.intra_op_num_threads = threads
    if providers[0] == CPU:
        # A memory pattern allocates one block in addition to the chunks of the first run: twice the memory, and no faster.
        options.enable_mem_pattern = False
        if mapped:
            _leave_weights_in_files(options)
        else:
            _share_arena()
            options.add_session_config_entry("session.use_env_allocators", "1")
        if integers and not _has_byte_products():
            # Kernels for AVX2 add two products of 8 bits in 16, which overflows for large weights: answers would be noise. The
            # others are slower than those for VNNI (3.5 times for one product, ONNX Runtime 1.31.1), which it would give up too.
            # Without integers it would give DequantizeLinear a zero point of a wrong shape.
            options.add_session_config_entry("session.x64quantprecision", "1")
    return options


@cache
def _has_byte_products() -> bool | None:
    from edgeprune.device.system import has_byte_products  # a runtime without integers starts without it

    return has_byte_products()


def _leave_weights_in_files(options: Any) -> None:
    # Folding constants and packing matrices for kernels would copy every weight, and the arena would keep the largest copy.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.enable_cpu_mem_arena = False


@cache
def _share_arena() -> None:
    # The graphs run one after another, so the decoder can reuse the memory of the vision encoder.
    kind, memory = onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, onnxruntime.OrtMemType.DEFAULT
    try:
        onnxruntime.create_and_register_allocator(onnxruntime.OrtMemoryInfo("Cpu", kind, 0, memory), None)
    except Exception:  # the host program registered its own allocator; ONNX Runtime's exceptions have no common base
        return


def _check_target(bundle: Bundle, providers: Sequence[str]) -> None:
    # Its operators and its buffers in place are those of the CPU's kernels; on CUDA they end the process (signal 11, 1.27).
    target = bundle.manifest.lowering.target
    if target.blocked and CUDA in providers:
        raise UsageError(
            f"{bundle.path} was exported for {target.modules} (--target {target.name}): its decoder does not run on CUDA.",
            hint="Export it with --target onnxruntime, or use --provider cpu.",
        )


def _with_options(bundle: Bundle, providers: Sequence[str]) -> list[tuple[str, dict[str, str]]]:
    exact = _EXACT if bundle.manifest.precision == "fp32" else {}
    return [(provider, exact.get(provider, {})) for provider in providers]


def _open_session(path: Path, options: Any, providers: Sequence[tuple[str, dict[str, str]]]) -> Any:
    first = providers[0][0]
    _check_available(first)
    if CUDA in (name for name, _ in providers):
        _load_cuda_libraries()
    try:
        session = onnxruntime.InferenceSession(
            str(path), options, providers=list(providers), disabled_optimizers=[_DISABLED_OPTIMIZERS]
        )
    except Exception as error:  # ONNX Runtime's exceptions have no common base
        first_line = str(error).splitlines()[0]
        raise BundleError(f"ONNX Runtime cannot load {path}: {first_line}.", hint="Export it again.") from error
    if session.get_providers()[0] != first:  # ONNX Runtime falls back to the next provider when a library is missing
        raise _not_started(first)
    return session


@cache
def _load_cuda_libraries() -> None:
    from edgeprune.device.onnxruntime_cuda import load_libraries  # a runtime without CUDA starts without it

    load_libraries()


def _not_started(provider: str) -> EngineError:
    from edgeprune.device.onnxruntime_cuda import why_not_started

    reason, remedy = why_not_started(provider)
    what = f"ONNX Runtime could not start {provider}" + (f": {reason}." if reason else ".")
    return EngineError(what, hint=f"{f'Try: {remedy}' if remedy else 'See: edgeprune doctor'}, or use --provider cpu")


def _check_available(provider: str) -> None:
    available = onnxruntime.get_available_providers()
    if provider not in available:
        raise EngineError(
            f"This ONNX Runtime has no {provider}; it has {', '.join(available)}.",
            hint=f"Replace onnxruntime by {_PACKAGES.get(provider, _GPU_PACKAGE)}, or use --provider cpu.",
        )
