"""Run one engine: a context for each optimization profile, inputs by address, outputs into leased memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from edgeprune.bundle import GraphRecord
from edgeprune.errors import EngineError
from edgeprune.runtime.tensorrt.arrays import DeviceArray, Pool, upload
from edgeprune.runtime.tensorrt.ranges import Profile

Value = DeviceArray | np.ndarray


class Executor:
    """One deserialized engine. `record` names its inputs and outputs, `profiles` are those that it was built with."""

    def __init__(self, trt: Any, runtime: Any, plan: bytes, record: GraphRecord, profiles: Sequence[Profile], pool: Pool) -> None:
        self._record, self._profiles, self._pool = record, profiles, pool
        self._engine = runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise EngineError("TensorRT does not take an engine that was built here.", hint="Build it again: edgeprune build")
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        self._inputs = [name for name in names if self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        self._outputs = [name for name in names if name not in self._inputs]
        self._contexts = [self._context(number) for number in range(len(profiles))]
        self._capacity = [self._capacities(number) for number in range(len(profiles))]

    def run(self, values: Mapping[str, Value], profile: int = 0) -> dict[str, DeviceArray]:
        """Return the outputs by name; they are complete when the stream has come so far.

        Raises EngineError when a shape lies outside the profile.
        """
        context, held = self._contexts[profile], []
        for name in self._inputs:
            value = values[name]
            self._check_range(name, value.shape, profile)
            array = value if isinstance(value, DeviceArray) else upload(self._pool, value.astype(self._type(name), copy=False))
            held.append(array)  # its memory must not be leased again before the engine has read it
            if not context.set_input_shape(name, array.shape) or not context.set_tensor_address(name, array.address):
                raise EngineError(
                    f"TensorRT refuses {name} of shape {array.shape}.", hint="Build the engines again: edgeprune build"
                )
        outputs = {name: self._output(context, name, profile) for name in self._outputs}
        if not context.execute_async_v3(self._pool.driver.stream):
            raise EngineError("TensorRT could not run the engine.", hint="See: edgeprune selftest BUNDLE")
        return outputs

    def close(self) -> None:
        """Destroy the contexts, and the engine after them."""
        self._contexts.clear()
        self._engine = None

    def _context(self, number: int) -> Any:
        context = self._engine.create_execution_context()
        if context is None:
            raise EngineError("There is no memory for another execution context.", hint="Build with a smaller --context or --turn.")
        if len(self._profiles) > 1:
            context.set_optimization_profile_async(number, self._pool.driver.stream)
        return context

    def _capacities(self, number: int) -> dict[str, int]:
        # What outputs may need at most under one profile, so that a cache which grows stays in its block.
        context = self._contexts[number]
        for name, (_, _, greatest) in self._profiles[number].items():
            if name in self._inputs:
                context.set_input_shape(name, greatest)
        return {name: self._bytes(name, context.get_tensor_shape(name)) for name in self._outputs}

    def _output(self, context: Any, name: str, profile: int) -> DeviceArray:
        shape = tuple(context.get_tensor_shape(name))
        lease = self._pool.lease(self._capacity[profile][name])
        context.set_tensor_address(name, lease.address)
        return DeviceArray(lease, shape, self._type(name))

    def _check_range(self, name: str, shape: Sequence[int], profile: int) -> None:
        least, _, greatest = self._profiles[profile].get(name, (shape, shape, shape))
        if not all(low <= length <= high for low, length, high in zip(least, shape, greatest, strict=True)):
            raise EngineError(
                f"{name} has shape {tuple(shape)}, the engine was built for {least} to {greatest}.", hint=_remedy(name, greatest)
            )

    def _type(self, name: str) -> np.dtype:
        return np.dtype((self._record.inputs.get(name) or self._record.outputs[name]).type)

    def _bytes(self, name: str, shape: Sequence[int]) -> int:
        return int(np.prod(tuple(shape), dtype=np.int64)) * self._type(name).itemsize


def _remedy(name: str, greatest: Sequence[int]) -> str:
    if name.startswith("visual_past"):
        return "Ask about fewer images, or build for more: edgeprune build --images N"
    if name.startswith("past_"):
        return "Begin a new conversation, or build for a longer one: edgeprune build --context N"
    if name.startswith("prefix") and 0 in greatest:
        return "Build engines that can answer without pruning: edgeprune build --unpruned"
    return "Ask something shorter, or build for longer turns: edgeprune build --turn N"
