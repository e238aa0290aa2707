"""Diagnose a machine: supported features, obstacles with the command that fixes each, and warnings about a slow or small setup."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from edgeprune.device.gpu import GpuTrial
from edgeprune.device.machine import BINDING, Machine, dotted
from edgeprune.device.memory import NO_ZRAM
from edgeprune.device.onnxruntime_cuda import CUDA as _PROVIDER
from edgeprune.device.onnxruntime_cuda import INSTALL
from edgeprune.device.system import version_numbers
from edgeprune.errors import install_command
from edgeprune.targets import TARGETS

LITTLE_MEMORY = 2048  # MiB: a vision encoder, a 0.5B decoder in 16 bits, and activations
SMALL_BOARD = 8192  # MiB
SMALL_CMA = 900  # MiB; cma=950M gives 950, the default on an Orin Nano is 256
_LARGER_CMA = "sudo sed -i '/^\\s*APPEND/ s/$/ cma=950M/' /boot/extlinux/extlinux.conf && sudo reboot"
_MORE_SWAP = "sudo fallocate -l 8G /swapfile && sudo chmod 600 /swapfile && sudo mkswap /swapfile && sudo swapon /swapfile"

OLDEST_TENSORRT = min(target.tensorrt for target in TARGETS.values() if target.tensorrt is not None)
UPGRADE_JETPACK = (
    "sudo sed -i 's/r36\\.[0-9]*/r36.4/' /etc/apt/sources.list.d/nvidia-l4t-apt-source.list && "
    "sudo apt update && sudo apt dist-upgrade && sudo reboot"
)
_EXPORT_PACKAGES = ("torch", "transformers", "onnx", "onnxscript")  # optimum is for its own command line alone
_CPU, _CUDA, _BUILD, _ENGINES, _EXPORTS = (
    "run bundles on the CPU",
    "ONNX Runtime on CUDA",
    "build TensorRT engines",
    "run TensorRT engines",
    "export and calibrate",
)
_CPU_WHEEL = "pip uninstall onnxruntime-gpu && pip install --force-reinstall onnxruntime"  # both packages install the same module
_NO_DRIVER = "no NVIDIA driver is loaded, and an engine fits one GPU and one TensorRT only"


@dataclass(frozen=True)
class DeviceWarning:
    """A warning, and the command that resolves it if there is one."""

    what: str
    remedy: str = ""


def cautions_of(machine: Machine) -> tuple[DeviceWarning, ...]:
    """Return warnings about a machine's speed, memory and software release."""
    return (*_speed_warnings(machine), *_memory_warnings(machine), *_release_warnings(machine))


def _speed_warnings(machine: Machine) -> Iterator[DeviceWarning]:
    if machine.byte_products is False:
        what = "This CPU has no instructions for products of 8-bit integers (VNNI): int8 bundles run slower kernels."
        yield DeviceWarning(what)
    if not machine.is_jetson:
        return
    best = machine.mode.best
    if machine.mode.is_best is None:
        yield DeviceWarning(f"It cannot be told whether power mode {machine.mode} is the fastest.", "sudo nvpmodel -q")
    elif not machine.mode.is_best and best is not None:
        yield DeviceWarning(f"The power mode is {machine.mode}, not the fastest, {best[1]}.", f"sudo nvpmodel -m {best[0]}")
    if machine.clocks_pinned is None:
        yield DeviceWarning("It cannot be told whether the clocks are pinned.", "sudo jetson_clocks --show")
    elif not machine.clocks_pinned:
        yield DeviceWarning("The clocks are not pinned: times will vary, and short answers are slower.", "sudo jetson_clocks")


def _memory_warnings(machine: Machine) -> Iterator[DeviceWarning]:
    memory = machine.memory
    if memory.available is not None and memory.available < LITTLE_MEMORY:
        remedy = "sudo systemctl isolate multi-user.target" if machine.is_jetson else ""
        yield DeviceWarning(f"Only {memory.available} MiB of memory are free.", remedy)
    if memory.zram_total and machine.is_jetson:
        what = f"{memory.zram_total} MiB of the swap are zram, which is compressed memory: no engine can be built or run in it."
        yield DeviceWarning(what, NO_ZRAM)
    if 0 in (memory.swap_total, memory.disk_swap_total) and memory.total is not None and memory.total <= SMALL_BOARD:
        what = f"There is no swap on a disk beside {memory.total} MiB of memory; building an engine may need it."
        yield DeviceWarning(what, _MORE_SWAP)
    if machine.module == "Orin Nano" and memory.cma_total is not None and memory.cma_total < SMALL_CMA:
        what = f"The contiguous memory pool has {memory.cma_total} MiB; building an engine on an Orin Nano may need more."
        yield DeviceWarning(what, _LARGER_CMA)


def _release_warnings(machine: Machine) -> Iterator[DeviceWarning]:
    if not machine.is_jetson:
        return
    pack, python = machine.jetpack, machine.software.version
    if machine.l4t is None:
        yield DeviceWarning("The L4T release is unknown; in a container, mount /etc/nv_tegra_release.")
    elif pack is None:
        yield DeviceWarning(f"L4T {dotted(machine.l4t)} belongs to no JetPack that EdgePrune knows.")
    elif pack.name == "6.0":
        yield DeviceWarning("JetPack 6.0 has TensorRT 8.6, and 10.3 is needed: upgrade to JetPack 6.2.")
    if pack is not None and python != pack.python:
        what = (
            f"JetPack {pack.name} has Python {dotted(pack.python)}, this is {dotted(python)}: TensorRT's package is for the former."
        )
        yield DeviceWarning(what, f"python{dotted(pack.python)} -m venv --system-site-packages VENV")


@dataclass(frozen=True)
class DeviceFeature:
    """A feature and whether it is available; `reason` names what provides or prevents it, `remedy` removes what does."""

    name: str
    able: bool
    reason: str
    remedy: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """The features and warnings of a machine."""

    machine: Machine
    abilities: tuple[DeviceFeature, ...]
    cautions: tuple[DeviceWarning, ...]

    @property
    def can_run(self) -> bool:
        """Whether a bundle can be run here, on the CPU or with engines."""
        return any(ability.able for ability in self.abilities if ability.name in (_CPU, _ENGINES))

    def to_dict(self) -> dict[str, Any]:
        """Return the diagnosis as JSON data."""
        return {
            "can_run": self.can_run,
            "machine": self.machine.to_dict(),
            "abilities": [asdict(ability) for ability in self.abilities],
            "cautions": [asdict(caution) for caution in self.cautions],
        }


def diagnose(
    machine: Machine, try_gpu: Callable[[], GpuTrial] | None = None, try_cuda: Callable[[], GpuTrial] | None = None
) -> Diagnosis:
    """Return the available features and the warnings of a machine.

    `try_gpu`: called if TensorRT is installed. `try_cuda`: called if ONNX Runtime offers CUDA. None: not tried.
    """
    trial = None if try_gpu is None or _tensorrt_blocked(_ENGINES, machine) is not None else try_gpu()
    abilities = (
        _cpu_feature(machine),
        _cuda_blocked(machine) or _cuda_feature(machine, None if try_cuda is None else try_cuda()),
        _build_feature(machine, trial),
        _engines_feature(machine, trial),
        _export_feature(machine),
    )
    return Diagnosis(machine, abilities, cautions_of(machine))


def _cpu_feature(machine: Machine) -> DeviceFeature:
    if "CPUExecutionProvider" in machine.software.providers:
        return DeviceFeature(_CPU, True, f"ONNX Runtime {_onnxruntime_version(machine)}")
    if _onnxruntime_version(machine):
        return DeviceFeature(
            _CPU, False, "ONNX Runtime is installed but cannot be imported", "pip install --force-reinstall onnxruntime"
        )
    return DeviceFeature(_CPU, False, "ONNX Runtime is not installed", "pip install onnxruntime")


def _cuda_blocked(machine: Machine) -> DeviceFeature | None:
    if not machine.gpu:
        return DeviceFeature(_CUDA, False, "no NVIDIA driver is loaded")
    if has_foreign_wheel(machine):
        return DeviceFeature(_CUDA, False, "this onnxruntime-gpu has no kernels for a Jetson", _CPU_WHEEL)
    if _PROVIDER in machine.software.providers:
        return None
    if machine.is_jetson:
        return DeviceFeature(
            _CUDA, False, "ONNX Runtime offers no CUDA provider; its Jetson wheels are on NVIDIA's Jetson package index"
        )
    return DeviceFeature(_CUDA, False, "ONNX Runtime offers no CUDA provider", f"pip uninstall onnxruntime && {INSTALL}")


def _cuda_feature(machine: Machine, trial: GpuTrial | None) -> DeviceFeature:
    # A list of providers says what ONNX Runtime was built for, not whether their libraries are there.
    if trial is not None and trial.error:
        return DeviceFeature(_CUDA, False, trial.error, trial.remedy)
    how = "offers CUDA, which was not tried" if trial is None else "multiplied on CUDA"
    return DeviceFeature(_CUDA, True, f"ONNX Runtime {_onnxruntime_version(machine)} {how}: edgeprune run BUNDLE --provider cuda")


def _build_feature(machine: Machine, trial: GpuTrial | None) -> DeviceFeature:
    if (blocked := _tensorrt_blocked(_BUILD, machine) or _trial_failed(_BUILD, trial)) is not None:
        return blocked
    if not machine.onnx_parser:
        major = version_numbers(machine.tensorrt)[0]
        return DeviceFeature(_BUILD, False, "TensorRT's ONNX parser is not installed", f"sudo apt install libnvonnxparsers{major}")
    return DeviceFeature(
        _BUILD,
        True,
        f"TensorRT {machine.tensorrt}: edgeprune export MODEL -o BUNDLE --target {_target_name(machine)}, edgeprune build BUNDLE",
    )


def _engines_feature(machine: Machine, trial: GpuTrial | None) -> DeviceFeature:
    if (blocked := _tensorrt_blocked(_ENGINES, machine) or _trial_failed(_ENGINES, trial)) is not None:
        return blocked
    tried = f" (tried with {trial.cuda})" if trial is not None else ""
    reason = f"TensorRT {machine.tensorrt}{tried}, engines built on this device: edgeprune run BUNDLE --provider tensorrt"
    return DeviceFeature(_ENGINES, True, reason)


def _trial_failed(name: str, trial: GpuTrial | None) -> DeviceFeature | None:
    return DeviceFeature(name, False, trial.error, trial.remedy) if trial is not None and trial.error else None


def _tensorrt_blocked(name: str, machine: Machine) -> DeviceFeature | None:
    if not machine.gpu:
        return DeviceFeature(name, False, _NO_DRIVER)
    bundled = machine.jetpack.tensorrt if machine.jetpack else OLDEST_TENSORRT
    if machine.tensorrt is None and bundled >= OLDEST_TENSORRT:
        remedy = f"sudo apt update && sudo apt install tensorrt {BINDING}" if machine.is_jetson else "pip install tensorrt"
        return DeviceFeature(name, False, "TensorRT is not installed", remedy)
    if version_numbers(machine.tensorrt)[:2] < OLDEST_TENSORRT:
        found = machine.tensorrt or f"{dotted(bundled)} of JetPack {machine.jetpack.name if machine.jetpack else ''}"
        reason = f"TensorRT {found} is too old: {dotted(OLDEST_TENSORRT)} is needed"
        return DeviceFeature(name, False, reason, _upgrade_command(machine))
    if "tensorrt" not in machine.software.packages:
        return _binding_missing(name, machine)
    return None


def _binding_missing(name: str, machine: Machine) -> DeviceFeature:
    needed_python = machine.jetpack.python if machine.jetpack else machine.software.version
    python = f"python{dotted(needed_python)}"
    venv = f"{python} -m venv --system-site-packages VENV"
    install = "" if BINDING in machine.debs else f"sudo apt install {BINDING}"
    if machine.software.version != needed_python:
        reason = f"TensorRT's Python package is for Python {dotted(needed_python)}, this is {dotted(machine.software.version)}"
        return DeviceFeature(name, False, reason, " && ".join(filter(None, (install, venv))))
    if install:
        remedy = f"{install} && {venv}" if machine.software.isolated else install
        return DeviceFeature(name, False, "TensorRT's Python package is not installed", remedy)
    return DeviceFeature(name, False, "this virtual environment does not see the system's TensorRT package", venv)


def _upgrade_command(machine: Machine) -> str:
    if machine.jetpack is not None and machine.jetpack.name == "6.0":
        return UPGRADE_JETPACK
    return "" if machine.is_jetson else "pip install --upgrade tensorrt"


def _export_feature(machine: Machine) -> DeviceFeature:
    missing = [package for package in _EXPORT_PACKAGES if package not in machine.software.packages]
    if missing:
        return DeviceFeature(_EXPORTS, False, f"{', '.join(missing)} not installed", install_command("export"))
    return DeviceFeature(_EXPORTS, True, f"torch {machine.software.packages['torch']}")


def has_foreign_wheel(machine: Machine) -> bool:
    """Return whether a Jetson has PyPI's onnxruntime-gpu, whose kernels are for other GPUs.

    That wheel needs Python 3.11 or newer and, unlike Jetson wheels, has no TensorRT provider.
    """
    software = machine.software
    foreign = "onnxruntime-gpu" in software.packages and "TensorrtExecutionProvider" not in software.providers
    return machine.is_jetson and foreign and software.version >= (3, 11)


def _onnxruntime_version(machine: Machine) -> str:
    packages = machine.software.packages
    return packages.get("onnxruntime-gpu") or packages.get("onnxruntime") or ""


def _target_name(machine: Machine) -> str:
    return machine.target.name if machine.target else "onnxruntime"
