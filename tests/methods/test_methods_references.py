"""Methods against slow references in plain numpy, and layer methods as graphs, with and without an image."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from edgeprune.errors import PlanError
from edgeprune.methods.base import InputView, LayerView
from edgeprune.plan import Cut, Geometry
from edgeprune.registry import method_class

GEOMETRY = Geometry(96, 80, 16, 1)  # 6 x 5
TOKENS = GEOMETRY.tokens
LAYER = ("fitprune", "pyramiddrop", "sparsevlm", "vtw")


def view(words: int = 6, seed: int = 0) -> InputView:
    generator = torch.Generator().manual_seed(seed)
    visual, prompt, keys = (torch.randn(n, 12, generator=generator) for n in (TOKENS, words, TOKENS))
    return InputView(visual, prompt, torch.rand(TOKENS, generator=generator), keys)


def kept(name: str, seen: InputView, keep: int, **options: Any) -> list[int]:
    chosen: torch.Tensor = method_class(name)(Cut("input", name, keep, options=options), GEOMETRY).select(seen, keep)
    return chosen.tolist()


def cosines(left: torch.Tensor, right: torch.Tensor) -> np.ndarray:
    rows, columns = left.double().numpy(), right.double().numpy()
    lengths = np.outer(np.linalg.norm(rows, axis=1), np.linalg.norm(columns, axis=1))
    similarity: np.ndarray = rows @ columns.T / lengths
    return similarity


def least_similar(similarity: np.ndarray, chosen: list[int], keep: int, block: int, reduce: str) -> list[int]:
    chosen = list(chosen)
    while len(chosen) < keep:
        others = [index for index in range(len(similarity)) if index not in chosen]
        to_set = {index: getattr(similarity[index, chosen], reduce)() for index in others}
        chosen += sorted(others, key=to_set.__getitem__)[: min(block, keep - len(chosen))]
    return sorted(chosen)


@pytest.mark.parametrize("relevance", ["pooled", "mean", "max"])
@pytest.mark.parametrize(("reduce", "block"), [("max", 1), ("mean", 1), ("max", 4), ("mean", 3)])
@pytest.mark.parametrize("keep", [2, 11, 29])
def test_zspaprune(relevance: str, reduce: str, block: int, keep: int) -> None:
    seen = view(seed=1)
    each = cosines(seen.visual, seen.prompt)
    scores = {"pooled": cosines(seen.visual, seen.prompt.mean(dim=0, keepdim=True))[:, 0], "mean": each.mean(1), "max": each.max(1)}
    core = np.argsort(-scores[relevance])[: max(1, round(0.4 * keep))].tolist()
    expected = least_similar(cosines(seen.visual, seen.visual), core, keep, block, reduce)
    assert kept("zspaprune", seen, keep, core=0.4, relevance=relevance, reduce=reduce, block=block) == expected


@pytest.mark.parametrize("keep", [1, 10, 29])
def test_divprune_in_blocks(keep: int) -> None:
    seen = view(seed=2)
    similarity = cosines(seen.visual, seen.visual)
    first = int((similarity - 9 * np.eye(TOKENS)).max(axis=1).argmin())
    assert kept("divprune", seen, keep, block=3) == least_similar(similarity, [first], keep, 3, "max")


@pytest.mark.parametrize("weight", [0.2, 0.5, 0.8, 1.0])  # with 0 all first picks tie, and rounding decides
@pytest.mark.parametrize("keep", [1, 5, 10])
def test_cdpruner(weight: float, keep: int) -> None:
    seen = view(seed=3)
    relevance = cosines(seen.visual, seen.prompt).mean(axis=1)
    relevance = (relevance - relevance.min() + 1e-6) / np.ptp(relevance)
    scale = relevance if weight == 1.0 else np.exp(weight / (2 * (1 - weight)) * relevance)
    kernel = scale[:, None] * cosines(seen.visual, seen.visual) * scale[None]
    chosen: list[int] = []
    for _ in range(keep):
        others = [index for index in range(TOKENS) if index not in chosen]
        chosen.append(max(others, key=lambda index: float(np.linalg.det(kernel[np.ix_([*chosen, index], [*chosen, index])]))))
    assert kept("cdpruner", seen, keep, weight=weight) == sorted(chosen)


def test_cdpruner_by_hand() -> None:
    # Tokens 0 and 1 are alike, 2 is at right angles to 0. The word points along x: relevance 1, .99, 0; with w = .5 the scale is
    # e^.5, about e^.5 and 1. First 0, then 2, since 1 adds no volume, however relevant. With w = 1 token 2 is worth nothing.
    seen = InputView(torch.tensor([[1.0, 0.0], [7.0, 1.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0]]))
    assert kept("cdpruner", seen, 2, weight=0.5) == [0, 2]
    assert kept("cdpruner", seen, 2) == [0, 1]


def test_divprune_by_hand() -> None:
    # Largest cosine to another: .8 for 0 and 1, .6 for 2, 0 for 3: 3 comes first. The cosines to it are 0, 0, -.8: then 2.
    # Similarity to {2, 3}: 0 for token 0, .6 for token 1: then 0.
    visual = torch.tensor([[1.0, 0.0, 0.0], [0.8, 0.6, 0.0], [0.0, 0.6, 0.8], [0.0, 0.0, -1.0]])
    seen = InputView(visual, torch.ones(1, 3))
    assert [kept("divprune", seen, keep) for keep in (1, 2, 3)] == [[3], [2, 3], [0, 2, 3]]


@pytest.mark.parametrize("words", [1, 3, 9])
@pytest.mark.parametrize("keep", [1, 3, 4, 7, 16, 29])
def test_dart(words: int, keep: int) -> None:
    seen = view(words, seed=4)
    order, ranked = (np.argsort(-rows.abs().sum(dim=1).numpy()).tolist() for rows in (seen.visual, seen.prompt))
    chosen = order[: min(4, keep)]
    pivots = torch.cat([seen.visual[chosen], seen.prompt[(ranked * 4)[:4]]])  # few words come again, the longest first
    left = keep - len(chosen)
    for index, row in enumerate(cosines(pivots, seen.visual)):
        quota = left // len(pivots) + (index < left % len(pivots))
        others = [token for token in range(TOKENS) if token not in chosen]
        chosen += sorted(others, key=row.__getitem__)[:quota]
    assert kept("dart", seen, keep) == sorted(chosen)


def test_dart_asks_different_words() -> None:
    # The visual pivot is 0, and each of three pivots adds one: least like 0 is 1. The words' norms are 3 and 2: least like the
    # first is 2. Left are 3 and 4: least like the second word is 3; the first one, asked again, would say 4.
    visual = torch.tensor([[0.0, 0.0, 9.0], [0.1, 0.1, -1.0], [-1.0, 0.2, 0.0], [0.5, -1.0, 0.1], [0.1, 0.9, 0.1]])
    prompt = torch.tensor([[0.0, 2.0, 0.0], [3.0, 0.0, 0.0]])
    seen = InputView(visual, prompt)
    assert kept("dart", seen, 4, image_pivots=1, text_pivots=2) == [0, 1, 2, 3]


@pytest.mark.parametrize("share", [0.0, 0.15, 0.5, 1.0])
@pytest.mark.parametrize("keep", [1, 2, 9, 20, 30])
def test_visionzip(share: float, keep: int) -> None:
    seen = view(seed=5)
    assert seen.attention is not None and seen.keys is not None
    contextual = min(int(share * keep), keep - 1)
    ranked = np.argsort(-seen.attention.numpy()).tolist()
    dominant, rest = ranked[: keep - contextual], sorted(ranked[keep - contextual :])
    targets = [rest[index * (len(rest) // contextual)] for index in range(contextual)]
    groups = {token: [token] for token in (*dominant, *targets)}
    likeness = cosines(seen.keys, seen.keys)
    for token in set(rest) - set(targets):
        if targets:
            groups[max(targets, key=lambda target: likeness[token, target])].append(token)
    zipped = method_class("visionzip")(Cut("input", "visionzip", keep, options={"contextual": share}), GEOMETRY)
    chosen = zipped.select(seen, keep)
    assert chosen.tolist() == sorted(groups)
    rows = seen.visual.numpy()
    merged = np.stack([rows[token] + (rows[more].mean(axis=0) if more else 0) for token, (_, *more) in sorted(groups.items())])
    assert np.allclose(zipped.merge(seen, chosen).numpy(), merged, atol=1e-5)


class Layered(torch.nn.Module):
    """A layer method over signals that are inputs."""

    def __init__(self, name: str, keep: int) -> None:
        super().__init__()
        self.method, self.keep = method_class(name)(Cut("layer", name, keep, layer=1), GEOMETRY), keep

    def forward(self, last: Any, text: Any, visual: Any, image: Any, words: Any) -> torch.Tensor:
        """Return the kept positions."""
        seen = LayerView(
            torch.arange(image.shape[0]),
            text_attention=lambda: text,
            visual_attention=lambda: visual,
            next_attention=lambda: last,
            embeds=lambda: (image, words),
        )
        chosen: torch.Tensor = self.method.select(seen, self.keep)
        return chosen


def signals(tokens: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((3, tokens), (3, 7, tokens), (3, tokens, tokens), (tokens, 12), (7, 12))
    return tuple(torch.rand(shape, generator=generator) for shape in shapes)


def layer_scores(name: str, seen: tuple[torch.Tensor, ...]) -> list[float]:
    last, text, visual, image, words = (rows.double().numpy() for rows in seen)
    heads, count, tokens = text.shape
    if name == "pyramiddrop":
        return [sum(last[head, token] for head in range(heads)) for token in range(tokens)]
    if name == "fitprune":
        cross = [sum(max(text[:, row, token]) for row in range(count)) / count for token in range(tokens)]
        return [cross[token] * sum(max(visual[:, row, token]) for row in range(tokens)) for token in range(tokens)]
    shares = np.exp(image @ words.T)
    resemblance = (shares / shares.sum(axis=1, keepdims=True)).sum(axis=0)
    raters = [row for row in range(count) if resemblance[row] > resemblance.mean()]
    return [float(np.mean([text[:, row, token].mean() for row in raters])) for token in range(tokens)]


@pytest.mark.parametrize("name", ["fitprune", "pyramiddrop", "sparsevlm"])
@pytest.mark.parametrize("keep", [1, 6, 29, 30, 40])
def test_layer_methods(name: str, keep: int) -> None:
    seen = signals(TOKENS, seed=6)
    best = np.argsort(-np.array(layer_scores(name, seen)))[:keep]
    assert Layered(name, keep)(*seen).tolist() == sorted(best.tolist())


@pytest.mark.parametrize("name", LAYER)
def test_layer_graphs_with_and_without_an_image(name: str, tmp_path: Path) -> None:
    keep = 0 if name == "vtw" else 5
    model, path = Layered(name, keep).eval(), tmp_path / "layer.onnx"
    tokens = torch.export.Dim("tokens", min=0, max=64)
    shapes = ({1: tokens}, {2: tokens}, {1: tokens, 2: tokens}, {0: tokens}, None)
    names = ["last", "text", "visual", "image", "words"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model, signals(9), dynamo=True, dynamic_shapes=shapes, input_names=names, opset_version=20, verbose=False
        )
    assert program is not None
    program.save(str(path))
    session = onnxruntime.InferenceSession(str(path))
    used = {entry.name for entry in session.get_inputs()}
    for count in (TOKENS, 3, 0):  # more than are kept, fewer, and a step without an image
        seen = signals(count, seed=count)
        feeds = {key: rows.numpy() for key, rows in zip(names, seen, strict=True) if key in used}
        (chosen,) = session.run(None, feeds)
        assert chosen.tolist() == model(*seen).tolist()
        assert len(chosen) == min(keep, count)


@pytest.mark.parametrize("name", LAYER)
def test_layer_methods_have_no_options(name: str) -> None:
    with pytest.raises(PlanError, match="unknown option"):
        method_class(name)(Cut("layer", name, 0, layer=1, options={"rate": 0.5}), GEOMETRY)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("zspaprune", {"core": "half"}),
        ("zspaprune", {"reduce": "sum"}),
        ("zspaprune", {"block": 1.5}),
        ("cdpruner", {"weight": -0.1}),
        ("dart", {"text_pivots": -1}),
        ("dart", {"image_pivots": True}),
        ("visionzip", {"contextual": 1.1}),
    ],
)
def test_wrong_settings_are_refused(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match=name):
        method_class(name)(Cut("input", name, 4, options=options), GEOMETRY)
