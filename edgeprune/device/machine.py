"""Read the facts of a machine: Jetson module, installed software, and the power and clock state that determines its speed."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeprune.device.cudart import library_files
from edgeprune.device.jetson import JetPack, PowerMode, jetpack_of, parse_clocks, parse_mode, parse_module, parse_release
from edgeprune.device.memory import Memory, parse_memory
from edgeprune.device.system import (
    Runner,
    Software,
    has_byte_products,
    installed_debs,
    read_number,
    read_text,
    run_command,
    version_numbers,
)
from edgeprune.targets import TARGETS, Target

_CORE = "nvidia-l4t-core"
_LIBRARIES = ("libnvinfer11", "libnvinfer10", "libnvinfer8")
_PARSERS = ("libnvonnxparsers11", "libnvonnxparsers10", "libnvonnxparsers8")
BINDING = "python3-libnvinfer"  # Debian's package of TensorRT's Python module
_CPU = "sys/devices/system/cpu"


@dataclass(frozen=True)
class Machine:
    """The facts of a machine; None for what could not be read.

    `model`: the device tree's model name. `module`: the Jetson module, such as "Orin Nano". `l4t`: such as (36, 4, 3). `gpu`: an
    NVIDIA driver is loaded. `cuda`: version of the runtime library. `debs`: versions of TensorRT's Debian packages.
    `clocks_pinned`: the clocks of CPU and GPU are fixed. `byte_products`: as `has_byte_products`.
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
    byte_products: bool | None = None

    @property
    def is_jetson(self) -> bool:
        """Whether the device tree or the release file names a Jetson."""
        return self.module is not None or self.l4t is not None

    @property
    def jetpack(self) -> JetPack | None:
        """The JetPack of the L4T release; None if it is not in the table."""
        return jetpack_of(self.l4t)

    @property
    def tensorrt(self) -> str | None:
        """Version of the TensorRT library, from its Debian or Python package."""
        found = next((self.debs[name] for name in _LIBRARIES if name in self.debs), None)
        package = self.software.packages.get("tensorrt")
        return found or (None if package == "unknown" else package)

    @property
    def onnx_parser(self) -> bool:
        """Whether TensorRT's ONNX parser is installed. The Python package of TensorRT includes it."""
        return any(name in self.debs for name in _PARSERS) or not any(name in self.debs for name in _LIBRARIES)

    @property
    def target(self) -> Target | None:
        """The newest target that the installed TensorRT supports; None without TensorRT or if it is too old."""
        version = version_numbers(self.tensorrt)[:2]
        known = [target for target in TARGETS.values() if target.tensorrt is not None and target.tensorrt <= version]
        return max(known, key=lambda target: target.tensorrt or (0, 0), default=None)

    @property
    def name(self) -> str:
        """A display name of the machine."""
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
            "byte_products": self.byte_products,
        }


def read_machine(root: Path = Path("/"), run: Runner = run_command, software: Software | None = None) -> Machine:
    """Read a machine from files below `root` and from the output of commands; `software` None: that of this Python."""
    debs = installed_debs(read_text(root, "var/lib/dpkg/status"), (_CORE, BINDING, *_LIBRARIES, *_PARSERS))
    model = read_text(root, "proc/device-tree/model") or None
    module = parse_module(model, read_text(root, "proc/device-tree/compatible"))
    l4t = parse_release(read_text(root, "etc/nv_tegra_release")) or version_numbers(debs.get(_CORE)) or None
    is_jetson = module is not None or l4t is not None
    return Machine(
        architecture=platform.machine(),
        model=model if is_jetson else None,  # other boards also have a device tree
        module=module,
        l4t=l4t,
        gpu=is_jetson or (root / "proc/driver/nvidia/version").exists() or (root / "dev/nvidiactl").exists(),
        cuda=_cuda_version(root),
        debs={name: version for name, version in debs.items() if name != _CORE},
        software=Software.here() if software is None else software,
        mode=_power_mode(root, run) if is_jetson else PowerMode(None, None),
        clocks_pinned=_clocks_pinned(root, run, is_jetson),
        memory=parse_memory(read_text(root, "proc/meminfo"), read_text(root, "proc/swaps")),
        byte_products=has_byte_products(root),
    )


def dotted(numbers: tuple[int, ...] | None) -> str | None:
    """Return "36.4.3" for (36, 4, 3)."""
    return None if numbers is None else ".".join(map(str, numbers))


def _power_mode(root: Path, run: Runner) -> PowerMode:
    status, configuration = read_text(root, "var/lib/nvpmodel/status"), read_text(root, "etc/nvpmodel.conf")
    return parse_mode(run(["nvpmodel", "-q"]), status, configuration)


def _clocks_pinned(root: Path, run: Runner, is_jetson: bool) -> bool | None:
    # sysfs first, because jetson_clocks --show needs root.
    cpus = [
        (path / "cpufreq/scaling_min_freq", path / "cpufreq/scaling_max_freq") for path in _glob_below(root, f"{_CPU}/cpu[0-9]*")
    ]
    gpus = [(path / "min_freq", path / "max_freq") for path in _glob_below(root, "sys/class/devfreq/*gpu*")]
    limits = [pair for pair in (_limits(root, *files) for files in [*cpus, *gpus]) if pair is not None]
    if limits:
        return all(low == high for low, high in limits)
    return parse_clocks(run(["jetson_clocks", "--show"])) if is_jetson else None


def _limits(root: Path, low: Path, high: Path) -> tuple[int, int] | None:
    lowest, highest = read_number(root, str(low)), read_number(root, str(high))
    return None if lowest is None or highest is None else (lowest, highest)


def _glob_below(root: Path, pattern: str) -> Iterable[Path]:
    return sorted(path.relative_to(root) for path in root.glob(pattern))


def _cuda_version(root: Path) -> str | None:
    # The file name has the version: libcudart.so.12.6.68.
    names = [path.name.partition(".so.")[2] for path in library_files(root)]
    versions = [version_numbers(name) for name in names]
    return dotted(max((version for version in versions if len(version) > 1), key=lambda v: (v[:2], len(v)), default=None))
