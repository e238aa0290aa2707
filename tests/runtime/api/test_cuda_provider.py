"""ONNX Runtime on CUDA: what is asked of it and what is refused, without a GPU; and the answers of one, where there is one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
from PIL import Image
from plans import PLANS, PROMPT

from edgeprune.bundle import Bundle
from edgeprune.checkpoint.loading import LoadedModel
from edgeprune.device import onnxruntime_cuda
from edgeprune.device.gpu import try_gpu
from edgeprune.errors import EngineError, UsageError
from edgeprune.export.exporter import export_bundle
from edgeprune.runtime import load
from edgeprune.runtime.backends import onnxruntime as backend
from edgeprune.runtime.backends.interface import CPU, CUDA
from edgeprune.runtime.backends.kv_cache import KvCache
from edgeprune.runtime.backends.onnxruntime import nodes_run
from edgeprune.runtime.backends.providers import ONNXRUNTIME, open_backend
from edgeprune.targets import TARGETS, Lowering


@pytest.fixture(scope="module", params=["fp32", "int8"])
def for_cpus(request: pytest.FixtureRequest, even: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    plan = PLANS["cache, schedule"]
    plan = type(plan)(plan.family, 2, plan.geometry)
    lowering = Lowering(TARGETS["cpu"], request.param)
    return export_bundle(even, plan, tmp_path_factory.mktemp("cpu") / "bundle", lowering=lowering)


@pytest.mark.parametrize("provider", ["cuda", "ort-tensorrt"])
def test_a_bundle_for_cpus_is_refused_by_name(for_cpus: Bundle, provider: str) -> None:
    # On CUDA it ended the process.
    said = r"exported for any machine without a GPU \(--target cpu\).*--target onnxruntime, or use --provider cpu"
    with pytest.raises(UsageError, match=said):
        open_backend(for_cpus, provider)
    with pytest.raises(UsageError, match=said):
        nodes_run(for_cpus, None, KvCache.empty(for_cpus.manifest.decoder, for_cpus.plan), providers=ONNXRUNTIME[provider])  # type: ignore[arg-type]


class Session:
    """Notes how it is made, and has the providers that are given."""

    made: list[Any] = []  # noqa: RUF012  # a test empties it
    started: tuple[str, ...] = (CUDA, CPU)

    def __init__(self, path: str, options: Any, *, providers: list[Any], disabled_optimizers: list[str]) -> None:
        Session.made.append(providers)

    def get_providers(self) -> list[str]:
        return list(self.started)


@pytest.fixture
def gpu_package(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let ONNX Runtime be that for CUDA; return what is called."""
    calls: list[str] = []
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr(onnxruntime_cuda, "load_libraries", lambda: calls.append("libraries"))
    monkeypatch.setattr(Session, "made", [])
    backend._load_cuda_libraries.cache_clear()
    return calls


@pytest.mark.parametrize(("precision", "options"), [("fp32", {"use_tf32": "0"}), ("fp16", {}), ("int8", {})])
def test_fp32_is_multiplied_as_such_on_cuda(precision: str, options: dict[str, str], gpu_package: list[str]) -> None:
    bundle: Any = SimpleNamespace(manifest=SimpleNamespace(precision=precision))
    for _ in range(2):
        backend._open_session(Path("decoder.onnx"), None, backend._with_options(bundle, ONNXRUNTIME["cuda"]))
    assert Session.made == 2 * [[(CUDA, options), (CPU, {})]]
    assert gpu_package == ["libraries"]  # once


def test_a_cpu_asks_for_no_library_of_cuda(gpu_package: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Session, "started", (CPU,))
    backend._open_session(Path("decoder.onnx"), None, [(CPU, {})])
    assert gpu_package == []


@pytest.mark.parametrize(
    ("why", "said"),
    [
        (
            ("libcublasLt.so.13 is missing", onnxruntime_cuda.INSTALL),
            r"libcublasLt\.so\.13 is missing\. Try: pip install .*provider cpu",
        ),
        (("", ""), r"could not start CUDAExecutionProvider\. See: edgeprune doctor, or use --provider cpu"),
    ],
)
def test_what_does_not_start_says_why(
    why: tuple[str, str], said: str, gpu_package: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Session, "started", (CPU,))
    monkeypatch.setattr(onnxruntime_cuda, "why_not_started", lambda provider: why)
    with pytest.raises(EngineError, match=said):
        backend._open_session(Path("decoder.onnx"), None, [(CUDA, {}), (CPU, {})])


@pytest.mark.device
@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("lowering", [Lowering(TARGETS["onnxruntime"], "fp32"), Lowering(TARGETS["jetpack6"], "fp16")], ids=str)
def test_cuda_answers_as_the_cpu(name: str, lowering: Lowering, tiny: LoadedModel, tmp_path: Path) -> None:
    if CUDA not in onnxruntime.get_available_providers() or try_gpu(onnxruntime_cuda.COMMAND).error:
        pytest.skip("needs a GPU and onnxruntime-gpu[cuda,cudnn]")
    bundle = export_bundle(tiny, PLANS[name], tmp_path / "bundle", lowering=lowering)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (84, 112, 3), dtype=np.uint8))
    here, there = (load(bundle.path, provider=provider).generate(picture, PROMPT, max_tokens=8) for provider in ("cpu", "cuda"))
    assert here.text == there.text
    if lowering.precision == "fp32":
        pairs = zip(here.receipt.cuts, there.receipt.cuts, strict=True)
        assert all(np.array_equal(one.kept, other.kept) for one, other in pairs)
