"""The doctor: what can be done on recorded machines, what stands in the way, the exact remedy, and the exit code."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from recordings_jetson import (
    BASE,
    CPU_ONLY,
    EXTRAS,
    RELEASE,
    Recording,
    agx_orin,
    deb,
    desktop,
    meminfo,
    orin_nano,
    orin_nx,
    swaps,
    tensorrt_debs,
    thor,
)

import edgeprune.device.gpu
import edgeprune.device.machine
from edgeprune.cli import main
from edgeprune.device.doctor import DeviceFeature, Diagnosis, diagnose
from edgeprune.device.gpu import GpuTrial
from edgeprune.device.system import Software
from edgeprune.errors import install_command

CPU, CUDA, BUILD, ENGINES, EXPORT = (
    "run bundles on the CPU",
    "ONNX Runtime on CUDA",
    "build TensorRT engines",
    "run TensorRT engines",
    "export and calibrate",
)


def examine(recording: Recording, root: Path) -> tuple[dict[str, DeviceFeature], Diagnosis]:
    diagnosis = diagnose(recording.machine(root))
    return {ability.name: ability for ability in diagnosis.abilities}, diagnosis


def cautions(recording: Recording, root: Path) -> dict[str, str]:
    """Return the remedies by what they are for."""
    return {caution.what: caution.remedy for caution in diagnose(recording.machine(root)).cautions}


def remedy_for(words: str, found: dict[str, str]) -> str:
    matching = [remedy for what, remedy in found.items() if words in what]
    assert len(matching) == 1, found
    return matching[0]


@pytest.mark.parametrize("recording", [orin_nano, orin_nx, agx_orin])
def test_jetsons_that_are_ready(recording: Callable[[], Recording], tmp_path: Path) -> None:
    abilities, diagnosis = examine(recording(), tmp_path)
    assert [name for name, ability in abilities.items() if ability.able] == [CPU, BUILD, ENGINES]
    assert abilities[EXPORT].remedy == install_command("export")
    assert diagnosis.can_run


def test_an_orin_nano_as_it_comes(tmp_path: Path) -> None:
    found = cautions(orin_nano(), tmp_path)
    assert len(found) == 5
    assert remedy_for("3809 MiB of the swap are zram", found) == "sudo systemctl disable nvzramconfig && sudo reboot"
    assert "swapon /swapfile" in remedy_for("no swap on a disk", found)
    assert remedy_for("MAXN_SUPER", found) == "sudo nvpmodel -m 2"
    assert remedy_for("not pinned", found) == "sudo jetson_clocks"
    assert "cma=950M" in remedy_for("256 MiB", found)


def test_an_agx_orin_at_its_fastest_has_nothing_to_say(tmp_path: Path) -> None:
    assert cautions(agx_orin(), tmp_path) == {}


def test_a_virtual_environment_without_the_systems_packages(tmp_path: Path) -> None:
    abilities, diagnosis = examine(thor(), tmp_path)
    assert not abilities[BUILD].able
    assert abilities[BUILD].remedy == "python3.12 -m venv --system-site-packages VENV"
    assert "does not see" in abilities[ENGINES].reason
    assert diagnosis.can_run  # on the CPU


def test_another_python_than_jetpacks(tmp_path: Path) -> None:
    recording = replace(orin_nano(), software=Software((3, 12), BASE, CPU_ONLY, False))
    abilities, diagnosis = examine(recording, tmp_path)
    assert abilities[ENGINES].remedy == "python3.10 -m venv --system-site-packages VENV"
    assert "for Python 3.10, this is 3.12" in abilities[ENGINES].reason
    assert any("JetPack 6.2 has Python 3.10" in caution.what for caution in diagnosis.cautions)


def test_missing_tensorrt_packages(tmp_path: Path) -> None:
    recording = replace(orin_nano(), software=Software((3, 10), BASE, CPU_ONLY, False))
    recording.files["var/lib/dpkg/status"] = ""
    abilities, _ = examine(recording, tmp_path)
    assert abilities[BUILD].remedy == "sudo apt update && sudo apt install tensorrt python3-libnvinfer"
    recording.files["var/lib/dpkg/status"] = deb("libnvinfer10", "10.3.0.30-1+cuda12.5")
    abilities, _ = examine(recording, tmp_path)
    assert abilities[ENGINES].remedy == "sudo apt install python3-libnvinfer"


def test_a_missing_parser_blocks_building_alone(tmp_path: Path) -> None:
    recording = orin_nano()
    recording.files["var/lib/dpkg/status"] = deb("libnvinfer10", "10.3.0.30-1") + deb("python3-libnvinfer", "10.3.0.30-1")
    abilities, _ = examine(recording, tmp_path)
    assert (abilities[BUILD].able, abilities[ENGINES].able) == (False, True)
    assert abilities[BUILD].remedy == "sudo apt install libnvonnxparsers10"


@pytest.mark.parametrize("installed", [tensorrt_debs("8.6.2.3-1+cuda12.2"), ""])
def test_jetpack_6_0_is_to_be_upgraded(installed: str, tmp_path: Path) -> None:
    recording = replace(orin_nano(), software=Software((3, 10), {**BASE, "tensorrt": "unknown"}, CPU_ONLY, False))
    recording.files["etc/nv_tegra_release"] = RELEASE.format(major=36, revision="3.0")
    recording.files["var/lib/dpkg/status"] = installed
    abilities, diagnosis = examine(recording, tmp_path)
    assert "too old: 10.3 is needed" in abilities[BUILD].reason
    assert "r36.4" in abilities[BUILD].remedy and "dist-upgrade" in abilities[BUILD].remedy
    assert any("upgrade to JetPack 6.2" in caution.what for caution in diagnosis.cautions)


def test_the_package_indexs_wheel_has_no_kernels_for_a_jetson(tmp_path: Path) -> None:
    recording = agx_orin()
    packages = {**BASE, "onnxruntime-gpu": "1.31.1"}
    recording.software = Software((3, 12), packages, ("CUDAExecutionProvider", *CPU_ONLY), False)
    abilities, _ = examine(recording, tmp_path)
    assert not abilities[CUDA].able
    assert abilities[CUDA].remedy.startswith("pip uninstall onnxruntime-gpu")
    recording.software = replace(recording.software, providers=("TensorrtExecutionProvider", "CUDAExecutionProvider", *CPU_ONLY))
    abilities, _ = examine(recording, tmp_path)
    assert abilities[CUDA].able


def test_memory(tmp_path: Path) -> None:
    recording = orin_nano()
    recording.files["proc/meminfo"] = meminfo(7.44, 1.5, swap_gib=3, cma_mib=950)
    recording.files["proc/swaps"] = swaps(zram_gib=3)
    found = cautions(recording, tmp_path)
    assert remedy_for("1536 MiB of memory are free", found) == "sudo systemctl isolate multi-user.target"
    assert "swapon /swapfile" in remedy_for("no swap on a disk", found)
    assert remedy_for("3072 MiB of the swap are zram", found) == "sudo systemctl disable nvzramconfig && sudo reboot"
    assert not any("contiguous" in what for what in found)


def test_what_cannot_be_told_is_said(tmp_path: Path) -> None:
    bare = Recording({"proc/device-tree/model": "NVIDIA Jetson Orin Nano\0"})
    found = cautions(bare, tmp_path)
    assert remedy_for("fastest", found) == "sudo nvpmodel -q"
    assert remedy_for("clocks", found) == "sudo jetson_clocks --show"
    assert remedy_for("container", found) == ""


def test_an_unknown_release_is_said(tmp_path: Path) -> None:
    recording = agx_orin()
    recording.files["etc/nv_tegra_release"] = RELEASE.format(major=41, revision="1.0")
    assert remedy_for("L4T 41.1.0 belongs to no JetPack", cautions(recording, tmp_path)) == ""


def test_a_desktop(tmp_path: Path) -> None:
    abilities, diagnosis = examine(desktop(), tmp_path)
    assert abilities[CUDA].remedy == 'pip uninstall onnxruntime && pip install "onnxruntime-gpu[cuda,cudnn]"'
    assert abilities[BUILD].remedy == "pip install tensorrt"
    assert diagnosis.cautions == ()


def test_a_desktop_with_everything(tmp_path: Path) -> None:
    packages = {"onnxruntime-gpu": "1.31.1", "tensorrt": "11.4.1", **EXTRAS}
    recording = replace(desktop(), software=Software((3, 12), packages, ("CUDAExecutionProvider", *CPU_ONLY), True))
    abilities, _ = examine(recording, tmp_path)
    assert all(ability.able for ability in abilities.values())
    assert abilities[BUILD].reason.endswith("export MODEL -o BUNDLE --target tensorrt11, edgeprune build BUNDLE")


@pytest.mark.parametrize(
    ("processor", "flags", "slow"),
    [
        ("x86_64", "fpu avx2 fma", True),
        ("x86_64", "fpu avx2 avx512f avx512_vnni", False),
        ("AMD64", "fpu avx2 avx_vnni", False),
        ("aarch64", None, False),
        ("x86_64", None, False),  # unknown
    ],
)
def test_a_cpu_without_products_of_bytes_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processor: str, flags: str | None, slow: bool
) -> None:
    monkeypatch.setattr("platform.machine", lambda: processor)
    files = {} if flags is None else {"proc/cpuinfo": f"processor\t: 0\nflags\t\t: {flags}\nbugs\t\t: spectre_v1\n"}
    recording = desktop()
    recording.files.update(files)
    assert any("VNNI" in what for what in cautions(recording, tmp_path)) is slow


def test_a_provider_in_the_list_is_tried(tmp_path: Path) -> None:
    packages = {"onnxruntime-gpu": "1.31.1"}
    recording = replace(desktop(), software=Software((3, 12), packages, ("CUDAExecutionProvider", *CPU_ONLY), True))
    machine = recording.machine(tmp_path)

    def feature(trial: GpuTrial) -> DeviceFeature:
        return next(each for each in diagnose(machine, try_cuda=lambda: trial).abilities if each.name == CUDA)

    assert feature(GpuTrial()).able and "1.31.1 multiplied on CUDA" in feature(GpuTrial()).reason
    failed = GpuTrial(error="libcublasLt.so.13 is missing", remedy="pip install it")
    assert feature(failed) == DeviceFeature(CUDA, False, failed.error, failed.remedy)
    untried = next(each for each in diagnose(machine).abilities if each.name == CUDA)
    assert untried.able and "was not tried" in untried.reason


def test_what_cannot_work_is_not_tried(tmp_path: Path) -> None:
    def never() -> GpuTrial:
        raise AssertionError

    for recording in (orin_nano(), desktop(), replace(desktop(), files={})):
        diagnose(recording.machine(tmp_path / str(id(recording))), try_cuda=never)


def test_without_onnx_runtime_nothing_runs(tmp_path: Path) -> None:
    recording = replace(desktop(), software=Software((3, 11), {}, (), True))
    abilities, diagnosis = examine(recording, tmp_path)
    assert abilities[CPU].remedy == "pip install onnxruntime"
    assert not diagnosis.can_run


def run_doctor(recording: Recording, root: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> tuple[int, str]:
    machine = recording.machine(root)
    monkeypatch.setattr(edgeprune.device.machine, "read_machine", lambda: machine)
    monkeypatch.setattr(edgeprune.device.gpu, "try_gpu", lambda *command: GpuTrial("CUDA 12.6, driver 12.6"))
    result = CliRunner().invoke(main, ["doctor", *options])
    return result.exit_code, result.output


def test_the_command_on_a_jetson(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, output = run_doctor(orin_nano(), tmp_path, monkeypatch)
    assert code == 0
    tried = "tried with CUDA 12.6, driver 12.6"
    for words in ("JetPack        6.2", "25W (mode 1)", "yes build TensorRT engines", tried, "sudo nvpmodel -m 2"):
        assert words in output


def test_the_command_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, output = run_doctor(desktop(), tmp_path, monkeypatch)
    assert (code, output.splitlines()[0].startswith("This machine is no Jetson")) == (0, True)
    assert "JetPack" not in output


def test_the_command_as_json_and_its_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = replace(desktop(), software=Software((3, 11), {}, (), True))
    code, output = run_doctor(empty, tmp_path, monkeypatch, "--json")
    data = json.loads(output)
    assert (code, data["can_run"]) == (1, False)
    assert {"machine", "abilities", "cautions"} < set(data)
    assert set(data["abilities"][0]) == {"name", "able", "reason", "remedy"}
