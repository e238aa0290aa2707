"""What a Jetson says of itself: module, L4T release, JetPack, power mode, clocks. Pure functions of text.

The table: NVIDIA's JetPack release notes. A parser returns None for what is absent or of a form that it does not know.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from edgeprune.device.system import version_numbers


@dataclass(frozen=True)
class JetPack:
    """One release: its `name`, the first L4T release that it is made of, and the CUDA, TensorRT and Python that it carries."""

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

# In this order: part numbers name the module itself, the words of a model may name a carrier board.
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
    """The mode of nvpmodel, by number and name, and all the `modes` (number, name) of this module's nvpmodel.conf."""

    number: int | None
    name: str | None
    modes: tuple[tuple[int, str], ...] = ()

    @property
    def best(self) -> tuple[int, str] | None:
        """The mode without a limit (MAXN_SUPER before MAXN), or else that of the most watts; None when no mode is known."""
        return max(self.modes, key=lambda mode: _rank(mode[1]), default=None)

    @property
    def is_best(self) -> bool | None:
        """Whether no faster mode is configured; None when it cannot be known."""
        if self.best is None:
            return True if (self.name or "").upper() == "MAXN_SUPER" else None
        return None if self.number is None else self.number == self.best[0]

    def __str__(self) -> str:
        if self.name is None:
            return "unknown" if self.number is None else f"mode {self.number}"
        return self.name if self.number is None else f"{self.name} (mode {self.number})"


def parse_module(model: str | None, compatible: str | None = None) -> str | None:
    """Return the module, such as "Orin Nano", that the device tree's `model` and `compatible` name; None for other machines."""
    text = f"{compatible or ''} {model or ''}".lower()
    return next((module for pattern, module in _MODULES if pattern in text), None)


def parse_release(text: str | None) -> tuple[int, ...] | None:
    """Return (36, 4, 3) of the text of /etc/nv_tegra_release, in its long and its short form."""
    found = _RELEASE.search(text or "")
    if not found:
        return None
    return (int(found[1]), *version_numbers(found[2] or found[3]))


def jetpack_of(l4t: tuple[int, ...] | None) -> JetPack | None:
    """Return the JetPack of an L4T release: the newest in the table that is not newer, of the same major and minor number."""
    if l4t is None:
        return None
    release = (*l4t, 0, 0)[:3]
    return next((pack for pack in reversed(JETPACKS) if pack.l4t[:2] == release[:2] and pack.l4t <= release), None)


def parse_modes(text: str | None) -> tuple[tuple[int, str], ...]:
    """Return the modes (number, name) of the text of nvpmodel.conf."""
    modes = []
    for attributes in _MODEL_LINE.findall(text or ""):
        number, name = re.search(r"\bID=(\d{1,4})\b", attributes), re.search(r"\bNAME=(\S+)", attributes)
        if number and name:
            modes.append((int(number[1]), name[1]))
    return tuple(modes)


def parse_mode(query: str | None, status: str | None, configuration: str | None) -> PowerMode:
    """Return the mode that `nvpmodel -q` prints, or else the one in /var/lib/nvpmodel/status, named by nvpmodel.conf."""
    modes = parse_modes(configuration)
    asked, kept = _MODE.search(query or ""), re.search(r"\bpmode:(\d{1,4})\b", status or "")
    number = asked[2] if asked else kept[1] if kept else None
    name = asked[1] if asked else None
    if number is None:
        return PowerMode(next((n for n, known in modes if known == name), None), name, modes)
    return PowerMode(int(number), name or dict(modes).get(int(number)), modes)


def parse_clocks(text: str | None) -> bool | None:
    """Return whether `jetson_clocks --show` shows every online CPU and the GPU pinned; None when it shows no clock."""
    found = [(low, high) for _, before, low, high in _CLOCK_LINE.findall(text or "") if "Online=0" not in before]
    return all(low == high for low, high in found) if found else None


def _rank(name: str) -> tuple[int, int]:
    watts = re.search(r"(\d{1,4})W", name.upper())
    unlimited = 2 if name.upper() == "MAXN_SUPER" else 1 if name.upper().startswith("MAXN") else 0
    return unlimited, int(watts[1]) if watts else 0
