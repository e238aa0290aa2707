"""Targets and precisions: which operators and types a graph has, and that it still computes what the model does."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from tiny_models import TINY_GEOMETRY

from edgeprune.bundle import DECODER, EMBED, VISION, Bundle, float32_graph
from edgeprune.checkpoint.loading import LoadedModel
from edgeprune.errors import UsageError
from edgeprune.export.exporter import export_bundle
from edgeprune.export.passes import weights as matrices
from edgeprune.export.tracing import trace_decoder
from edgeprune.export.verification import verify
from edgeprune.lint.check import lint
from edgeprune.model.quantization import Quantized, at_precision, quantize
from edgeprune.plan import Cut, KeepPlan
from edgeprune.plan.presets import staircase_plan, unpruned_plan
from edgeprune.runtime import load
from edgeprune.runtime.backends.kv_cache import bfloat16_as_float32, float32_as_bfloat16
from edgeprune.targets import PLAIN, TARGETS, Lowering, target_named


@pytest.fixture(scope="module")
def lowered(even: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function from target and precision to a bundle with a layer and a cache cut, exported once."""
    plan = staircase_plan(unpruned_plan("qwen2_vl", 2, TINY_GEOMETRY), "fastv", [0.5], [1]).with_cuts(
        Cut("cache", "plphp", 2, layer=1)
    )
    made: dict[tuple[str, str], Bundle] = {}

    def get(target: str, precision: str) -> Bundle:
        if (target, precision) not in made:
            folder = tmp_path_factory.mktemp("lowered") / f"{target}-{precision}"
            made[target, precision] = export_bundle(even, plan, folder, lowering=Lowering(target_named(target), precision))
        return made[target, precision]

    return get


def operators(bundle: Bundle, name: str = DECODER) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(bundle.file(name), load_external_data=False).graph.node)


@pytest.mark.parametrize(
    ("target", "precision"),
    [
        ("jetpack6", "fp16"),
        ("jetpack7.2", "fp16"),
        ("jetpack6", "bf16"),
        ("jetpack7.2", "bf16"),
        ("jetpack7.2", "int4"),
        ("onnxruntime", "int8"),
        ("cpu", "fp32"),
        ("cpu", "int8"),
        ("cpu", "int4"),
    ],
)
def test_every_lowering_computes_what_the_model_does(lowered: Any, even: LoadedModel, target: str, precision: str) -> None:
    bundle = lowered(target, precision)
    report = verify(bundle, even)
    assert [stage.name for stage in report if not stage.passed] == []
    assert (bundle.manifest.target, bundle.manifest.precision) == (target, precision)


def test_lengths_that_are_not_known_have_no_name(even: LoadedModel, tmp_path: Path) -> None:
    # ONNX Runtime takes dimensions of one name as equal, and gives their tensors the same memory.
    caches = [Cut("cache", "plphp", keep, layer) for layer, keep in enumerate((7, 5))]
    options = {"form": "map", "attention": [0.2, 0.4], "shares": [0.3, 0.6, 1.0]}
    plan = unpruned_plan("qwen2_vl", 2, TINY_GEOMETRY).with_cuts(*caches, Cut("decode", "dyrate", 0, options=options))
    trace_decoder(even.family.decoder(), 3, plan, PLAIN, tmp_path / "decoder.onnx")
    graph = onnx.load(tmp_path / "decoder.onnx", load_external_data=False).graph
    names = {axis.dim_param for value in graph.value_info for axis in value.type.tensor_type.shape.dim}
    assert "visual" in names and "None" not in names


def test_newer_readers_get_whole_operators(lowered: Any) -> None:
    fused, plain = operators(lowered("jetpack7.2", "fp16")), operators(lowered("jetpack6", "fp16"))
    assert (fused["Attention"], fused["RotaryEmbedding"], fused["RMSNormalization"]) == (2, 4, 5)
    assert not {"Attention", "RotaryEmbedding", "RMSNormalization"} & set(plain)
    graph = onnx.load(lowered("jetpack7.2", "fp16").file(DECODER), load_external_data=False)
    assert graph.opset_import[0].version == 23
    # TensorRT takes Attention with one output, without a cache of its own and without is_causal beside a mask.
    for node in graph.graph.node:
        if node.op_type == "Attention":
            assert len(node.output) == 1 and len([name for name in node.input if name]) == 4
            assert not any(attribute.name == "is_causal" and attribute.i for attribute in node.attribute)


def test_half_precision_halves_weights_and_caches(lowered: Any, tiny_image: Any) -> None:
    bundle = lowered("jetpack6", "fp16")
    types = {value.name: value.type.tensor_type.elem_type for value in onnx.load(bundle.file(DECODER)).graph.input}
    assert types["past_key_values.0.key"] == types["visual_past_key_values.1.value"] == onnx.TensorProto.FLOAT16
    assert types["prefix_embeds"] == onnx.TensorProto.FLOAT
    for name in (DECODER, VISION, EMBED):
        sizes = {
            tensor.name: np.prod(tensor.dims) * (4 if tensor.data_type == onnx.TensorProto.FLOAT else 2)
            for tensor in onnx.load(bundle.file(name), load_external_data=False).graph.initializer
        }
        whole = [size for key, size in sizes.items() if not key.endswith(".fp16")]
        assert sum(whole) < 0.1 * sum(sizes.values()), name  # norms alone
    receipt = load(bundle.path).generate(tiny_image, "What?", max_tokens=3).receipt
    assert (
        receipt.kv_bytes * 2
        == load(lowered("onnxruntime", "int8").path).generate(tiny_image, "What?", max_tokens=3).receipt.kv_bytes
    )


@pytest.mark.parametrize("target", ["jetpack6", "jetpack7.2"])
def test_bfloat16_is_where_float16_is(lowered: Any, target: str) -> None:
    kinds = onnx.TensorProto.DataType.Name
    found = []
    for precision in ("fp16", "bf16"):
        graph = onnx.load(lowered(target, precision).file(DECODER), load_external_data=False).graph
        values = {value.name: kinds(value.type.tensor_type.elem_type) for value in (*graph.input, *graph.output)}
        casts = [kinds(node.attribute[0].i) for node in graph.node if node.op_type == "Cast"]
        found.append(([node.op_type for node in graph.node], casts, values))
    half, brain = found
    assert str(half).replace("FLOAT16", "BFLOAT16") == str(brain)


def test_a_bfloat16_graph_in_float32_has_no_weights_of_its_own(lowered: Any) -> None:
    bundle = lowered("jetpack6", "bf16")
    for graph in (DECODER, VISION, EMBED):
        path = bundle.file(float32_graph(graph))
        model = onnx.load(path, load_external_data=False)
        onnx.checker.check_model(str(path), full_check=True)
        stored = [tensor for tensor in model.graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL]
        locations = {entry.value for tensor in stored for entry in tensor.external_data if entry.key == "location"}
        assert locations == {f"{path.name.removesuffix('.float32.onnx')}.onnx.data"}
        assert not {value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output)} & {
            onnx.TensorProto.BFLOAT16
        }
        assert [value.name for value in model.graph.output] == list(bundle.manifest.graphs[graph].outputs)
        assert not list(bundle.path.glob("onnx/*.float32.onnx.data"))


def test_rows_of_bfloat16_are_held_as_their_bits() -> None:
    numbers = torch.tensor([0.0, -0.0, 1.0, -3.140625, 1e38, float("inf"), 2.0**-126])
    bits = numbers.bfloat16().view(torch.uint16).numpy()
    assert np.array_equal(bfloat16_as_float32(bits), numbers.bfloat16().float().numpy())
    assert np.array_equal(float32_as_bfloat16(bfloat16_as_float32(bits)), bits)


def test_quantized_weights_have_zero_points_of_zero(lowered: Any) -> None:
    graph = onnx.load(lowered("jetpack7.2", "int4").file(DECODER), load_external_data=False).graph
    dequantized = [node for node in graph.node if node.op_type == "DequantizeLinear"]
    assert len(dequantized) == 2 * 7 + 1 and all(len(node.input) == 2 for node in dequantized)
    kinds = Counter(onnx.TensorProto.DataType.Name(tensor.data_type) for tensor in graph.initializer if "weight.int" in tensor.name)
    assert kinds == {"INT4": 14, "INT8": 1}
    assert not any(node.op_type in ("QuantizeLinear", "DynamicQuantizeLinear", "MatMulNBits") for node in graph.node)


def test_int4_is_kept_in_blocks_of_128() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 256, generator=generator)
    quantized = quantize(weight, "int4", torch.float16)
    assert quantized.kind == "int4" and quantized.scales.shape == (6, 2)
    assert (int(quantized.values.min()), int(quantized.values.max())) == (-8, 7)
    assert (quantized.restored() - weight).square().mean() < 0.02 * weight.square().mean()
    # Blocks of their own: a large weight in one leaves the other alone.
    weight[0, 0] = 1000
    assert torch.equal(quantize(weight, "int4", torch.float16).values[:, 128:], quantized.values[:, 128:])


def test_scales_of_int4_lose_least() -> None:
    # Of blocks of normal numbers 4 bits lose 10.1 percent; the half of the range that -7 to 7 leaves out would cost another 0.5.
    weight = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))
    quantized = quantize(weight, "int4", torch.float32)
    lost = (quantized.restored() - weight).square().mean().sqrt()
    assert lost < 0.102 * weight.square().mean().sqrt()
    for change in (0.97, 1.03):
        others = Quantized("int4", quantized.values, quantized.scales * change)
        assert (others.restored() - weight).square().mean().sqrt() > lost


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_row_of_zeros_has_a_scale(even: LoadedModel, tmp_path: Path, precision: str) -> None:
    # float16 makes 0 of the scale of such a row, and NVIDIA's builder refuses the graph.
    matrix = even.family.decoder().layers[0].mlp.gate_proj.weight
    lowering, whole = Lowering(TARGETS["jetpack6"], precision), matrix.detach().clone()
    with torch.no_grad():
        matrix[5] = 0
        matrix[6] *= 1e-7
    try:
        trace_decoder(even.family.decoder(), 3, KeepPlan("qwen2_vl", 2, TINY_GEOMETRY), lowering, tmp_path / "decoder.onnx")
    finally:
        with torch.no_grad():
            matrix.copy_(whole)
    assert [str(finding) for finding in lint(tmp_path / "decoder.onnx", lowering.target) if finding.severity == "error"] == []
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(tmp_path / "decoder.onnx").graph.initializer}
    scales = next(numbers for name, numbers in stored.items() if name.endswith("layers.0.mlp.gate_proj.weight.scales"))
    assert scales.min() > 0 and np.isfinite(scales).all()


def test_matrices_that_do_not_divide_into_blocks_stay_int8() -> None:
    weight = torch.linspace(-1, 1, 480).view(10, 48)
    quantized = quantize(weight, "int4", torch.float32)
    assert quantized.kind == "int8" and quantized.scales.shape == (10, 1)
    assert (quantized.restored() - weight).abs().max() < 1 / 127


def test_the_reference_is_itself_again_afterwards(tiny: LoadedModel) -> None:
    parts, vision = tiny.family.decoder(), torch.nn.Linear(4, 4)
    before = parts.lm_head.weight
    hidden = torch.randn(2, parts.hidden, generator=torch.Generator().manual_seed(1))
    whole = parts.lm_head(hidden)
    with pytest.raises(RuntimeError, match="stop"), at_precision(parts, vision, Lowering(TARGETS["jetpack6"], "int8")):
        assert not torch.equal(parts.lm_head(hidden), whole)
        raise RuntimeError("stop")
    assert parts.lm_head.weight is before and torch.equal(parts.lm_head(hidden), whole)
    with at_precision(parts, vision, PLAIN):
        assert torch.equal(parts.lm_head(hidden), whole)


def test_verify_notices_a_wrong_scale(
    tiny: LoadedModel, tiny_plan: KeepPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(weight: torch.Tensor, kind: str, products: torch.dtype, largest: float | None = None) -> Quantized:
        right = quantize(weight, kind, products, largest)
        return Quantized(right.kind, right.values, right.scales * 1.05)

    monkeypatch.setattr(matrices, "quantize", wrong)
    bundle = export_bundle(tiny, tiny_plan, tmp_path / "b", lowering=Lowering(TARGETS["onnxruntime"], "int8"))
    failed = [stage.name for stage in verify(bundle, tiny) if not stage.passed]
    assert {"vision", "prefill"} <= set(failed)


def test_unknown_targets_and_precisions_are_refused() -> None:
    with pytest.raises(UsageError, match=r"Unknown target 'orin'.*jetpack7\.2"):
        target_named("orin")
    with pytest.raises(UsageError, match=r"Unknown precision 'fp6'.*int4"):
        Lowering(TARGETS["jetpack6"], "fp6")
