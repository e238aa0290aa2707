"""SmoothQuant's formulas, by hand and against sums over drawn numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from edgeprune.checkpoint.weights import InMemoryMatrix
from edgeprune.export.passes.weights import SmoothedMatrix
from edgeprune.model.smoothquant import (
    InputRange,
    Rounding,
    input_scale,
    load_roundings,
    save_roundings,
    smoothing_factors,
)


def test_factors_by_hand() -> None:
    # smooth_ln_fcs of mit-han-lab/smoothquant for a norm and two layers of these inputs: max|W_j| is that of both layers.
    first, second = torch.tensor([[1.0, -0.5, 0.25, 0.0, 2.0]]), torch.tensor([[0.5, 4.0, -0.25, 0.0, -1.0]])
    inputs, weights = torch.tensor([4.0, 1.0, 0.25, 0.001, 0.0]), torch.cat([first, second]).abs().amax(dim=0)
    found = smoothing_factors(inputs, weights, 0.5)
    # sqrt(4 / 1), sqrt(1 / 4), sqrt(0.25 / 0.25), weights of zeros count as 1e-5, and inputs of zeros have 1e-5
    assert torch.allclose(found, torch.tensor([2.0, 0.5, 1.0, 10.0, 1e-5]))
    # 4^0.75 / 1, 1 / 4^0.25, 0.25^0.75 / 0.25^0.25
    assert torch.allclose(smoothing_factors(inputs, weights, 0.75)[:3], torch.tensor([2.8284271, 0.7071068, 0.5]))
    assert torch.allclose(smoothing_factors(inputs, weights, 1.0)[:3], inputs[:3])


def test_smoothing_moves_the_outlier_and_keeps_the_product() -> None:
    torch.manual_seed(0)
    states, weight = torch.randn(200, 16) * torch.tensor([100.0] + [1.0] * 15), torch.randn(8, 16)
    expected, inputs = states @ weight.T, InputRange.of(states)
    assert inputs.rows == 200 and torch.equal(inputs.largest, states.abs().amax(dim=0))
    factors = smoothing_factors(inputs.largest, weight.abs().amax(dim=0), 0.5)
    assert torch.allclose((states / factors) @ (weight * factors).T, expected, rtol=1e-3, atol=1e-3)
    plain = Rounding(torch.ones(16), input_scale(float(inputs.largest.max())))
    smooth = Rounding(factors, input_scale(float((inputs.largest / factors).max())))
    assert smooth.smooths and not plain.smooths
    # Without the outlier's own products, which hide the errors of the others.
    others = weight.clone()
    others[:, 0] = 0
    losses = [
        float((each.inputs(states) @ each.weights(others).T - states @ others.T).norm() / (states @ others.T).norm())
        for each in (plain, smooth)
    ]
    assert losses[0] > 0.5 and losses[1] < 0.1


def test_the_expected_error_is_about_what_is_lost() -> None:
    torch.manual_seed(1)
    states, weight = torch.randn(500, 64), torch.randn(32, 64)
    inputs, products = InputRange.of(states[:250]) | InputRange.of(states[250:]), states @ weight.T
    factors = smoothing_factors(inputs.largest, weight.abs().amax(dim=0), 0.5)
    rounding = Rounding(factors, input_scale(float((inputs.largest / factors).max())))
    scaled = rounding.weights(weight)
    steps = scaled.abs().amax(dim=1, keepdim=True) / 127
    actual = rounding.inputs(states) @ ((scaled / steps).round() * steps).T
    lost = float((actual - products).norm() / products.norm())
    assert rounding.error(weight, inputs, float(products.square().sum())) == pytest.approx(lost, rel=0.05)
    assert rounding.error(weight, inputs, 0.0) == 0.0


def test_inputs_are_rounded_to_steps_by_hand() -> None:
    rounding = Rounding(torch.tensor([2.0, 1.0]), 0.5)
    # 3 / 2 / 0.5 = 3, 0.75 / 0.5 = 1.5 to even, and -100 is beyond the 256 steps
    assert rounding.inputs(torch.tensor([[3.0, 0.75], [1.0, -100.0]])).tolist() == [[1.5, 1.0], [0.5, -64.0]]
    assert rounding.weights(torch.tensor([[3.0, 5.0]])).tolist() == [[6.0, 5.0]]
    assert input_scale(254.0) == 2.0
    assert input_scale(0.0) == 2.0**-24  # inputs that were all zeros
    assert input_scale(1.0) == float(torch.tensor(1 / 127, dtype=torch.float16))
    assert InputRange.of(torch.zeros(0, 3)).largest.tolist() == [0, 0, 0]


def test_matrices_are_scaled_where_they_are_read() -> None:
    weight, factors = torch.arange(12.0).view(4, 3), torch.tensor([1.0, 2.0, 4.0])
    smooth = SmoothedMatrix(InMemoryMatrix(weight), Rounding(factors, 1.0))
    assert smooth.shape == (4, 3)
    assert torch.equal(smooth.rows(1, 3), weight[1:3] * factors)


def test_roundings_are_read_as_they_were_written(tmp_path: Path) -> None:
    roundings = {"decoder.layers.0.mlp.down_proj": Rounding(torch.tensor([0.1, 3.0]), 0.015625)}
    roundings["vision.patch"] = Rounding(torch.ones(1), 2.0)
    save_roundings(roundings, tmp_path / "roundings.safetensors")
    found = load_roundings(tmp_path / "roundings.safetensors")
    assert found.keys() == roundings.keys()
    for name, each in roundings.items():
        assert torch.equal(found[name].factors, each.factors) and found[name].scale == each.scale
