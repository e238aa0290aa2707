"""The gated delta rule as ONNX, against the eager one, for every target's form and many lengths."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn

from edgeprune.export.passes.recurrence import expand_delta_rules
from edgeprune.export.tracing import _Graph, traced
from edgeprune.families.recurrent import CHUNK, gated_delta_rule
from edgeprune.lint.check import lint
from edgeprune.targets import TARGETS

HEADS, KEYS, VALUES = 3, 8, 12
NAMES = ["query", "key", "value", "decay", "beta", "state"]


class Rule(nn.Module):
    def forward(self, *given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return gated_delta_rule(*given)


def given(length: int) -> list[torch.Tensor]:
    torch.manual_seed(length)
    query, key = (nn.functional.normalize(torch.randn(length, HEADS, KEYS), dim=-1) for _ in range(2))
    decay, beta = -torch.rand(length, HEADS), torch.rand(length, HEADS)
    return [query * KEYS**-0.5, key, torch.randn(length, HEADS, VALUES), decay, beta, torch.randn(HEADS, KEYS, VALUES)]


@pytest.fixture(scope="module", params=[False, True], ids=["chunks", "chunks or one token"])
def graph(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    length = torch.export.Dim("length", min=1, max=1 << 15)
    shapes = ({0: length},) * 5 + (None,)
    model = traced(_Graph(Rule(), tuple(given(37)), (shapes,), NAMES, ["output", "after"]), 20)
    expand_delta_rules(model.graph, single=request.param)
    path = tmp_path_factory.mktemp("rule") / "rule.onnx"
    ir.save(model, path)
    onnx.checker.check_model(str(path), full_check=True)
    return path


@pytest.mark.parametrize("length", [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 333])
def test_the_graph_equals_the_eager_rule(graph: Path, length: int) -> None:
    session, values = onnxruntime.InferenceSession(graph), given(length)
    feeds = {name: value.numpy() for name, value in zip(NAMES, values, strict=True)}
    for actual, expected in zip(session.run(None, feeds), gated_delta_rule(*values), strict=True):
        np.testing.assert_allclose(actual, expected.numpy(), atol=2e-6, rtol=1e-4)


def test_its_operators_are_those_of_every_target(graph: Path) -> None:
    operators = {node.op_type for node in onnx.load(graph).graph.node}
    if "If" not in operators:  # the form for TensorRT
        assert (
            "Scan" in operators and [finding for finding in lint(graph, TARGETS["jetpack6"]) if finding.severity == "error"] == []
        )
