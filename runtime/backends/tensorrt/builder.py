"""Build one engine from one graph, with the Python API that TensorRT 10.3 to 11.4 and TensorRT-RTX share.

Networks are strongly typed: precision lies in the graph, and no precision flag exists in 11. What only some versions have is asked
for by name and left out elsewhere.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeprune.errors import EngineError
from edgeprune.runtime.backends.tensorrt.profiles import ShapeProfile

BuildProgress = Callable[[str, float], None]  # what the builder is at, and the share of it that is done
_MOST_ERRORS = 3  # of a parser, that a message quotes


@dataclass(frozen=True)
class BuilderSettings:
    """`workspace`: bytes of scratch memory that a layer may ask for; `level`: how long the builder searches, 0 to 5."""

    workspace: int = 512 << 20
    level: int = 3


@dataclass(frozen=True)
class Built:
    """A serialized engine where the builder left it, the seconds that parsing and building took, and the builder's timing cache."""

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
    """Return the engine of a graph under optimization profiles.

    `trt`: TensorRT's module; `timings`: a timing cache of an earlier build, ignored when it is of another device; `configure` may
    set more on the builder's configuration. Raises EngineError with the node and the reason when the graph is refused.
    """
    log = _log(trt)
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
        raise EngineError(f"TensorRT cannot build {graph.name}: {log.first_error}", hint="See: edgeprune check")
    del parser  # the network reads the weights that the parser mapped
    serialized = bytes(cache.serialize()) if cache is not None else b""
    return Built(memoryview(plan).cast("B"), parsed - started, time.perf_counter() - parsed, serialized)


def _parsed(trt: Any, builder: Any, log: Any, graph: Path) -> tuple[Any, Any]:
    # 11 accepts the flag and ignores it: every network is strongly typed there.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    # From the file, so that external weights are mapped and not read.
    if not parser.parse_from_file(str(graph)):
        errors = [_refusal(parser.get_error(index)) for index in range(min(parser.num_errors, _MOST_ERRORS))]
        raise EngineError(
            f"TensorRT cannot parse {graph.name}: {'; '.join(errors) or log.first_error}", hint="See: edgeprune check"
        )
    return network, parser


def _refusal(error: Any) -> str:
    # What follows the first line is the builder's own trace; without a GPU it ends in a CUDA error that explains nothing.
    lines = [line.strip() for line in str(error.desc()).splitlines() if line.strip()]
    reason = next((line for line in lines if not line.startswith(("Invalid Node", "In node"))), "no reason given")
    node = f"{getattr(error, 'node_name', str)()} ({getattr(error, 'node_operator', str)()})"
    return f"{node}: {reason}"


def _set_up(trt: Any, config: Any, settings: BuilderSettings, advance: BuildProgress) -> None:
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace)
    config.builder_optimization_level = settings.level
    monitor = getattr(trt, "IProgressMonitor", None)
    if monitor is not None:
        config.progress_monitor = _monitor(monitor, advance)


def _add_profile(builder: Any, config: Any, network: Any, profile: ShapeProfile) -> None:
    names = {network.get_input(index).name for index in range(network.num_inputs)}
    added = builder.create_optimization_profile()
    for name, shapes in profile.items():
        if name in names:  # a parser may drop an input that nothing reads
            added.set_shape(name, *shapes)
    if profile:
        config.add_optimization_profile(added)


def _timing_cache(config: Any, timings: bytes) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # TensorRT-RTX measures nothing, and says so
        cache = config.create_timing_cache(timings) or config.create_timing_cache(b"")
        if cache is not None and not config.set_timing_cache(cache, False):  # not of this device or version
            cache = config.create_timing_cache(b"")
            config.set_timing_cache(cache, False)
    return cache


def _log(trt: Any) -> Any:
    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.first_error = "no reason given."

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR and self.first_error == "no reason given.":
                self.first_error = message.strip().splitlines()[0]

    return Log()


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
