"""What graphs for CPUs are made of: products of integers, projections in one product, attention in blocks of rows."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnx_ir.tape import Tape

from edgeprune.checkpoint.loading import LoadedModel, load_model, resolve_model
from edgeprune.export import tracing
from edgeprune.export.passes.fusion import merge_reshapes
from edgeprune.export.passes.precision import DynamicQuantizer
from edgeprune.export.tracing import trace_decoder, trace_embedding, trace_vision
from edgeprune.model.quantization import dynamically_rounded, quantize
from edgeprune.plan import KeepPlan
from edgeprune.plan.presets import unpruned_plan
from edgeprune.runtime.backends.interface import CPU
from edgeprune.runtime.backends.onnxruntime import _DISABLED_OPTIMIZERS, _session_options
from edgeprune.targets import PLAIN, TARGETS, Lowering


def cpu(precision: str) -> Lowering:
    return Lowering(TARGETS["cpu"], precision)


def nodes(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)


def run(path: Path, **feeds: np.ndarray) -> np.ndarray:
    options = _session_options(1, [CPU], exact=False, integers=True)
    output: np.ndarray = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run(None, feeds)[0]
    return output


def multiplied(tmp_path: Path, rows: torch.Tensor, weight: torch.Tensor, *, normed: bool) -> torch.Tensor:
    """Return rows times weight [out, in] as DynamicQuantizer writes it, behind a norm (of no effect) or not."""
    state = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["n", rows.shape[1]]))
    tape, quantized = Tape(), quantize(weight, "int8", torch.float32)
    one = tape.initializer(ir.tensor(np.ones(rows.shape[1], np.float32), name="one"))
    # Of one column the norm is the sign; epsilon outweighs every number here instead.
    start = tape.op("RMSNormalization", [state, one], {"epsilon": 1e12}) if normed else state
    integers = tape.initializer(ir.tensor(quantized.values.T.contiguous().numpy(), name="w"))
    scales = tape.initializer(ir.tensor(quantized.scales[:, 0].numpy(), name="s"))
    output = DynamicQuantizer().product(tape, start, integers, scales, None)
    output.name = "y"
    graph = ir.Graph([state], [output], nodes=tape.nodes, initializers=tape.initializers, opset_imports={"": 23})
    ir.save(ir.Model(graph, ir_version=10), tmp_path / "product.onnx")
    return torch.from_numpy(run(tmp_path / "product.onnx", x=rows.numpy())) * (1e6 if normed else 1.0)


def test_one_large_token_does_not_take_the_range_of_the_others(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, weight = torch.randn(6, 64, generator=generator), torch.randn(32, 64, generator=generator)
    rows[2] *= 1000
    expected = rows @ weight.T
    worst = [
        (multiplied(tmp_path, rows, weight, normed=normed) - expected)[[0, 1, 3, 4, 5]].abs().max() for normed in (False, True)
    ]
    assert worst[0] < 0.02 * expected[0].abs().max() < worst[1]


def test_products_of_the_largest_bytes_do_not_overflow(tmp_path: Path) -> None:
    # Kernels that add two products in 16 bits end at 32,767; this CPU may have better ones, or the runtime asks for others.
    rows, weight = torch.ones(3, 1024), torch.ones(16, 1024)
    expected = torch.full((3, 16), 1024.0)
    torch.testing.assert_close(multiplied(tmp_path, rows, weight, normed=False), expected)


def test_states_are_rounded_as_the_operator_does(tmp_path: Path) -> None:
    rows = torch.randn(5, 16, generator=torch.Generator().manual_seed(1)) + 0.3
    tape, state = Tape(), ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([5, 16]))
    output = tape.op("DequantizeLinear", list(tape.op_multi_out("DynamicQuantizeLinear", [state], num_outputs=3)))
    output.name = "y"
    ir.save(ir.Model(ir.Graph([state], [output], nodes=tape.nodes, opset_imports={"": 20}), ir_version=10), tmp_path / "x.onnx")
    np.testing.assert_allclose(dynamically_rounded(rows).numpy(), run(tmp_path / "x.onnx", x=rows.numpy()), atol=1e-6)


def test_query_key_and_value_are_one_product(even: LoadedModel, tiny_plan: KeepPlan, tmp_path: Path) -> None:
    parts = even.family.decoder()
    plan = KeepPlan("qwen2_vl", 2, tiny_plan.geometry)
    found = {}
    for precision in ("fp32", "int8"):
        trace_decoder(parts, 3, plan, cpu(precision), tmp_path / "decoder.onnx")
        found[precision] = nodes(tmp_path / "decoder.onnx")
    assert found["fp32"]["Gemm"] == found["int8"]["MatMulInteger"] == 2 * 5 + 1
    assert found["int8"]["DynamicQuantizeLinear"] == 2 * 4 + 1  # gate and up meet the same


@pytest.mark.parametrize("buffers", [True, False])
def test_a_layer_of_a_decode_step_has_few_nodes(
    buffers: bool, even: LoadedModel, tiny_plan: KeepPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracing, "has_buffers", lambda *_: buffers)
    trace_decoder(even.family.decoder(), 3, KeepPlan("qwen2_vl", 2, tiny_plan.geometry), cpu("int8"), tmp_path / "decoder.onnx")
    graph = onnx.load(tmp_path / "decoder.onnx", load_external_data=False).graph
    found = Counter(node.op_type for node in graph.node)
    # One cuts the blocks, two are those of attention, and two tell a row that is alone; lengths are compared once for all layers.
    assert found["If"] == 5 and found["Less"] == 3
    makers = {output: node.op_type for node in graph.node for output in node.output}
    reshapes = ("Reshape", "Unsqueeze", "Squeeze")
    assert not [node.name for node in graph.node if node.op_type in reshapes and makers.get(node.input[0]) in reshapes]
    # Two of these Transposes fuse with each of the products; one row has no scale, which is an Identity.
    products = {"MatMul": 6, "Transpose": 6, "Reshape": 2, **dict.fromkeys(("Mul", "Concat", "Add", "Softmax", "Split", "Sum"), 1)}
    projection = {"Split": 1, "RotaryEmbedding": 2, "Reshape": 3}  # and two outputs that are none
    attentions = 0
    for node in graph.node:
        branches = {part.name: part.g for part in node.attribute} if node.op_type == "If" else {}
        if not branches or not branches["then_branch"].name.endswith("_one_row"):
            continue
        row, several = (Counter(part.op_type for part in branches[name].node) for name in ("then_branch", "else_branch"))
        assert row == ({"GroupQueryAttention": 1, "Identity": 3} if buffers else {**products, "Identity": 1})
        scaled = dict.fromkeys(("If", "ReduceMax", "ReduceMin", "Neg", "Max", "Div"), 1)
        assert several == {**scaled, **({**projection, "Identity": 2} if buffers else {})}  # buffers that are none
        attentions += 1
    assert attentions == 2


@pytest.mark.parametrize(
    ("precision", "kv", "expected"), [("fp32", "same", 13), ("int8", "same", 15), ("int8", "int8", 20), ("int4", "same", 11)]
)
def test_a_layer_of_a_decode_step_runs_few_nodes(
    precision: str, kv: str, expected: int, even: LoadedModel, tiny_plan: KeepPlan, tmp_path: Path
) -> None:
    plan = KeepPlan("qwen2_vl", 2, tiny_plan.geometry)
    trace_decoder(even.family.decoder(), 3, plan, replace(cpu(precision), kv=kv), tmp_path / "decoder.onnx")
    assert nodes_of_a_layer(tmp_path / "decoder.onnx") == expected


@pytest.mark.slow
def test_norms_of_queries_and_keys_are_few_nodes_more(tmp_path: Path) -> None:
    kind = import_module("tiny_qwen3_vl")
    model = load_model(resolve_model(str(kind.folder(tmp_path))))
    plan = unpruned_plan("qwen3_vl", len(model.family.decoder().layers), model.geometry(kind.SIZE))
    trace_decoder(model.family.decoder(), 3, plan, cpu("int8"), tmp_path / "decoder.onnx")
    assert nodes_of_a_layer(tmp_path / "decoder.onnx") == 15 + 7 + 1  # the last adds features of the encoder


def nodes_of_a_layer(path: Path) -> int:
    """Return how many nodes of a decoder run from the last attention but one of a single row to the last."""
    options = _session_options(1, [CPU], exact=False, integers=True)
    options.optimized_model_filepath, options.log_severity_level = str(path.with_name("optimized.onnx")), 4
    onnxruntime.InferenceSession(path, options, providers=[CPU], disabled_optimizers=[_DISABLED_OPTIMIZERS])
    run = list(onnx.load(path.with_name("optimized.onnx"), load_external_data=False).graph.node)
    branches = {
        place: next(part.g for part in node.attribute if part.name == "then_branch").node
        for place, node in enumerate(run)
        if node.op_type == "If"
    }
    *_, first, second = (place for place, row in branches.items() if "GroupQueryAttention" in {node.op_type for node in row})
    layer = [node for node in run[first + 1 : second + 1] if node.op_type not in ("Shape", "Less")]  # what layers share
    return len(layer) + sum(len(row) for place, row in branches.items() if first < place <= second)


def test_one_row_attends_as_several_do(
    even: LoadedModel, tiny_plan: KeepPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The last of two rows attends in another branch than the same row alone, after the first is cached. For buffers see
    # test_step_answers.py.
    monkeypatch.setattr(tracing, "has_buffers", lambda *_: False)
    parts, plan = even.family.decoder(), KeepPlan("qwen2_vl", 2, tiny_plan.geometry)
    trace_decoder(parts, 3, plan, cpu("fp32"), tmp_path / "decoder.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "decoder.onnx", providers=[CPU])
    draws = np.random.default_rng(0)
    embeds = draws.standard_normal((1, 2, parts.hidden)).astype(np.float32)
    past = {
        node.name: np.concatenate([np.zeros((1, *node.shape[1:])), draws.standard_normal((5, *node.shape[1:]))]).astype(np.float32)
        for node in session.get_inputs()
        if "past" in node.name
    }

    def step(rows: slice, caches: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        tokens = {"prefix": slice(0), "visual": slice(0), "suffix": rows}
        feeds = {f"{name}_embeds": embeds[:, part] for name, part in tokens.items()}
        feeds |= {f"{name}_positions": np.tile(np.arange(10, 12)[part], (3, 1)) for name, part in tokens.items()}
        feeds = {node.name: feeds[node.name] for node in session.get_inputs() if node.name in feeds} | caches
        feeds |= {"visual_order": np.zeros(0, np.int64)} if "visual_order" in {node.name for node in session.get_inputs()} else {}
        names = [node.name for node in session.get_outputs()]
        return dict(zip(names, session.run(names, feeds), strict=True))

    first = step(slice(0, 1), past)
    grown = {
        name: np.concatenate([rows, first[name.replace("past_key_values", "present")]]) if not name.startswith("visual") else rows
        for name, rows in past.items()
    }
    np.testing.assert_allclose(step(slice(1, 2), grown)["logits"], step(slice(0, 2), past)["logits"], atol=1e-5)


def test_norms_of_an_older_opset_are_one_node(even: LoadedModel, tiny_plan: KeepPlan, tmp_path: Path) -> None:
    trace_decoder(even.family.decoder(), 3, KeepPlan("qwen2_vl", 2, tiny_plan.geometry), PLAIN, tmp_path / "decoder.onnx")
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.optimized_model_filepath = 4, str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(tmp_path / "decoder.onnx", options, providers=[CPU])
    assert not nodes(tmp_path / "decoder.onnx")["Reciprocal"]
    assert nodes(tmp_path / "optimized.onnx")["SimplifiedLayerNormalization"] == 2 * 2 + 1


def test_a_chain_of_reshapes_is_one_or_none(tmp_path: Path) -> None:
    state = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["n", 6]))
    tape = Tape()

    def reshaped(value: ir.Value, *sizes: int | str) -> ir.Value:
        shape = tape.initializer(ir.tensor(np.array([-1 if size == "n" else size for size in sizes]), name=f"s{len(tape.nodes)}"))
        output = tape.op("Reshape", [value, shape])
        output.type, output.shape = state.type, ir.Shape(sizes)
        return output

    wide = reshaped(reshaped(state, "n", 2, 3), 1, "n", 6)
    back = reshaped(reshaped(wide, "n", 3, 2), "n", 6)
    output = tape.op(
        "Concat", [back, tape.op("Squeeze", [wide, tape.initializer(ir.tensor(np.array([0]), name="axis"))])], {"axis": 1}
    )
    output.name, output.type, output.shape = "y", state.type, ir.Shape(["n", 12])
    graph = ir.Graph([state], [output], nodes=tape.nodes, initializers=tape.initializers, opset_imports={"": 23})
    rows = np.arange(12, dtype=np.float32).reshape(2, 6)
    model = ir.Model(graph, ir_version=10)
    merge_reshapes(graph)
    RemoveUnusedNodesPass()(model)
    ir.save(model, tmp_path / "merged.onnx")
    assert nodes(tmp_path / "merged.onnx") == {"Reshape": 1, "Squeeze": 1, "Concat": 1}  # the shape of a Squeeze is unknown here
    np.testing.assert_array_equal(run(tmp_path / "merged.onnx", x=rows), np.concatenate([rows, rows], axis=1))


@pytest.mark.parametrize(
    "name",
    [
        "qwen2_5_vl",
        "smolvlm",
        "internvl",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen2_vl", "idefics2", "mistral3")),
    ],
)
def test_an_encoder_never_holds_its_scores(name: str, tmp_path: Path) -> None:
    kind: Any = import_module(f"tiny_{name}")
    model = load_model(resolve_model(str(kind.folder(tmp_path))))
    layers = len(model.family.decoder().layers)
    plan = unpruned_plan(name, layers, model.geometry(kind.SIZE))
    found, outputs = list[Counter[str]](), list[np.ndarray]()
    for lowering in (PLAIN, cpu("fp32")):
        trace_vision(model.family, plan, lowering, tmp_path / "vision.onnx")
        (pixels,) = onnx.load(tmp_path / "vision.onnx", load_external_data=False).graph.input
        shape = [axis.dim_value for axis in pixels.type.tensor_type.shape.dim]
        found.append(nodes(tmp_path / "vision.onnx"))
        outputs.append(run(tmp_path / "vision.onnx", pixel_values=np.random.default_rng(0).standard_normal(shape, np.float32)))
    # Idefics 2's resampler shares keys among its heads, and keeps its scores, which are of few queries.
    assert found[1]["MultiHeadAttention"] + found[1]["Softmax"] == found[0]["Softmax"] > 0
    assert bool(found[1]["Softmax"]) == (name == "idefics2")
    np.testing.assert_allclose(outputs[1], outputs[0], atol=2e-5)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
def test_rotary_positions_of_an_encoder_are_one_operator(name: str, tmp_path: Path) -> None:
    kind: Any = import_module(f"tiny_{name}")
    model = load_model(resolve_model(str(kind.folder(tmp_path))))
    layers, blocks = len(model.family.decoder().layers), len(model.model.model.visual.blocks)
    plan = unpruned_plan(name, layers, model.geometry(kind.SIZE))
    pixels, outputs = np.random.default_rng(0).standard_normal((plan.geometry.tokens * 4, 1176)).astype(np.float32), []
    for lowering in (PLAIN, cpu("fp32")):
        trace_vision(model.family, plan, lowering, tmp_path / "vision.onnx")
        outputs.append(run(tmp_path / "vision.onnx", pixel_values=pixels))
    found = nodes(tmp_path / "vision.onnx")
    assert found["RotaryEmbedding"] == 2 * blocks and not found["Neg"]
    np.testing.assert_allclose(outputs[1], outputs[0], atol=2e-5)


def test_the_table_of_tokens_is_int8_row_by_row(even: LoadedModel, tmp_path: Path) -> None:
    parts = even.family.decoder()
    trace_embedding(parts, cpu("int8"), tmp_path / "embed.onnx")
    weight = parts.embed_tokens.weight.detach()
    expected = quantize(weight, "int8", torch.float32).restored()[[3, 1, 4, 1]]
    np.testing.assert_allclose(run(tmp_path / "embed.onnx", ids=np.array([[3, 1, 4, 1]]))[0], expected.numpy(), atol=1e-6)
