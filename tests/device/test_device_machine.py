"""What is read of a machine: every release's forms, and nothing but None where there is nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from recordings_jetson import (
    CLOCKS_FREE,
    CLOCKS_PINNED,
    NANO_MODES,
    Recording,
    agx_orin,
    deb,
    desktop,
    meminfo,
    orin_nano,
    orin_nx,
    swaps,
    thor,
)

from edgeprune.device.jetson import (
    JETPACKS,
    PowerMode,
    jetpack_of,
    parse_clocks,
    parse_mode,
    parse_modes,
    parse_module,
    parse_release,
)
from edgeprune.device.machine import read_machine
from edgeprune.device.memory import Memory, parse_memory, peak_rss, reset_peak_rss
from edgeprune.device.system import Software, installed_debs, read_text, run_command, version_numbers

NINES = "9" * 5000  # more digits than Python turns into a number
HUGE = f"R{NINES} (release)\nMemTotal: {NINES} kB\nNV Power Mode: \n{NINES}\npmode:{NINES}\n< POWER_MODEL ID={NINES} NAME=X >"
ODD = [None, "", "\0", "R", "# R (release), REVISION:", "nonsense: [] @ % < >", "9" * 50, "é\n\n\n: : :", "MemTotal: kB", HUGE]


@pytest.mark.parametrize(
    ("recording", "module", "l4t", "jetpack", "cuda", "tensorrt", "target", "mode", "pinned"),
    [
        (orin_nano, "Orin Nano", (36, 4, 3), "6.2", "12.6.68", "10.3.0.30-1+cuda12.5", "jetpack6", "25W (mode 1)", False),
        (orin_nx, "Orin NX", (36, 4, 0), "6.1", None, "10.3.0.30-1+cuda12.5", "jetpack6", "MAXN_SUPER (mode 0)", True),
        (agx_orin, "AGX Orin", (39, 2, 0), "7.2", "13.2.51", "10.16.1.11-1+cuda13.2", "jetpack7.2", "MAXN (mode 0)", True),
        (thor, "Thor", (38, 2, 2), "7.0", None, "10.13.3.9-1+cuda13.0", "jetpack7", "120W (mode 1)", False),
    ],
)
def test_recorded_jetsons(
    recording: Callable[[], Recording],
    module: str,
    l4t: tuple[int, ...],
    jetpack: str,
    cuda: str | None,
    tensorrt: str,
    target: str,
    mode: str,
    pinned: bool,
    tmp_path: Path,
) -> None:
    machine = recording().machine(tmp_path)
    assert machine.is_jetson and machine.gpu
    assert (machine.module, machine.l4t, machine.cuda, machine.tensorrt) == (module, l4t, cuda, tensorrt)
    assert machine.jetpack is not None and machine.jetpack.name == jetpack
    assert machine.target is not None and machine.target.name == target
    assert (str(machine.mode), machine.clocks_pinned) == (mode, pinned)
    assert machine.to_dict()["l4t"] == ".".join(map(str, l4t))


def test_an_empty_machine_is_all_unknown(tmp_path: Path) -> None:
    machine = read_machine(tmp_path, lambda command: None, Software((3, 10), {}, (), False))
    assert not machine.is_jetson and not machine.gpu
    assert (machine.model, machine.l4t, machine.cuda, machine.tensorrt, machine.target) == (None,) * 5
    assert machine.clocks_pinned is None
    assert machine.memory == Memory(None, None, None, None, None, None)
    assert machine.name.endswith("no Jetson")


def test_a_desktop_is_no_jetson(tmp_path: Path) -> None:
    machine = desktop().machine(tmp_path)
    assert (machine.is_jetson, machine.gpu, machine.jetpack) == (False, True, None)


def test_another_board_is_no_jetson(tmp_path: Path) -> None:
    board = Recording({"proc/device-tree/model": "Raspberry Pi 5 Model B\0", "proc/device-tree/compatible": "brcm,bcm2712\0"})
    assert not board.machine(tmp_path).is_jetson


def test_this_machine_can_be_read() -> None:
    machine = read_machine()
    assert machine.software.version == sys.version_info[:2]
    assert "CPUExecutionProvider" in machine.software.providers
    assert (machine.memory.total or 0) > 100


def test_binary_noise_does_not_raise(tmp_path: Path) -> None:
    noise = orin_nano()
    noise.write(tmp_path)
    for path in noise.files:
        (tmp_path / path).write_bytes(bytes(range(256)))
    machine = read_machine(tmp_path, lambda command: "\0é", noise.software)
    assert (machine.l4t, machine.module, machine.clocks_pinned, machine.tensorrt) == (None, None, None, "10.3.0")


@pytest.mark.parametrize(
    ("text", "release"),
    [
        ("# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, DATE: Wed Jan  8\n", (36, 4, 3)),
        ("# R32 (release), REVISION: 7.1, GCID: 29818004, BOARD: t210ref", (32, 7, 1)),
        ("# R38 (release), REVISION: 2.2\n", (38, 2, 2)),
        ("# R39 (release)\n", (39,)),
        ("R36.4.3", (36, 4, 3)),
        ("# r36 (Release), Revision: 5.0", (36, 5, 0)),
        ("BOARD: generic", None),
    ],
)
def test_release_forms(text: str, release: tuple[int, ...] | None) -> None:
    assert parse_release(text) == release


def test_a_release_without_its_file_comes_from_its_package(tmp_path: Path) -> None:
    recording = orin_nano()
    del recording.files["etc/nv_tegra_release"]
    assert recording.machine(tmp_path).l4t == (36, 4, 3)


@pytest.mark.parametrize(
    ("release", "name"),
    [
        ((36, 3, 0), "6.0"),
        ((36, 4, 0), "6.1"),
        ((36, 4, 2), "6.1"),
        ((36, 4, 3), "6.2"),
        ((36, 4, 7), "6.2.1"),
        ((36, 5, 0), "6.2.2"),
        ((36, 4), "6.1"),
        ((38, 2, 1), "7.0"),
        ((38, 4, 0), "7.1"),
        ((39, 2, 0), "7.2"),
        ((39, 2, 1), "7.2.1"),
        ((35, 4, 1), None),
        ((40, 1, 0), None),
        ((39,), None),
        (None, None),
    ],
)
def test_jetpack_of_a_release(release: tuple[int, ...] | None, name: str | None) -> None:
    pack = jetpack_of(release)
    assert (pack.name if pack else None) == name


def test_the_table_is_in_order() -> None:
    assert [pack.l4t for pack in JETPACKS] == sorted(pack.l4t for pack in JETPACKS)


def test_the_part_number_wins_over_the_words() -> None:
    assert parse_module("Orin NX carrier", "nvidia,p3767-0003 nvidia,tegra234") == "Orin Nano"
    assert parse_module("Lanner EAI-I233 Jetson AGX Orin", None) == "AGX Orin"
    assert parse_module("Some board", "nvidia,tegra234") == "Orin"


@pytest.mark.parametrize(
    ("query", "status", "mode"),
    [
        ("NV Power Mode: MAXN_SUPER\n2\n", None, (2, "MAXN_SUPER")),
        ("NV Fan Mode:quiet\nNV Power Mode: 15W\n0\n", "pmode:0002", (0, "15W")),
        ("NV Power Mode: 25W\n", None, (1, "25W")),
        (None, "pmode:0002", (2, "MAXN_SUPER")),
        ("NVPM ERROR: no permission", "pmode:0003 fmode:fanNull", (3, "7W")),
        (None, "pmode:0009", (9, None)),
        (None, None, (None, None)),
    ],
)
def test_power_mode_forms(query: str | None, status: str | None, mode: tuple[int | None, str | None]) -> None:
    found = parse_mode(query, status, NANO_MODES)
    assert (found.number, found.name) == mode


@pytest.mark.parametrize(
    ("names", "best"),
    [
        (("15W", "25W", "MAXN_SUPER", "7W"), 2),
        (("MAXN", "MODE_15W", "MODE_30W"), 0),
        (("MAXN", "MAXN_SUPER"), 1),
        (("10W", "15W", "25W"), 2),
        (("120W", "70W", "40W"), 0),
        ((), None),
    ],
)
def test_the_fastest_mode(names: tuple[str, ...], best: int | None) -> None:
    mode = PowerMode(0, None, tuple(enumerate(names)))
    assert (mode.best[0] if mode.best else None) == best
    assert mode.is_best is (None if best is None else best == 0)


def test_modes_are_read_in_any_order_of_attributes() -> None:
    assert parse_modes("< POWER_MODEL NAME=MAXN ID=3 >\n#< POWER_MODEL ID=4 NAME=OLD >\n< POWER_MODEL ID=5 >") == ((3, "MAXN"),)


def test_clocks() -> None:
    assert parse_clocks(CLOCKS_FREE) is False
    assert parse_clocks(CLOCKS_PINNED) is True
    free = "schedutil MinFreq=729600 MaxFreq"
    assert parse_clocks(CLOCKS_PINNED + f"cpu2:  Online=0 Governor={free}=2201600") is True
    assert parse_clocks(CLOCKS_PINNED + f"cpu2:  Online=1 Governor={free}=2201600") is False
    assert parse_clocks("Error: Run this script(/usr/bin/jetson_clocks) as a root user") is None


def test_only_installed_packages_count() -> None:
    status = deb("libnvinfer10", "10.3.0.30-1+cuda12.5", "deinstall ok config-files") + deb("libnvinfer8", "8.6.2.3-1")
    assert installed_debs(status, ("libnvinfer10", "libnvinfer8")) == {"libnvinfer8": "8.6.2.3-1"}


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("10.3.0.30-1+cuda12.5", (10, 3, 0, 30)), ("1:8.6.2.3-1", (8, 6, 2, 3)), ("36.4.3-2025", (36, 4, 3)), ("x1", ()), (None, ())],
)
def test_version_numbers(text: str | None, numbers: tuple[int, ...]) -> None:
    assert version_numbers(text) == numbers


@pytest.mark.parametrize("text", ODD)
def test_odd_input_is_absent_not_an_error(text: str | None) -> None:
    assert parse_release(text) is None
    assert parse_module(text, text) is None
    assert parse_clocks(text) is None
    assert parse_mode(text, text, text) == PowerMode(None, None)
    assert parse_memory(text, text) == Memory(None, None, None, None, None, None)
    assert installed_debs(text, ("libnvinfer10",)) == {}


def test_zram_is_no_swap_on_a_disk() -> None:
    both = parse_memory(meminfo(7.44, 5.1, swap_gib=11), swaps(zram_gib=3, used_gib=0.75, file_gib=8))
    assert (both.zram_total, both.zram_free) == (3072, 2304)
    assert both.disk_swap_total == 8192
    zram = parse_memory(meminfo(7.44, 5.1, swap_gib=3), swaps(zram_gib=3))
    assert (zram.swap_free, zram.disk_swap_free) == (3072, 0)
    none = parse_memory(meminfo(7.44, 5.1, swap_gib=0), swaps())
    assert (none.zram_total, none.disk_swap_total) == (0, 0)
    unknown = parse_memory(meminfo(7.44, 5.1, swap_gib=3), None)
    assert (unknown.zram_total, unknown.disk_swap_free) == (None, None)


def test_commands_that_fail_are_none() -> None:
    assert run_command([sys.executable, "-c", "print('x')"]) == "x\n"
    assert run_command([sys.executable, "-c", "raise SystemExit(3)"]) is None
    assert run_command(["no-such-command-anywhere"]) is None


def test_a_folder_is_no_text(tmp_path: Path) -> None:
    assert read_text(tmp_path, ".") is None


def test_peak_memory_begins_anew() -> None:
    block = bytearray(64 * 2**20)
    high = peak_rss()
    del block
    if not reset_peak_rss():
        pytest.skip("this kernel keeps the peak")
    assert high is not None
    assert (peak_rss() or high) < high
