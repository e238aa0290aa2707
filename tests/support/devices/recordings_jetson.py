"""Jetsons as they appear to a program: files below a root, and what commands print. The forms are those of the releases named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from edgeprune.device.machine import Machine, read_machine
from edgeprune.device.system import Software

CPU_ONLY = ("CPUExecutionProvider",)
BASE = {"onnxruntime": "1.23.2"}
EXTRAS = {"torch": "2.13.0", "transformers": "5.20.0", "optimum": "2.3.0", "onnx": "1.23.0", "onnxscript": "0.7.2"}

RELEASE = """# R{major} (release), REVISION: {revision}, GCID: 42132812, BOARD: generic, EABI: aarch64, DATE: Thu Sep 18 2025
# KERNEL_VARIANT: oot
TARGET_USERSPACE_LIB_DIR=nvidia
TARGET_USERSPACE_LIB_DIR_PATH=usr/lib/aarch64-linux-gnu/nvidia
"""
MEMINFO = """MemTotal:        {total} kB
MemFree:          402164 kB
MemAvailable:    {available} kB
SwapTotal:       {swap} kB
SwapFree:        {swap} kB
CmaTotal:         {cma} kB
CmaFree:           98304 kB
"""
SWAPS = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"
NANO_MODES = """< PARAM TYPE=FILE NAME=CPU_ONLINE >
CORE_0 /sys/devices/system/cpu/cpu0/online

< POWER_MODEL ID=0 NAME=15W >
CPU_ONLINE CORE_0 1
GPU MAX_FREQ 612000000
< POWER_MODEL ID=1 NAME=25W >
GPU MAX_FREQ 918000000
< POWER_MODEL ID=2 NAME=MAXN_SUPER >
GPU MAX_FREQ -1
< POWER_MODEL ID=3 NAME=7W >

< PM_CONFIG DEFAULT=1 >
"""
AGX_MODES = "".join(
    f"< POWER_MODEL ID={number} NAME={name} >\n" for number, name in enumerate(("MAXN", "MODE_15W", "MODE_30W", "MODE_50W"))
)
THOR_MODES = "< POWER_MODEL ID=0 NAME=MAXN >\n< POWER_MODEL ID=1 NAME=120W >\n"
CLOCKS_FREE = """SOC family:tegra234  Machine:NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super
Online CPUs: 0-5
cpu0:  Online=1 Governor=schedutil MinFreq=729600 MaxFreq=1344000 CurrentFreq=960000 IdleStates: WFI=1 c7=1\x20
GPU MinFreq=306000000 MaxFreq=918000000 CurrentFreq=306000000
Active GPU TPCs: 4
EMC MinFreq=204000000 MaxFreq=3199000000 CurrentFreq=665600000 FreqOverride=0
NV Power Mode: 25W
"""
CLOCKS_PINNED = """SOC family:tegra234  Machine:NVIDIA Jetson AGX Orin Developer Kit
Online CPUs: 0-1, Offline CPUs:\x20
cpu0:  Governor=schedutil MinFreq=2201600 MaxFreq=2201600 CurrentFreq=2201600 IdleStates: WFI=0 c7=0\x20
cpu1:  Governor=schedutil MinFreq=2201600 MaxFreq=2201600 CurrentFreq=2201600 IdleStates: WFI=0 c7=0\x20
GPU MinFreq=1300500000 MaxFreq=1300500000 CurrentFreq=1300500000
EMC MinFreq=204000000 MaxFreq=3199000000 CurrentFreq=3199000000 FreqOverride=1
"""

TEGRASTATS_JP6_NANO = (
    "01-07-2026 10:11:12 RAM 2161/7620MB (lfb 149x4MB) SWAP 1875/12002MB (cached 43MB) "
    "CPU [2%@1728,1%@1728,4%@1728,2%@1728,9%@1728,off] GR3D_FREQ 31% cpu@55.093C soc2@53.75C soc0@54.562C cv0@-256C "
    "gpu@56.562C tj@56.562C VDD_IN 7256mW/7031mW VDD_CPU_GPU_CV 1711mW/1698mW VDD_SOC 2511mW/2500mW"
)
TEGRASTATS_JP5_NX = (
    "RAM 3986/15523MB (lfb 125x4MB) SWAP 0/7762MB (cached 0MB) CPU [33%@1190,29%@1190] EMC_FREQ 7%@2133 GR3D_FREQ 44%@917 "
    "GR3D2_FREQ 44%@0 VIC_FREQ 0%@115 APE 174 CV0@-256C CPU@47.5C SOC2@46C GPU@-256C tj@47.5C "
    "VDD_IN 5079mW/5079mW VDD_CPU_GPU_CV 780mW/780mW VDD_SOC 1398mW/1398mW"
)
TEGRASTATS_JP6_AGX = (
    "11-21-2025 08:49:48 RAM 13983/62780MB (lfb 424x4MB) SWAP 126/31390MB (cached 0MB) CPU [90%@2201,100%@2201] EMC_FREQ 1%@2133 "
    "GR3D_FREQ 14%@[407,407] VIC_FREQ 115 NVDLA0_FREQ @1600 APE 174 CV0@73.625C CPU@77.281C Tboard@62C tj@77.281C "
    "VDD_GPU_SOC 3150mW/2971mW VDD_CPU_CV 14312mW/12415mW VIN_SYS_5V0 4968mW/5048mW VDDQ_VDD2_1V8AO 1091mW/1091mW"
)
TEGRASTATS_JP72_AGX = (
    "07-25-2026 09:08:28 RAM 20642/62817MB (lfb 1x2MB) CPU [23%@2201,10%@2201] EMC_FREQ 3%@3199 GR3D_FREQ 0%@[1300,1300] "
    "NVENC0 off NVDEC0 off APE 174 cpu@52.968C/52.968C tj@53.1C/53.1C "
    "VDD_GPU_SOC 2404mW/2404mW/2404mW VDD_CPU_CV 801mW/801mW/801mW VIN_SYS_5V0 3526mW/3526mW/3526mW"
)
TEGRASTATS_THOR = (
    "12-09-2025 04:56:58 RAM 16614/125772MB (lfb 106x4MB) SWAP 0/2048MB (cached 0MB) CPU [2%@972,1%@972] EMC_FREQ @4266 "
    "GR3D_FREQ @[1000,1000,1000] cpu@35.25C tj@36.343C gpu@-256C VDD_GPU 5956mW/5956mW VDD_CPU_SOC_MSS 7148mW/7148mW "
    "VIN_SYS_5V0 6807mW/6807mW VIN 25530mW/12765mW"
)
TEGRASTATS_THOR_WITHOUT_INPUT = TEGRASTATS_THOR.replace(" VIN 25530mW/12765mW", "").replace("VDD_GPU 5956", "VDD_GPU -392")
TEGRASTATS_OLD = (
    "RAM 2257/30536MB (lfb 5392x4MB) SWAP 0/15268MB (cached 0MB) IRAM 0/252kB(lfb 252kB) CPU [1%@729,off] EMC_FREQ 0% "
    "GR3D_FREQ 10%@1000 APE 150 PLL@41C CPU@42.5C PMIC@100C GPU@41.5C POM_5V_IN 2532/2600 POM_5V_GPU 80/84 POM_5V_CPU 523/500"
)


def deb(name: str, version: str, status: str = "install ok installed") -> str:
    """Return a paragraph of /var/lib/dpkg/status."""
    return f"Package: {name}\nStatus: {status}\nPriority: optional\nVersion: {version}\nDescription: x\n with: colons\n\n"


def tensorrt_debs(version: str) -> str:
    """Return the paragraphs of TensorRT's packages."""
    major = version.partition(".")[0]
    return "".join(deb(name, version) for name in (f"libnvinfer{major}", f"libnvonnxparsers{major}", "python3-libnvinfer"))


@dataclass
class Recording:
    """One machine: `files` by path below the root, `commands` with what they print, and the Python on it."""

    files: dict[str, str] = field(default_factory=dict)
    commands: dict[str, str] = field(default_factory=dict)
    software: Software = field(default_factory=lambda: Software((3, 10), {**BASE, "tensorrt": "10.3.0"}, CPU_ONLY, False))

    def run(self, command: Sequence[str]) -> str | None:
        """Answer a command as the machine did."""
        return self.commands.get(" ".join(command))

    def write(self, root: Path) -> Path:
        """Write the files below `root`."""
        for path, text in self.files.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text(text)
        return root

    def machine(self, root: Path) -> Machine:
        """Return what is read of the machine."""
        return read_machine(self.write(root), self.run, self.software)


def rails(chip: int, *channels: tuple[str, int, int]) -> dict[str, str]:
    """Return the files of an INA3221: label, millivolts and milliamperes of each channel."""
    folder = f"sys/class/hwmon/hwmon{chip}"
    files = {f"{folder}/name": "ina3221\n", f"{folder}/in7_label": "sum of shunt voltages\n", f"{folder}/in7_input": "1200\n"}
    for number, (label, millivolts, milliamperes) in enumerate(channels, 1):
        files |= {f"{folder}/in{number}_label": f"{label}\n", f"{folder}/in{number}_input": f"{millivolts}\n"}
        files[f"{folder}/curr{number}_input"] = f"{milliamperes}\n"
    return files


def clocks(low: int, high: int, *, gpu: str = "17000000.gpu") -> dict[str, str]:
    """Return the limits of two CPUs, in kHz, and of a GPU."""
    folders = [f"sys/devices/system/cpu/cpu{number}/cpufreq/scaling_" for number in (0, 1)] + [f"sys/class/devfreq/{gpu}/"]
    return {f"{folder}{name}_freq": f"{value}\n" for folder in folders for name, value in (("min", low), ("max", high))}


def meminfo(total_gib: float, available_gib: float, *, swap_gib: float = 4, cma_mib: int = 256) -> str:
    """Return /proc/meminfo."""
    kib = 1024 * 1024
    sizes = {"total": total_gib * kib, "available": available_gib * kib, "swap": swap_gib * kib, "cma": cma_mib * 1024}
    return MEMINFO.format(**{name: int(value) for name, value in sizes.items()})


def swaps(*, zram_gib: float = 0, devices: int = 6, used_gib: float = 0, file_gib: float = 0) -> str:
    """Return /proc/swaps: the devices of JetPack's nvzramconfig, one a core, and a file on a disk."""
    size, used = (int(gib * 1024 * 1024) // devices for gib in (zram_gib, used_gib))
    zram = [f"/dev/zram{number:<38}partition\t{size}\t\t{used}\t\t5\n" for number in range(devices if zram_gib else 0)]
    files = [f"/mnt/16GB.swap{'':<26}file\t\t{int(file_gib * 1024 * 1024)}\t0\t\t-2\n"] if file_gib else []
    return SWAPS + "".join([*zram, *files])


def orin_nano() -> Recording:
    """Return an Orin Nano 8GB, JetPack 6.2, as it comes: 25 W, clocks free, the CMA pool of the default kernel line."""
    return Recording(
        {
            "proc/device-tree/model": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super\0",
            "proc/device-tree/compatible": "nvidia,p3768-0000+p3767-0005-super\0nvidia,p3767-0005\0nvidia,tegra234\0",
            "etc/nv_tegra_release": RELEASE.format(major=36, revision="4.3"),
            "etc/nvpmodel.conf": NANO_MODES,
            "var/lib/nvpmodel/status": "pmode:0001",
            "var/lib/dpkg/status": deb("nvidia-l4t-core", "36.4.3-20250107174145") + tensorrt_debs("10.3.0.30-1+cuda12.5"),
            "usr/local/cuda-12.6/targets/aarch64-linux/lib/libcudart.so.12.6.68": "",
            "usr/local/cuda-12.6/targets/aarch64-linux/lib/libcudart.so.12": "",
            "proc/meminfo": meminfo(7.44, 5.1, swap_gib=3.72),
            "proc/swaps": swaps(zram_gib=3.72),
            **clocks(729_600, 1_344_000),
            **rails(1, ("VDD_IN", 5016, 1440), ("VDD_CPU_GPU_CV", 5008, 320), ("VDD_SOC", 5008, 488)),
        },
        {"nvpmodel -q": "NV Power Mode: 25W\n1\n"},
    )


def orin_nx() -> Recording:
    """Return an Orin NX 16GB on a carrier board that names itself, JetPack 6.1, at its fastest."""
    modes = NANO_MODES.replace("NAME=15W", "NAME=MAXN_SUPER").replace("ID=2 NAME=MAXN_SUPER", "ID=2 NAME=15W")
    return Recording(
        {
            "proc/device-tree/model": "Acme Carrier A\0",
            "proc/device-tree/compatible": "nvidia,p3768-0000+p3767-0000\0nvidia,p3767-0000\0nvidia,tegra234\0",
            "etc/nv_tegra_release": RELEASE.format(major=36, revision="4.0"),
            "etc/nvpmodel.conf": modes,
            "var/lib/nvpmodel/status": "pmode:0000 fmode:quiet",
            "var/lib/dpkg/status": tensorrt_debs("10.3.0.30-1+cuda12.5"),
            "proc/meminfo": meminfo(15.3, 12, cma_mib=256),
            **clocks(1_190_400, 1_190_400),
        }
    )


def agx_orin() -> Recording:
    """Return an AGX Orin 64GB, JetPack 7.2, clocks pinned; the kernel's files hidden, as in a container."""
    return Recording(
        {
            "proc/device-tree/model": "NVIDIA Jetson AGX Orin Developer Kit\0",
            "proc/device-tree/compatible": "nvidia,p3737-0000+p3701-0005\0nvidia,p3701-0005\0nvidia,tegra234\0",
            "etc/nv_tegra_release": RELEASE.format(major=39, revision="2.0"),
            "etc/nvpmodel.conf": AGX_MODES,
            "var/lib/dpkg/status": tensorrt_debs("10.16.1.11-1+cuda13.2"),
            "usr/local/cuda/targets/sbsa-linux/lib/libcudart.so.13.2.51": "",
            "proc/meminfo": meminfo(61.3, 58, swap_gib=30),
            **rails(5, ("VDD_GPU_SOC", 4900, 2000), ("VDD_CPU_CV", 4900, 1000), ("VIN_SYS_5V0", 5000, 1600)),
            **rails(6, ("NC", 0, 0), ("VDDQ_VDD2_1V8AO", 4968, 80)),
        },
        {"nvpmodel -q": "NV Power Mode: MAXN\n0\n", "jetson_clocks --show": CLOCKS_PINNED},
        Software((3, 12), {**BASE, "tensorrt": "10.16.1.11"}, CPU_ONLY, False),
    )


def thor() -> Recording:
    """Return a Thor, JetPack 7.0, in a virtual environment that does not see the system's packages."""
    return Recording(
        {
            "proc/device-tree/model": "NVIDIA Jetson AGX Thor Developer Kit\0",
            "proc/device-tree/compatible": "nvidia,p4071-0000+p3834-0008\0nvidia,p3834-0008\0nvidia,tegra264\0",
            "etc/nv_tegra_release": RELEASE.format(major=38, revision="2.2"),
            "etc/nvpmodel.conf": THOR_MODES,
            "var/lib/dpkg/status": tensorrt_debs("10.13.3.9-1+cuda13.0"),
            "proc/meminfo": meminfo(122.8, 110, swap_gib=0),
            **clocks(972_000, 2_601_000, gpu="gpu-gpc-0"),
            **rails(3, ("VDD_GPU", 5008, 40), ("VDD_CPU_SOC_MSS", 5000, 1400), ("VIN_SYS_5V0", 5000, 1300)),
        },
        {"nvpmodel -q": "NVPM VERB: Config file: /etc/nvpmodel.conf\nNV Power Mode: 120W\n1\n"},
        Software((3, 12), BASE, CPU_ONLY, True),
    )


def desktop() -> Recording:
    """Return an x86 machine with an NVIDIA driver and nothing else."""
    return Recording(
        {"proc/driver/nvidia/version": "NVRM version", "proc/meminfo": meminfo(31, 20), "proc/swaps": swaps(file_gib=4)},
        software=Software((3, 11), BASE, CPU_ONLY, True),
    )
