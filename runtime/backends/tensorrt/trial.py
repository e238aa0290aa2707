"""Try to build a graph with the parser and builder of TensorRT-RTX, which need no GPU.

Each build runs in its own process, so that its peak memory can be measured and a crash is contained. The result is a check, not an
engine for a Jetson: TensorRT-RTX supports neither Orin (8.7) nor Thor (11.0), so the nearest capabilities are used instead.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgeprune.device.memory import peak_rss
from edgeprune.errors import EdgePruneError, EngineError
from edgeprune.runtime.backends.tensorrt.builder import build_engine
from edgeprune.runtime.backends.tensorrt.profiles import ShapeProfile
from edgeprune.targets import SMALL_FLOATS, Target

# Orin has the instruction set of SM 8.0, without FP8 and FP4. Thor has the data types of SM 12.0.
_SUBSTITUTES = {"orin": "SM80", "thor": "SM120"}


@dataclass(frozen=True)
class Trial:
    """The result of one trial build: times, memory and size, or the `error`."""

    graph: str
    parse_seconds: float = 0.0
    build_seconds: float = 0.0
    peak_bytes: int = 0
    plan_bytes: int = 0
    error: str = ""


def can_try() -> bool:
    """Tell whether TensorRT-RTX is installed."""
    return importlib.util.find_spec("tensorrt_rtx") is not None


def substitute_capability(target: Target, precision: str = "") -> str:
    """Return the compute capability to build a target's graphs for: that of Orin if the target includes Orin, else of Thor.

    A `precision` that only the target's Thor computes with is built for Thor.
    """
    includes_orin = "Orin" in target.modules or target.modules.startswith("TensorRT")
    for_thor = precision in SMALL_FLOATS and target.has_small_floats
    return _SUBSTITUTES["orin" if includes_orin and not for_thor else "thor"]


def try_build(graph: Path, name: str, profiles: Sequence[ShapeProfile], capability: str) -> Trial:
    """Build a graph in a separate process and return the result."""
    request = json.dumps({"graph": str(graph), "name": name, "profiles": profiles, "capability": capability})
    command = [sys.executable, "-m", "edgeprune.runtime.backends.tensorrt.trial"]
    result = subprocess.run(command, input=request, capture_output=True, text=True)
    if result.returncode:
        lines = result.stderr.strip().splitlines() or [f"the builder died with status {result.returncode}"]
        return Trial(name, error=lines[-1])
    return Trial(**json.loads(result.stdout.splitlines()[-1]))


def _main() -> None:
    import tensorrt_rtx as trt

    request: dict[str, Any] = json.load(sys.stdin)

    def configure(config: Any) -> None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, request["capability"]), 0)

    name = request["name"]
    try:
        built = build_engine(trt, Path(request["graph"]), request["profiles"], configure=configure)
    except EngineError as error:
        trial = Trial(name, error=error.message)
    except EdgePruneError as error:
        trial = Trial(name, error=str(error))
    else:
        trial = Trial(name, built.parse_seconds, built.build_seconds, peak_rss() or 0, len(built.serialized_engine))
    print(json.dumps(asdict(trial)))


if __name__ == "__main__":
    _main()
