"""A bundle's engines on the device, behind the interface of the generation loop.

Only token ids, positions and pixels go to the device, and only logits, kept indices and shares come back; embeddings, caches and
the attention split stay there. A step's keys and values are copied behind those that are there. There is no CUDA graph of the
decode step: its text caches are one longer every time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, cast

import numpy as np

from edgeprune.bundle import DECODER, EMBED, PREDICTOR, SELECTOR, VISION, VISION_UNPRUNED, Bundle, GraphRecord, tier_selector
from edgeprune.bundle.graph_io import SIGNALS, decoder_inputs, decoder_outputs, kept_names
from edgeprune.errors import EngineError
from edgeprune.runtime.cache import KvCache
from edgeprune.runtime.engine import Seen, Step, StepInput
from edgeprune.runtime.interrupt import Interrupt
from edgeprune.runtime.tensorrt.api import cuda, identity, tensorrt
from edgeprune.runtime.tensorrt.arrays import DeviceArray, Pool
from edgeprune.runtime.tensorrt.driver import CudaDriver, Driver
from edgeprune.runtime.tensorrt.executor import Executor, Value
from edgeprune.runtime.tensorrt.ranges import TEXT, Profile, image_turn_of
from edgeprune.runtime.tensorrt.store import EngineRecord, Identity, Store, usable_engines


class TensorRTEngine:
    """The graphs of a bundle as TensorRT engines; `close` gives their memory back.

    Arrays in what it returns lie on the device. Raises EngineError when an engine is missing, is of another TensorRT or GPU, or was
    not built on this device.
    """

    def __init__(self, bundle: Bundle, trt: Any, driver: Driver, store: Store, device: Identity) -> None:
        self._plan, self._driver, self._pool = bundle.plan, driver, Pool(driver)
        self._tiers = bundle.manifest.tiers
        self._executors: dict[str, Executor] = {}
        self._runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        try:
            engines = usable_engines(bundle, store, device)
            self._open = {
                graph: partial(self._executor, trt, store, record, bundle.manifest.graphs[graph], profiles)
                for graph, (record, profiles) in engines.items()
            }
            for graph in engines:
                if graph != VISION_UNPRUNED:  # only an unpruned answer needs it
                    self._executors[graph] = self._open[graph]()
        except EngineError:
            self.close()
            raise
        self._inputs, self._outputs = decoder_inputs(bundle.plan, tiers=bool(bundle.lower)), decoder_outputs(bundle.plan)

    def _executor(
        self, trt: Any, store: Store, record: EngineRecord, described: GraphRecord, profiles: Sequence[Profile]
    ) -> Executor:
        return Executor(trt, self._runtime, store.read(record), described, profiles, self._pool)

    @classmethod
    def here(cls, bundle: Bundle) -> TensorRTEngine:
        """Return the engine on this machine's GPU."""
        trt, runtime = tensorrt(), cuda()
        return cls(bundle, trt, CudaDriver(runtime), Store(bundle.path), identity(trt, runtime))

    @property
    def device_bytes(self) -> int:
        """Memory for inputs, outputs and caches; engines and their scratch memory not counted."""
        return self._pool.bytes

    def see(self, patches: np.ndarray, *, whole: bool = False, interrupt: Interrupt | None = None) -> Seen:
        """Return what the vision encoder says of patches [patches, patch pixels]; `whole`: of all, whatever its cuts are."""
        outputs = self._encoder(whole and bool(self._plan.vision_cuts)).run({"pixel_values": patches})
        self._driver.synchronize()  # so that its time is its own, and not that of the step that waits for it
        signals = {name: _array(outputs[name]) for name in SIGNALS if name in outputs}
        kept = [outputs[name].numpy() for name in kept_names(self._plan, "vision") if name in outputs]
        return Seen(_array(outputs["visual_embeds"]), signals, tuple(kept))

    def _encoder(self, unpruned: bool) -> Executor:
        if not unpruned:
            return self._executors[VISION]
        if VISION_UNPRUNED not in self._open:
            raise EngineError(
                "There is no engine of the vision encoder without its cuts.",
                hint="Build engines that can answer without pruning: edgeprune build --unpruned",
            )
        if VISION_UNPRUNED not in self._executors:
            self._executors[VISION_UNPRUNED] = self._open[VISION_UNPRUNED]()
        return self._executors[VISION_UNPRUNED]

    def select(self, seen: Seen, prompt: np.ndarray, tier: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Apply the plan's input cut, given the embeddings of the prompt [1, M, hidden]: return embeddings [1, K, hidden], indices
        [K], those on the host.
        """
        values = {"visual_embeds": seen.embeds, "prompt_embeds": prompt, "visual_order": seen.order, **seen.signals}
        selector = self._executors[tier_selector(self._tiers[tier]) if tier else SELECTOR]
        outputs, (name,) = selector.run(values), kept_names(self._plan, "input")
        return _array(outputs["kept_embeds"]), outputs[name].numpy()

    def embed(self, ids: Sequence[int]) -> np.ndarray:
        """Return embeddings [1, n, hidden]."""
        return _array(self._executors[EMBED].run({"ids": np.array([ids], np.int64)})["embeds"])

    def step(self, tokens: StepInput, cache: KvCache) -> Step:
        """Run new tokens on top of a cache."""
        segments = (tokens.prefix, tokens.visual, tokens.suffix)
        values: list[Value] = [*(part.embeds for part in segments), *(part.positions for part in segments), tokens.order]
        values += [np.zeros(1 + tokens.tier, np.int64)] if self._tiers else []
        values += [*([tokens.groups] if self._plan.live else []), *cache.text, *cache.visual]
        profile = image_turn_of(tokens.tier) if len(tokens.order) else TEXT
        outputs = self._executors[DECODER].run(dict(zip(self._inputs, values, strict=True)), profile)
        return self._step(outputs)

    def rate(self, split: np.ndarray, step: int) -> float:
        """Return the share of visual tokens that the plan's predictor keeps for decode step `step`, given the attention split."""
        outputs = self._executors[PREDICTOR].run({"attention_split": split, "step": np.array([step], np.float32)})
        return float(outputs["share"].numpy()[0])

    def close(self) -> None:
        """Destroy the engines, then free the memory, then give the stream back."""
        for executor in self._executors.values():
            executor.close()
        self._pool.close()
        self._driver.close()

    def _step(self, outputs: Mapping[str, DeviceArray]) -> Step:
        logits, *rest = (outputs[name] for name in self._outputs)
        split = _array(rest.pop()) if self._plan.live else None
        count = 2 * self._plan.layers
        return Step(logits.numpy()[0, 0], tuple(map(_array, rest[:count])), tuple(part.numpy() for part in rest[count:]), split)


def _array(array: DeviceArray) -> np.ndarray:
    # The loop passes these on, joins them, takes prefixes and writes rows, which is all they can do.
    return cast("np.ndarray", array)
