"""The table of providers: ONNX Runtime execution providers, and TensorRT engines of this device or of its fleet."""

from __future__ import annotations

from edgeprune.bundle import Bundle
from edgeprune.bundle.signing import TrustedKeys
from edgeprune.errors import UsageError
from edgeprune.runtime.backends.interface import CPU, CUDA, Backend

_TENSORRT, _OPENVINO = "TensorrtExecutionProvider", "OpenVINOExecutionProvider"
TENSORRT = "tensorrt"
# ONNX Runtime assigns each node to the first provider that supports it. Its TensorRT provider builds engines at load time and has
# no cache here, because it would load a cached engine without verification.
ONNXRUNTIME = {"cpu": (CPU,), "cuda": (CUDA, CPU), "ort-tensorrt": (_TENSORRT, CUDA, CPU), "openvino": (_OPENVINO, CPU)}
PROVIDERS = (*ONNXRUNTIME, TENSORRT)


def open_backend(
    bundle: Bundle, provider: str, threads: int | None = None, trust: TrustedKeys = (), *, parallel: int = 1
) -> Backend:
    """Return the backend for a bundle on a provider of PROVIDERS. `trust`: public keys, one of which must have signed the engines.

    `parallel`: conversations whose decode steps it may be given at once, where it takes several.

    Raises EngineError when the provider is not available here, and UsageError for an unknown provider, unsupported `threads` or
    `trust`, or a bundle whose target does not fit the provider.
    """
    if trust and provider != TENSORRT:
        raise UsageError("Only --provider tensorrt loads engines that a key could have signed.", hint="Leave --trust out.")
    if provider in ONNXRUNTIME:
        from edgeprune.runtime.backends.onnxruntime import OnnxRuntimeBackend  # a quarter of what the runtime takes to import

        return OnnxRuntimeBackend(bundle, threads, providers=ONNXRUNTIME[provider], parallel=parallel)
    if provider != TENSORRT:
        raise UsageError(f"Unknown provider {provider!r}.", hint=f"Providers are: {', '.join(PROVIDERS)}.")
    if threads is not None:
        raise UsageError("TensorRT engines have no threads to choose.", hint="Leave --threads out.")
    from edgeprune.runtime.backends.tensorrt.backend import TensorRTBackend

    return TensorRTBackend.on_this_device(bundle, trust)
