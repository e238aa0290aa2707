"""Views of an image that an encoder takes one after another: the same numbers, and the activations of one view."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from test_cpu_kernels import cpu, nodes, run

from edgeprune import targets
from edgeprune.bundle import VISION, own_weights_graph
from edgeprune.checkpoint.loading import LoadedModel, load_model, resolve_model
from edgeprune.device.onnx_file import read_graph
from edgeprune.export.exporter import export_bundle
from edgeprune.export.passes.views import _Run, write_with_own_weights
from edgeprune.export.tracing import trace_vision
from edgeprune.model.quantization import at_precision
from edgeprune.plan import Cut, KeepPlan
from edgeprune.plan.presets import unpruned_plan
from edgeprune.runtime import load
from edgeprune.runtime.backends import onnxruntime as backend

TILED = ["smolvlm", "internvl", "idefics3", "llava_next", "llava_onevision"]
NEVER = 1 << 30


def tiled(name: str, folder: Path) -> tuple[LoadedModel, KeepPlan]:
    kind: Any = import_module(f"tiny_{name}")
    model = load_model(resolve_model(str(kind.folder(folder))))
    return model, unpruned_plan(name, len(model.family.decoder().layers), model.geometry(kind.SIZE))


def trace(monkeypatch: pytest.MonkeyPatch, model: LoadedModel, plan: KeepPlan, precision: str, least: int, path: Path) -> Path:
    """Write the encoder for CPUs, with views in turn from `least` patches."""
    monkeypatch.setattr(targets, "FEWEST_IN_TURN", least)
    trace_vision(model.family, plan, cpu(precision), path)
    return path


def pixels_for(path: Path) -> np.ndarray:
    (pixels,) = onnx.load(path, load_external_data=False).graph.input
    shape = [axis.dim_value for axis in pixels.type.tensor_type.shape.dim]
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def attention_in_turn(path: Path) -> list[int]:
    """Return how many attentions each Scan of a graph has."""
    graph: Any = onnx.load(path, load_external_data=False).graph
    bodies = [
        attribute.g for node in graph.node if node.op_type == "Scan" for attribute in node.attribute if attribute.name == "body"
    ]
    return [[node.op_type for node in body.node].count("MultiHeadAttention") for body in bodies]


@pytest.mark.parametrize("name", TILED)
def test_views_in_turn_become_the_same_tokens(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, plan = tiled(name, tmp_path)
    at_once, in_turn = (trace(monkeypatch, model, plan, "fp32", least, tmp_path / f"{least}.onnx") for least in (NEVER, 1))
    pixels = pixels_for(at_once)
    np.testing.assert_allclose(run(in_turn, pixel_values=pixels), run(at_once, pixel_values=pixels), atol=2e-5)
    assert attention_in_turn(in_turn) == [nodes(at_once)["MultiHeadAttention"]] and not nodes(in_turn)["MultiHeadAttention"]
    assert sorted(read_graph(in_turn).weights) == sorted(read_graph(at_once).weights)


@pytest.mark.parametrize("name", TILED)
def test_integers_have_the_range_of_their_view(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, plan = tiled(name, tmp_path)
    pixels = pixels_for(trace(monkeypatch, model, plan, "int8", NEVER, tmp_path / "vision.onnx"))
    pixels[: len(pixels) // 3] *= 0.1  # a dark view
    vision = model.family.vision(plan.geometry).eval()
    outputs, references = list[np.ndarray](), list[np.ndarray]()
    for least in (NEVER, 1):
        path = trace(monkeypatch, model, plan, "int8", least, tmp_path / "vision.onnx")
        owning = tmp_path / "owning.onnx"  # exact on every CPU
        outputs.append(run(owning if write_with_own_weights(path, owning) else path, pixel_values=pixels))
        with torch.no_grad(), at_precision(model.family.decoder(), vision, cpu("int8")):
            found = vision(torch.from_numpy(pixels))
        references.append((found[0] if isinstance(found, tuple) else found).numpy())
    differences = [[float(np.abs(output - reference).mean()) for reference in references] for output in outputs]
    assert differences[0][0] < 0.2 * differences[0][1] and differences[1][1] < 0.2 * differences[1][0], differences


def test_what_is_equal_in_all_views_is_there_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, plan = tiled("smolvlm", tmp_path)
    path = trace(monkeypatch, model, plan, "fp32", 1, tmp_path / "vision.onnx")
    rows = pixels_for(path).shape[0]
    constants = onnx.load(path, load_external_data=False).graph.initializer
    shapes = [tuple(each.dims) for each in constants]
    assert (rows // len(plan.geometry.views), 24) in shapes  # positions
    assert not [shape for shape in shapes if rows in shape]


def test_cuts_keep_the_same_tokens_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, plan = tiled("smolvlm", tmp_path)
    plan = plan.with_cuts(Cut("vision", "evit", 6, layer=2))
    paths = [trace(monkeypatch, model, plan, "fp32", least, tmp_path / f"{least}.onnx") for least in (NEVER, 1)]
    pixels = pixels_for(paths[0])
    at_once, in_turn = (onnxruntime.InferenceSession(path).run(None, {"pixel_values": pixels}) for path in paths)
    for expected, found in zip(at_once, in_turn, strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-5)
    assert attention_in_turn(paths[1]) and len(at_once) == 2


def test_what_would_be_broadcast_along_another_axis_ends_a_run() -> None:
    def value(name: str, *shape: int) -> ir.Value:
        return ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))

    rows, axis = value("x", 6, 6), ir.Value(name="axis", const_value=ir.tensor(np.array([1], np.int64), name="axis"))
    peaks, total = value("peaks", 6), value("total", 6, 6)
    run = _Run(3)
    assert run.takes(ir.node("ReduceMax", [rows, axis], {"keepdims": 0}, outputs=[peaks]))
    assert not run.takes(ir.node("Add", [rows, peaks], outputs=[total]))
    heads, keys, scores = value("heads", 6, 4, 5), value("keys", 3, 6, 5, 4), value("scores", 3, 6, 4, 4)
    assert not _Run(3).takes(ir.node("MatMul", [heads, keys], outputs=[scores]))
    same = value("same", 6, 5, 4)
    assert _Run(3).takes(ir.node("MatMul", [heads, same], outputs=[value("each", 6, 4, 4)]))


def test_small_views_are_taken_at_once(tmp_path: Path) -> None:
    model, plan = tiled("smolvlm", tmp_path)
    trace_vision(model.family, plan, cpu("fp32"), tmp_path / "vision.onnx")
    assert not nodes(tmp_path / "vision.onnx")["Scan"]


def borrowed_integers(path: Path) -> int:
    """Return how many integer weights the Scans of a graph multiply by that are not their own."""
    bodies = [node.attributes["body"].as_graph() for node in ir.load(path).graph if node.op_type == "Scan"]
    assert bodies
    weights = [(node.inputs[1], body) for body in bodies for node in body if node.op_type == "MatMulInteger"]
    return sum(weight is None or weight.name not in body.initializers for weight, body in weights)


def test_scans_own_their_integers_in_a_form_of_the_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, plan = tiled("smolvlm", tmp_path)
    path, owning = tmp_path / "vision.onnx", tmp_path / "owning.onnx"
    trace(monkeypatch, model, plan, "int8", 1, path)
    assert write_with_own_weights(path, owning)
    assert borrowed_integers(path) and not borrowed_integers(owning)
    assert read_graph(owning).bytes == read_graph(path).bytes
    assert sorted(read_graph(owning).weights) == sorted(read_graph(path).weights)
    trace(monkeypatch, model, plan, "fp32", 1, path)
    owning.unlink()
    assert not write_with_own_weights(path, owning) and not owning.exists()


@pytest.mark.parametrize("able", [True, False, None])
def test_a_cpu_that_would_overflow_reads_that_form(able: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, plan = tiled("smolvlm", tmp_path)
    monkeypatch.setattr(targets, "FEWEST_IN_TURN", 1)
    bundle = export_bundle(model, plan, tmp_path / "bundle", lowering=cpu("int8"))
    opened, opening = list[str](), backend._open_session

    def noted(path: Path, *others: Any) -> Any:
        opened.append(path.name)
        return opening(path, *others)

    monkeypatch.setattr(backend, "_open_session", noted)
    monkeypatch.setattr(backend, "_has_byte_products", lambda: able)
    with load(bundle.path, threads=1):
        assert Path(VISION if able else own_weights_graph(VISION)).name in opened
