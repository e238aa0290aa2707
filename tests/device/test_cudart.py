"""Which libcudart is loaded, what its errors say, and the trial of the GPU: on made-up machines, and with NVIDIA's libraries."""

from __future__ import annotations

import ctypes
import json
import platform
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from device_simulation import SimulatedCudart, simulated_libraries
from recordings_jetson import orin_nano

from edgeprune.device import cudart, gpu
from edgeprune.device.cudart import Cudart, driver_version, library_names, load_cudart
from edgeprune.device.doctor import diagnose
from edgeprune.device.gpu import GpuTrial, try_gpu
from edgeprune.errors import EngineError

JETPACK_6, PIP = "/usr/local/cuda-12.6/lib64/libcudart.so.12", "/venv/nvidia/cuda_runtime/lib/libcudart.so.12"


@pytest.fixture(autouse=True)
def jetson(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")


def on_jetpack_6(libraries: dict[str, tuple[int, int]]) -> Cudart:
    """Return what is loaded on a driver for CUDA 12.6."""
    given = {name: SimulatedCudart(version, (12, 6)) for name, version in libraries.items()}
    return load_cudart(list(libraries), simulated_libraries((12, 6), given))


def test_a_normal_board() -> None:
    runtime = on_jetpack_6({"libcudart.so.12": (12, 6)})
    runtime.call("cudaFree", None)
    assert (runtime.version, runtime.driver, str(runtime)) == ((12, 6), (12, 6), "CUDA 12.6, driver 12.6")


def test_jetpacks_library_is_taken_before_a_newer_one() -> None:
    runtime = on_jetpack_6({"libcudart.so.13": (13, 0), PIP: (12, 9), JETPACK_6: (12, 6)})
    assert runtime.name == JETPACK_6


def test_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineError, match=r"no CUDA runtime library .* for CUDA 12\.6\. .*sudo apt install cuda-cudart-12-6$"):
        load_cudart(["libcudart.so.12"], simulated_libraries((12, 6), {}))
    with pytest.raises(EngineError, match=r"sudo apt install cuda-cudart-13-0$"):
        load_cudart([], simulated_libraries((14, 1), {}))
    with pytest.raises(EngineError, match=r"Update the NVIDIA driver: CUDA 12 or newer"):
        load_cudart([], simulated_libraries((11, 4), {}))
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    with pytest.raises(EngineError, match=r'pip install "nvidia-cuda-runtime-cu12==12\.6\.\*"$'):
        load_cudart([], simulated_libraries((12, 6), {}))
    with pytest.raises(EngineError, match=r'pip install "nvidia-cuda-runtime==13\.0\.\*"$'):
        load_cudart([], simulated_libraries((13, 0), {}))


def test_a_library_newer_than_the_driver_says_so() -> None:
    runtime = on_jetpack_6({PIP: (12, 9), "libcudart.so.13": (13, 0)})
    assert runtime.version == (12, 9)  # the oldest, which an error asks to replace
    with pytest.raises(EngineError) as caught:
        runtime.call("cudaFree", None)
    assert caught.value.message == (
        "cudaFree failed: cudaErrorInsufficientDriver (35). "
        f"The CUDA runtime is 12.9 ({PIP}), and the NVIDIA driver is for CUDA 12.6."
    )
    assert caught.value.hint.endswith("sudo apt install cuda-cudart-12-6")


def test_without_a_driver_that_is_the_reason() -> None:
    libraries = simulated_libraries(None, {"libcudart.so.12": SimulatedCudart((12, 6), None)})
    runtime = load_cudart(["libcudart.so.12"], libraries)
    with pytest.raises(EngineError, match=r"\(35\)\. The CUDA runtime is 12\.6 .*no NVIDIA driver is loaded\..*--runtime nvidia$"):
        runtime.call("cudaFree", None)
    assert str(runtime) == "CUDA 12.6, driver none"
    with pytest.raises(EngineError, match="and no NVIDIA driver is loaded"):
        load_cudart([], libraries)


def test_something_else_of_that_name_is_passed_over() -> None:
    libraries = simulated_libraries((12, 6), {"libcudart.so.13": object(), "libcudart.so.12": SimulatedCudart()})
    assert load_cudart(["libcudart.so.13", "libcudart.so.12"], libraries).name == "libcudart.so.12"


def test_where_libraries_are_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheels = [tmp_path / folder / "lib" for folder in ("nvidia/cuda_runtime", "nvidia/cu13")]
    for folder, name in zip(wheels, ("libcudart.so.12", "libcudart.so.13"), strict=True):
        folder.mkdir(parents=True)
        (folder / name).touch()
    (wheels[0] / "libcudart.so.12.6.77").touch()  # the soname leads to it
    system = orin_nano().write(tmp_path / "system")
    files = cudart.library_files(system)
    monkeypatch.setattr(cudart, "library_files", lambda: files)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    found = wheels[1] / "libcudart.so.13", files[0].with_name("libcudart.so.12"), wheels[0] / "libcudart.so.12"
    assert library_names() == ["libcudart.so.13", "libcudart.so.12", *map(str, found)]


def test_the_constants_are_nvidias() -> None:
    cuda = pytest.importorskip("cuda.bindings.runtime", reason="NVIDIA's bindings, of the extra test")
    kinds, attributes, errors = cuda.cudaMemcpyKind, cuda.cudaDeviceAttr, cuda.cudaError_t
    assert (
        kinds.cudaMemcpyHostToDevice,
        kinds.cudaMemcpyDeviceToHost,
        kinds.cudaMemcpyDeviceToDevice,
    ) == (cudart.TO_DEVICE, cudart.TO_HOST, cudart.ON_DEVICE)
    assert attributes.cudaDevAttrComputeCapabilityMajor == cudart.CAPABILITY_MAJOR
    assert attributes.cudaDevAttrComputeCapabilityMinor == cudart.CAPABILITY_MINOR
    assert attributes.cudaDevAttrMultiProcessorCount == cudart.MULTIPROCESSORS
    named = errors.cudaErrorMemoryAllocation, errors.cudaErrorInsufficientDriver, errors.cudaErrorCallRequiresNewerDriver
    assert named == (cudart._OUT_OF_MEMORY, cudart._INSUFFICIENT_DRIVER, cudart._NEWER_DRIVER_NEEDED)


@pytest.mark.parametrize("name", [name for name in library_names() if "/" in name] or ["none"])
def test_nvidias_libraries_answer_as_expected(name: str) -> None:
    if name == "none":
        pytest.skip("there is no libcudart here: pip install nvidia-cuda-runtime")
    driver = driver_version()
    runtime = Cudart(ctypes.CDLL(name), name, driver)
    assert runtime.version[0] == int(name.rpartition(".so.")[2])
    if driver is not None:
        pytest.skip("there is a driver here: see `pytest -m device`")
    with pytest.raises(EngineError, match=r"cudaStreamCreate failed: cudaErrorInsufficientDriver \(35\)"):
        runtime.address("cudaStreamCreate")


def program(path: Path, text: str) -> list[str]:
    path.write_text(text)
    return [sys.executable, str(path)]


def test_the_trial_says_what_was_tried(tmp_path: Path) -> None:
    started = time.monotonic()
    assert try_gpu(program(tmp_path / "fine.py", 'print("noise"); print(\'{"cuda": "CUDA 12.6"}\'); print(1)')) == GpuTrial(
        "CUDA 12.6"
    )
    failed = try_gpu(program(tmp_path / "failed.py", 'print(\'{"error": "No.", "remedy": "Do."}\')'))
    assert failed == GpuTrial(error="No.", remedy="Do.")
    said = 'print(\'{"trying": "cudaFree(0)"}\', flush=True)\n'
    crashed = try_gpu(program(tmp_path / "crashed.py", f"{said}import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)"))
    assert crashed.error == "cudaFree(0) crashed (SIGSEGV)" and "dmesg" in crashed.remedy
    hung = try_gpu(program(tmp_path / "hung.py", f"{said}import time\ntime.sleep(600)"), limit=2)
    assert hung.error == "cudaFree(0) did not return within 2 s"
    ended = try_gpu(program(tmp_path / "ended.py", "raise SystemExit(3)"))
    assert ended.error == "The trial ended with status 3"
    assert time.monotonic() - started < 60


def trial_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], runtime: Cudart, tmp_path: Path, text: str
) -> GpuTrial:
    """Return what the trial says of a machine with a CUDA runtime and a TensorRT module of this text."""
    (tmp_path / "tensorrt.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    gpu._main(lambda: runtime)
    sys.modules.pop("tensorrt", None)  # with monkeypatch it would come back
    return gpu._result(capsys.readouterr().out, "")


def test_the_trial_calls_cuda_and_tensorrt(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    fine = "class Logger:\n    ERROR = 1\n    def __init__(self, severity): pass\ndef Runtime(logger): pass\n"
    library = SimulatedCudart()
    normal = Cudart(library, "libcudart.so.12", (12, 6))
    assert trial_of(monkeypatch, capsys, normal, tmp_path, fine) == GpuTrial("CUDA 12.6, driver 12.6")
    assert library.calls == [("free", None)]
    broken = "raise ImportError('libnvinfer.so.10: cannot open')"
    assert trial_of(monkeypatch, capsys, normal, tmp_path, broken).error == (
        "TensorRT cannot be used: ImportError: libnvinfer.so.10: cannot open"
    )
    newer = Cudart(SimulatedCudart((12, 9), (12, 6)), "libcudart.so.12", (12, 6))
    refused = trial_of(monkeypatch, capsys, newer, tmp_path, fine)
    assert "(35)" in refused.error and "12.9" in refused.error and "12.6" in refused.error and "cuda-cudart-12-6" in refused.remedy


def test_the_doctor_believes_the_trial(tmp_path: Path) -> None:
    machine = orin_nano().machine(tmp_path)
    names = ("build TensorRT engines", "run TensorRT engines")
    good = {each.name: each for each in diagnose(machine, lambda: GpuTrial("CUDA 12.6, driver 12.6")).abilities}
    assert all(good[name].able for name in names) and "CUDA 12.6, driver 12.6" in good[names[1]].reason
    bad = {each.name: each for each in diagnose(machine, lambda: GpuTrial(error="Too new", remedy="Do")).abilities}
    assert [(bad[name].able, bad[name].reason, bad[name].remedy) for name in names] == [(False, "Too new", "Do")] * 2


def test_the_gpu_is_not_tried_without_tensorrt(tmp_path: Path) -> None:
    machine = orin_nano().machine(tmp_path)
    bare = replace(machine, debs={}, software=replace(machine.software, packages={}))
    diagnose(bare, lambda: pytest.fail("there is nothing to try"))


def test_the_trials_own_process_ends_with_one_result() -> None:
    command = [sys.executable, "-m", "edgeprune.device.gpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[0]) == {"trying": "Loading the CUDA runtime"}
