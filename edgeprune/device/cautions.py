"""What would make a machine slow, short of memory or hard to set up, although it can run bundles."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from edgeprune.device.machine import Machine, dotted

LITTLE_MEMORY = 2048  # MiB: an encoder, a decoder of half a billion parameters in 16 bits, and room to work
SMALL_BOARD = 8192  # MiB
SMALL_CMA = 900  # MiB; cma=950M gives 950, the default of an Orin Nano is 256
_LARGER_CMA = "sudo sed -i '/^\\s*APPEND/ s/$/ cma=950M/' /boot/extlinux/extlinux.conf && sudo reboot"
_MORE_SWAP = "sudo fallocate -l 8G /swapfile && sudo chmod 600 /swapfile && sudo mkswap /swapfile && sudo swapon /swapfile"


@dataclass(frozen=True)
class Caution:
    """One thing to know, and the command that changes it where there is one."""

    what: str
    remedy: str = ""


def cautions_of(machine: Machine) -> tuple[Caution, ...]:
    """Return what there is to know about a machine before it is measured or relied on."""
    return (*_speed(machine), *_memory(machine), *_release(machine))


def _speed(machine: Machine) -> Iterator[Caution]:
    if not machine.is_jetson:
        return
    best = machine.mode.best
    if machine.mode.is_best is None:
        yield Caution(f"It cannot be told whether power mode {machine.mode} is the fastest.", "sudo nvpmodel -q")
    elif not machine.mode.is_best and best is not None:
        yield Caution(f"The power mode is {machine.mode}, not the fastest, {best[1]}.", f"sudo nvpmodel -m {best[0]}")
    if machine.clocks_pinned is None:
        yield Caution("It cannot be told whether the clocks are pinned.", "sudo jetson_clocks --show")
    elif not machine.clocks_pinned:
        yield Caution("The clocks are not pinned: times will vary, and short answers are slower.", "sudo jetson_clocks")


def _memory(machine: Machine) -> Iterator[Caution]:
    memory = machine.memory
    if memory.available is not None and memory.available < LITTLE_MEMORY:
        remedy = "sudo systemctl isolate multi-user.target" if machine.is_jetson else ""
        yield Caution(f"Only {memory.available} MiB of memory are free.", remedy)
    if memory.swap_total == 0 and memory.total is not None and memory.total <= SMALL_BOARD:
        yield Caution(f"There is no swap beside {memory.total} MiB of memory; building an engine may need it.", _MORE_SWAP)
    if machine.module == "Orin Nano" and memory.cma_total is not None and memory.cma_total < SMALL_CMA:
        what = f"The contiguous memory pool has {memory.cma_total} MiB; building an engine on an Orin Nano may need more."
        yield Caution(what, _LARGER_CMA)


def _release(machine: Machine) -> Iterator[Caution]:
    if not machine.is_jetson:
        return
    pack, python = machine.jetpack, machine.software.version
    if machine.l4t is None:
        yield Caution("The L4T release is unknown; in a container, mount /etc/nv_tegra_release.")
    elif pack is None:
        yield Caution(f"L4T {dotted(machine.l4t)} belongs to no JetPack that EdgePrune knows.")
    elif pack.name == "6.0":
        yield Caution("JetPack 6.0 has TensorRT 8.6, and 10.3 is needed: upgrade to JetPack 6.2.")
    if pack is not None and python != pack.python:
        what = (
            f"JetPack {pack.name} has Python {dotted(pack.python)}, this is {dotted(python)}: TensorRT's package is for the former."
        )
        yield Caution(what, f"python{dotted(pack.python)} -m venv --system-site-packages VENV")
