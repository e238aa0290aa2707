"""The quick exporter against torch's own: the same computation, and the exporter's own way for whatever it does not know."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from plans import PLANS
from torch import nn

from edgeprune.checkpoint.loading import LoadedModel
from edgeprune.export import tracing
from edgeprune.export.torch_exporter import quick_exporter
from edgeprune.export.tracing import trace_decoder
from edgeprune.targets import PLAIN

# What computes on tensors. Lengths may be computed in another way: by fewer additions, or from the shape of another tensor.
COMPUTING = ("Cast", "Einsum", "Gather", "GatherElements", "Gemm", "MatMul", "ReduceMax", "ReduceMean", "Softmax", "TopK", "Where")


class Casting(nn.Module):
    """Casts that change nothing, one that does, and a number minus a tensor."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [n, 3]."""
        y: torch.Tensor = 1 - x.to(torch.float32).to(x.device)
        return y + (x > 0).to(x.dtype)


class Writing(nn.Module):
    """Writes to what it was given, which only the exporter's own decomposition undoes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [n, 3]."""
        y = x.clone()
        y[:, 0] = 7
        return y.add_(1)


class Promoting(nn.Module):
    """Mixes types and numbers, part of it under `torch.no_grad`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [n, 3]."""
        with torch.no_grad():
            order = torch.arange(x.shape[0])[:, None] + 0.5
        y: torch.Tensor = x * order + (x > 0) * 2 - x.round().long() / 3 + x.shape[0]
        return y


class Unknown(nn.Module):
    """Has an operator that ONNX lacks."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [n, 3]."""
        entropy: torch.Tensor = torch.special.entr(x.abs())
        return entropy


def run(module: nn.Module, x: np.ndarray, *, quick: bool) -> tuple[np.ndarray, Counter[str]]:
    with quick_exporter() if quick else torch.no_grad():
        program: Any = torch.onnx.export(
            module.eval(),
            (torch.from_numpy(x),),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("n")},),
            verbose=False,
            optimize=False,
        )
    session = ort.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x})
    return np.asarray(found), Counter(node.op_type for node in program.model.graph)


@pytest.mark.parametrize("module", [Casting(), Writing(), Promoting(), Unknown()], ids=lambda module: type(module).__name__)
@pytest.mark.filterwarnings("ignore")
def test_the_result_is_torchs(module: nn.Module) -> None:
    x = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
    found, operators = run(module, x, quick=True)
    expected, theirs = run(module, x, quick=False)
    assert np.array_equal(found, expected)
    np.testing.assert_allclose(found, module(torch.from_numpy(x)).numpy(), rtol=1e-6)
    assert isinstance(module, Casting) or operators == theirs


@pytest.mark.usefixtures("fresh_traces")
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("plan", ["everything", "input, layers"])
def test_a_decoder_computes_the_same(plan: str, tiny: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts, records = [], []
    for name in ("quick", "torch"):
        if name == "torch":
            monkeypatch.setattr(tracing, "quick_exporter", torch.no_grad)
        records.append(trace_decoder(tiny.family.decoder(), 3, PLANS[plan], PLAIN, tmp_path / f"{name}.onnx"))
        graph = ir.load(tmp_path / f"{name}.onnx").graph
        counts.append({operator: sum(node.op_type == operator for node in graph) for operator in COMPUTING})
    assert counts[0] == counts[1]
    assert records[0] == records[1]
