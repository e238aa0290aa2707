"""What this machine is: Jetson or not, what is installed on it, and the state that decides how fast it answers."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeprune.device.jetson import JetPack, PowerMode, jetpack_of, parse_clocks, parse_mode, parse_module, parse_release
from edgeprune.device.memory import Memory, parse_meminfo
from edgeprune.device.system import Runner, Software, installed_debs, read_number, read_text, run_command, version_numbers
from edgeprune.targets import TARGETS, Target

_CORE = "nvidia-l4t-core"
_LIBRARIES = ("libnvinfer11", "libnvinfer10", "libnvinfer8")
_PARSERS = ("libnvonnxparsers11", "libnvonnxparsers10", "libnvonnxparsers8")
BINDING = "python3-libnvinfer"  # Debian's package of TensorRT's Python module
_CPU = "sys/devices/system/cpu"
_CUDART = (
    "usr/local/cuda*/targets/*/lib/libcudart.so.*",
    "usr/local/cuda*/lib64/libcudart.so.*",
    "usr/lib/*-linux-gnu/libcudart.so.*",
)


@dataclass(frozen=True)
class Machine:
    """The facts of one machine; None for what could not be read.

    `model`: the device tree's words; `module`: the Jetson, such as "Orin Nano"; `l4t`: such as (36, 4, 3); `gpu`: an NVIDIA
    driver is loaded; `cuda`: the runtime library's version; `debs`: versions of TensorRT's Debian packages; `clocks_pinned`: CPU
    and GPU cannot change their clocks.
    """

    architecture: str
    model: str | None
    module: str | None
    l4t: tuple[int, ...] | None
    gpu: bool
    cuda: str | None
    debs: dict[str, str]
    software: Software
    mode: PowerMode
    clocks_pinned: bool | None
    memory: Memory

    @property
    def is_jetson(self) -> bool:
        """Whether the device tree or the release file names a Jetson."""
        return self.module is not None or self.l4t is not None

    @property
    def jetpack(self) -> JetPack | None:
        """The JetPack of the L4T release; None when the table does not know it."""
        return jetpack_of(self.l4t)

    @property
    def tensorrt(self) -> str | None:
        """Version of the TensorRT library, from Debian's packages or from Python's."""
        found = next((self.debs[name] for name in _LIBRARIES if name in self.debs), None)
        package = self.software.packages.get("tensorrt")
        return found or (None if package == "unknown" else package)

    @property
    def onnx_parser(self) -> bool:
        """Whether TensorRT's ONNX parser is installed; Python's package of TensorRT carries one."""
        return any(name in self.debs for name in _PARSERS) or not any(name in self.debs for name in _LIBRARIES)

    @property
    def target(self) -> Target | None:
        """The target whose bundles this TensorRT reads best; None without one that is new enough."""
        version = version_numbers(self.tensorrt)[:2]
        known = [target for target in TARGETS.values() if target.tensorrt is not None and target.tensorrt <= version]
        return max(known, key=lambda target: target.tensorrt or (0, 0), default=None)

    @property
    def name(self) -> str:
        """The machine in words."""
        return self.model or self.module or f"{self.architecture} machine, no Jetson"

    def to_dict(self) -> dict[str, Any]:
        """Return the facts as JSON data."""
        return {
            "device": self.name,
            "jetson": self.module,
            "architecture": self.architecture,
            "l4t": dotted(self.l4t),
            "jetpack": self.jetpack.name if self.jetpack else None,
            "cuda": self.cuda,
            "tensorrt": self.tensorrt,
            "target": self.target.name if self.target else None,
            "python": dotted(self.software.version),
            "packages": dict(self.software.packages),
            "providers": list(self.software.providers),
            "power_mode": self.mode.name,
            "power_mode_number": self.mode.number,
            "clocks_pinned": self.clocks_pinned,
            "memory_mib": vars(self.memory),
        }


def read_machine(root: Path = Path("/"), run: Runner = run_command, software: Software | None = None) -> Machine:
    """Return what the files below `root` and the commands of `run` say of a machine. `software` None: that of this Python."""
    debs = installed_debs(read_text(root, "var/lib/dpkg/status"), (_CORE, BINDING, *_LIBRARIES, *_PARSERS))
    model = read_text(root, "proc/device-tree/model") or None
    module = parse_module(model, read_text(root, "proc/device-tree/compatible"))
    l4t = parse_release(read_text(root, "etc/nv_tegra_release")) or version_numbers(debs.get(_CORE)) or None
    is_jetson = module is not None or l4t is not None
    return Machine(
        architecture=platform.machine(),
        model=model if is_jetson else None,  # other boards have a device tree too
        module=module,
        l4t=l4t,
        gpu=is_jetson or (root / "proc/driver/nvidia/version").exists() or (root / "dev/nvidiactl").exists(),
        cuda=_cuda(root),
        debs={name: version for name, version in debs.items() if name != _CORE},
        software=Software.here() if software is None else software,
        mode=_mode(root, run) if is_jetson else PowerMode(None, None),
        clocks_pinned=_clocks_pinned(root, run, is_jetson),
        memory=parse_meminfo(read_text(root, "proc/meminfo")),
    )


def dotted(numbers: tuple[int, ...] | None) -> str | None:
    """Return "36.4.3" of (36, 4, 3)."""
    return None if numbers is None else ".".join(map(str, numbers))


def _mode(root: Path, run: Runner) -> PowerMode:
    kept, known = read_text(root, "var/lib/nvpmodel/status"), read_text(root, "etc/nvpmodel.conf")
    return parse_mode(run(["nvpmodel", "-q"]), kept, known)


def _clocks_pinned(root: Path, run: Runner, is_jetson: bool) -> bool | None:
    # jetson_clocks --show wants root, so the kernel is asked first.
    cpus = [(path / "cpufreq/scaling_min_freq", path / "cpufreq/scaling_max_freq") for path in _below(root, f"{_CPU}/cpu[0-9]*")]
    gpus = [(path / "min_freq", path / "max_freq") for path in _below(root, "sys/class/devfreq/*gpu*")]
    limits = [pair for pair in (_limits(root, *files) for files in [*cpus, *gpus]) if pair is not None]
    if limits:
        return all(low == high for low, high in limits)
    return parse_clocks(run(["jetson_clocks", "--show"])) if is_jetson else None


def _limits(root: Path, low: Path, high: Path) -> tuple[int, int] | None:
    lowest, highest = read_number(root, str(low)), read_number(root, str(high))
    return None if lowest is None or highest is None else (lowest, highest)


def _below(root: Path, pattern: str) -> Iterable[Path]:
    return sorted(path.relative_to(root) for path in root.glob(pattern))


def _cuda(root: Path) -> str | None:
    # The library's name carries its version: libcudart.so.12.6.68.
    names = [path.name.partition(".so.")[2] for pattern in _CUDART for path in root.glob(pattern)]
    versions = [version_numbers(name) for name in names]
    return dotted(max((version for version in versions if len(version) > 1), key=lambda v: (v[:2], len(v)), default=None))
