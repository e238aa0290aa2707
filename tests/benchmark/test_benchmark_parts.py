"""What a benchmark is made of: peaks, tiny graphs, rooflines by hand, and the tokens that are chosen without looking."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from PIL import Image

from edgeprune.benchmark.profile import bytes_to_read, cores, measure_peaks, product_graph, profile, step_nodes
from edgeprune.benchmark.results import ContextPoint, Sizes, Spread, VariantResult, arithmetic_of, decode_kv_bytes, with_roofline
from edgeprune.benchmark.sweeps import filler
from edgeprune.benchmark.variants import (
    FixedSelectionBackend,
    Variant,
    check_names,
    chosen_tokens,
    equal_work_tokens,
    load_variants,
)
from edgeprune.bundle import DECODER as DECODER_GRAPH
from edgeprune.bundle import Bundle, Operations
from edgeprune.device.onnx_file import Graph, read_graph
from edgeprune.device.profile import DeviceProfile, reported_peaks
from edgeprune.device.roofline import Peaks, prefill_operations
from edgeprune.device.workload import PRECISIONS, Decoder, VisionWorkload, Workload
from edgeprune.errors import UsageError
from edgeprune.plan import Cut, Geometry, KeepPlan
from edgeprune.runtime import Runtime, load
from edgeprune.runtime.backends.compare import RecordingBackend
from edgeprune.runtime.backends.onnxruntime import nodes_run
from edgeprune.runtime.telemetry.receipt import Receipt

PEAKS = Peaks({"fp32": 1e9, "int8": 4e9}, 1e8, None)
ENCODING, THINNED = Operations(32_800, 20_480), Operations(24_400, 12_800)
TOWER = VisionWorkload(2, 10, 40, patches=16, tokens=4, parameters=1100, work=ENCODING, whole=ENCODING)
DECODER = Decoder(layers=2, hidden=10, heads=2, kv_heads=1, head_dim=5, intermediate=30, vocabulary=50, parameters=2000)
WORK = Workload(TOWER, DECODER, PRECISIONS["fp32"], (4, 2), (4, 2), text_tokens=1, generated=1)


def session(graph: bytes) -> Any:
    return onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])


def stored(**sizes: float) -> Graph:
    return Graph(Counter(), (), sizes)


@pytest.mark.parametrize("arithmetic", ["fp32", "fp16", "int8"])
def test_a_graph_written_by_hand_is_onnx(arithmetic: str, tmp_path: Path) -> None:
    graph = product_graph(arithmetic, 3, 300, 5)
    onnx.checker.check_model(onnx.load_from_string(graph), full_check=True)
    (tmp_path / "product.onnx").write_bytes(graph)
    read = read_graph(tmp_path / "product.onnx")
    name, size = {"fp32": ("float32", 4), "fp16": ("float16", 2), "int8": ("int8", 1)}[arithmetic]
    assert (read.weights, read.bytes, read.main_type) == (((300, 5),), {name: 300 * 5 * size}, name)


@pytest.mark.parametrize(("arithmetic", "tolerance"), [("fp32", 1e-6), ("int8", 0.02)])
def test_it_multiplies(arithmetic: str, tolerance: float) -> None:
    graph = product_graph(arithmetic, 3, 32, 5)
    weights = onnx.numpy_helper.to_array(onnx.load_from_string(graph).graph.initializer[0]).astype(np.float32)
    given = np.random.default_rng(2).uniform(-1, 1, (3, 32)).astype(np.float32)
    found = session(graph).run(["y"], {"x": given})[0]
    if arithmetic == "int8":
        found = found * (given.max() - given.min()) / 255
    expected = given @ weights
    assert np.abs(found - expected).max() < tolerance * np.abs(expected).max()


def test_peaks_are_measured() -> None:
    peaks = measure_peaks(1, ("fp32",))
    assert list(peaks.operations) == ["fp32"] and peaks.threads == 1
    assert peaks.operations["fp32"] > 1e8 and peaks.bandwidth > 1e7
    assert cores() >= 1


def test_memory_is_read_far_beyond_the_cache(tmp_path: Path) -> None:
    assert bytes_to_read(tmp_path) == 128 << 20  # nothing known
    size = tmp_path / "sys/devices/system/cpu/cpu0/cache/index3/size"
    size.parent.mkdir(parents=True)
    for text, expected in (("65536K", 256 << 20), ("4096K", 128 << 20), ("1048576K", 2 << 30), ("odd", 128 << 20)):
        size.write_text(text)
        assert bytes_to_read(tmp_path) == expected


def test_the_least_time_by_hand() -> None:
    # 2e6 products at 4e9 and 1e6 of attention at 1e9 a second are 1.5 ms; 1e5 bytes at 1e8 are 1 ms.
    work = Operations(2e6, 1e6)
    assert PEAKS.least_ms(work, "int8", 1e5) == pytest.approx(1.5)
    assert PEAKS.least_ms(work, "fp32", 1e5) == pytest.approx(3.0)
    assert PEAKS.least_ms(work, "int8", 1e6) == pytest.approx(10.0)


def test_operations_by_hand() -> None:
    # 1000 weights a layer for 5 and 3 tokens, and the head once; attention 2 x 2 x 10 wide for the pairs that are not masked.
    assert prefill_operations(WORK) == Operations(2 * 500 + 2 * 1000 * (5 + 3), 40 * (15 + 6))
    # Layers of 1500 and 500 weights.
    uneven = replace(WORK, decoder=replace(DECODER, by_layer=(1500, 500)))
    assert prefill_operations(uneven).products == 2 * 500 + 2 * (1500 * 5 + 500 * 3)


def test_shares_of_the_roofline_by_hand(tiny_bundle: Bundle) -> None:
    own, whole = load_variants(tiny_bundle.path, threads=1)
    costs = {name: Spread(value, value) for name, value in {"vision_ms": 1.0, "prefill_ms": 2.0, "ms_per_token": 5.0}.items()}
    figures = VariantResult("a", costs, {}, 2, 1, 3.0, True, (), 0, 700.0, (ContextPoint(9, 9, Spread(4.0, 4.0), 1.0, 900),))
    sizes = Sizes(WORK, stored(float32=20.0), stored(int8=90_000.0, float32=300.0))
    pruned = with_roofline(figures, replace(own, alive=(4, 2)), sizes, PEAKS)
    line = pruned.roofline
    assert line is not None and line.arithmetic == ("fp32", "int8")
    assert line.vision_ms == pytest.approx(1e3 * (32_800 + 20_480) / 1e9)
    assert line.prefill_ms == pytest.approx(1e3 * 90_300 / 1e8)  # its weights take longer than its operations
    assert line.token_ms == pytest.approx(1e3 * (90_300 + 700) / 1e8)
    assert line.ttft == pytest.approx((line.vision_ms + line.prefill_ms) / 3) and line.token == pytest.approx(line.token_ms / 5)
    assert [line.vision, line.prefill] == pytest.approx([line.vision_ms / 1, line.prefill_ms / 2])
    cut = replace(sizes, work=replace(WORK, tower=replace(TOWER, left=(16, 8), work=THINNED)))
    lines = [with_roofline(figures, replace(variant, alive=(4, 2)), cut, PEAKS).roofline for variant in (own, whole)]
    assert [each and each.vision_ms for each in lines] == [pytest.approx(0.0372), line.vision_ms]
    assert pruned.contexts[0].roofline == pytest.approx(1e3 * 91_200 / 1e8 / 4)
    small = with_roofline(figures, replace(whole, alive=(4, 4)), replace(sizes, decoder=stored(int8=1.0)), PEAKS).roofline
    assert small is not None and small.prefill_ms == pytest.approx(1e3 * ((1000 + 2000 * 10) / 4e9 + 40 * 30 / 1e9))


def test_peaks_without_the_arithmetic_are_refused() -> None:
    assert arithmetic_of(stored(float16=1.0), PEAKS) == "fp32"
    assert arithmetic_of(stored(float16=1.0), replace(PEAKS, operations={"fp16": 1.0, "fp32": 1.0})) == "fp16"
    assert arithmetic_of(stored(uint8=5.0, int4=9.0, float32=2.0), PEAKS) == "int8"
    with pytest.raises(UsageError, match="no peak of int8"):
        arithmetic_of(stored(int4=1.0), replace(PEAKS, operations={"fp32": 1.0}))


def test_a_profile_has_peaks_and_older_files_have_none(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgeprune.benchmark.profile.measure_peaks", lambda threads: replace(PEAKS, threads=threads))
    profile(tiny_bundle, repeats=1, threads=1).save(tmp_path / "t.json")
    assert reported_peaks(tmp_path / "t.json") == replace(PEAKS, threads=1)
    DeviceProfile("old", "measured", 12, 1.0, (1.0,) * 5).save(tmp_path / "old.json")
    with pytest.raises(UsageError, match="no peaks"):
        reported_peaks(tmp_path / "old.json")


def test_a_decode_cut_passes_tokens_over() -> None:
    receipt = Receipt(True, "", kv_bytes=1000, visual_stored=30, visual_reads=[30, 20, 10])
    assert decode_kv_bytes(receipt, 8) == 1000 - 8 * 10


def test_equal_work_is_the_mean_over_the_layers() -> None:
    geometry = Geometry(112, 140, 14, 2)  # 20 tokens
    plan = KeepPlan("qwen2_vl", 4, geometry, (Cut("layer", "fastv", 5, 1), Cut("layer", "fastv", 1, 3)))
    assert equal_work_tokens(plan) == 8  # 20, 5, 5 and 1 are 7.75
    assert equal_work_tokens(replace(plan, cuts=())) == 20


@pytest.mark.parametrize("name", ["random", "uniform"])
def test_as_many_are_chosen_as_are_wanted(name: str) -> None:
    for keep in (1, 7, 12, 49, 50):
        kept = chosen_tokens(name, 50, keep)
        assert len(set(kept)) == keep and list(kept) == sorted(kept) and kept[0] >= 0 and kept[-1] < 50
        assert np.array_equal(kept, chosen_tokens(name, 50, keep))
    assert np.diff(chosen_tokens("uniform", 50, 7)).max() <= 8


def test_the_nodes_of_a_step_are_those_of_an_answer(tiny_bundle: Bundle, tiny_image: Image.Image) -> None:
    model = load(tiny_bundle.path, threads=1, cache_bytes=0)._pipeline
    recorded = RecordingBackend(model.backend)
    Runtime(replace(model, backend=recorded)).generate(tiny_image, "What is it?", max_tokens=3)
    prefill, *steps = recorded.inputs
    nodes = [nodes_run(tiny_bundle, *step, threads=1) for step in steps[-2:]]
    assert nodes == [step_nodes(tiny_bundle, threads=1)] * 2
    assert 3 * 15 < nodes[0] <= read_graph(tiny_bundle.file(DECODER_GRAPH)).nodes  # three layers; optimization only removes
    assert nodes_run(tiny_bundle, *prefill, threads=1) > 3 * 15
    assert step_nodes(tiny_bundle, "tensorrt") is None


def test_chosen_tokens_keep_their_positions(tiny_bundle: Bundle, tiny_image: Image.Image) -> None:
    model = load(tiny_bundle.path, threads=1, cache_bytes=0)._pipeline
    kept = np.array([1, 4, 5, 11])
    whole, some = RecordingBackend(model.backend), RecordingBackend(model.backend)
    Runtime(replace(model, backend=whole)).generate(tiny_image, "What is it?", prune=False, max_tokens=3)
    chosen = Runtime(replace(model, backend=FixedSelectionBackend(some, kept, 12)))
    answer = chosen.generate(tiny_image, "What is it?", prune=False, max_tokens=3)
    prefix, expected = some.inputs[0][0].prefix, whole.inputs[0][0].prefix
    text = expected.embeds.shape[1] - 12
    places = [*range(text), *(text + kept)]
    assert np.array_equal(prefix.positions, expected.positions[:, places])
    assert np.array_equal(prefix.embeds, expected.embeds[:, places])
    for (tokens, _), (others, _) in zip(some.inputs, whole.inputs, strict=False):
        assert np.array_equal(tokens.suffix.positions, others.suffix.positions)  # they go on after the unpruned length
    assert answer.receipt.kv_bytes == (answer.receipt.text_tokens + 4 + 2) * 3 * 128


def test_choosing_all_changes_nothing(tiny_bundle: Bundle, tiny_image: Image.Image) -> None:
    runtime = load(tiny_bundle.path, threads=1, cache_bytes=0)
    model = runtime._pipeline
    same = Runtime(replace(model, backend=FixedSelectionBackend(model.backend, np.arange(12), 12)))
    asked = {"prune": False, "max_tokens": 8}
    assert same.generate(tiny_image, "Which?", **asked).text == runtime.generate(tiny_image, "Which?", **asked).text  # type: ignore[arg-type]


def test_the_same_bundle_is_loaded_once(tiny_bundle: Bundle) -> None:
    own, none, uniform = load_variants(tiny_bundle.path, ("none", "uniform"), threads=1)
    engines = [each.runtime._pipeline.backend for each in (own, none, uniform)]
    assert engines[0] is engines[1] and isinstance(engines[2], FixedSelectionBackend)
    assert [each.alive for each in (own, none, uniform)] == [(12, 6, 3), (12, 12, 12), (7, 7, 7)]


@pytest.mark.parametrize(
    ("names", "provider", "words"),
    [
        (("resize",), "cpu", "--compare small.bundle"),
        (("magic",), "cpu", "none, random, uniform, or the path"),
        (("none", "none"), "cpu", "compared twice"),
        (("pruned",), "cpu", "compared twice"),
        (("random",), "tensorrt", "--method random"),
    ],
)
def test_what_cannot_be_compared_is_refused(names: tuple[str, ...], provider: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        check_names(names, provider)


def test_fillers_are_as_long_as_asked(tiny_bundle: Bundle) -> None:
    codec = contender(tiny_bundle).tokenizer
    assert [len(codec.encode(filler(codec, tokens))) for tokens in (1, 9, 200)] == [1, 9, 200]


def contender(bundle: Bundle) -> Variant:
    return load_variants(bundle.path, (), threads=1)[0]


def test_packed_matrices_are_read_as_large_as_they_are(tmp_path: Path) -> None:
    blob = onnx.numpy_helper.from_array(np.zeros((8, 2, 16), np.uint8), "w")
    inputs = [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 64])]
    outputs = [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, 8])]
    node = onnx.helper.make_node("MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", K=64, N=8, bits=4, block_size=32)
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([node], "g", inputs, outputs, [blob])), tmp_path / "packed.onnx")
    found = read_graph(tmp_path / "packed.onnx")
    assert found.weights == ((64, 8),) and found.bytes == {"uint8": 8 * 2 * 16}


def test_importing_waits_for_no_template_engine() -> None:
    code = "import sys, edgeprune.runtime; print({'jinja2', 'tokenizers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "set()"
