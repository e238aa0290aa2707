"""Lines of tegrastats: memory, GPU load, temperatures and power, in the forms of JetPack 5, 6 and 7 and those before."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

_RAM = re.compile(r"\bRAM (\d{1,9})/(\d{1,9})MB")
_SWAP = re.compile(r"\bSWAP (\d{1,9})/(\d{1,9})MB")
_LOAD = re.compile(r"\bGR3D(?:_FREQ)? (\d{1,3})%")  # Thor names frequencies alone: "GR3D_FREQ @[1000,1000,1000]"
_SENSOR = re.compile(r"(?<![\w%])([A-Za-z]\w*)@(-?\d{1,9}(?:\.\d{1,9})?)C\b")
# Now, average and (JetPack 7.2) peak. Old lines have no unit; "RAM 2257/30536MB" must not pass for one of them.
_RAIL = re.compile(r"(?<!\S)([A-Z][A-Z0-9_]*) (?:(-?\d{1,9})mW(?:/-?\d+mW)*|(-?\d{1,9})/-?\d+)(?!\S)")
_OFF = -256.0  # degrees of a sensor whose part of the chip is switched off


@dataclass(frozen=True)
class Tegrastats:
    """One line: mebibytes, percent, milliwatts by rail and degrees Celsius by sensor; None for what the line does not say."""

    ram_used: int | None
    ram_total: int | None
    swap_used: int | None
    swap_total: int | None
    gpu_load: int | None
    rails: Mapping[str, int]
    temperatures: Mapping[str, float]


def parse_tegrastats(line: str) -> Tegrastats:
    """Return what a line says. Power is the momentary value; sensors that are off are left out."""
    ram, swap, load = _RAM.search(line), _SWAP.search(line), _LOAD.search(line)
    degrees = {name: float(value) for name, value in _SENSOR.findall(line)}
    return Tegrastats(
        ram_used=int(ram[1]) if ram else None,
        ram_total=int(ram[2]) if ram else None,
        swap_used=int(swap[1]) if swap else None,
        swap_total=int(swap[2]) if swap else None,
        gpu_load=int(load[1]) if load else None,
        rails={name: int(with_unit or without) for name, with_unit, without in _RAIL.findall(line)},
        temperatures={name: value for name, value in degrees.items() if value > _OFF},
    )
