"""The roofline: a workload computed by hand, monotony, memory, bundles read without onnx, and published measurements."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from repository import ROOT

from edgeprune.bundle import DECODER, MANIFEST, SELECTOR, VISION, Bundle, LayerState, Manifest, Operations
from edgeprune.checkpoint.loading import LoadedModel
from edgeprune.device.jetson import MODULES, module_named
from edgeprune.device.onnx_file import read_graph
from edgeprune.device.roofline import Interval, estimate, prefill_operations
from edgeprune.device.workload import PRECISIONS, Decoder, VisionWorkload, Workload, workload_of
from edgeprune.errors import BundleError, UsageError
from edgeprune.export.exporter import export_bundle
from edgeprune.plan import Cut, KeepPlan
from edgeprune.targets import TARGETS, Lowering

ENCODING = Operations(2 * (100e6 * 400 + 10e6 * 100), 10 * 4 * 1000 * 400**2)
TOWER = VisionWorkload(10, 1000, 4000, patches=400, tokens=100, parameters=110_000_000, work=ENCODING, whole=ENCODING)
DECODER_SHAPE = Decoder(
    layers=20, hidden=1000, heads=10, kv_heads=2, head_dim=100, intermediate=3000, vocabulary=50_000, parameters=1_000_000_000
)
WORK = Workload(TOWER, DECODER_SHAPE, PRECISIONS["fp16"], (100,) * 20, (100,) * 20, text_tokens=20, generated=10)


def stage_ms(work: Workload, module: str, name: str) -> Interval:
    stage = estimate(work, module_named(module)).stage(name)
    assert stage is not None
    return stage.ms


def examples() -> list[dict[str, Any]]:
    command = [sys.executable, "examples/roofline/roofline.py", "--json"]
    output = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    found: list[dict[str, Any]] = json.loads(output)
    return found


def test_a_prefill_by_hand() -> None:
    stage = estimate(WORK, module_named("orin-nano")).stage("prefill")
    assert stage is not None
    # 2 * 10^9 weights * 120 tokens, 4 * 20 layers * 1000 wide * 120 * 121 / 2 pairs, and 2 * 50 million weights of the head.
    assert stage.operations == 240e9 + 0.5808e9 + 0.1e9
    # 2.1 GB of weights; at most 120 * 20 times (12 * 1000 + 4 * 1000 + 2 * 400 + 6 * 3000) numbers of 2 bytes besides.
    assert stage.bytes == Interval(2.1e9, 2.1e9 + 120 * 20 * 34_800 * 2)
    assert stage.limit == "compute"
    peak = 8 * 1.02 * 2.048e9  # operations in a millisecond
    launches = 20 * 12
    assert stage.ms.low == pytest.approx(240.6808e9 / (0.54 * peak) + launches * 0.001)
    assert stage.ms.high == pytest.approx(240.6808e9 / (0.38 * peak) + launches * 0.006)


def test_a_token_of_decode_by_hand() -> None:
    stage = estimate(WORK, module_named("orin-nano")).stages[-1]
    kv = 20 * (100 + 20 + 5) * 400 * 2  # layers, tokens on average, numbers a token, bytes
    assert stage.bytes == Interval(2.1e9 + kv, 2.1e9 + kv)
    assert stage.limit == "bandwidth"
    assert stage.ms.low == pytest.approx((2.1e9 + kv) / (0.95 * 102e6) + 0.24)
    assert estimate(WORK, module_named("orin-nano")).token_ms == stage.ms


def test_masks_leave_pairs() -> None:
    local = replace(DECODER_SHAPE, local=(0,), window=30)
    assert DECODER_SHAPE.pairs(0, 100, 20) == local.pairs(1, 100, 20) == sum(range(1, 121))
    assert local.pairs(0, 100, 20) == sum(min(place, 30) for place in range(1, 121))
    assert local.pairs(0, 10, 5) == sum(range(1, 16))  # shorter than the window
    assert replace(DECODER_SHAPE, mutual="all").pairs(0, 100, 20) == 120**2
    seen = sum(min(place, 30) for place in range(1, 121)) + 100 * 99 / 2  # every visual token also sees those after it
    assert replace(local, mutual="image").pairs(0, 100, 20) == seen


def test_a_state_instead_of_attention() -> None:
    net = LayerState(3, (4, 100, 50))
    decoder = replace(DECODER_SHAPE, states=(LayerState(3, (3, 2000)), net))
    assert decoder.pairs(3, 100, 20) == decoder.visible(3, 125) == 0
    assert decoder.state_bytes == 4 * (3 * 2000 + 4 * 100 * 50)
    work = replace(WORK, decoder=decoder)
    before, after = (prefill_operations(each).attention for each in (WORK, work))
    assert after - before == 6 * 4 * 100 * 50 * 120 - 4 * 1000 * sum(range(1, 121))
    stage = estimate(work, module_named("orin-nano")).stages[-1]
    assert stage.bytes.low == 2.1e9 + 19 * 125 * 400 * 2 + 2 * decoder.state_bytes  # read and written


def test_a_decode_step_sees_what_a_window_shows() -> None:
    work = replace(WORK, decoder=replace(DECODER_SHAPE, local=(0, 1, 2), window=30))
    stage = estimate(work, module_named("orin-nano")).stages[-1]
    rows = 400 * 2
    assert stage.bytes == Interval(2.1e9 + (17 * 125 + 3 * 30) * rows, 2.1e9 + 20 * 125 * rows)
    assert stage.operations == 2.1e9 + 4 * 1000 * (17 * 125 + 3 * 30)


def test_the_first_token_waits_for_the_stages_before() -> None:
    found = estimate(replace(WORK, selector=500), module_named("thor"))
    assert [stage.name for stage in found.stages] == ["vision encoder", "selection", "prefill", "decode"]
    assert found.ttft_ms.high == pytest.approx(sum(stage.ms.high for stage in found.stages[:3]))
    selection = found.stage("selection")
    assert selection is not None and selection.limit == "launches" and selection.ms.low > 0.5
    assert found.stage("dessert") is None
    assert replace(WORK, selector=500, alive=(5,) * 20).unpruned() == WORK


@pytest.mark.parametrize(
    ("module", "precision"),
    [(name, each.name) for each in PRECISIONS.values() for name in MODULES if module_named(name).has(each.arithmetic)],
)
def test_fewer_tokens_are_never_slower(module: str, precision: str) -> None:
    before = None
    for keep in (1, 10, 50, 99, 100):
        work = replace(WORK, precision=PRECISIONS[precision], alive=(100,) * 2 + (keep,) * 18, stored=(keep,) * 20)
        found = estimate(work, module_named(module))
        now = [*(end for stage in found.stages for end in (stage.ms.low, stage.ms.high)), found.memory.at_peak.high]
        assert all(stage.ms.low <= stage.ms.high for stage in found.stages)
        assert before is None or all(a <= b for a, b in zip(before, now, strict=True))
        before = now
    assert before is not None
    assert estimate(WORK.unpruned(), module_named(module)).stages == estimate(WORK, module_named(module)).stages


def test_faster_modules_are_faster() -> None:
    order = ("orin-nano-7w", "orin-nano-15w", "orin-nano-25w", "orin-nano", "orin-nx", "agx-orin", "thor")
    prefills = [stage_ms(WORK, name, "prefill").middle for name in order]
    assert prefills == sorted(prefills, reverse=True)


def test_smaller_weights_decode_faster() -> None:
    times = [stage_ms(replace(WORK, precision=precision), "thor", "decode").middle for precision in PRECISIONS.values()]
    assert list(PRECISIONS) == ["fp32", "fp16", "bf16", "int8", "w8a8", "fp8", "int4", "nvfp4"]
    by_name = dict(zip(PRECISIONS, times, strict=True))
    others = [time for name, time in by_name.items() if name not in ("fp8", "nvfp4")]  # whose heads are float16
    assert others == sorted(others, reverse=True)
    assert by_name["int8"] < by_name["fp8"] < by_name["fp16"] and by_name["int4"] < by_name["nvfp4"] < by_name["fp8"]


def test_memory_by_hand() -> None:
    memory = estimate(WORK, module_named("orin-nano")).memory
    parts = {"vision encoder": 110, "decoder layers": 1000, "output head": 50}
    assert memory.weight_parts == {part: 2e6 * millions for part, millions in parts.items()}
    assert memory.weights == 2 * (1_000_000_000 + 50_000_000 + 110_000_000)
    assert memory.kv == 20 * (100 + 20 + 10) * 400 * 2
    assert memory.activations == 400 * (2 * 1000 + 2 * 4000) * 2  # the vision encoder's MLP
    assert memory.at_rest == Interval(memory.weights + 1e9, memory.weights + 2e9)
    assert memory.at_peak.low == memory.at_rest.low + memory.kv + memory.activations
    assert memory.embedding == 2 * 50_000_000 and memory.file_cache == memory.weights + memory.embedding
    assert memory.ram == 8 * 2**30 and memory.system == Interval(1e9, 2.5e9) and memory.fits == "yes"
    assert memory.needed == memory.at_peak + memory.system


def test_what_does_not_fit_is_said() -> None:
    def fits(parameters: int) -> str:
        work = replace(WORK, decoder=replace(DECODER_SHAPE, parameters=parameters))
        return estimate(work, module_named("orin-nano")).memory.fits

    # 8.59 GB less 1 to 2.5 of the system and 1 to 2 of the runtime leave 4.1 to 6.6 for weights, 0.33 of which are not these.
    assert [fits(count) for count in (1_850_000_000, 1_950_000_000, 3_100_000_000, 3_150_000_000)] == [
        "yes",
        "perhaps",
        "perhaps",
        "no",
    ]


# Sparse INT8 TOPS of the GPU alone, and sparse FP4 TFLOPS, as the data sheets print them.
@pytest.mark.parametrize(
    ("name", "arithmetic", "published"),
    [
        ("orin-nano-15w", "int8", 40),
        ("orin-nano", "int8", 67),
        ("orin-nx-maxn", "int8", 60),
        ("agx-orin", "int8", 170),
        ("agx-orin-32gb", "int8", 108),
        ("thor", "fp4", 2070),
        ("thor-t4000", "fp4", 1200),
    ],
)
def test_peaks_are_those_of_the_data_sheets(name: str, arithmetic: str, published: float) -> None:
    assert 2 * module_named(name).tflops(arithmetic) == pytest.approx(published, rel=0.025)


def test_what_a_module_lacks_is_refused() -> None:
    with pytest.raises(UsageError, match="fp8"):
        estimate(replace(WORK, precision=PRECISIONS["fp8"]), module_named("agx-orin"))
    with pytest.raises(UsageError, match="fp4"):
        estimate(replace(WORK, precision=PRECISIONS["nvfp4"]), module_named("agx-orin"))
    with pytest.raises(UsageError, match="thor-t4000"):
        module_named("toaster")


@pytest.mark.parametrize("change", [{"text_tokens": 0}, {"generated": 0}, {"alive": (1, 2)}])
def test_impossible_workloads_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        replace(WORK, **change)


def test_graphs_are_read_as_onnx_reads_them(tiny_bundle: Bundle) -> None:
    for name in (VISION, DECODER):
        model = onnx.load(tiny_bundle.file(name), load_external_data=False)
        graph = read_graph(tiny_bundle.file(name))
        assert graph.nodes == len(model.graph.node)
        assert graph.operators["Softmax"] == sum(node.op_type == "Softmax" for node in model.graph.node)
        shapes = [tuple(tensor.dims) for tensor in model.graph.initializer]
        assert graph.weights and all(shape in shapes for shape in graph.weights)


def test_a_graph_written_for_cpus_does_the_same_work(
    tiny_bundle: Bundle, tiny: LoadedModel, tiny_plan: KeepPlan, tmp_path: Path
) -> None:
    written = export_bundle(tiny, tiny_plan, tmp_path / "cpu", lowering=Lowering(TARGETS["cpu"], "int8"))
    assert read_graph(written.file(VISION)).operators["MultiHeadAttention"] == written.manifest.encoder_blocks
    expected, found = (workload_of(bundle, text_tokens=8, generated=4) for bundle in (tiny_bundle, written))
    assert found.tower.work == expected.tower.work
    assert astuple(prefill_operations(found)) == pytest.approx(astuple(prefill_operations(expected)), rel=0.02)


@pytest.mark.parametrize("content", [b"", b"\x00", b"\x3a\x05\x0a", b"\x3f", b"\x3a\x80\x80", b"no ONNX at all"])
def test_what_is_no_graph_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(content)
    with pytest.raises(BundleError, match=r"broken\.onnx"):
        read_graph(tmp_path / "broken.onnx")


def test_packed_dimensions_are_read(tmp_path: Path) -> None:
    tensor = b"\x0a\x03\x80\x01\x03" + b"\x42\x01w"  # dims 128 and 3 in one field; the name
    node = b"\x0a\x01x" + b"\x0a\x01w" + b"\x22\x06MatMul"
    graph = b"\x0a" + bytes([len(node)]) + node + b"\x2a" + bytes([len(tensor)]) + tensor
    (tmp_path / "packed.onnx").write_bytes(b"\x08\x08" + b"\x3a" + bytes([len(graph)]) + graph)
    assert read_graph(tmp_path / "packed.onnx").weights == ((128, 3),)


def test_a_bundle_becomes_its_workload(tiny: LoadedModel, tiny_bundle: Bundle) -> None:
    work = workload_of(tiny_bundle, text_tokens=7, generated=5)
    layers = [matrix.numel() for matrix in tiny.family.decoder().layers.parameters() if matrix.ndim == 2]
    each = (sum(layers) // 3,) * 3
    expected = Decoder(3, 48, 6, 2, 8, 56, tiny_bundle.manifest.decoder.vocabulary, sum(layers), by_layer=each)
    assert work.decoder == expected
    assert (work.tower.layers, work.tower.hidden, work.tower.mlp, work.tower.patches, work.tower.tokens) == (2, 32, 128, 48, 12)
    blocks = 2 * 12 * 32 * 32 + 32 * (3 * 2 * 14 * 14)  # two blocks, and the patches' own matrix
    merger = 128 * 128 + 128 * 48  # four patches of 32, to the decoder's 48
    assert work.tower.parameters == blocks + merger
    # Two products of 32 for each pair of patches, in two blocks.
    assert work.tower.work == work.tower.whole == Operations(2 * (blocks * 48 + merger * 12), 2 * 4 * 32 * 48**2)
    assert work.alive == work.stored == (12, 6, 3)
    assert work.precision == PRECISIONS["fp32"] and work.selector == 0
    with pytest.raises(UsageError, match="int4"):
        workload_of(tiny_bundle, text_tokens=7, generated=5, precision="int2")


def test_a_bundle_that_does_not_say_its_work_has_a_lower_bound(altered_bundle: Path, tiny_bundle: Bundle) -> None:
    data = json.loads((altered_bundle / MANIFEST).read_text())
    del data["encoder_work"]
    for name in ("heads", "window", "layer_weights"):
        del data["decoder"][name]
    older = replace(tiny_bundle, manifest=Manifest.parse(altered_bundle, json.dumps(data | {"schema_version": 8}).encode()))
    found, expected = (workload_of(bundle, text_tokens=7, generated=5) for bundle in (older, tiny_bundle))
    assert found.tower.work == Operations(expected.tower.work.products, 0.0)
    assert found.decoder == replace(expected.decoder, by_layer=())
    assert prefill_operations(found) == prefill_operations(expected)


def test_a_selector_is_counted(tiny: LoadedModel, tiny_plan: KeepPlan, tmp_path: Path) -> None:
    plan = KeepPlan(tiny_plan.family, 3, tiny_plan.geometry, (Cut("input", "divprune", 6),))
    bundle = export_bundle(tiny, plan, tmp_path / "selected")
    work = workload_of(bundle, text_tokens=7, generated=5, precision="fp16")
    assert work.selector == read_graph(bundle.file(SELECTOR)).nodes > 0
    assert work.alive == (6, 6, 6) and work.unpruned().alive == (12, 12, 12)
    assert stage_ms(work, "orin-nano", "prefill").high < stage_ms(work.unpruned(), "orin-nano", "prefill").high


def test_published_times_lie_in_the_ranges() -> None:
    rows = [row for row in examples() if (row["figure"] != "memory" and "VL" in row["model"]) or "Cosmos" in row["model"]]
    assert len(rows) == 9 * 3 + 4
    for row in rows:
        assert row["low"] <= row["published"] <= row["high"], row
        assert abs(row["error"]) < 0.2, row


def test_other_published_figures_are_as_far_off_as_the_page_says() -> None:
    found = examples()
    orin = [row for row in found if row["figure"] == "memory" and row["module"].startswith(("orin-nano", "orin-nx"))]
    assert len(orin) == 5 and all(abs(row["error"]) < 0.05 for row in orin)
    text = [row for row in found if "VL" not in row["model"] and "Cosmos" not in row["model"]]
    far = [(row["model"], row["precision"], row["figure"]) for row in text if abs(row["error"]) > 0.35]
    assert far == [("Qwen3-0.6B", "INT4 AWQ", "prefill_ms")]


@pytest.mark.parametrize("example", ["roofline", pytest.param("models", marks=pytest.mark.slow)])
def test_the_page_shows_what_the_example_prints(example: str) -> None:
    command = [sys.executable, f"examples/roofline/{example}.py"]
    table = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert table in (ROOT / "docs" / "roofline.md").read_text()


def test_the_roofline_needs_neither_torch_nor_onnx() -> None:
    code = "import sys, edgeprune.device.roofline; print(sorted({name.partition('.')[0] for name in sys.modules}))"
    output = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True).stdout
    assert not [name for name in ("torch", "onnx", "onnxruntime", "transformers") if f"'{name}'" in output]
