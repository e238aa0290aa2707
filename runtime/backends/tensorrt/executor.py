"""One engine of TensorRT: its execution contexts, what they are bound to, and its runs.

Each engine has one execution context per optimization profile, and all contexts work in one block of scratch memory. Inputs are
bound by address, outputs to pooled memory.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from edgeprune.bundle import GraphRecord, held_as
from edgeprune.errors import EngineError
from edgeprune.runtime.backends.tensorrt.arrays import DeviceArray, MemoryPool, Scratch, upload
from edgeprune.runtime.backends.tensorrt.profiles import ShapeProfile

Value = DeviceArray | np.ndarray


class Executor:
    """One deserialized engine. `inputs`: their names.

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
        self.inputs = [name for name in names if self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        self._outputs = [name for name in names if name not in self.inputs]
        self._contexts = [self._context(trt, number, scratch) for number in range(len(profiles))]
        self._capacity = [self._capacities(number) for number in range(len(profiles))]

    def run(self, values: Mapping[str, Value], profile: int = 0) -> dict[str, DeviceArray]:
        """Enqueue one run and return the outputs by name. They are valid once the stream has reached this point.

        Raises EngineError when a shape lies outside the profile.
        """
        arrays = {}  # which keep their leases until the run is enqueued
        for name in self.inputs:
            value = values[name]
            self.check_range(name, value.shape, profile)
            array = value if isinstance(value, DeviceArray) else upload(self._pool, value.astype(self.type(name), copy=False))
            arrays[name] = array
            self._take(name, array, profile)
        outputs = self.outputs(profile)
        self.enqueue(profile)
        return outputs

    def bind(self, arrays: Mapping[str, DeviceArray], profile: int = 0) -> None:
        """Let runs read these inputs, which stay bound until others are. Those that the engine does not have are left out."""
        for name in self.inputs:
            if name in arrays:
                self.check_range(name, arrays[name].shape, profile)
                self._take(name, arrays[name], profile)

    def outputs(self, profile: int = 0) -> dict[str, DeviceArray]:
        """Return new arrays for all outputs, whose shapes follow from the inputs, and let runs write them."""
        context = self._contexts[profile]
        return {name: self._output(context, name, profile) for name in self._outputs}

    def enqueue(self, profile: int = 0) -> None:
        """Put a run on the stream, with what is bound. Raises EngineError when TensorRT cannot run it."""
        if not self._contexts[profile].execute_async_v3(self._pool.driver.stream):
            raise EngineError(f"TensorRT could not run the engine: {self._log.last_error}", hint="See: edgeprune selftest BUNDLE")

    def shape_in(self, name: str, profile: int) -> tuple[int, ...]:
        """Return the smallest shape that an input has in a profile."""
        fixed = self._record.inputs[name].shape
        return self._profiles[profile][name][0] if name in self._profiles[profile] else tuple(map(int, fixed))

    def longest(self, name: str, profile: int) -> int:
        """Return the largest length of an input's first axis in a profile."""
        return self._profiles[profile][name][2][0]

    def check_range(self, name: str, shape: Sequence[int], profile: int) -> None:
        """Raise EngineError when an input's shape lies outside a profile."""
        minimum, _, maximum = self._profiles[profile].get(name, (shape, shape, shape))
        if not all(low <= length <= high for low, length, high in zip(minimum, shape, maximum, strict=True)):
            raise EngineError(
                f"{name} has shape {tuple(shape)}, the engine was built for {minimum} to {maximum}.", hint=_remedy(name, maximum)
            )

    def type(self, name: str) -> np.dtype:
        """Return the type of an input or output."""
        return np.dtype(held_as((self._record.inputs.get(name) or self._record.outputs[name]).type))

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
            if name in self.inputs:
                context.set_input_shape(name, maximum)
        return {name: self._bytes(name, context.get_tensor_shape(name)) for name in self._outputs}

    def _take(self, name: str, array: DeviceArray, profile: int) -> None:
        context = self._contexts[profile]
        if not context.set_input_shape(name, array.shape) or not context.set_tensor_address(name, array.address):
            raise EngineError(
                f"TensorRT refuses {name} of shape {array.shape}: {self._log.last_error}",
                hint="Build the engines again: edgeprune build BUNDLE",
            )

    def _output(self, context: Any, name: str, profile: int) -> DeviceArray:
        shape = tuple(context.get_tensor_shape(name))
        lease = self._pool.lease(self._capacity[profile][name])
        context.set_tensor_address(name, lease.address)
        return DeviceArray(lease, shape, self.type(name))

    def _bytes(self, name: str, shape: Sequence[int]) -> int:
        return int(np.prod(tuple(shape), dtype=np.int64)) * self.type(name).itemsize


def _remedy(name: str, maximum: Sequence[int]) -> str:
    if name.startswith("visual_past"):
        return "Ask about fewer images, or build for more: edgeprune build BUNDLE --images N"
    if name.startswith("past_"):
        return "Begin a new conversation, or build for a longer one: edgeprune build BUNDLE --context N"
    if name.startswith("prefix") and 0 in maximum:
        return "Build engines that can answer without pruning: edgeprune build BUNDLE --unpruned"
    return "Ask something shorter, or build for longer turns: edgeprune build BUNDLE --turn N"
