"""The backend interface on TensorRT engines.

Each engine has one execution context per optimization profile, and all contexts work in one block of scratch memory. Inputs are
bound by address, outputs to pooled memory. Only token ids, positions and pixels are copied to the device. Only logits, kept indices
and keep ratios are copied back. Embeddings, KV caches, states and attention shares stay on the device, and the keys and values of a
step are appended there. The decode step has no CUDA graph, because its text caches grow by one at every step.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, cast

import numpy as np

from edgeprune.bundle import (
    DECODER,
    EMBED,
    PREDICTOR,
    SELECTOR,
    VISION,
    VISION_UNPRUNED,
    Bundle,
    GraphRecord,
    held_as,
    tier_selector,
)
from edgeprune.bundle.graph_io import SIGNALS, WEIGHTS, cache_slots, decoder_inputs, decoder_outputs, kept_names
from edgeprune.bundle.signing import TrustedKeys
from edgeprune.device.cudart import load_cudart
from edgeprune.errors import EngineError
from edgeprune.runtime.backends.interface import CancellationToken, DecoderOutput, VisionOutput
from edgeprune.runtime.backends.kv_cache import DecoderInput, KvCache, decoder_feeds, split_outputs
from edgeprune.runtime.backends.tensorrt.arrays import DeviceArray, MemoryPool, Scratch, upload
from edgeprune.runtime.backends.tensorrt.bindings import DeviceIdentity, Driver, identity, recording_log, tensorrt
from edgeprune.runtime.backends.tensorrt.profiles import TEXT, ShapeProfile, image_prefill_of
from edgeprune.runtime.backends.tensorrt.store import EngineRecord, Store, usable_engines

Value = DeviceArray | np.ndarray


class Executor:
    """One deserialized engine.

    `plan`: its file, which may be unmapped afterwards. `record`: inputs and outputs. `profiles`: those it was built with, in order.
    `scratch`: where its contexts work. `log`: that of the runtime.
    """

    def __init__(
        self,
        trt: Any,
        runtime: Any,
        plan: mmap.mmap,
        record: GraphRecord,
        profiles: Sequence[ShapeProfile],
        pool: MemoryPool,
        scratch: Scratch,
        log: Any,
    ) -> None:
        self._record, self._profiles, self._pool, self._log = record, profiles, pool, log
        self._engine = runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise EngineError(
                f"TensorRT does not take an engine of this bundle: {log.last_error}",
                hint="If it says nothing of this GPU, build it again: edgeprune build BUNDLE",
            )
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        self._inputs = [name for name in names if self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        self._outputs = [name for name in names if name not in self._inputs]
        self._contexts = [self._context(trt, number, scratch) for number in range(len(profiles))]
        self._capacity = [self._capacities(number) for number in range(len(profiles))]

    def run(self, values: Mapping[str, Value], profile: int = 0) -> dict[str, DeviceArray]:
        """Enqueue one run and return the outputs by name. They are valid once the stream has reached this point.

        Raises EngineError when a shape lies outside the profile.
        """
        context, arrays = self._contexts[profile], []
        for name in self._inputs:
            value = values[name]
            self._check_range(name, value.shape, profile)
            array = value if isinstance(value, DeviceArray) else upload(self._pool, value.astype(self._type(name), copy=False))
            arrays.append(array)  # keeps the lease until the run is enqueued
            if not context.set_input_shape(name, array.shape) or not context.set_tensor_address(name, array.address):
                raise EngineError(
                    f"TensorRT refuses {name} of shape {array.shape}: {self._log.last_error}",
                    hint="Build the engines again: edgeprune build BUNDLE",
                )
        outputs = {name: self._output(context, name, profile) for name in self._outputs}
        if not context.execute_async_v3(self._pool.driver.stream):
            raise EngineError(f"TensorRT could not run the engine: {self._log.last_error}", hint="See: edgeprune selftest BUNDLE")
        return outputs

    def close(self) -> None:
        """Destroy the contexts, then the engine."""
        self._contexts.clear()
        self._engine = None

    def _context(self, trt: Any, number: int, scratch: Scratch) -> Any:
        # A context's own scratch memory would be as large as the largest profile needs, in each of them.
        context = self._engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if context is None:
            raise EngineError(
                f"TensorRT could not make an execution context: {self._log.last_error}",
                hint="Build with a smaller --context or --turn.",
            )
        if len(self._profiles) > 1:
            context.set_optimization_profile_async(number, self._pool.driver.stream)
        scratch.serve(context, self._engine.device_memory_size_v2)
        return context

    def _capacities(self, number: int) -> dict[str, int]:
        # Bytes of each output at the profile's maximum shapes, so that a growing cache reuses blocks of one size.
        context = self._contexts[number]
        for name, (_, _, maximum) in self._profiles[number].items():
            if name in self._inputs:
                context.set_input_shape(name, maximum)
        return {name: self._bytes(name, context.get_tensor_shape(name)) for name in self._outputs}

    def _output(self, context: Any, name: str, profile: int) -> DeviceArray:
        shape = tuple(context.get_tensor_shape(name))
        lease = self._pool.lease(self._capacity[profile][name])
        context.set_tensor_address(name, lease.address)
        return DeviceArray(lease, shape, self._type(name))

    def _check_range(self, name: str, shape: Sequence[int], profile: int) -> None:
        minimum, _, maximum = self._profiles[profile].get(name, (shape, shape, shape))
        if not all(low <= length <= high for low, length, high in zip(minimum, shape, maximum, strict=True)):
            raise EngineError(
                f"{name} has shape {tuple(shape)}, the engine was built for {minimum} to {maximum}.", hint=_remedy(name, maximum)
            )

    def _type(self, name: str) -> np.dtype:
        return np.dtype(held_as((self._record.inputs.get(name) or self._record.outputs[name]).type))

    def _bytes(self, name: str, shape: Sequence[int]) -> int:
        return int(np.prod(tuple(shape), dtype=np.int64)) * self._type(name).itemsize


def _remedy(name: str, maximum: Sequence[int]) -> str:
    if name.startswith("visual_past"):
        return "Ask about fewer images, or build for more: edgeprune build BUNDLE --images N"
    if name.startswith("past_"):
        return "Begin a new conversation, or build for a longer one: edgeprune build BUNDLE --context N"
    if name.startswith("prefix") and 0 in maximum:
        return "Build engines that can answer without pruning: edgeprune build BUNDLE --unpruned"
    return "Ask something shorter, or build for longer turns: edgeprune build BUNDLE --turn N"


class TensorRTBackend:
    """The graphs of a bundle as TensorRT engines. `close` frees their memory.

    Returned embeddings, keys, values, signals and attention splits are device arrays; logits and indices are host arrays.
    Raises EngineError when an engine is missing, is for another TensorRT version or GPU, or is not one that the store trusts.
    """

    def __init__(self, bundle: Bundle, trt: Any, driver: Driver, store: Store, device: DeviceIdentity) -> None:
        self._plan, self._driver, self._pool, self._scratch = bundle.plan, driver, MemoryPool(driver), Scratch(driver)
        self._tiers, self._has_attention_split = bundle.manifest.tiers, bundle.plan.follows_attention
        self._executors: dict[str, Executor] = {}
        self._log = recording_log(trt)
        self._runtime = trt.Runtime(self._log)
        try:
            engines = usable_engines(bundle, store, device)
            self._open = {
                graph: partial(self._executor, trt, store, record, bundle.manifest.graphs[graph], profiles)
                for graph, (record, profiles) in engines.items()
            }
            for graph in engines:
                if graph != VISION_UNPRUNED:  # loaded with the first unpruned answer
                    self._executors[graph] = self._open[graph]()
        except EngineError:
            self.close()
            raise
        shape = bundle.manifest.decoder
        kinds = shape.local_layers, shape.states
        self._inputs = decoder_inputs(bundle.plan, *kinds, tiers=bool(bundle.lower_tiers))
        self._outputs = decoder_outputs(bundle.plan, *kinds)
        self._slots, self._states = len(cache_slots(bundle.plan, *kinds)), len(shape.states)

    def _executor(
        self, trt: Any, store: Store, record: EngineRecord, described: GraphRecord, profiles: Sequence[ShapeProfile]
    ) -> Executor:
        with store.mapped(record) as plan:
            return Executor(trt, self._runtime, plan, described, profiles, self._pool, self._scratch, self._log)

    @classmethod
    def on_this_device(cls, bundle: Bundle, trust: TrustedKeys = ()) -> TensorRTBackend:
        """Return the backend on this machine's GPU. `trust`: public keys, one of which must have signed the engines."""
        trt, cudart = tensorrt(), load_cudart()
        return cls(bundle, trt, Driver(cudart), Store(bundle.path, trust=trust), identity(trt, cudart))

    @property
    def device_bytes(self) -> int:
        """Bytes of inputs, outputs, caches and scratch memory, without the engines."""
        return self._pool.bytes + self._scratch.bytes

    def encode_image(
        self, patches: np.ndarray, *, unpruned: bool = False, cancellation: CancellationToken | None = None
    ) -> VisionOutput:
        """Encode patches [patches, patch pixels]. `unpruned` skips the cuts inside the vision encoder."""
        outputs = self._encoder(unpruned and bool(self._plan.vision_cuts)).run({"pixel_values": patches})
        self._driver.synchronize()  # otherwise its time would be measured with the next step
        signals = {name: _array(outputs[name]) for name in SIGNALS if name in outputs}
        kept = [outputs[name].numpy() for name in kept_names(self._plan, "vision") if name in outputs]
        return VisionOutput(_array(outputs["visual_embeds"]), signals, tuple(kept))

    def _encoder(self, unpruned: bool) -> Executor:
        if not unpruned:
            return self._executors[VISION]
        if VISION_UNPRUNED not in self._open:
            raise EngineError(
                "There is no engine of the vision encoder without its cuts.",
                hint="Build engines that can answer without pruning: edgeprune build BUNDLE --unpruned",
            )
        if VISION_UNPRUNED not in self._executors:
            self._executors[VISION_UNPRUNED] = self._open[VISION_UNPRUNED]()
        return self._executors[VISION_UNPRUNED]

    def select_tokens(self, vision_output: VisionOutput, prompt: np.ndarray, tier: int = 0) -> tuple[np.ndarray, ...]:
        """Apply the input cut of a tier's plan.

        `prompt`: text embeddings [1, M, hidden]. Returns embeddings [1, K, hidden] on the device and indices [K] on the host, and
        weights [K] on the host if the plan weighs.
        """
        values = {
            "visual_embeds": vision_output.embeds,
            "prompt_embeds": prompt,
            "visual_order": vision_output.token_indices,
            **vision_output.signals,
        }
        selector = self._executors[tier_selector(self._tiers[tier]) if tier else SELECTOR]
        outputs, (name,) = selector.run(values), kept_names(self._plan, "input")
        weights = [outputs[WEIGHTS].numpy()] if self._plan.weighs else []
        return _array(outputs["kept_embeds"]), outputs[name].numpy(), *weights

    def embed_tokens(self, ids: Sequence[int]) -> np.ndarray:
        """Return the embeddings [1, n, hidden] of n token ids."""
        return _array(self._executors[EMBED].run({"ids": np.array([ids], np.int64)})["embeds"])

    def forward(self, tokens: DecoderInput, cache: KvCache, *, cancellation: CancellationToken | None = None) -> DecoderOutput:
        """Run the decoder on new tokens, given the KV cache of the earlier ones."""
        profile = image_prefill_of(tokens.tier) if len(tokens.visual_indices) else TEXT
        return self._step(self._executors[DECODER].run(decoder_feeds(self._inputs, tokens, cache), profile))

    def predict_keep_ratio(self, split: np.ndarray, step: int) -> float:
        """Return the keep ratio that the plan's predictor gives for decode step `step`, from the attention split."""
        outputs = self._executors[PREDICTOR].run({"attention_split": split, "step": np.array([step], np.float32)})
        return float(outputs["share"].numpy()[0])

    def close(self) -> None:
        """Destroy the engines, then free the memory, then destroy the stream."""
        for executor in self._executors.values():
            executor.close()
        self._scratch.close()
        self._pool.close()
        self._driver.close()

    def _step(self, outputs: Mapping[str, DeviceArray]) -> DecoderOutput:
        logits, *rest = (outputs[name] for name in self._outputs)
        split = _array(rest.pop()) if self._has_attention_split else None
        rows, states, kept = split_outputs(rest, self._slots, self._states)
        return DecoderOutput(
            logits.numpy()[0, 0],
            tuple(map(_array, rows)),
            tuple(part.numpy() for part in kept),
            split,
            states=tuple(map(_array, states)),
        )


def _array(array: DeviceArray) -> np.ndarray:
    # The interface is typed for NumPy. The generation loop uses only what DeviceArray implements.
    return cast("np.ndarray", array)
