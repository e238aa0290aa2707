"""What Jetson modules can do at most: arithmetic, memory bandwidth, memory.

Peak arithmetic is not listed but computed, SMs times clock times `_PER_CLOCK`; the products agree with the GPU's TOPS of the data
sheets (20, 33 dense INT8 for Orin Nano; 30, 38 for Orin NX; 85 for AGX Orin; 1035, 600 dense FP4 for T5000, T4000).
"""

from __future__ import annotations

from dataclasses import dataclass

from edgeprune.errors import UsageError

# Dense operations of one SM in one clock, in thousands. Orin: 170 sparse INT8 TOPS on 16 SMs at 1.3 GHz are 8.17 an SM and GHz;
# dense is half of sparse, FP16 half of INT8, TF32 (what an engine makes of float32) half of FP16. Thor: 2070 sparse FP4 TFLOPS on
# 20 SMs at 1.575 GHz; FP8 is half of FP4 and FP16 half of FP8; INT8 is taken as FP8.
_PER_CLOCK = {
    (8, 7): {"fp32": 1.024, "fp16": 2.048, "int8": 4.096},
    (11, 0): {"fp32": 4.096, "fp16": 8.192, "int8": 16.384, "fp8": 16.384, "fp4": 32.768},
}


@dataclass(frozen=True)
class Module:
    """One module in one power mode: GPU clock in GHz, memory bandwidth in GB/s, memory in GiB.

    `sm` is the compute capability: an engine built for one does not load on another.
    """

    name: str
    title: str
    sm: tuple[int, int]
    sms: int
    clock: float
    bandwidth: float
    ram: int

    def tflops(self, arithmetic: str = "fp16") -> float:
        """Return the dense peak in 10^12 operations a second; raise UsageError for arithmetic that the module has not."""
        rates = _PER_CLOCK[self.sm]
        if arithmetic not in rates:
            raise UsageError(f"{self.title} has no {arithmetic} arithmetic.", hint=f"It has: {', '.join(rates)}.")
        return self.sms * self.clock * rates[arithmetic]

    @property
    def ram_bytes(self) -> int:
        """Memory in bytes, shared by CPU and GPU."""
        return self.ram << 30


# SMs, clocks, bandwidth and memory: NVIDIA's data sheets of the modules. Single power modes: the nvpmodel tables of Jetson Linux
# 35 and 36 (GPU MAX_FREQ; TPC_PG_MASK 252 leaves 4 SMs, 240 leaves 8; EMC at 2133 MHz is 68 GB/s on 128 bits, at 3199 MHz 102).
# Orin Nano and NX are in their fastest ("super") mode unless the name says otherwise, and a name without capacity is the largest
# module of its kind. The clock of T4000 is the least certain figure: it reproduces the published 1200 sparse FP4 TFLOPS.
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
    """Return a module; raise UsageError with the known names for another."""
    if name not in MODULES:
        raise UsageError(f"Unknown device {name!r}.", hint=f"Known: {', '.join(MODULES)}; or measure yours: edgeprune profile")
    return MODULES[name]
