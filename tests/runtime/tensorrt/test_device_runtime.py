"""The native runtime on a simulated device: the same answers as ONNX Runtime, from the right addresses, with nothing left over."""

from __future__ import annotations

import gc
import hashlib
import json
import shutil
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from device_simulation import SCRATCH, SimulatedDriver, simulated_tensorrt
from PIL import Image
from plans import PLANS, PROMPT
from simulated_device import LIMITS, ORIN, SECRET, on_device, prepare
from tiny_models import TINY_GEOMETRY

from edgeprune.benchmark.expected import ComparingBackend, Expected, read_expected
from edgeprune.benchmark.profile import profile
from edgeprune.benchmark.selftest import STAGES, SelfTest, selftest
from edgeprune.bundle import EXPECTED, VISION, Bundle
from edgeprune.bundle.signing import TrustedKeys
from edgeprune.checkpoint.loading import LoadedModel
from edgeprune.cli import main, options
from edgeprune.device.cudart import load_cudart
from edgeprune.errors import BundleError, EngineError, UsageError
from edgeprune.export.exporter import export_bundle
from edgeprune.io.progress import Silent
from edgeprune.plan import Cut, KeepPlan
from edgeprune.plan.presets import unpruned_plan
from edgeprune.runtime import Runtime, load
from edgeprune.runtime.backends import providers
from edgeprune.runtime.backends.interface import BackendProxy, DecoderOutput, VisionOutput
from edgeprune.runtime.backends.onnxruntime import EmbeddingTable, OnnxRuntimeBackend
from edgeprune.runtime.backends.providers import open_backend
from edgeprune.runtime.backends.tensorrt.arrays import DeviceArray, MemoryPool, joined, upload
from edgeprune.runtime.backends.tensorrt.backend import TensorRTBackend
from edgeprune.runtime.backends.tensorrt.bindings import DeviceIdentity, identity, tensorrt
from edgeprune.runtime.backends.tensorrt.build import BuildRequest, build_bundle
from edgeprune.runtime.backends.tensorrt.builder import BuilderSettings
from edgeprune.runtime.backends.tensorrt.profiles import ProfileLimits
from edgeprune.runtime.backends.tensorrt.store import Store
from edgeprune.targets import TARGETS, Lowering


@pytest.fixture(
    scope="module",
    params=["everything", *(pytest.param(name, marks=pytest.mark.slow) for name in ("input, layers", "withdrawn, map"))],
)
def bundle(request: pytest.FixtureRequest, tiny: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    jetpack = Lowering(TARGETS["jetpack6"], "fp32")  # only a bundle for TensorRT has outputs to compare engines with
    made = export_bundle(tiny, PLANS[request.param], tmp_path_factory.mktemp("device") / "bundle", lowering=jetpack)
    prepare(made)
    return made


@pytest.fixture(scope="module")
def bfloat16(tiny: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    lowering = Lowering(TARGETS["jetpack6"], "bf16")
    made = export_bundle(tiny, PLANS["everything"], tmp_path_factory.mktemp("bfloat16") / "bundle", lowering=lowering)
    prepare(made)
    return made


@pytest.fixture
def driver() -> Iterator[SimulatedDriver]:
    yield SimulatedDriver()


def conversation(runtime: Runtime, image: Image.Image, *, prune: bool = True) -> list[Any]:
    """Return what three turns say: about an image, without one, and about a second one."""
    chat = runtime.chat(prune=prune)
    other = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    streams = []
    for prompt, shown in ((PROMPT, image), ("And the ball?", None), ("Is it here too?", other)):
        stream = chat.ask(prompt, shown, max_tokens=6)
        "".join(stream)
        streams.append(stream)
    return streams


@pytest.mark.parametrize("prune", [True, False])
def test_the_device_says_what_onnx_runtime_says(
    bundle: Bundle, tiny_image: Image.Image, driver: SimulatedDriver, prune: bool
) -> None:
    expected, actual = (
        conversation(runtime, tiny_image, prune=prune) for runtime in (load(bundle.path), on_device(bundle, driver))
    )
    for one, other in zip(expected, actual, strict=True):
        assert one.text == other.text
        for cut, same in zip(one.receipt.cuts, other.receipt.cuts, strict=True):
            assert np.array_equal(cut.kept, same.kept)
        assert one.receipt.kv_bytes == other.receipt.kv_bytes
        assert one.receipt.visual_reads == other.receipt.visual_reads
        assert one.receipt.decode_shares == other.receipt.decode_shares


def test_caches_of_bfloat16_stay_on_the_device_as_they_are(
    bfloat16: Bundle, tiny_image: Image.Image, driver: SimulatedDriver
) -> None:
    shape = bfloat16.manifest.decoder
    assert (shape.cache_type, shape.row_type) == ("bfloat16", "uint16")
    expected, actual = (conversation(runtime, tiny_image) for runtime in (load(bfloat16.path), on_device(bfloat16, driver)))
    assert [stream.text for stream in expected] == [stream.text for stream in actual]
    assert [stream.receipt.kv_bytes for stream in expected] == [stream.receipt.kv_bytes for stream in actual]
    stream = on_device(bfloat16, driver).stream(tiny_image, PROMPT, max_tokens=12)
    next(stream)
    before = len(driver.calls)
    "".join(stream)
    assert driver.calls[before:].count(("launch",)) > 5  # a step in place writes rows of bfloat16, too
    assert stream.receipt.kv_bytes % (2 * shape.kv_heads * shape.head_dim) == 0


def test_nothing_large_comes_back_and_memory_stops_growing(
    bundle: Bundle, tiny_image: Image.Image, driver: SimulatedDriver
) -> None:
    runtime = on_device(bundle, driver)
    runtime.generate(tiny_image, PROMPT, max_tokens=12)
    before, blocks = len(driver.calls), len(driver.blocks)
    runtime.generate(tiny_image, PROMPT, max_tokens=12)
    second = driver.calls[before:]
    assert len(driver.blocks) == blocks and not any(call[0] == "allocate" for call in second)
    vocabulary = bundle.manifest.decoder.vocabulary * 4
    indices = 8 * TINY_GEOMETRY.tokens * bundle.manifest.decoder.kv_heads
    assert max(call[1] for call in second if call[0] == "download") <= max(vocabulary, indices)
    steps = [call[2] for call in second if call[0] == "execute" and call[1] == "decoder"]
    assert steps == [0] and second.count(("launch",)) == 11  # one image turn, then decode steps


def test_a_step_on_growing_caches_copies_its_own_rows(own: Bundle, tiny_image: Image.Image, driver: SimulatedDriver) -> None:
    stream = on_device(own, driver).stream(tiny_image, PROMPT, max_tokens=12)
    next(stream)  # the decoder of this bundle is not told how many rows of its caches are real
    shape, before = own.manifest.decoder, len(driver.calls)
    "".join(stream)
    copied = [call[1] for call in driver.calls[before:] if call[0] == "copy"]
    row = shape.kv_heads * shape.head_dim * np.dtype(shape.cache_type).itemsize
    assert copied and set(copied) == {row}


def test_questions_of_all_lengths_share_a_few_blocks(bundle: Bundle, tiny_image: Image.Image, driver: SimulatedDriver) -> None:
    runtime = on_device(bundle, driver)
    held = []
    for words in range(1, 9):
        runtime.generate(tiny_image, PROMPT + " Now." * words, max_tokens=6)
        held.append(runtime._pipeline.backend.device_bytes)  # type: ignore[attr-defined]
    assert held[-1] < 2.5 * held[0]


def test_closing_gives_everything_back(bundle: Bundle, tiny_image: Image.Image, driver: SimulatedDriver) -> None:
    runtime = on_device(bundle, driver)
    answer = runtime.generate(tiny_image, PROMPT, max_tokens=3)
    chat = runtime.chat()
    "".join(chat.ask(PROMPT, tiny_image, max_tokens=3))
    assert answer.text and driver.blocks
    engine: Any = runtime._pipeline.backend
    assert engine.device_bytes == sum(map(len, driver.blocks.values()))
    engine.close()
    assert not driver.blocks and driver.closed
    del chat
    gc.collect()  # arrays that outlive the engine have nothing to give back


def test_all_contexts_work_in_one_block_of_scratch_memory(
    tiny: LoadedModel, tiny_image: Image.Image, tmp_path: Path, driver: SimulatedDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    allocate = driver.allocate

    def full(size: int) -> int:
        if size == SCRATCH["vision_unpruned.onnx"]:
            raise EngineError(f"no memory for {size} bytes")
        return allocate(size)

    evit = unpruned_plan("qwen2_vl", 3, TINY_GEOMETRY).with_cuts(Cut("vision", "evit", 6, layer=1))
    bundle = export_bundle(tiny, evit, tmp_path / "bundle")
    prepare(bundle)
    runtime = on_device(bundle, driver)
    engine: Any = runtime._pipeline.backend
    assert engine._scratch.bytes == SCRATCH["decoder.onnx"]  # the largest; the unpruned encoder is not open yet
    assert sum(call == ("allocate", SCRATCH["decoder.onnx"]) for call in driver.calls) == 1
    expected = [load(bundle.path).generate(tiny_image, PROMPT, max_tokens=4, prune=prune).text for prune in (True, False)]
    assert runtime.generate(tiny_image, PROMPT, max_tokens=4).text == expected[0]
    monkeypatch.setattr(driver, "allocate", full)
    with pytest.raises(EngineError, match="no memory for 40960 bytes"):
        runtime.generate(tiny_image, PROMPT, max_tokens=4, prune=False)
    monkeypatch.undo()
    assert runtime.generate(tiny_image, PROMPT, max_tokens=4).text == expected[0]  # in a block as before
    assert runtime.generate(tiny_image, PROMPT, max_tokens=4, prune=False).text == expected[1]
    assert engine._scratch.bytes == SCRATCH["vision_unpruned.onnx"]  # grown, and the old block is given back
    assert not any(len(block) == SCRATCH["decoder.onnx"] for block in driver.blocks.values())
    assert runtime.generate(tiny_image, PROMPT, max_tokens=4).text == expected[0]
    engine.close()
    assert not driver.blocks


@pytest.fixture
def own(tiny_bundle: Bundle, tmp_path: Path) -> Bundle:
    shutil.copytree(tiny_bundle.path, tmp_path / "own")
    bundle = Bundle.load(tmp_path / "own")
    prepare(bundle, ProfileLimits(context=40, turn=30))
    return bundle


def test_what_is_too_long_names_the_limit(own: Bundle, tiny_image: Image.Image, driver: SimulatedDriver) -> None:
    runtime = on_device(own, driver)
    with pytest.raises(EngineError, match=r"_embeds has shape .*edgeprune build BUNDLE --turn N"):
        runtime.generate(tiny_image, "word " * 40, max_tokens=2)
    with pytest.raises(EngineError, match="edgeprune build BUNDLE --unpruned"):
        runtime.generate(tiny_image, "Hi", max_tokens=2, prune=False)
    with pytest.raises(EngineError, match="edgeprune build BUNDLE --context N"):
        runtime.generate(tiny_image, "Hi", max_tokens=60)
    chat = runtime.chat()
    "".join(chat.ask("Hi", tiny_image, max_tokens=1))
    with pytest.raises(EngineError, match="edgeprune build BUNDLE --images N"):
        "".join(chat.ask("Hi", tiny_image, max_tokens=1))
    assert runtime.generate(tiny_image, "Hi", max_tokens=2).receipt.pruned  # a refusal leaves the engine as it was


def test_engines_of_elsewhere_are_refused(own: Bundle, driver: SimulatedDriver) -> None:
    with pytest.raises(EngineError, match=r"TensorRT 10\.3\.0 for SM 8\.7, this is 10\.16 on SM 11\.0.*edgeprune build"):
        on_device(own, SimulatedDriver(), device=DeviceIdentity("10.16", "11.0"))
    with pytest.raises(EngineError, match="were not built on this device"):
        on_device(own, SimulatedDriver(), store=Store(own.path, b"another device's own key, 32 byte"))
    record = next(record for record in Store(own.path, SECRET).records() if record.graph == VISION)
    (own.path / record.file).write_bytes(b"not an engine")
    with pytest.raises(EngineError, match="is not the engine that was built here"):
        on_device(own, driver)
    assert driver.closed and not driver.blocks  # what was opened before it is given back


def test_what_tensorrt_says_of_an_engine_is_in_the_error(
    own: Bundle, driver: SimulatedDriver, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    store = Store(own.path, SECRET)
    record = next(record for record in store.records() if record.graph == VISION)
    store.add(replace(record, sha256=hashlib.sha256(b"not an engine").hexdigest(), bytes=13), memoryview(b"not an engine"))
    with pytest.raises(
        EngineError, match=r"does not take an engine of this bundle: .*cannot run on this GPU.*edgeprune build BUNDLE"
    ):
        on_device(own, driver)
    assert capfd.readouterr().out == ""  # which may be JSON


def test_an_engine_of_other_weights_is_refused(own: Bundle, driver: SimulatedDriver) -> None:
    path = own.path / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["precision"] = "fp16"  # as if exported anew over engines that stayed
    path.write_text(json.dumps(manifest))
    with pytest.raises(EngineError, match="was built from another bundle"):
        on_device(Bundle.load(own.path), driver)


def test_a_bundle_without_engines_says_how_to_build_them(tiny_bundle: Bundle, driver: SimulatedDriver) -> None:
    with pytest.raises(EngineError, match=r"no engine of onnx/vision_encoder\.onnx.*edgeprune build"):
        on_device(tiny_bundle, driver, store=Store(tiny_bundle.path, SECRET))


def test_providers_are_never_replaced(tiny_bundle: Bundle) -> None:
    for provider in ("cuda", "ort-tensorrt"):
        with pytest.raises(EngineError, match=r"has no \w+ExecutionProvider; it has .*--provider cpu"):
            load(tiny_bundle.path, provider=provider)
    with pytest.raises(EngineError, match="TensorRT cannot be used here"):
        load(tiny_bundle.path, provider="tensorrt")
    with pytest.raises(UsageError, match=r"Unknown provider 'gpu'.*ort-tensorrt"):
        load(tiny_bundle.path, provider="gpu")
    assert options.PROVIDERS == providers.PROVIDERS  # written twice, so that --help loads nothing heavy
    with pytest.raises(UsageError, match="no threads"):
        open_backend(tiny_bundle, "tensorrt", 2)


@pytest.mark.parametrize("precision", ["fp16", pytest.param("bf16", marks=pytest.mark.slow)])
def test_text_has_the_checkpoints_embeddings(tiny: LoadedModel, tiny_plan: KeepPlan, tmp_path: Path, precision: str) -> None:
    lowering = Lowering(TARGETS["jetpack6"], precision)
    bundle = export_bundle(tiny, tiny_plan, tmp_path / "bundle", lowering=lowering)
    table = tiny.model.get_input_embeddings().weight.detach()  # transformers' own
    ids = [0, 7, len(table) - 1]
    found = EmbeddingTable(bundle).embed_tokens(ids)
    rounded = table[ids].to(getattr(torch, lowering.products)).float().numpy()
    assert found.dtype == np.float32 and found.shape == (1, 3, bundle.manifest.decoder.width)
    np.testing.assert_array_equal(found[0, :, : rounded.shape[1]], rounded)


def test_a_device_is_profiled_through_its_engines(own: Bundle, driver: SimulatedDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    def here(opened: Bundle, trust: TrustedKeys) -> TensorRTBackend:
        return TensorRTBackend(opened, simulated_tensorrt(driver), driver, Store(opened.path, SECRET), ORIN)

    monkeypatch.setattr(TensorRTBackend, "on_this_device", here)
    with pytest.raises(EngineError, match="edgeprune build BUNDLE --turn N"):
        profile(own, repeats=1, provider="tensorrt")  # the image's tokens are timed as text, of which 30 are too few
    prepare(own, ProfileLimits(context=64, turn=64))
    times = profile(own, repeats=2, provider="tensorrt")
    assert len(times.prefill_ms) == 5 and times.vision_ms > 0 and ("synchronize",) in driver.calls


def test_arrays_on_the_device_join_and_share(driver: SimulatedDriver) -> None:
    pool = MemoryPool(driver)
    rows = np.arange(24, dtype=np.float16).reshape(4, 2, 3)
    array = upload(pool, rows)
    view: Any = array[1:3]
    assert (len(array), view.shape, view.nbytes) == (4, (2, 2, 3), 24)
    assert np.array_equal(view.numpy(), rows[1:3]) and len(driver.blocks) == 1
    both: Any = np.concatenate([array, view])
    assert isinstance(both, DeviceArray) and np.array_equal(both.numpy(), np.concatenate([rows, rows[1:3]]))
    wide = joined(pool, [np.zeros((1, 0, 3), np.float16), rows[None, 0]], axis=1)
    assert wide.shape == (1, 2, 3) and np.array_equal(wide.numpy()[0], rows[0])
    with pytest.raises(TypeError):
        np.sum(array)  # type: ignore[call-overload]


def test_blocks_are_used_again_only_when_nothing_refers_to_them(driver: SimulatedDriver) -> None:
    pool = MemoryPool(driver)
    first = upload(pool, np.zeros(100, np.float32))
    view = first[:10]
    address = first.address
    del first
    assert upload(pool, np.ones(100, np.float32)).address != address
    del view
    assert upload(pool, np.ones(100, np.float32)).address == address
    assert Counter(call[0] for call in driver.calls)["allocate"] == 2


def test_the_selftest_compares_and_reports(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drivers: list[SimulatedDriver] = []

    def simulated(opened: Bundle) -> TensorRTBackend:
        driver = SimulatedDriver()
        drivers.append(driver)
        return TensorRTBackend(opened, simulated_tensorrt(driver), driver, Store(opened.path, SECRET), ORIN)

    stages: list[str] = []

    class Stages(Silent):
        def begin(self, stage: str) -> None:
            stages.append(stage)

    report = selftest(bundle, simulated, Stages())
    assert report.passed and stages == list(STAGES)
    ratio = {"ratio"} if bundle.plan.has_rate_predictor else set()
    assert {check.name for check in report.checks} == {"vision", "kept", "logits", "tokens", "memory", "limits", "steps"} | ratio
    trusted: list[TrustedKeys] = []

    def here(opened: Bundle, trust: TrustedKeys) -> TensorRTBackend:
        trusted.append(trust)
        return simulated(opened)

    monkeypatch.setattr(TensorRTBackend, "on_this_device", here)
    shown = CliRunner().invoke(
        main, ["selftest", str(bundle.path), "-o", str(tmp_path / "report.json"), "--trust", str(tmp_path / "fleet.pub")]
    )
    assert trusted == [(tmp_path / "fleet.pub",)]
    assert shown.exit_code == 0 and "Every check passed." in shown.output
    assert json.loads((tmp_path / "report.json").read_text())["passed"] is True
    assert len(drivers) == 2 and all(driver.closed for driver in drivers)


@pytest.mark.parametrize("part", ["vision", "kept", "logits", "ratio"])
def test_the_selftest_names_what_a_wrong_engine_got_wrong(
    part: str, bundle: Bundle, driver: SimulatedDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    if part == "ratio" and not bundle.plan.has_rate_predictor:
        pytest.skip("this plan has no predictor")
    engine = TensorRTBackend(bundle, simulated_tensorrt(driver), driver, Store(bundle.path, SECRET), ORIN)
    name = {"vision": "encode_image", "ratio": "predict_keep_ratio"}.get(part, "forward")
    right = getattr(engine, name)

    def wrong(*given: Any, **named: Any) -> Any:
        found = right(*given, **named)
        if part == "vision":
            return replace(found, embeds=found.embeds.numpy() * 1.1)
        if part == "kept":
            return replace(found, kept=tuple(kept[..., ::-1] // 2 for kept in found.kept))
        return found + 0.1 if part == "ratio" else replace(found, logits=found.logits * 1.1)

    report = _selftest_without_a_second_model(bundle, engine, name, wrong, monkeypatch)
    assert [check.name for check in report.checks if not check.passed] == [part]


def _selftest_without_a_second_model(
    bundle: Bundle, engine: TensorRTBackend, name: str, wrong: Any, monkeypatch: pytest.MonkeyPatch
) -> SelfTest:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a second model beside the engines")

    monkeypatch.setattr(engine, name, wrong)
    monkeypatch.setattr(OnnxRuntimeBackend, "__init__", refuse)
    return selftest(bundle, lambda opened: engine)


def test_a_bundle_without_expected_outputs_says_how_to_get_them(tiny_bundle: Bundle, bundle: Bundle, tmp_path: Path) -> None:
    refused = CliRunner().invoke(main, ["selftest", str(tiny_bundle.path)])
    remedy = "edgeprune export MODEL -o BUNDLE --target jetpack6 --precision fp32"
    assert refused.exit_code == 1 and "is for target onnxruntime" in refused.output and remedy in refused.output
    files = {name: record for name, record in bundle.manifest.files.items() if name != EXPECTED}
    with pytest.raises(BundleError, match=f"was exported by an older version.*{remedy}"):
        selftest(replace(bundle, manifest=replace(bundle.manifest, files=files)))


@pytest.mark.parametrize("content", [b"", b"PK\x05\x06" + bytes(18), b"\x93NUMPY"])
def test_expected_outputs_that_cannot_be_read_are_refused(content: bytes, bundle: Bundle, tmp_path: Path) -> None:
    shutil.copytree(bundle.path, tmp_path / "own")
    (tmp_path / "own" / EXPECTED).write_bytes(content)
    with pytest.raises(BundleError, match=r"Cannot read expected/conversation\.npz"):
        read_expected(replace(bundle, path=tmp_path / "own"))
    arrays = dict(np.load(bundle.path / EXPECTED))
    np.savez(tmp_path / "own" / EXPECTED, **{**arrays, "logits": arrays["logits"][:, 1:]})
    with pytest.raises(BundleError, match=r"shapes that are not the model's"):
        read_expected(replace(bundle, path=tmp_path / "own"))


def test_comparing_takes_little_memory_at_real_size() -> None:
    # LLaVA-NeXT's 2,880 tokens of 4,096, and 16 steps of 151,936 logits.
    arrays = {"embeds": np.ones((1, 2880, 4096), np.float16), "logits": np.ones((16, 151_936), np.float16)}

    class Engines(BackendProxy):
        def encode_image(self, patches: Any, **_: Any) -> VisionOutput:
            return VisionOutput(np.ones((1, 2880, 4096), np.float16))

        def forward(self, tokens: Any, cache: Any, **_: Any) -> DecoderOutput:
            return DecoderOutput(np.ones(151_936, np.float32), (), (), None)

    nothing: Any = None
    compared = ComparingBackend(Engines(nothing), Expected((), [], arrays))
    tracemalloc.start()
    compared.encode_image(nothing)
    for _ in range(16):
        compared.forward(nothing, nothing)
    peak = tracemalloc.get_traced_memory()[1] + sum(array.nbytes for array in arrays.values())
    tracemalloc.stop()
    assert peak < 60e6 and compared.vision == 0.0 and compared.logits == [0.0] * 16


@pytest.mark.device
def test_this_device_runs_what_it_builds(tiny_bundle: Bundle, tmp_path: Path) -> None:
    try:
        trt = tensorrt()
        device = identity(trt, load_cudart())
    except EngineError as error:
        pytest.skip(f"needs a GPU with TensorRT: {error}")
    shutil.copytree(tiny_bundle.path, tmp_path / "own")
    own = Bundle.load(tmp_path / "own")
    build_bundle(BuildRequest(own, LIMITS, BuilderSettings()), trt=trt, device=device)
    assert [check for check in selftest(own).checks if not check.passed] == []
