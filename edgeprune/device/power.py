"""Power and energy: the INA sensors of a Jetson or the output of tegrastats, and a counter that integrates power over time.

The parser reads memory, GPU load, temperatures and power from the tegrastats lines of JetPack 5, 6, 7 and earlier.

A module with one input rail is read there. AGX Orin has no such rail: its total is the sum of the rails that are fed side by
side, of which VIN_SYS_5V0 is only one. Thor's developer kit measures its whole input, carrier board included, as VIN, which
INA3221 does not see.
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
_LOAD = re.compile(r"\bGR3D(?:_FREQ)? (\d{1,3})%")  # Thor names frequencies alone: "GR3D_FREQ @[1000,1000,1000]"
_SENSOR = re.compile(r"(?<![\w%])([A-Za-z]\w*)@(-?\d{1,9}(?:\.\d{1,9})?)C\b")
# Now, average and (JetPack 7.2) peak. Old lines have no unit; "RAM 2257/30536MB" must not pass for one of them.
_RAIL = re.compile(r"(?<!\S)([A-Z][A-Z0-9_]*) (?:(-?\d{1,9})mW(?:/-?\d+mW)*|(-?\d{1,9})/-?\d+)(?!\S)")
_OFF = -256.0  # degrees of a sensor whose part of the chip is switched off

_INPUTS = ("VDD_IN", "VIN", "POM_5V_IN")  # each the whole input of its board
_FED_BY_OTHERS = ("VDDQ_VDD2_1V8AO",)  # drawn from VIN_SYS_5V0: adding it would count it twice
_UNUSED = ("", "NC", "sum of shunt voltages")
_CHANNELS = (1, 2, 3)


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


@dataclass(frozen=True)
class Power:
    """Milliwatts, and the rails that were added up."""

    milliwatts: float
    rails: tuple[str, ...]


class PowerSource(Protocol):
    """Something that says what is drawn now."""

    name: str

    def read(self) -> Power | None:
        """Return the power, or None when there is no reading."""
        ...

    def close(self) -> None:
        """Let go of what the source holds."""
        ...


def total_power(rails: Mapping[str, float]) -> Power | None:
    """Return the total of rails in milliwatts: the input rail, or the sum of those that are fed side by side; None without any."""
    whole = next((name for name in _INPUTS if name in rails), None)
    if whole is not None:
        return Power(rails[whole], (whole,))
    parts = {name: value for name, value in rails.items() if name not in _FED_BY_OTHERS}
    return Power(sum(parts.values()), tuple(parts)) if parts else None


class Ina3221:
    """The INA3221 sensors of the module, through hwmon below `root`."""

    name = "INA3221"

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._channels = _labelled_channels(root)

    def rails(self) -> dict[str, float]:
        """Return the milliwatts of every labelled rail; a channel that is switched off cannot be read and is left out."""
        found = {}
        for label, chip, channel in self._channels:
            millivolts = read_number(self._root, f"{chip}/in{channel}_input")
            milliamperes = read_number(self._root, f"{chip}/curr{channel}_input")
            if millivolts is not None and milliamperes is not None:
                found[label] = millivolts * milliamperes / 1000
        return found

    def read(self) -> Power | None:
        """Return the power of this moment."""
        return total_power(self.rails())

    def close(self) -> None:
        """Do nothing: no file is kept open."""


class TegrastatsPower:
    """A tegrastats process, whose last line is the reading."""

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
        self._first.set()  # it ended: nobody needs to wait

    def read(self) -> Power | None:
        """Return the power of the last line; wait up to a second for the first."""
        self._first.wait(1.0)
        return self._last

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.wait()
        self._reader.join()
        if self._process.stdout is not None:
            self._process.stdout.close()


def find_power_source(
    root: Path = Path("/"), tegrastats: Sequence[str] = ("tegrastats", "--interval", "100")
) -> PowerSource | None:
    """Return the INA3221 sensors, or else tegrastats, whichever gives a reading; None on a machine without either."""
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
    """The joules of a `with` block, known at its end; None where a sample at one of its ends is missing."""

    joules: float | None = None


class EnergyCounter:
    """Counts the energy of the whole machine, from now until `close`: what idles and what else runs is in it.

    A thread takes samples, and the trapezoids between them are added up; a reading that fails leaves a gap that one of them spans.
    Without a source there is no energy.
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
        """The energy up to now, where a sample is taken; None where there is no reading."""
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
        """Measure the energy of a block: the difference over it."""
        block, before = BlockEnergy(), self.joules
        yield block
        after = self.joules
        block.joules = None if before is None or after is None else after - before

    def close(self) -> None:
        """Stop counting. The source stays open, for whoever opened it."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self._interval):
            _ = self.joules


def _labelled_channels(root: Path) -> list[tuple[str, str, int]]:
    # (label, folder of the chip, channel), in the order of the chips.
    found = []
    for chip in sorted(root.glob("sys/class/hwmon/hwmon*")):
        folder = str(chip.relative_to(root))
        if read_text(root, f"{folder}/name") != "ina3221":
            continue
        labels = ((read_text(root, f"{folder}/in{channel}_label") or "", folder, channel) for channel in _CHANNELS)
        found += [entry for entry in labels if entry[0] not in _UNUSED]
    return found
