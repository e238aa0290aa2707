"""Every method keeps exactly as many different tokens as it is told, whatever the numbers are."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from learned_weights import input_cut

from edgeprune.methods.base import InputView, LayerView
from edgeprune.methods.cdpruner import greedy_map
from edgeprune.model import InputSelector
from edgeprune.plan import Cut, Geometry, View
from edgeprune.registry import METHODS, method_class

TOKENS, WORDS, WIDTH = 20, 5, 6  # more tokens than features
SQUARE = Geometry(64, 80, 16, 1)
VIDEO = Geometry(16, 80, 16, 1, tuple(View(0, 0, 16, 80, 1, 5, time=time) for time in range(4)), frames=8, fps=2.0)
INPUT = sorted(name for name in METHODS if "input" in method_class(name).sites)
LAYER = sorted(name for name in METHODS if "layer" in method_class(name).sites and name != "vtw")
CACHE = sorted(name for name in METHODS if "cache" in method_class(name).sites)
KINDS = ("gaussian", "rank 1", "equal", "zero", "huge", "tiny", "mixed", "infinite", "not a number")


def numbers(kind: str, seed: int, *shape: int) -> torch.Tensor:
    """Return numbers of a kind: the last axis is that of features."""
    generator = torch.Generator().manual_seed(seed)
    plain = torch.randn(*shape, generator=generator)
    made = {
        "rank 1": plain[..., :1] * plain.flatten()[: shape[-1]],
        "equal": torch.ones(shape),
        "zero": torch.zeros(shape),
        "huge": plain * 1e30,
        "tiny": plain * 1e-30,
        "mixed": plain * torch.logspace(-30, 30, shape[0]).view(-1, *[1] * (len(shape) - 1)),
        "infinite": torch.where(plain > 0.5, float("inf"), plain),
        "not a number": torch.where(plain > 0.5, float("nan"), plain),
    }
    return made.get(kind, plain)


def geometry(name: str) -> Geometry:
    return VIDEO if name == "evs" else SQUARE


def input_view(kind: str, seed: int) -> InputView:
    visual, prompt, keys = (numbers(kind, seed + n, rows, WIDTH) for n, rows in enumerate((TOKENS, WORDS, TOKENS)))
    return InputView(visual, prompt, numbers(kind, seed + 3, TOKENS, 1)[:, 0], keys)


def layer_view(kind: str, seed: int) -> LayerView:
    # Attention is positive, but it may be anything else.
    shapes = ((4, TOKENS), (4, WORDS, TOKENS), (4, TOKENS, TOKENS), (TOKENS, WIDTH), (WORDS, WIDTH))
    last, text, visual, image, words = (numbers(kind, seed + n, *shape).abs() for n, shape in enumerate(shapes))
    return LayerView(
        torch.arange(TOKENS),
        kv_heads=2,
        attention=lambda: last,
        text_attention=lambda: text,
        visual_attention=lambda: visual,
        next_attention=lambda: last,
        embeds=lambda: (image, words),
    )


def check(chosen: torch.Tensor, keep: int) -> None:
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert len(chosen) == keep and int(chosen.min()) >= 0 and int(chosen.max()) < TOKENS


@pytest.mark.parametrize("name", INPUT)
@given(kind=st.sampled_from(KINDS), seed=st.integers(0, 1000), keep=st.integers(5, TOKENS))
@settings(max_examples=60, deadline=None)
def test_input_methods(name: str, kind: str, seed: int, keep: int) -> None:
    check(method_class(name)(input_cut(name, keep, WIDTH), geometry(name)).select(input_view(kind, seed), keep), keep)


@pytest.mark.parametrize("weight", [0.0, 0.5, 0.98, 0.999, 1.0])
@given(kind=st.sampled_from(KINDS), seed=st.integers(0, 1000), keep=st.integers(1, TOKENS))
@settings(max_examples=40, deadline=None)
def test_cdpruner_at_every_weight(weight: float, kind: str, seed: int, keep: int) -> None:
    method = method_class("cdpruner")(Cut("input", "cdpruner", keep, options={"weight": weight}), SQUARE)
    check(method.select(input_view(kind, seed), keep), keep)


@pytest.mark.parametrize("name", LAYER)
@given(kind=st.sampled_from(KINDS), seed=st.integers(0, 1000), keep=st.integers(1, TOKENS))
@settings(max_examples=40, deadline=None)
def test_layer_methods(name: str, kind: str, seed: int, keep: int) -> None:
    check(method_class(name)(Cut("layer", name, keep, layer=1), SQUARE).select(layer_view(kind, seed), keep), keep)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", INPUT)
def test_the_graph_too(name: str, kind: str, selectors: dict[str, Any]) -> None:
    session, view = selectors[name], input_view(kind, 7)
    given = {"visual": view.visual[None], "prompt": view.prompt[None], "attention": view.attention, "keys": view.keys}
    wanted = {entry.name for entry in session.get_inputs()}
    _, kept = session.run(None, {key: rows.numpy() for key, rows in given.items() if rows is not None and key in wanted})
    check(torch.from_numpy(kept), 15)


@pytest.fixture(scope="module")
def selectors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {name: traced(name, tmp_path_factory.mktemp("graph") / "selector.onnx") for name in INPUT}


def traced(name: str, path: Path) -> Any:
    view, names = input_view("gaussian", 0), ["visual", "prompt", "attention", "keys"]
    selector = InputSelector(input_cut(name, 15, WIDTH), geometry(name), WIDTH).eval()
    arguments = (view.visual[None], view.prompt[None], view.attention, view.keys)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(selector, arguments, dynamo=True, input_names=names, opset_version=20, verbose=False)
    assert program is not None
    program.save(str(path))
    return onnxruntime.InferenceSession(str(path))


def test_what_is_spanned_is_filled_by_relevance() -> None:
    # Three directions among nine tokens: after one of each the most relevant of the rest follow.
    rows = torch.eye(3).repeat(3, 1)
    relevance = torch.tensor([0.9, 0.8, 0.7, 0.1, 0.5, 0.2, 0.6, 0.3, 0.4])
    assert greedy_map(rows @ rows.T, relevance, relevance, 9).tolist() == [0, 1, 2, 6, 4, 8, 7, 5, 3]


def test_a_search_without_a_mask_would_be_noticed() -> None:
    # The rule of before, where the exponential of a large weight overflows: gains are no numbers, and one token comes every time.
    rows = torch.nn.functional.normalize(torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(0)), dim=1)
    scale = torch.exp(100 * torch.linspace(0, 1, TOKENS))
    kernel = scale[:, None] * (rows @ rows.T) * scale
    gain, factors, picked = kernel.diagonal(), torch.zeros(1, TOKENS), []
    for _ in range(TOKENS):
        best = int(torch.topk(gain, 1).indices)
        picked.append(best)
        row = kernel[best] - factors[:, best] @ factors
        factor = row / gain[best].clamp_min(1e-6).sqrt()
        factors, gain = torch.cat([factors, factor[None]]), gain - factor.square()
        gain[best] = float("-inf")
    assert len(set(picked)) < TOKENS
    assert len(set(greedy_map(rows @ rows.T, scale / scale.max(), torch.linspace(0, 1, TOKENS), TOKENS).tolist())) == TOKENS
