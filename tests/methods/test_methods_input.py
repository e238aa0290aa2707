"""Input methods: by hand, against plain loops over numbers, and the same set from the traced graph."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from learned_weights import input_cut

from edgeprune.errors import PlanError
from edgeprune.methods.base import InputView, add_most_different, cosine
from edgeprune.methods.cdpruner import greedy_map
from edgeprune.methods.visionzip import VisionZip
from edgeprune.methods.zspaprune import ZSPAPrune
from edgeprune.model import InputSelector
from edgeprune.plan import Cut, Geometry, View
from edgeprune.registry import METHODS, method_class

GEOMETRY = Geometry(80, 80, 16, 1)  # 5 x 5
VIDEO = Geometry(16, 80, 16, 1, tuple(View(0, 0, 16, 80, 1, 5, time=time) for time in range(5)), frames=10, fps=2.0)
GEOMETRIES = {"evs": VIDEO}
INPUT = sorted(name for name in METHODS if "input" in method_class(name).sites)
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in INPUT),
    ("zspaprune", {"core": 0.0}),
    ("zspaprune", {"core": 1.0, "relevance": "max"}),
    ("zspaprune", {"core": 0.2, "relevance": "mean", "reduce": "mean"}),
    ("zspaprune", {"core": 0.3, "block": 3}),
    ("divprune", {"block": 4}),
    ("cdpruner", {"weight": 0.2}),
    ("dart", {"image_pivots": 2, "text_pivots": 0}),
    ("visionzip", {"contextual": 0.5}),
    ("learned", {"merge": True}),
]


def view(words: int = 6, seed: int = 0) -> InputView:
    generator = torch.Generator().manual_seed(seed)
    visual, prompt, keys = (torch.randn(n, 12, generator=generator) for n in (25, words, 25))
    return InputView(visual, prompt, torch.rand(25, generator=generator), keys)


def method(name: str, keep: int = 9, **options: Any) -> Any:
    return method_class(name)(input_cut(name, keep, 12, **options), GEOMETRIES.get(name, GEOMETRY))


@pytest.mark.parametrize(("name", "options"), VARIANTS)
@pytest.mark.parametrize("keep", [1, 2, 9, 24, 25, 40])
def test_exactly_the_budget_is_kept_in_order(name: str, options: dict[str, Any], keep: int) -> None:
    if name == "evs" and keep < VIDEO.views[0].tokens:
        pytest.skip("EVS refuses to keep less than the first frame")
    kept = method(name, keep, **options).select(view(), keep).tolist()
    assert kept == sorted(set(kept))
    assert len(kept) == min(keep, 25)
    assert set(kept) <= set(range(25))


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_the_graph_keeps_the_same_tokens(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    selector = InputSelector(input_cut(name, 9, 12, **options), GEOMETRIES.get(name, GEOMETRY), view().visual.shape[1]).eval()
    seen = view()
    arguments = (seen.visual[None], seen.prompt[None], seen.attention, seen.keys)
    names = ["visual", "prompt", "attention", "keys"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shapes = (None, {1: torch.export.Dim("words", min=1, max=64)}, None, None)
        program = torch.onnx.export(
            selector, arguments, dynamo=True, dynamic_shapes=shapes, input_names=names, opset_version=20, verbose=False
        )
    assert program is not None
    program.save(str(tmp_path / "selector.onnx"))
    session = onnxruntime.InferenceSession(str(tmp_path / "selector.onnx"))
    for other in (view(3, seed=1), view(11, seed=2)):
        tensors = (other.visual[None], other.prompt[None], other.attention, other.keys)
        with torch.no_grad():
            embeds, kept = selector(*tensors)
        feeds = {
            n: t.numpy()
            for n, t in zip(names, tensors, strict=True)
            if t is not None and n in {i.name for i in session.get_inputs()}
        }
        outputs = session.run(None, feeds)
        assert outputs[1].tolist() == kept.tolist()
        assert np.allclose(outputs[0], embeds.numpy(), atol=1e-5)


def test_zspaprune_by_hand() -> None:
    # The prompt's mean points along x. Cosines to it: 1, .99, .71, 0, -1. Core of one: token 0. Least similar to {0}: 4 (-1); then
    # to {0, 4}, the larger of both: 1 -> .99, 2 -> .71, 3 -> 0.
    visual = torch.tensor([[1.0, 0.0], [7.0, 1.0], [1.0, 1.0], [0.0, 2.0], [-3.0, 0.0]])
    seen = InputView(visual, torch.tensor([[2.0, 1.0], [2.0, -1.0]]))
    assert method("zspaprune", core=0.34, norm=0.0).select(seen, 3).tolist() == [0, 3, 4]
    assert method("zspaprune", core=1.0).select(seen, 3).tolist() == [0, 1, 2]


@pytest.mark.parametrize("core", [0.0, 0.3, 0.5])
@pytest.mark.parametrize("keep", [3, 10, 17])
@pytest.mark.parametrize("norm", [0.0, 0.5, 2.0])
def test_zspaprune_against_a_plain_loop(core: float, keep: int, norm: float) -> None:
    seen = view(seed=4)
    weight = seen.visual.norm(dim=1).double().numpy() ** norm
    visual = (seen.visual / seen.visual.norm(dim=1, keepdim=True)).double().numpy()
    pooled = seen.prompt.mean(dim=0).double().numpy()
    relevance = visual @ pooled
    chosen = list(np.argsort(-relevance)[: max(1, round(core * keep))])
    while len(chosen) < keep:
        others = [index for index in range(25) if index not in chosen]
        different = {index: 1.001 - max(visual[index] @ visual[taken] for taken in chosen) for index in others}
        chosen.append(max(others, key=lambda index: weight[index] * different[index]))
    assert method("zspaprune", core=core, norm=norm).select(seen, keep).tolist() == sorted(chosen)


@pytest.mark.parametrize("scale", [1e-6, 1e15])
def test_norms_of_any_size_weigh_alike(scale: float) -> None:
    seen = view(seed=6)
    scaled = InputView(seen.visual * scale, seen.prompt)
    assert method("zspaprune").select(scaled, 9).tolist() == method("zspaprune").select(seen, 9).tolist()


@pytest.mark.parametrize("value", [0.0, 1.0, 1e30])
def test_tokens_that_are_all_alike_are_kept_once_each(value: float) -> None:
    seen = InputView(torch.full((25, 12), value), view().prompt)
    assert len(set(method("zspaprune").select(seen, 9).tolist())) == 9


@pytest.mark.parametrize("keep", [1, 6, 15])
def test_divprune_against_a_plain_loop(keep: int) -> None:
    seen = view(seed=5)
    visual = (seen.visual / seen.visual.norm(dim=1, keepdim=True)).double().numpy()
    distance = 1 - visual @ visual.T
    np.fill_diagonal(distance, np.inf)
    chosen = [int(distance.min(axis=1).argmax())]
    while len(chosen) < keep:
        others = [index for index in range(25) if index not in chosen]
        chosen.append(max(others, key=lambda index: min(distance[index, taken] for taken in chosen)))
    assert method("divprune").select(seen, keep).tolist() == sorted(chosen)


@pytest.mark.parametrize("count", [2, 5])
def test_the_greedy_dpp_adds_the_most_volume_each_time(count: int) -> None:
    rows = torch.randn(8, 8, generator=torch.Generator().manual_seed(2)).double()
    kernel = rows @ rows.T
    chosen: list[int] = []
    for _ in range(count):
        others = [index for index in range(8) if index not in chosen]
        chosen.append(max(others, key=lambda index: float(torch.linalg.det(kernel[[*chosen, index]][:, [*chosen, index]]))))
    assert greedy_map(kernel, torch.ones(8).double(), torch.zeros(8), count).tolist() == chosen


def test_dart_by_hand() -> None:
    # L1 norms 3, 1, 1, 1, 1: the visual pivot is 0; the word is the other pivot. Two more tokens: the least like token 0 is 3,
    # and of
    # the rest the least like the word (0, 1) is 4.
    visual = torch.tensor([[3.0, 0.0], [1.0, 0.0], [0.9, 0.1], [-1.0, 0.0], [0.5, -0.5]])
    seen = InputView(visual, torch.tensor([[0.0, 1.0]]))
    assert method("dart", image_pivots=1, text_pivots=1).select(seen, 3).tolist() == [0, 3, 4]


def test_visionzip_by_hand() -> None:
    # Keep 3 of 6, one of them contextual: dominant are 1 and 4. Of 0, 2, 3, 5 the first is the target; all others are merged
    # into it.
    visual = torch.arange(6.0)[:, None].repeat(1, 2)
    seen = InputView(visual, torch.ones(1, 2), torch.tensor([0.1, 0.9, 0.2, 0.1, 0.8, 0.3]), torch.ones(6, 2))
    zipped = VisionZip(Cut("input", "visionzip", 3, options={"contextual": 0.4}), GEOMETRY)
    chosen = zipped.select(seen, 3)
    assert chosen.tolist() == [0, 1, 4]
    assert zipped.merge(seen, chosen)[:, 0].tolist() == pytest.approx([0 + (2 + 3 + 5) / 3, 1.0, 4.0])


def test_visionzip_merges_before_the_projector() -> None:
    # As above: the target 0 of features 0 gets the mean of 2, 3 and 5, and then becomes a token of its own.
    features = torch.arange(6.0)[:, None]
    attention, keys = torch.tensor([0.1, 0.9, 0.2, 0.1, 0.8, 0.3]), torch.ones(6, 2)
    projected = InputView(features.square(), torch.ones(1, 1), attention, keys, features, torch.square)
    zipped = VisionZip(Cut("input", "visionzip", 3, options={"contextual": 0.4}), GEOMETRY)
    assert zipped.merge(projected, torch.tensor([0, 1, 4]))[:, 0].tolist() == pytest.approx([(10 / 3) ** 2, 1.0, 16.0])


def test_a_larger_block_takes_several_at_once() -> None:
    similarity = cosine(view().visual, view().visual)
    first = torch.tensor([0])
    best = (similarity[0] + 4.0 * torch.nn.functional.one_hot(first, 25)[0]).topk(4, largest=False).indices
    assert add_most_different(similarity, first, 4, block=4).tolist() == [0, *best.tolist()]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("zspaprune", {"core": 1.5}),
        ("zspaprune", {"block": 0}),
        ("zspaprune", {"relevance": "clip"}),
        ("divprune", {"block": 0}),
        ("cdpruner", {"weight": 1.1}),
        ("dart", {"image_pivots": 0}),
        ("visionzip", {"contextual": -0.1}),
        ("divprune", {"core": 0.5}),
    ],
)
def test_settings_out_of_range_are_refused(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(PlanError):
        method(name, **options)


def test_relevance_of_single_words() -> None:
    visual = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    seen = InputView(visual, torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    scores = {
        kind: ZSPAPrune(Cut("input", "zspaprune", 1, options={"relevance": kind}), GEOMETRY).relevance(seen)
        for kind in ("mean", "max")
    }
    assert scores["max"].tolist() == pytest.approx([1.0, 1.0, 0.5**0.5])
    assert scores["mean"].tolist() == pytest.approx([0.5, 0.5, 0.5**0.5])
