"""Jetson modules: peak arithmetic, memory bandwidth and memory size, and parsers for what a board reports about itself.

Peak arithmetic is SMs times clock times `_PER_CLOCK`. It agrees with the GPU TOPS of the data sheets (dense INT8: 20, 33 for Orin
Nano; 30, 38 for Orin NX; 85 for AGX Orin; dense FP4: 1035, 600 for T5000, T4000).

Parsers for module, L4T release, JetPack, power mode and clocks are pure functions of text. They return None for text that is
missing or has an unknown format. The table of releases is from NVIDIA's JetPack release notes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from edgeprune.device.system import version_numbers
from edgeprune.errors import UsageError
from edgeprune.targets import TARGETS, Target

# Dense operations per SM and clock, in thousands. Orin: 170 sparse INT8 TOPS on 16 SMs at 1.3 GHz are 8.17 per SM and GHz; dense
# is half of sparse, FP16 half of INT8, TF32 (used by engines for float32) half of FP16. Thor: 2070 sparse FP4 TFLOPS on 20 SMs at
# 1.575 GHz; FP8 is half of FP4, FP16 half of FP8, and INT8 is assumed equal to FP8.
_PER_CLOCK = {
    (8, 7): {"fp32": 1.024, "fp16": 2.048, "int8": 4.096},
    (11, 0): {"fp32": 4.096, "fp16": 8.192, "int8": 16.384, "fp8": 16.384, "fp4": 32.768},
}


@dataclass(frozen=True)
class JetPack:
    """A JetPack release: its `name`, first L4T release, and its versions of CUDA, TensorRT and Python."""

    name: str
    l4t: tuple[int, ...]
    cuda: str
    tensorrt: tuple[int, ...]
    python: tuple[int, int]


JETPACKS = (
    JetPack("6.0", (36, 3), "12.2", (8, 6), (3, 10)),
    JetPack("6.1", (36, 4, 0), "12.6", (10, 3), (3, 10)),
    JetPack("6.2", (36, 4, 3), "12.6", (10, 3), (3, 10)),
    JetPack("6.2.1", (36, 4, 4), "12.6", (10, 3), (3, 10)),
    JetPack("6.2.2", (36, 5), "12.6", (10, 3), (3, 10)),
    JetPack("7.0", (38, 2), "13.0", (10, 13), (3, 12)),
    JetPack("7.1", (38, 4), "13.0", (10, 13), (3, 12)),
    JetPack("7.2", (39, 2, 0), "13.2", (10, 16), (3, 12)),
    JetPack("7.2.1", (39, 2, 1), "13.2", (10, 16), (3, 12)),
)

# Order matters: part numbers identify the module, whereas a model name may refer to the carrier board.
_MODULES = (
    ("p3767-0000", "Orin NX"),
    ("p3767-0001", "Orin NX"),
    ("p3767-0003", "Orin Nano"),
    ("p3767-0004", "Orin Nano"),
    ("p3767-0005", "Orin Nano"),
    ("p3701", "AGX Orin"),
    ("p3834", "Thor"),
    ("orin nano", "Orin Nano"),
    ("orin nx", "Orin NX"),
    ("agx orin", "AGX Orin"),
    ("thor", "Thor"),
    ("xavier nx", "Xavier NX"),
    ("agx xavier", "AGX Xavier"),
    ("jetson nano", "Nano"),
    ("jetson tx2", "TX2"),
    ("tegra234", "Orin"),
    ("tegra264", "Thor"),
)
_RELEASE = re.compile(r"\bR(\d{1,4})\b(?:\.(\d+(?:\.\d+)*)|\s*\(release\)(?:\s*,\s*REVISION:\s*(\d+(?:\.\d+)*))?)", re.IGNORECASE)
_MODE = re.compile(r"NV Power Mode[ \t]*:[ \t]*(\S+)(?:\s+(\d{1,4})\b)?")
_MODEL_LINE = re.compile(r"^[ \t]*<[ \t]*POWER_MODEL\b([^>\n]*)>", re.MULTILINE)
_CLOCK_LINE = re.compile(r"^\s*(cpu\d+:|GPU)(.*)\bMinFreq=(\d+)\s+MaxFreq=(\d+)", re.MULTILINE)


@dataclass(frozen=True)
class PowerMode:
    """The current nvpmodel mode by number and name, and all `modes` (number, name) in nvpmodel.conf."""

    number: int | None
    name: str | None
    modes: tuple[tuple[int, str], ...] = ()

    @property
    def best(self) -> tuple[int, str] | None:
        """The unlimited mode (MAXN_SUPER before MAXN), else the one with the most watts; None if no mode is known."""
        return max(self.modes, key=lambda mode: _speed_rank(mode[1]), default=None)

    @property
    def is_best(self) -> bool | None:
        """Whether the current mode is the fastest; None if unknown."""
        if self.best is None:
            return True if (self.name or "").upper() == "MAXN_SUPER" else None
        return None if self.number is None else self.number == self.best[0]

    def __str__(self) -> str:
        if self.name is None:
            return "unknown" if self.number is None else f"mode {self.number}"
        return self.name if self.number is None else f"{self.name} (mode {self.number})"


def parse_module(model: str | None, compatible: str | None = None) -> str | None:
    """Return the module, such as "Orin Nano", from the device tree's `model` and `compatible`; None for other machines."""
    text = f"{compatible or ''} {model or ''}".lower()
    return next((module for pattern, module in _MODULES if pattern in text), None)


def parse_release(text: str | None) -> tuple[int, ...] | None:
    """Return the L4T release, such as (36, 4, 3), from the long or short form of /etc/nv_tegra_release."""
    found = _RELEASE.search(text or "")
    if not found:
        return None
    return (int(found[1]), *version_numbers(found[2] or found[3]))


def jetpack_of(l4t: tuple[int, ...] | None) -> JetPack | None:
    """Return the JetPack of an L4T release: the newest in the table with the same major and minor number that is not newer."""
    if l4t is None:
        return None
    release = (*l4t, 0, 0)[:3]
    return next((pack for pack in reversed(JETPACKS) if pack.l4t[:2] == release[:2] and pack.l4t <= release), None)


def parse_modes(text: str | None) -> tuple[tuple[int, str], ...]:
    """Return the modes (number, name) in the text of nvpmodel.conf."""
    modes = []
    for attributes in _MODEL_LINE.findall(text or ""):
        number, name = re.search(r"\bID=(\d{1,4})\b", attributes), re.search(r"\bNAME=(\S+)", attributes)
        if number and name:
            modes.append((int(number[1]), name[1]))
    return tuple(modes)


def parse_mode(query: str | None, status: str | None, configuration: str | None) -> PowerMode:
    """Return the mode from the output of `nvpmodel -q`, else from /var/lib/nvpmodel/status; names are from nvpmodel.conf."""
    modes = parse_modes(configuration)
    queried, stored = _MODE.search(query or ""), re.search(r"\bpmode:(\d{1,4})\b", status or "")
    number = queried[2] if queried else stored[1] if stored else None
    name = queried[1] if queried else None
    if number is None:
        return PowerMode(next((n for n, known in modes if known == name), None), name, modes)
    return PowerMode(int(number), name or dict(modes).get(int(number)), modes)


def parse_clocks(text: str | None) -> bool | None:
    """Return whether the output of `jetson_clocks --show` has every online CPU and the GPU pinned; None without clocks."""
    found = [(low, high) for _, before, low, high in _CLOCK_LINE.findall(text or "") if "Online=0" not in before]
    return all(low == high for low, high in found) if found else None


@dataclass(frozen=True)
class Module:
    """A module in one power mode: `clock` of the GPU in GHz, memory `bandwidth` in GB/s, `ram` in GiB.

    `sm` is the compute capability. An engine does not load on a GPU of another one.
    """

    name: str
    title: str
    sm: tuple[int, int]
    sms: int
    clock: float
    bandwidth: float
    ram: int

    def tflops(self, arithmetic: str = "fp16") -> float:
        """Return the dense peak in 10^12 operations per second; raise UsageError if the module lacks the arithmetic."""
        rates = _PER_CLOCK[self.sm]
        if arithmetic not in rates:
            raise UsageError(f"{self.title} has no {arithmetic} arithmetic.", hint=f"It has: {', '.join(rates)}.")
        return self.sms * self.clock * rates[arithmetic]

    def has(self, arithmetic: str) -> bool:
        """Return whether the module has an arithmetic."""
        return arithmetic in _PER_CLOCK[self.sm]

    @property
    def target(self) -> Target:
        """What reads graphs on it with the oldest JetPack that is supported."""
        return TARGETS["jetpack6" if self.sm == (8, 7) else "jetpack7"]

    @property
    def ram_bytes(self) -> int:
        """Memory in bytes, shared by CPU and GPU."""
        return self.ram << 30


# SMs, clocks, bandwidth and memory are from NVIDIA's data sheets, power modes from the nvpmodel tables of Jetson Linux 35 and 36
# (GPU MAX_FREQ; TPC_PG_MASK 252 leaves 4 SMs, 240 leaves 8; EMC at 2133 MHz is 68 GB/s on 128 bits, at 3199 MHz 102). Orin Nano and
# NX are in their fastest ("super") mode unless the name has another. A name without capacity means the largest module of its kind.
# The clock of T4000 is the least certain figure: it was chosen to give the published 1200 sparse FP4 TFLOPS.
MODULES = {
    module.name: module
    for module in (
        Module("orin-nano", "Orin Nano 8GB (MAXN_SUPER)", (8, 7), 8, 1.02, 102.0, 8),
        Module("orin-nano-25w", "Orin Nano 8GB (25 W)", (8, 7), 8, 0.918, 102.0, 8),
        Module("orin-nano-15w", "Orin Nano 8GB (15 W)", (8, 7), 8, 0.625, 68.0, 8),
        Module("orin-nano-7w", "Orin Nano 8GB (7 W)", (8, 7), 4, 0.408, 68.0, 8),
        Module("orin-nx", "Orin NX 16GB (MAXN_SUPER)", (8, 7), 8, 1.173, 102.4, 16),
        Module("orin-nx-maxn", "Orin NX 16GB (MAXN, not super)", (8, 7), 8, 0.918, 102.4, 16),
        Module("orin-nx-8gb", "Orin NX 8GB (MAXN_SUPER)", (8, 7), 8, 1.173, 102.4, 8),
        Module("agx-orin", "AGX Orin 64GB (MAXN)", (8, 7), 16, 1.3, 204.8, 64),
        Module("agx-orin-32gb", "AGX Orin 32GB (MAXN)", (8, 7), 14, 0.93, 204.8, 32),
        Module("thor", "Thor T5000 (MAXN)", (11, 0), 20, 1.575, 273.0, 128),
        Module("thor-t4000", "Thor T4000 (MAXN)", (11, 0), 12, 1.53, 273.0, 64),
    )
}


def module_named(name: str) -> Module:
    """Return a module by name; raise UsageError for an unknown name."""
    if name not in MODULES:
        raise UsageError(
            f"Unknown device {name!r}.", hint=f"Known: {', '.join(MODULES)}; or measure yours: edgeprune profile BUNDLE -o FILE"
        )
    return MODULES[name]


def _speed_rank(name: str) -> tuple[int, int]:
    watts = re.search(r"(\d{1,4})W", name.upper())
    unlimited = 2 if name.upper() == "MAXN_SUPER" else 1 if name.upper().startswith("MAXN") else 0
    return unlimited, int(watts[1]) if watts else 0
