"""Targets, precision and `check` as a user types them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper

import edgeprune.export.checking
from edgeprune.bundle import MANIFEST, VISION, Bundle, Manifest
from edgeprune.bundle.integrity import record_files
from edgeprune.cli import main
from edgeprune.errors import install_command


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def rewritten(bundle: Path, change: Any) -> Path:
    """Change the vision encoder of a bundle, as an exporter with a fault would have written it."""
    path = bundle / VISION
    model = onnx.load(path)
    change(model)
    onnx.save(model, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=0)
    replace(Manifest.load(bundle), files=record_files(bundle, MANIFEST)).save(bundle)
    return bundle


def pick(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("NonZero", ["visual_embeds"], ["places"], name="picked"))
    model.graph.output.append(helper.make_tensor_value_info("places", TensorProto.INT64, [3, None]))


def rank(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(helper.make_tensor("count", TensorProto.INT64, [1], [4000]))
    model.graph.node.append(helper.make_node("TopK", ["visual_embeds", "count"], ["best", "ranks"], name="ranked", axis=1))
    model.graph.output.append(helper.make_tensor_value_info("ranks", TensorProto.INT64, None))


def test_a_lowered_bundle_says_so(tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    made = invoke("export", tiny_folder, "-o", out, "--target", "jetpack7.2", "--precision", "int8", "--image-size", "84x112")
    assert made.exit_code == 0, made.output
    assert "int8 for jetpack7.2, opset 23" in made.output
    shown = json.loads(invoke("inspect", out, "--json").output)
    assert (shown["target"], shown["precision"], shown["opset"]) == ("jetpack7.2", "int8", 23)
    older = invoke("check", out, "--target", "jetpack6", "--json")
    assert older.exit_code == 1
    found = {finding["operator"] for finding in json.loads(older.output)["findings"] if finding["severity"] == "error"}
    assert {"RMSNormalization", "RotaryEmbedding"} <= found


def test_for_cpus_there_is_a_target_with_integers(tiny_folder: Path, tmp_path: Path) -> None:
    asked = ("export", tiny_folder, "--precision", "int8", "--image-size", "84x112")
    made = invoke(*asked, "-o", tmp_path / "floats")
    assert "On a CPU --target cpu multiplies integers" in made.output
    made = invoke(*asked, "-o", tmp_path / "integers", "--target", "cpu", "--kv", "int8")
    assert made.exit_code == 0 and "multiplies integers" not in made.output
    assert "KV cache of steps in 8 bits" in " ".join(made.output.split())
    assert json.loads(invoke("inspect", tmp_path / "integers", "--json").output)["kv"] == "int8"


def test_graphs_for_cpus_are_not_built(tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    assert invoke("export", tiny_folder, "-o", out, "--target", "cpu", "--image-size", "84x112").exit_code == 0
    refused = invoke("build", out, "--dry-run")
    assert refused.exit_code == 2 and "TensorRT does not read its graphs" in refused.output and "--target" in refused.output


def test_half_precision_is_refused_for_cpus(tmp_path: Path) -> None:
    refused = invoke("export", "tabletop", "-o", tmp_path / "b", "--target", "cpu", "--precision", "fp16")
    assert refused.exit_code == 2 and "has no fp16" in refused.output and "--precision fp32" in refused.output
    assert not (tmp_path / "b").exists()


def test_unknown_targets_are_refused_with_the_known_ones(tiny_bundle: Bundle, tmp_path: Path) -> None:
    refused = invoke("export", "tabletop", "-o", tmp_path / "b", "--target", "orin")
    assert refused.exit_code == 2 and "jetpack7.2" in refused.output
    assert invoke("check", tiny_bundle.path, "--target", "orin").exit_code == 2


def test_check_lints_and_builds(tiny_bundle: Bundle) -> None:
    pytest.importorskip("tensorrt_rtx")
    result = invoke("check", tiny_bundle.path, "--target", "jetpack6", "--context", "128", "--turn", "64")
    assert result.exit_code == 0, result.output
    assert "every graph was built by TensorRT-RTX" in result.output and "onnx/decoder.onnx" in result.output


def test_check_goes_without_a_builder(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edgeprune.export.checking, "can_try", lambda: False)
    result = invoke("check", tiny_bundle.path, "--target", "jetpack6")
    assert result.exit_code == 0 and install_command("check") in result.output
    own = invoke("check", tiny_bundle.path)
    assert own.exit_code == 0 and "onnxruntime: nothing stands in the way" in own.output


def test_check_knows_graphs_for_cpus(tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "b"
    assert invoke("export", tiny_folder, "-o", out, "--target", "cpu", "--image-size", "84x112").exit_code == 0
    own = invoke("check", out)
    assert own.exit_code == 0 and "cpu: nothing stands in the way" in own.output and "onnx/decoder.onnx" in own.output
    other = invoke("check", out, "--target", "jetpack6")
    assert other.exit_code == 2 and "TensorRT does not read its graphs. Export it with --target jetpack6." in other.output


def test_a_count_that_depends_on_data_is_caught(altered_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edgeprune.export.checking, "can_try", lambda: False)
    result = invoke("check", rewritten(altered_bundle, pick), "--target", "jetpack6")
    assert result.exit_code == 1
    assert "error: onnx/vision_encoder.onnx picked (NonZero)" in result.output and "1 errors in the lint" in result.output


def test_too_large_a_selection_is_caught_twice(altered_bundle: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    broken = rewritten(altered_bundle, rank)
    result = json.loads(invoke("check", broken, "--target", "jetpack6", "--context", "128", "--turn", "64", "--json").output)
    assert not result["passed"]
    assert any("3840" in finding["reason"] for finding in result["findings"] if finding["node"] == "ranked")
    refused = {build["graph"]: build["error"] for build in result["builds"] if build["error"]}
    assert list(refused) == [VISION] and refused[VISION]
