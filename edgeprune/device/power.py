"""Power from a Jetson's INA sensors or from tegrastats, and a counter that integrates it to energy.

The parser reads memory, GPU load, temperatures and power from the tegrastats lines of JetPack 7, 6, 5 and earlier.

If a module has a total input rail, that rail is used. AGX Orin has none: its total is the sum of its parallel rails, of which
VIN_SYS_5V0 is only one. Thor's developer kit measures its total input, carrier board included, as VIN, which INA3221 does not have.
"""

from __future__ import annotations

import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from edgeprune.device.system import read_number, read_text

_RAM = re.compile(r"\bRAM (\d{1,9})/(\d{1,9})MB")
_SWAP = re.compile(r"\bSWAP (\d{1,9})/(\d{1,9})MB")
_LOAD = re.compile(r"\bGR3D(?:_FREQ)? (\d{1,3})%")  # Thor reports only frequencies: "GR3D_FREQ @[1000,1000,1000]"
_SENSOR = re.compile(r"(?<![\w%])([A-Za-z]\w*)@(-?\d{1,9}(?:\.\d{1,9})?)C\b")
# Current, average and (JetPack 7.2) peak power. Old lines have no unit; "RAM 2257/30536MB" must not match as one.
_RAIL = re.compile(r"(?<!\S)([A-Z][A-Z0-9_]*) (?:(-?\d{1,9})mW(?:/-?\d+mW)*|(-?\d{1,9})/-?\d+)(?!\S)")
_OFF = -256.0  # degrees reported for a part of the chip that is powered off

_INPUTS = ("VDD_IN", "VIN", "POM_5V_IN")  # total input rails of different boards
_INCLUDED_IN_OTHERS = ("VDDQ_VDD2_1V8AO",)  # supplied by VIN_SYS_5V0, which already includes it
_UNUSED = ("", "NC", "sum of shunt voltages")
_CHANNELS = (1, 2, 3)


@dataclass(frozen=True)
class Tegrastats:
    """One tegrastats line: memory in MiB, load in percent, mW by rail, degrees Celsius by sensor; None for missing values."""

    ram_used: int | None
    ram_total: int | None
    swap_used: int | None
    swap_total: int | None
    gpu_load: int | None
    rails: Mapping[str, int]
    temperatures: Mapping[str, float]


def parse_tegrastats(line: str) -> Tegrastats:
    """Parse a tegrastats line. Power is the current value; sensors that are off are omitted."""
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


@dataclass(frozen=True)
class Power:
    """Power in milliwatts, and the rails that it is the sum of."""

    milliwatts: float
    rails: tuple[str, ...]


class PowerSource(Protocol):
    """A source of power readings."""

    name: str

    def read(self) -> Power | None:
        """Return the current power; None if there is no reading."""
        ...

    def close(self) -> None:
        """Release the source's resources."""
        ...


def total_power(rails: Mapping[str, float]) -> Power | None:
    """Return the total power of rails in mW: the total input rail, else the sum of the parallel rails; None without rails."""
    total = next((name for name in _INPUTS if name in rails), None)
    if total is not None:
        return Power(rails[total], (total,))
    parts = {name: value for name, value in rails.items() if name not in _INCLUDED_IN_OTHERS}
    return Power(sum(parts.values()), tuple(parts)) if parts else None


class Ina3221:
    """The module's INA3221 sensors, read from hwmon below `root`."""

    name = "INA3221"

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._channels = _labelled_channels(root)

    def rails(self) -> dict[str, float]:
        """Return the power of every labelled rail in mW. Disabled channels cannot be read and are omitted."""
        found = {}
        for label, chip, channel in self._channels:
            millivolts = read_number(self._root, f"{chip}/in{channel}_input")
            milliamperes = read_number(self._root, f"{chip}/curr{channel}_input")
            if millivolts is not None and milliamperes is not None:
                found[label] = millivolts * milliamperes / 1000
        return found

    def read(self) -> Power | None:
        """Return the current power."""
        return total_power(self.rails())

    def close(self) -> None:
        """Do nothing: no file stays open."""


class TegrastatsPower:
    """A tegrastats process whose latest line is the reading."""

    name = "tegrastats"

    def __init__(self, command: Sequence[str] = ("tegrastats", "--interval", "100")) -> None:
        self._process = subprocess.Popen(
            list(command), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL, text=True, errors="replace"
        )
        self._last: Power | None = None
        self._first = threading.Event()
        self._reader = threading.Thread(target=self._follow, daemon=True)
        self._reader.start()

    def _follow(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._last = total_power(parse_tegrastats(line).rails) or self._last
            self._first.set()
        self._first.set()  # the process ended: release waiting readers

    def read(self) -> Power | None:
        """Return the power of the latest line; wait up to a second for the first line."""
        self._first.wait(1.0)
        return self._last

    def close(self) -> None:
        """Stop the process."""
        self._process.terminate()
        self._process.wait()
        self._reader.join()
        if self._process.stdout is not None:
            self._process.stdout.close()


def find_power_source(
    root: Path = Path("/"), tegrastats: Sequence[str] = ("tegrastats", "--interval", "100")
) -> PowerSource | None:
    """Return the INA3221 sensors or else tegrastats, if it gives a reading; None on a machine without either."""
    if (sensors := Ina3221(root)).read() is not None:
        return sensors
    try:
        process = TegrastatsPower(tegrastats)
    except OSError:
        return None
    if process.read() is not None:
        return process
    process.close()
    return None


@dataclass
class BlockEnergy:
    """Energy of a `with` block in joules, set at its end; None if the sample at its start or end is missing."""

    joules: float | None = None


class EnergyCounter:
    """Counts the energy of the whole machine from construction until `close`, idle power and other processes included.

    A thread samples the power every `interval_s` seconds; the energy is the trapezoidal integral. A failed reading is skipped, and
    one trapezoid spans the gap. Without a source, the energy is None.
    """

    def __init__(
        self, source: PowerSource | None, *, interval_s: float = 0.05, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._source, self._interval, self._clock = source, interval_s, clock
        self._last: tuple[float, float] | None = None  # seconds, milliwatts
        self._total = 0.0
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        if source is not None:
            self._thread.start()

    @property
    def joules(self) -> float | None:
        """Energy so far, including a sample taken now; None if there is no reading."""
        with self._lock:
            power = None if self._source is None else self._source.read()
            if power is None:
                return None
            seconds, milliwatts = now = self._clock(), power.milliwatts
            if self._last is not None:
                self._total += (seconds - self._last[0]) * (milliwatts + self._last[1]) / 2000
            self._last = now
            return self._total

    @contextmanager
    def measure(self) -> Iterator[BlockEnergy]:
        """Measure the energy of a block."""
        block, before = BlockEnergy(), self.joules
        yield block
        after = self.joules
        block.joules = None if before is None or after is None else after - before

    def close(self) -> None:
        """Stop counting. The source stays open; its owner closes it."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self._interval):
            _ = self.joules


def _labelled_channels(root: Path) -> list[tuple[str, str, int]]:
    # (label, folder of the chip, channel), sorted by chip.
    found = []
    for chip in sorted(root.glob("sys/class/hwmon/hwmon*")):
        folder = str(chip.relative_to(root))
        if read_text(root, f"{folder}/name") != "ina3221":
            continue
        labels = ((read_text(root, f"{folder}/in{channel}_label") or "", folder, channel) for channel in _CHANNELS)
        found += [entry for entry in labels if entry[0] not in _UNUSED]
    return found
