"""CUDA for ONNX Runtime: find the libraries that its GPU package needs, and try a product on the GPU.

`pip install "onnxruntime-gpu[cuda,cudnn]"` puts CUDA's libraries into folders of `site-packages` that the system's linker does not
search, and ONNX Runtime does not load them by itself. Its own `preload_dlls` searches folders of older packages in some versions
(1.27: none of CUDA 13), prefers them to the system's, and prints to standard output.

The trial runs in a process of its own: `try_gpu(COMMAND)` of `edgeprune.device.gpu`.
"""

from __future__ import annotations

import ctypes
import platform
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from edgeprune.device.gpu import report
from edgeprune.errors import one_line

COMMAND = (sys.executable, "-m", "edgeprune.device.onnxruntime_cuda")
CUDA = "CUDAExecutionProvider"
INSTALL = 'pip install "onnxruntime-gpu[cuda,cudnn]"'
_INSTALL_ON_JETSON = "sudo apt install nvidia-jetpack"

# Those that others need come first. What a version of ONNX Runtime does not need does no harm.
_STEMS = ("cudart", "nvrtc", "nvJitLink", "cublasLt", "cublas", "curand", "cufft", "cudnn")
_OF_EACH = ("cuda_runtime", "cuda_nvrtc", "nvjitlink", "cublas", "curand", "cufft")  # a folder a library, before CUDA 13
_FILES = {CUDA: "libonnxruntime_providers_cuda.so", "TensorrtExecutionProvider": "libonnxruntime_providers_tensorrt.so"}
_DRIVER = "libcuda.so.1"
# y = xx + x of x [1, 1], as ONNX of opset 13: a product by cuBLAS and a kernel of ONNX Runtime's own.
_GRAPH = bytes.fromhex(
    "080812003a500a110a01780a017812017022064d61744d756c0a0e0a01700a017812017922034164641201675a130a01"
    "78120e0a0c080112080a0208010a02080162130a0179120e0a0c080112080a0208010a02080142040a00100d"
)


def load_libraries(folders: Iterable[str] | None = None) -> list[str]:
    """Load CUDA's libraries of Python packages where the system's linker finds none, and return their names.

    They stay loaded, under the names by which ONNX Runtime asks for them. `folders`: where packages are; None: `sys.path`. Does
    nothing if ONNX Runtime was not built for CUDA 12 or later, or by others than its authors, as on a Jetson.
    """
    major, loaded = _cuda_major(), []
    if major is None:
        return []
    for file in _wheel_files(sys.path if folders is None else folders, major):
        if not _loads(file.name) and _loads(str(file)):
            loaded.append(file.name)
    return loaded


def _cuda_major() -> int | None:
    # The CUDA version of the installed GPU package, which it notes in a module.
    try:
        from onnxruntime.capi import build_and_package_info

        return int(build_and_package_info.cuda_version.partition(".")[0])
    except (ImportError, AttributeError, ValueError):
        return None


def _wheel_files(folders: Iterable[str], major: int) -> list[Path]:
    places = [f"cu{major}", "cudnn"] if major >= 13 else [*_OF_EACH, "cudnn"]
    found = [
        file for folder in filter(None, folders) for place in places for file in _libraries(Path(folder, "nvidia", place, "lib"))
    ]
    return sorted(found, key=lambda file: _STEMS.index(_stem(file)))


def _libraries(folder: Path) -> list[Path]:
    return [file for file in sorted(folder.glob("lib*.so.*")) if _stem(file) in _STEMS]


def _stem(file: Path) -> str:
    return file.name.removeprefix("lib").partition(".so.")[0]


def _loads(name: str) -> bool:
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


def why_not_started(provider: str) -> tuple[str, str]:
    """Return why ONNX Runtime could not start a provider of NVIDIA's, and the remedy. Empty words for what is not known."""
    import onnxruntime

    try:
        ctypes.CDLL(str(Path(onnxruntime.__file__).parent / "capi" / _FILES[provider]))
    except KeyError:
        return "", ""
    except OSError as error:
        return _why(str(error), provider)
    return "it loads, and finds no GPU that it can use", "nvidia-smi"


def _why(error: str, provider: str) -> tuple[str, str]:
    missing = re.match(r"(lib\S+\.so[.\d]*): cannot open", error)
    if missing is None:
        return one_line(error), ""
    if missing[1] == _DRIVER:
        return f"{_DRIVER} of NVIDIA's driver is missing", "docker run --runtime nvidia, or install the driver"
    install = _INSTALL_ON_JETSON if platform.machine() == "aarch64" else INSTALL
    return f"{missing[1]} is missing", install if provider == CUDA else ""


def _main() -> None:
    report(trying="Importing ONNX Runtime")
    try:
        import numpy as np
        import onnxruntime

        load_libraries()
        report(trying="A product on CUDA by ONNX Runtime")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(_GRAPH, options, providers=[CUDA])
        if session.get_providers()[0] != CUDA:
            reason, remedy = why_not_started(CUDA)
            report(error=f"ONNX Runtime cannot start CUDA: {reason}", remedy=remedy)
            return
        (result,) = session.run(None, {"x": np.full((1, 1), 3, np.float32)})
        if result.item() != 12:
            report(error=f"ONNX Runtime computes {result.item()} on CUDA, where it is 12")
    except Exception as error:  # ONNX Runtime's exceptions have no common base
        report(error=one_line(f"ONNX Runtime cannot use CUDA: {type(error).__name__}: {error}"))


if __name__ == "__main__":
    _main()
