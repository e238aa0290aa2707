"""Build one engine from one graph, with the Python API that TensorRT 10.3 to 11.4 and TensorRT-RTX share.

Networks are strongly typed: the graph sets the precision, and TensorRT 11 has no precision flags. Features that only some versions
have are looked up by name and skipped where they are missing.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeprune.errors import EngineError
from edgeprune.runtime.backends.tensorrt.bindings import recording_log
from edgeprune.runtime.backends.tensorrt.profiles import ShapeProfile

BuildProgress = Callable[[str, float], None]  # phase name, fraction done
_NO_ATTENTION = "not supported by a dedicated kernel"
_MAX_ERRORS = 3  # parser errors quoted in a message


@dataclass(frozen=True)
class BuilderSettings:
    """`workspace`: scratch memory limit in bytes. `level`: TensorRT's builder optimization level, 0 to 5.

    `tf32`: multiply float32 with 10 bits of mantissa, as TensorRT does by default.
    """

    workspace: int = 512 << 20
    level: int = 3
    tf32: bool = True


@dataclass(frozen=True)
class Built:
    """A serialized engine in the builder's own memory, with the times of parsing and building and the updated timing cache."""

    serialized_engine: memoryview
    parse_seconds: float
    build_seconds: float
    timings: bytes


def build_engine(
    trt: Any,
    graph: Path,
    profiles: Sequence[ShapeProfile],
    settings: BuilderSettings | None = None,
    *,
    timings: bytes = b"",
    configure: Callable[[Any], None] = lambda config: None,
    advance: BuildProgress = lambda phase, done: None,
) -> Built:
    """Build the engine of an ONNX graph for some optimization profiles.

    `trt`: the TensorRT module. `timings`: timing cache of an earlier build, ignored when it is from another device. `configure` may
    change the builder configuration. Raises EngineError with the node and the reason when TensorRT rejects the graph.
    """
    log = recording_log(trt)
    builder = trt.Builder(log)
    started = time.perf_counter()
    network, parser = _parsed(trt, builder, log, graph)
    parsed = time.perf_counter()
    config = builder.create_builder_config()
    _set_up(trt, config, settings or BuilderSettings(), advance)
    configure(config)
    for profile in profiles:
        _add_profile(builder, config, network, profile)
    cache = _timing_cache(config, timings)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise _failure(graph, log)
    del parser  # not earlier: the network refers to weights that the parser has mapped
    serialized = bytes(cache.serialize()) if cache is not None else b""
    return Built(memoryview(plan).cast("B"), parsed - started, time.perf_counter() - parsed, serialized)


def _parsed(trt: Any, builder: Any, log: Any, graph: Path) -> tuple[Any, Any]:
    # TensorRT 11 accepts this flag and ignores it, because all its networks are strongly typed.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    # Parsing from a file maps external weights instead of reading them.
    if not parser.parse_from_file(str(graph)):
        errors = [_refusal(parser.get_error(index)) for index in range(min(parser.num_errors, _MAX_ERRORS))]
        raise EngineError(
            f"TensorRT cannot parse {graph.name}: {'; '.join(errors) or log.first_error}", hint="See: edgeprune check BUNDLE"
        )
    return network, parser


def _refusal(error: Any) -> str:
    # Later lines are the parser's internal trace, which without a GPU ends in an unrelated CUDA error.
    lines = [line.strip() for line in str(error.desc()).splitlines() if line.strip()]
    reason = next((line for line in lines if not line.startswith(("Invalid Node", "In node"))), "no reason given")
    node = f"{getattr(error, 'node_name', str)()} ({getattr(error, 'node_operator', str)()})"
    return f"{node}: {reason}"


def _set_up(trt: Any, config: Any, settings: BuilderSettings, advance: BuildProgress) -> None:
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace)
    config.builder_optimization_level = settings.level
    if not settings.tf32:
        config.clear_flag(trt.BuilderFlag.TF32)
    monitor = getattr(trt, "IProgressMonitor", None)
    if monitor is not None:
        config.progress_monitor = _monitor(monitor, advance)


def _add_profile(builder: Any, config: Any, network: Any, profile: ShapeProfile) -> None:
    names = {network.get_input(index).name for index in range(network.num_inputs)}
    added = builder.create_optimization_profile()
    for name, shapes in profile.items():
        if name in names:  # the parser may remove an unused input
            added.set_shape(name, *shapes)
    if profile:
        config.add_optimization_profile(added)


def _timing_cache(config: Any, timings: bytes) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # TensorRT-RTX has no timing cache and warns about it
        cache = config.create_timing_cache(timings) or config.create_timing_cache(b"")
        if cache is not None and not config.set_timing_cache(cache, False):  # from another device or version
            cache = config.create_timing_cache(b"")
            config.set_timing_cache(cache, False)
    return cache


def _failure(graph: Path, log: Any) -> EngineError:
    # TensorRT leaves out kernels that do not fit, and says so in warnings; its error is that it found none.
    lacking = next((line for line in (log.first_error, log.last_error) if _NO_ATTENTION in line), None)
    if lacking is not None:
        return EngineError(
            f"TensorRT has no attention in one kernel for this GPU, and cannot build {graph.name}: {lacking}",
            hint="Export it with --target jetpack7, which has attention as several nodes.",
        )
    if not log.memory_warning:
        return EngineError(f"TensorRT cannot build {graph.name}: {log.first_error}", hint="See: edgeprune check BUNDLE")
    count = "once" if log.memory_warnings == 1 else f"{log.memory_warnings} times"
    return EngineError(
        f"TensorRT cannot build {graph.name}: {log.first_error} It warned of too little memory ({count}): {log.memory_warning}",
        hint="Close other programs, give a smaller --context and --turn, or export with --precision int8 or int4.",
    )


def _monitor(base: Any, advance: BuildProgress) -> Any:
    class Monitor(base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)
            self._steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._steps[phase_name] = num_steps
            advance(phase_name, 0.0)

        def step_complete(self, phase_name: str, step: int) -> bool:
            advance(phase_name, (step + 1) / max(self._steps.get(phase_name, 1), 1))
            return True

        def phase_finish(self, phase_name: str) -> None:
            advance(phase_name, 1.0)

    return Monitor()
