"""EVS: by hand, against a plain loop, refused for images, and the same tokens from the traced graph."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from edgeprune.errors import PlanError
from edgeprune.export.tracing import trace_selector
from edgeprune.lint.check import lint
from edgeprune.methods.base import InputView
from edgeprune.methods.evs import EVS
from edgeprune.model import InputSelector
from edgeprune.plan import Cut, Geometry, View
from edgeprune.plan.presets import unpruned_plan
from edgeprune.runtime.backends.tensorrt.trial import substitute_capability, try_build
from edgeprune.targets import TARGETS, Lowering

HIDDEN = 12


def clip(frames: int, rows: int, columns: int) -> Geometry:
    views = tuple(View(0, 0, 16 * rows, 16 * columns, rows, columns, time=time) for time in range(frames))
    return Geometry(16 * rows, 16 * columns, 16, 1, views, frames=2 * frames, fps=2.0)


def kept(visual: torch.Tensor, geometry: Geometry, keep: int) -> list[int]:
    cut = Cut("input", "evs", keep)
    chosen: list[int] = EVS(cut, geometry).select(InputView(visual, visual[:1]), keep).tolist()
    return chosen


def test_by_hand() -> None:
    # Two tokens a frame. The first stays, turns back, and stays turned; the second turns by a right angle, and by none.
    first = [[1.0, 0.0], [2.0, 0.0], [-1.0, 0.0]]
    second = [[1.0, 0.0], [0.0, 3.0], [0.0, 1.0]]
    visual = torch.tensor([token for frame in zip(first, second, strict=True) for token in frame])
    geometry = clip(3, 1, 2)
    scores = EVS(Cut("input", "evs", 2), geometry).score(InputView(visual, visual[:1]))
    assert scores[2:].tolist() == pytest.approx([0.0, 1.0, 2.0, 0.0])
    assert kept(visual, geometry, 2) == [0, 1]
    assert kept(visual, geometry, 3) == [0, 1, 4]
    assert kept(visual, geometry, 4) == [0, 1, 3, 4]


@pytest.mark.parametrize("keep", [6, 7, 15, 24])
def test_against_a_plain_loop(keep: int) -> None:
    visual = np.random.default_rng(2).standard_normal((24, HIDDEN))
    unit = visual / np.linalg.norm(visual, axis=1, keepdims=True)
    likeness = {token: float(unit[token] @ unit[token - 6]) for token in range(6, 24)}
    changed = sorted(likeness, key=lambda token: likeness[token])[: keep - 6]
    assert kept(torch.from_numpy(visual), clip(4, 2, 3), keep) == sorted([*range(6), *changed])


@pytest.mark.parametrize(
    ("geometry", "keep", "reason"),
    [
        (Geometry(48, 32, 16, 1), 6, "needs a video"),
        (clip(1, 2, 3), 6, "needs a video of two frames"),
        (clip(2, 2, 3), 5, "first frame whole: 6 tokens or more, not 5"),
        (Geometry(32, 48, 16, 1, (View(0, 0, 32, 48, 2, 3), View(0, 0, 32, 32, 2, 2)), 4, 2.0), 6, "equal grids"),
        (Geometry(32, 48, 16, 1, (View(0, 0, 32, 24, 2, 3), View(0, 24, 32, 24, 2, 3))), 6, "needs a video"),
    ],
)
def test_what_is_no_video_is_refused(geometry: Geometry, keep: int, reason: str) -> None:
    with pytest.raises(PlanError, match=reason):
        EVS(Cut("input", "evs", keep), geometry)


def test_it_has_no_options() -> None:
    with pytest.raises(PlanError, match="no options"):
        EVS(Cut("input", "evs", 6, options={"threshold": 0.5}), clip(2, 2, 3))


@pytest.mark.parametrize("target", ["onnxruntime", "jetpack6", "jetpack7.2"])
@pytest.mark.parametrize("planes", [0, 2])
def test_the_graph_keeps_the_same_tokens(target: str, planes: int, tmp_path: Path) -> None:
    geometry, path = clip(3, 2, 3), tmp_path / "selector.onnx"
    plan = unpruned_plan("qwen3_vl", 2, geometry).with_cuts(Cut("input", "evs", 9))
    parts: Any = SimpleNamespace(hidden=HIDDEN, planes=planes)
    lowering = Lowering(TARGETS[target], "fp32")
    trace_selector(parts, plan, {}, lowering, path)
    visual, prompt = torch.randn(1, 18, HIDDEN * (1 + planes)), torch.randn(1, 4, HIDDEN * (1 + planes))
    session = onnxruntime.InferenceSession(path)
    embeds, chosen = session.run(None, {"visual_embeds": visual.numpy()})
    assert plan.input is not None
    expected, order = InputSelector(plan.input, geometry, HIDDEN)(visual, prompt)
    assert chosen.tolist() == order.tolist()
    assert order.tolist()[:6] == [0, 1, 2, 3, 4, 5]
    assert np.allclose(embeds, expected.numpy(), atol=1e-6)
    if lowering.target.tensorrt is not None:
        profile: Any = {}  # EVS never asks what was asked: the one input left is of constant shape
        assert [finding for finding in lint(path, lowering.target, [profile]) if finding.severity == "error"] == []
        pytest.importorskip("tensorrt_rtx")
        assert try_build(path, "selector", [profile], substitute_capability(lowering.target)).error == ""
