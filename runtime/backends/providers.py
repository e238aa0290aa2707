"""What computes: ONNX Runtime on one of its execution providers, or TensorRT engines that were built on this device."""

from __future__ import annotations

from edgeprune.bundle import Bundle
from edgeprune.errors import UsageError
from edgeprune.runtime.backends.interface import Backend
from edgeprune.runtime.backends.onnxruntime import CPU, OnnxRuntimeBackend

_CUDA, _TENSORRT, _OPENVINO = "CUDAExecutionProvider", "TensorrtExecutionProvider", "OpenVINOExecutionProvider"
TENSORRT = "tensorrt"
# ONNX Runtime gives each provider what the one before it does not take. Its TensorRT provider builds engines while it loads and
# keeps none: a cached one would be loaded blindly.
ONNXRUNTIME = {"cpu": (CPU,), "cuda": (_CUDA, CPU), "ort-tensorrt": (_TENSORRT, _CUDA, CPU), "openvino": (_OPENVINO, CPU)}
PROVIDERS = (*ONNXRUNTIME, TENSORRT)


def open_backend(bundle: Bundle, provider: str, threads: int | None = None) -> Backend:
    """Return a bundle's graphs on a provider of PROVIDERS.

    Raises EngineError when it cannot be had here, UsageError for an unknown one or threads that it does not have.
    """
    if provider in ONNXRUNTIME:
        return OnnxRuntimeBackend(bundle, threads, providers=ONNXRUNTIME[provider])
    if provider != TENSORRT:
        raise UsageError(f"Unknown provider {provider!r}.", hint=f"Providers are: {', '.join(PROVIDERS)}.")
    if threads is not None:
        raise UsageError("TensorRT engines have no threads to choose.", hint="Leave --threads out.")
    from edgeprune.runtime.backends.tensorrt.backend import TensorRTBackend

    return TensorRTBackend.on_this_device(bundle)
