"""CUDA's libraries of Python packages, and the trial of ONNX Runtime on CUDA, with made-up libraries."""

from __future__ import annotations

import ctypes
import json
import platform
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from edgeprune.device import onnxruntime_cuda as cuda
from edgeprune.device.gpu import try_gpu
from edgeprune.device.onnxruntime_cuda import COMMAND, CUDA, load_libraries, why_not_started

CUDA_13 = ("cu13/lib/libcublas.so.13", "cu13/lib/libcudart.so.13", "cu13/lib/libcublasLt.so.13", "cudnn/lib/libcudnn.so.9")
CUDA_12 = (
    "cublas/lib/libcublas.so.12",
    "cublas/lib/libcublasLt.so.12",
    "cuda_runtime/lib/libcudart.so.12",
    "cufft/lib/libcufft.so.11",
)
OTHERS = ("cu13/lib/libnvblas.so.13", "cu13/lib/libcudart_static.a", "cudnn/lib/libcudnn_ops.so.9")


@pytest.fixture(autouse=True)
def desktop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """Return a site-packages with the libraries of both versions of CUDA."""
    for name in (*CUDA_13, *CUDA_12, *OTHERS):
        file = tmp_path / "nvidia" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    return tmp_path


def loaded(monkeypatch: pytest.MonkeyPatch, packages: Path, built_for: str | None, found: tuple[str, ...] = ()) -> list[str]:
    """Return what is loaded by path, where the linker finds `found`; from an ONNX Runtime for a version of CUDA."""
    opened: list[str] = []

    def open_library(name: str) -> None:
        opened.append(name)
        if "/" not in name and name not in found:
            raise OSError(f"{name}: cannot open shared object file: No such file or directory")

    info = ModuleType("onnxruntime.capi.build_and_package_info")
    info.__dict__.update({} if built_for is None else {"cuda_version": built_for})
    monkeypatch.setitem(sys.modules, info.__name__, info)
    monkeypatch.setattr("onnxruntime.capi.build_and_package_info", info, raising=False)
    monkeypatch.setattr(ctypes, "CDLL", open_library)
    names = load_libraries(["", str(packages), str(packages / "no such folder")])
    assert [name.rpartition("/")[2] for name in opened if "/" in name] == names
    return names


def test_libraries_of_the_right_cuda_in_their_order(monkeypatch: pytest.MonkeyPatch, packages: Path) -> None:
    of_13 = ["libcudart.so.13", "libcublasLt.so.13", "libcublas.so.13", "libcudnn.so.9"]
    assert loaded(monkeypatch, packages, "13.0") == of_13
    of_12 = ["libcudart.so.12", "libcublasLt.so.12", "libcublas.so.12", "libcufft.so.11", "libcudnn.so.9"]
    assert loaded(monkeypatch, packages, "12.8") == of_12


def test_the_systems_libraries_come_first(monkeypatch: pytest.MonkeyPatch, packages: Path) -> None:
    assert loaded(monkeypatch, packages, "13.0", ("libcudart.so.13", "libcudnn.so.9")) == ["libcublasLt.so.13", "libcublas.so.13"]


@pytest.mark.parametrize("built_for", [None, "", "unknown"])
def test_other_builds_load_nothing(monkeypatch: pytest.MonkeyPatch, packages: Path, built_for: str | None) -> None:
    assert loaded(monkeypatch, packages, built_for) == []


@pytest.mark.parametrize(
    ("error", "machine", "expected"),
    [
        (
            "libcublasLt.so.13: cannot open shared object file: No such file or directory",
            "x86_64",
            ("libcublasLt.so.13 is missing", 'pip install "onnxruntime-gpu[cuda,cudnn]"'),
        ),
        (
            "libcudnn.so.9: cannot open shared object file",
            "aarch64",
            ("libcudnn.so.9 is missing", "sudo apt install nvidia-jetpack"),
        ),
        ("libcuda.so.1: cannot open shared object file", "x86_64", ("libcuda.so.1 of NVIDIA's driver is missing", "docker run")),
        ("/x/libonnxruntime.so: undefined symbol: f", "x86_64", ("/x/libonnxruntime.so: undefined symbol: f", "")),
        (None, "x86_64", ("it loads, and finds no GPU that it can use", "nvidia-smi")),
    ],
)
def test_the_linker_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, error: str | None, machine: str, expected: tuple[str, str]
) -> None:
    def open_library(name: str) -> None:
        assert name.endswith("capi/libonnxruntime_providers_cuda.so")
        if error is not None:
            raise OSError(error)

    monkeypatch.setattr(ctypes, "CDLL", open_library)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    reason, remedy = why_not_started(CUDA)
    assert (reason, remedy[: len(expected[1])]) == expected
    assert why_not_started("OpenVINOExecutionProvider") == ("", "")


def test_the_graph_of_the_trial() -> None:
    onnx.checker.check_model(onnx.load_from_string(cuda._GRAPH))
    session = onnxruntime.InferenceSession(cuda._GRAPH, providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {"x": np.full((1, 1), 3, np.float32)})
    assert result == 12


@pytest.mark.parametrize(
    ("providers", "result", "said"),
    [
        ([CUDA, "CPUExecutionProvider"], 12, ""),
        ([CUDA, "CPUExecutionProvider"], 0, "ONNX Runtime computes 0.0 on CUDA, where it is 12"),
        (["CPUExecutionProvider"], 12, "ONNX Runtime cannot start CUDA: libcurand.so.10 is missing"),
        ([CUDA], None, "ONNX Runtime cannot use CUDA: RuntimeError: no kernel image is available"),
    ],
)
def test_the_trial_multiplies(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], providers: list[str], result: float | None, said: str
) -> None:
    def run(names: None, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        if result is None:
            raise RuntimeError("no kernel image is available")
        return [np.full((1, 1), result, np.float32)]

    def session(graph: bytes, options: Any, **asked: Any) -> SimpleNamespace:
        assert asked == {"providers": [CUDA]}
        return SimpleNamespace(get_providers=lambda: providers, run=run)

    def open_library(name: str) -> None:
        raise OSError("libcurand.so.10: cannot open shared object file")

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    monkeypatch.setattr(ctypes, "CDLL", open_library)
    cuda._main()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert next((line["error"] for line in lines if "error" in line), "") == said


def test_the_trial_in_a_process_of_its_own() -> None:
    if CUDA in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has CUDA: see `pytest -m device`")
    assert try_gpu(COMMAND).error.startswith("ONNX Runtime cannot start CUDA: ")


@pytest.mark.device
def test_cuda_is_tried_on_a_gpu() -> None:
    if CUDA not in onnxruntime.get_available_providers():
        pytest.skip("needs a GPU and onnxruntime-gpu[cuda,cudnn]")
    trial = try_gpu(COMMAND)
    if "finds no GPU" in trial.error or "driver is missing" in trial.error:
        pytest.skip("needs a GPU")
    assert trial.error == ""
