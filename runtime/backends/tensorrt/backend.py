"""The backend interface on TensorRT engines.

Only embeddings of text, positions and pixels are copied to the device. Only logits, kept indices and keep ratios are copied back.
Visual tokens, KV caches, states and attention shares stay on the device, and the keys and values of a step are appended there. A
decode step is one launch of a CUDA graph (`steps`), unless the decoder has states or is of an older bundle: its caches then grow
by one row. The table of text embeddings is no engine: its rows are read from its file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, cast

import numpy as np

from edgeprune.bundle import DECODER, PREDICTOR, SELECTOR, VISION, VISION_UNPRUNED, Bundle, GraphRecord, tier_selector
from edgeprune.bundle.graph_io import SIGNALS, WEIGHTS, cache_slots, decoder_inputs, decoder_outputs, kept_names, length_slots
from edgeprune.bundle.signing import TrustedKeys
from edgeprune.device.cudart import load_cudart
from edgeprune.errors import EngineError
from edgeprune.runtime.backends.interface import CancellationToken, DecoderOutput, VisionOutput
from edgeprune.runtime.backends.kv_cache import DecoderInput, KvCache, decoder_feeds, split_outputs
from edgeprune.runtime.backends.onnxruntime import EmbeddingTable
from edgeprune.runtime.backends.tensorrt.arrays import DeviceArray, MemoryPool, Scratch
from edgeprune.runtime.backends.tensorrt.bindings import DeviceIdentity, Driver, identity, recording_log, tensorrt
from edgeprune.runtime.backends.tensorrt.executor import Executor
from edgeprune.runtime.backends.tensorrt.profiles import TEXT, ShapeProfile, image_prefill_of
from edgeprune.runtime.backends.tensorrt.steps import StepsInPlace
from edgeprune.runtime.backends.tensorrt.store import EngineRecord, Store, usable_engines


class TensorRTBackend:
    """The graphs of a bundle as TensorRT engines. `close` frees their memory.

    Returned visual tokens, keys, values, signals and attention splits are device arrays; logits, indices and embeddings of text are
    host arrays.
    Raises EngineError when an engine is missing, is for another TensorRT version or GPU, or is not one that the store trusts.
    """

    def __init__(self, bundle: Bundle, trt: Any, driver: Driver, store: Store, device: DeviceIdentity) -> None:
        self._plan, self._driver, self._pool, self._scratch = bundle.plan, driver, MemoryPool(driver), Scratch(driver)
        self._tiers, self._has_attention_split = bundle.manifest.tiers, bundle.plan.follows_attention
        self._executors: dict[str, Executor] = {}
        self._steps: StepsInPlace | None = None
        self._log = recording_log(trt)
        self._runtime = trt.Runtime(self._log)
        self._table = EmbeddingTable(bundle)
        shape = bundle.manifest.decoder
        kinds = shape.local_layers, shape.states
        slots = cache_slots(bundle.plan, *kinds)
        self._lengths = length_slots(bundle.manifest.graphs[DECODER].inputs, slots)
        self._inputs = decoder_inputs(bundle.plan, *kinds, tiers=bool(bundle.lower_tiers), rows=bool(self._lengths))
        self._outputs = decoder_outputs(bundle.plan, *kinds)
        self._slots, self._states = len(slots), len(shape.states)
        try:
            engines = usable_engines(bundle, store, device)
            self._open = {
                graph: partial(self._executor, trt, store, record, bundle.manifest.graphs[graph], profiles)
                for graph, (record, profiles) in engines.items()
            }
            for graph in engines:
                if graph != VISION_UNPRUNED:  # loaded with the first unpruned answer
                    self._executors[graph] = self._open[graph]()
            if self._lengths:
                self._steps = StepsInPlace(bundle, self._executors[DECODER], self._pool, self._scratch)
        except EngineError:
            self.close()
            raise

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

    @property
    def why_by_hand(self) -> str:
        """Why decode steps are not one launch, "" if they are, or will be."""
        if self._steps is None:
            return "The decoder is not told how many rows of its caches are real."
        return self._steps.failure

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
        return self._table.embed_tokens(ids)

    def forward(self, tokens: DecoderInput, cache: KvCache, *, cancellation: CancellationToken | None = None) -> DecoderOutput:
        """Run the decoder on new tokens, given the KV cache of the earlier ones."""
        if self._steps is not None and self._steps.can_run(tokens, cache):
            return self._steps.run(tokens, cache)
        profile = image_prefill_of(tokens.tier) if len(tokens.visual_indices) else TEXT
        return self._step(self._executors[DECODER].run(decoder_feeds(self._inputs, tokens, cache, self._lengths), profile))

    def predict_keep_ratio(self, split: np.ndarray, step: int) -> float:
        """Return the keep ratio that the plan's predictor gives for decode step `step`, from the attention split."""
        outputs = self._executors[PREDICTOR].run({"attention_split": split, "step": np.array([step], np.float32)})
        return float(outputs["share"].numpy()[0])

    def close(self) -> None:
        """Destroy the engines, then free the memory, then destroy the stream."""
        if self._steps is not None:
            self._steps.close()
        for executor in self._executors.values():
            executor.close()
        self._scratch.close()
        self._pool.close()
        self._driver.close()

    def _step(self, outputs: Mapping[str, DeviceArray]) -> DecoderOutput:
        logits, *rest = (outputs[name] for name in self._outputs)
        split = rest.pop() if self._has_attention_split else None
        rows, states, kept = split_outputs(rest, self._slots, self._states)
        return DecoderOutput(
            logits.numpy()[0, 0],
            tuple(map(_array, rows)),
            tuple(part.numpy() for part in kept),
            # Classes are found on the host.
            None if split is None else split.numpy() if self._plan.has_classes else _array(split),
            states=tuple(map(_array, states)),
        )


def _array(array: DeviceArray) -> np.ndarray:
    # The interface is typed for NumPy. The generation loop uses only what DeviceArray implements.
    return cast("np.ndarray", array)
