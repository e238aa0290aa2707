"""fp8: inputs and weights of products in FP8 (E4M3), for the GPUs of Thor."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from drawn_samples import samples
from onnx import TensorProto, numpy_helper
from tiny_models import TINY_GEOMETRY

from edgeprune.bundle import DECODER, ROUNDINGS, VISION, Bundle
from edgeprune.calibration.data.samples import WeightSamples
from edgeprune.calibration.replay.ranges import collect_ranges
from edgeprune.checkpoint.loading import LoadedModel
from edgeprune.errors import UsageError
from edgeprune.export.exporter import export_bundle
from edgeprune.export.verification import verify
from edgeprune.lint.check import lint
from edgeprune.model.quantization import quantize
from edgeprune.model.smoothquant import Rounding, load_roundings, round_to_fp8
from edgeprune.plan import Cut
from edgeprune.plan.presets import staircase_plan, unpruned_plan
from edgeprune.runtime import load
from edgeprune.targets import TARGETS, Lowering

PLAN = unpruned_plan("qwen2_vl", 2, TINY_GEOMETRY)
PRUNED = staircase_plan(PLAN, "fastv", [0.5], [1]).with_cuts(Cut("cache", "plphp", 2, layer=1))
ABLE = [name for name, target in TARGETS.items() if target.has_small_floats]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> WeightSamples:
    return samples(tmp_path_factory.mktemp("fit"), 0)


@pytest.fixture(scope="module", params=[pytest.param("jetpack7", marks=pytest.mark.slow), "tensorrt11"])
def bundle(
    request: pytest.FixtureRequest, even: LoadedModel, data: WeightSamples, tmp_path_factory: pytest.TempPathFactory
) -> Bundle:
    folder = tmp_path_factory.mktemp("fp8") / "bundle"
    return export_bundle(even, PRUNED, folder, lowering=Lowering(TARGETS[request.param], "fp8"), data=data)


def test_it_is_verified_and_answers(bundle: Bundle, even: LoadedModel, tiny_image: Any) -> None:
    assert [stage for stage in verify(bundle, even) if not stage.passed] == []
    assert load(bundle.path).generate(tiny_image, "What?", max_tokens=3).receipt.kv_bytes > 0
    assert bundle.manifest.smoothing is not None and bundle.manifest.smoothing.lossy == {}


def test_products_of_layers_are_fp8_and_the_head_is_not(bundle: Bundle) -> None:
    found, rounded = load_roundings(bundle.file(ROUNDINGS), "fp8"), set[str]()
    for path, part in ((DECODER, ""), (VISION, "vision.")):
        assert lint(bundle.file(path), bundle.manifest.lowering.target, modules=["Thor"], name=path) == []
        graph = onnx.load(bundle.file(path)).graph
        made = {name: node for node in graph.node for name in node.output}
        stored = {tensor.name: tensor for tensor in graph.initializer}
        for node in [node for node in graph.node if node.op_type == "MatMul"]:
            state, weight = (made.get(name) for name in node.input)
            if weight is None or weight.op_type != "DequantizeLinear":
                continue
            name = weight.input[0].removesuffix(".weight.fp8")
            assert state is not None and state.op_type == "DequantizeLinear"
            quantize_node = made[state.input[0]]
            types = [stored[tensor].data_type for tensor in (quantize_node.input[2], weight.input[0])]
            assert types == [TensorProto.FLOAT8E4M3FN] * 2
            scales = [numpy_helper.to_array(stored[tensor]) for tensor in (quantize_node.input[1], state.input[1], weight.input[1])]
            assert scales[0] == scales[1] == found[f"{part}{name}"].scale and scales[1].dtype == scales[2].dtype == np.float16
            rounded.add(f"{part}{name}")
        heads = [tensor.data_type for tensor in graph.initializer if "lm_head.weight" in tensor.name]
        assert heads == ([TensorProto.FLOAT16] if path == DECODER else [])
    assert rounded == found.keys() and len([name for name in rounded if "layers" in name]) == 14


def test_scales_hold_the_largest_input_of_the_samples(bundle: Bundle, even: LoadedModel, data: WeightSamples) -> None:
    found, (_, ranges) = load_roundings(bundle.file(ROUNDINGS), "fp8"), collect_ranges(even, PLAN, data)
    assert sorted(name for group in ranges.groups.values() for name in group) == sorted(found)
    for first, group in ranges.groups.items():
        for name in group:
            assert found[name].scale * 448 == pytest.approx(float(ranges.inputs[first].largest.max()), rel=1e-3)
            assert not found[name].smooths


def test_numbers_are_those_of_ml_dtypes() -> None:
    numbers = torch.randn(64, 96, generator=torch.manual_seed(0)) * torch.logspace(-4, 2.5, 96)
    expected = np.clip(numbers.numpy(), -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(round_to_fp8(numbers).numpy(), expected)
    made = quantize(numbers, "fp8", torch.float16)
    assert made.values.dtype is torch.float8_e4m3fn and made.scales.dtype is torch.float16
    # half a step of 3 bits of mantissa; below the largest over 28,672 numbers are subnormal
    normal = numbers.abs() > numbers.abs().amax(dim=1, keepdim=True) / 20_000
    error = ((made.restored() - numbers).abs() / numbers.abs())[normal]
    assert 0.03 < float(error.max()) <= 1 / 16


def test_a_product_loses_a_few_per_cent_with_outliers_too() -> None:
    torch.manual_seed(0)
    states, weight = torch.randn(128, 256), torch.randn(64, 256) * 0.05
    states[:, 3] *= 100
    exact = states @ weight.T
    rounding = Rounding(torch.ones(256), float(states.abs().max()) / 448, "fp8")
    product = rounding.inputs(states) @ quantize(weight, "fp8", torch.float16).restored().T
    assert float((product - exact).norm() / exact.norm()) < 0.05
    steps = Rounding(torch.ones(256), float(states.abs().max()) / 127)
    assert float((steps.inputs(states)[:, :3] - states[:, :3]).norm()) > 5 * float((rounding.inputs(states) - states)[:, :3].norm())


def test_verify_notices_another_scale(bundle: Bundle, even: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    right = load_roundings(bundle.file(ROUNDINGS), "fp8")
    wrong = {name: replace(each, scale=each.scale / 16) for name, each in right.items()}
    monkeypatch.setattr("edgeprune.export.verification.load_roundings", lambda *_: wrong)
    assert {"vision", "prefill", "generation"} <= {stage.name for stage in verify(bundle, even) if not stage.passed}


def test_only_targets_with_a_thor_have_it(even: LoadedModel, tmp_path: Path) -> None:
    assert ABLE == ["jetpack7", "jetpack7.2", "tensorrt11"]
    for name in TARGETS.keys() - set(ABLE):
        with pytest.raises(UsageError, match=r"has no fp8: .*products of FP8") as raised:
            Lowering(TARGETS[name], "fp8")
        assert "jetpack7, jetpack7.2, tensorrt11" in str(raised.value.hint)
    with pytest.raises(UsageError, match=r"fp8 rounds activations .* none are given"):
        export_bundle(even, PLAN, tmp_path / "b", lowering=Lowering(TARGETS["jetpack7"], "fp8"))


def test_graphs_for_orin_and_thor_are_told_once_what_orin_lacks(bundle: Bundle) -> None:
    found = lint(bundle.file(DECODER), TARGETS["jetpack7.2"])
    assert [(finding.severity, "Orin cannot compute" in finding.reason) for finding in found] == [("warning", True)]
    assert [finding.severity for finding in lint(bundle.file(DECODER), TARGETS["jetpack6"]) if "FLOAT8" in finding.reason] == [
        "error"
    ]
