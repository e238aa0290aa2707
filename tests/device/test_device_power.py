"""Power: lines of tegrastats in every form, the INA3221's files, which rails make the total, and energy over time."""

from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from recordings_jetson import (
    TEGRASTATS_JP5_NX,
    TEGRASTATS_JP6_AGX,
    TEGRASTATS_JP6_NANO,
    TEGRASTATS_JP72_AGX,
    TEGRASTATS_OLD,
    TEGRASTATS_THOR,
    TEGRASTATS_THOR_WITHOUT_INPUT,
    Recording,
    agx_orin,
    orin_nano,
    rails,
    thor,
)

from edgeprune.device.power import EnergyCounter, Ina3221, Power, TegrastatsPower, find_power_source, parse_tegrastats, total_power

NINES = "9" * 5000  # more digits than Python turns into a number
HUGE = f"RAM {NINES}/{NINES}MB SWAP 1/{NINES}MB GR3D_FREQ {NINES}% VDD_IN {NINES}mW/{NINES}mW"
AGX_RAILS = ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0")
THOR_RAILS = ("VDD_GPU", "VDD_CPU_SOC_MSS", "VIN_SYS_5V0")


@pytest.mark.parametrize(
    ("line", "ram", "swap", "load", "milliwatts", "added"),
    [
        (TEGRASTATS_JP5_NX, (3986, 15523), (0, 7762), 44, 5079, ("VDD_IN",)),
        (TEGRASTATS_JP6_NANO, (2161, 7620), (1875, 12002), 31, 7256, ("VDD_IN",)),
        (TEGRASTATS_JP6_AGX, (13983, 62780), (126, 31390), 14, 3150 + 14312 + 4968, AGX_RAILS),
        (TEGRASTATS_JP72_AGX, (20642, 62817), (None, None), 0, 2404 + 801 + 3526, AGX_RAILS),
        (TEGRASTATS_THOR, (16614, 125772), (0, 2048), None, 25530, ("VIN",)),
        (TEGRASTATS_THOR_WITHOUT_INPUT, (16614, 125772), (0, 2048), None, -392 + 7148 + 6807, THOR_RAILS),
        (TEGRASTATS_OLD, (2257, 30536), (0, 15268), 10, 2532, ("POM_5V_IN",)),
    ],
)
def test_lines(
    line: str,
    ram: tuple[int, int],
    swap: tuple[int | None, int | None],
    load: int | None,
    milliwatts: int,
    added: tuple[str, ...],
) -> None:
    found = parse_tegrastats(line)
    assert (found.ram_used, found.ram_total) == ram
    assert (found.swap_used, found.swap_total) == swap
    assert found.gpu_load == load
    assert total_power(found.rails) == Power(milliwatts, added)


def test_sensors_that_are_off_are_left_out() -> None:
    degrees = parse_tegrastats(TEGRASTATS_JP5_NX).temperatures
    assert degrees == {"CPU": 47.5, "SOC2": 46.0, "tj": 47.5}
    assert parse_tegrastats(TEGRASTATS_JP72_AGX).temperatures == {"cpu": 52.968, "tj": 53.1}


def test_rails_without_a_unit_or_an_average() -> None:
    assert parse_tegrastats("RAM 3986/7803MB VDD_GPU_SOC 3776/3843 VDD_CPU_CV 1411/1448").rails == {
        "VDD_GPU_SOC": 3776,
        "VDD_CPU_CV": 1411,
    }
    assert parse_tegrastats("gpu@43.9C VDD_GPU 5517mW VIN 28548mW").rails == {"VDD_GPU": 5517, "VIN": 28548}


@pytest.mark.parametrize("line", ["", "nonsense", "RAM x/yMB GR3D_FREQ %", "VDD_IN mW/mW", "\0", "RAM 1/2GB SWAP", "@C@-C", HUGE])
def test_odd_lines_say_nothing(line: str) -> None:
    found = parse_tegrastats(line)
    assert (found.ram_used, found.gpu_load, found.rails, found.temperatures) == (None, None, {}, {})


def test_part_of_a_line_is_read() -> None:
    assert parse_tegrastats(TEGRASTATS_JP6_NANO[:60]).ram_total == 7620


@pytest.mark.parametrize(
    ("recording", "milliwatts", "added"),
    [
        (orin_nano, 5016 * 1440 / 1000, ("VDD_IN",)),
        (agx_orin, 9800 + 4900 + 8000, AGX_RAILS),
        (thor, 5008 * 40 / 1000 + 7000 + 6500, THOR_RAILS),
    ],
)
def test_ina3221(recording: Callable[[], Recording], milliwatts: float, added: tuple[str, ...], tmp_path: Path) -> None:
    power = Ina3221(recording().write(tmp_path)).read()
    assert power is not None
    assert power.milliwatts == pytest.approx(milliwatts)
    assert power.rails == added


def test_channels_that_are_off_are_left_out(tmp_path: Path) -> None:
    files = rails(0, ("VDD_IN", 5000, 1000), ("VDD_SOC", 5000, 100))
    del files["sys/class/hwmon/hwmon0/curr2_input"]
    files["sys/class/hwmon/hwmon1/name"] = "tmp451"
    files["sys/class/hwmon/hwmon1/in1_label"] = "VDD_IN"
    assert Ina3221(Recording(files).write(tmp_path)).rails() == {"VDD_IN": 5000.0}


class Steps:
    """A source that says the next value at each reading."""

    name = "steps"

    def __init__(self, *milliwatts: float | None) -> None:
        self._values = iter(milliwatts)

    def read(self) -> Power | None:
        value = next(self._values)
        return None if value is None else Power(value, ("VDD_IN",))

    def close(self) -> None:
        return


def test_energy_is_the_sum_of_trapezoids() -> None:
    times: Iterator[float] = iter([10.0, 11.0, 13.0])
    counter = EnergyCounter(Steps(1000, 3000, 2000), interval_s=1000, clock=lambda: next(times))
    with closing(counter), counter.measure() as block:
        assert counter.joules == pytest.approx(2.0)
    assert block.joules == pytest.approx(1 * 2.0 + 2 * 2.5)


def test_readings_that_fail_leave_a_gap() -> None:
    times = iter([0.0, 2.0])
    counter = EnergyCounter(Steps(1000, None, 3000), interval_s=1000, clock=lambda: next(times))
    with closing(counter), counter.measure() as block:
        assert counter.joules is None
    assert block.joules == pytest.approx(4.0)


@pytest.mark.parametrize("milliwatts", [(None, 1000), (1000, None)])
def test_a_block_needs_a_reading_at_both_ends(milliwatts: tuple[float | None, float | None]) -> None:
    counter = EnergyCounter(Steps(1000, *milliwatts), interval_s=1000, clock=itertools.count(0.0).__next__)
    with closing(counter):
        assert counter.joules == 0.0
        with counter.measure() as block:
            pass
    assert block.joules is None


def test_every_block_is_measured_alone() -> None:
    counter = EnergyCounter(Steps(*[1000] * 4), interval_s=1000, clock=itertools.count(0.0).__next__)
    with closing(counter):
        for _ in range(2):
            with counter.measure() as block:
                pass
            assert block.joules == pytest.approx(1.0)


def test_the_thread_samples_and_ends() -> None:
    class Endless(Steps):
        def __init__(self) -> None:
            self.read_often = threading.Event()
            self.count = 0

        def read(self) -> Power:
            self.count += 1
            if self.count == 5:
                self.read_often.set()
            return Power(2000, ("VDD_IN",))

    source = Endless()
    before = threading.active_count()
    with closing(EnergyCounter(source, interval_s=0.001)) as counter, counter.measure() as block:
        assert source.read_often.wait(10)
    assert threading.active_count() == before
    assert (block.joules or 0) > 0


def test_without_a_source_there_is_no_energy() -> None:
    before = threading.active_count()
    with closing(EnergyCounter(None)) as counter, counter.measure() as block:
        assert threading.active_count() == before
    assert block.joules is None


def prints(text: str) -> list[str]:
    return [sys.executable, "-c", f"import time; print({text!r}, flush=True); time.sleep(60)"]


def test_sensors_come_before_tegrastats(tmp_path: Path) -> None:
    source = find_power_source(orin_nano().write(tmp_path), prints(TEGRASTATS_THOR))
    assert source is not None
    assert source.name == "INA3221"


def test_tegrastats_is_read_where_there_is_no_sensor(tmp_path: Path) -> None:
    source = find_power_source(tmp_path, prints(TEGRASTATS_THOR))
    assert source is not None
    try:
        assert (source.name, source.read()) == ("tegrastats", Power(25530, ("VIN",)))
    finally:
        source.close()


def test_no_source(tmp_path: Path) -> None:
    assert find_power_source(tmp_path, ["no-such-command-anywhere"]) is None
    assert find_power_source(tmp_path, [sys.executable, "-c", "print('nonsense')"]) is None


def test_a_closed_process_is_gone() -> None:
    before = threading.active_count()
    source = TegrastatsPower(prints(TEGRASTATS_JP6_NANO))
    assert source.read() == Power(7256, ("VDD_IN",))
    source.close()
    assert threading.active_count() == before
