"""Layer methods beside FastV: by hand, and against transformers' own attention."""

from __future__ import annotations

import warnings

import pytest
import torch

from edgeprune.errors import PlanError
from edgeprune.methods.base import LayerView
from edgeprune.methods.fitprune import FitPrune, attention_received
from edgeprune.methods.pyramiddrop import PyramidDrop
from edgeprune.methods.sparsevlm import SparseVLM, text_raters
from edgeprune.methods.vtw import VTW
from edgeprune.plan import Cut, Geometry

GEOMETRY = Geometry(32, 48, 16, 1)


def cut(method: str, keep: int) -> Cut:
    return Cut("layer", method, keep, layer=1)


def test_pyramiddrop_by_hand() -> None:
    rows = torch.tensor([[0.1, 0.3, 0.2], [0.3, 0.1, 0.3]])  # means .2, .2, .25
    view = LayerView(torch.arange(3), next_attention=lambda: rows)
    assert PyramidDrop(cut("pyramiddrop", 1), GEOMETRY).select(view, 1).tolist() == [2]


def test_text_raters_become_a_graph() -> None:
    # The exporter writes no maximum over "all" dimensions.
    class Raters(torch.nn.Module):
        def forward(self, visual: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
            return text_raters(visual, text)

    pair = (torch.eye(3), torch.ones(4, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.onnx.export(Raters(), pair, dynamo=True, opset_version=20, verbose=False) is not None


def test_text_raters_by_hand() -> None:
    # Both visual tokens lie along x: the first word resembles them, the second does not.
    visual, text = torch.tensor([[2.0, 0.0], [3.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert text_raters(visual, text).tolist() == [1.0, 0.0]


def test_sparsevlm_asks_the_raters_alone() -> None:
    visual, text = torch.tensor([[2.0, 0.0], [3.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    attention = torch.tensor([[[0.1, 0.4], [0.9, 0.0]]])  # one head: the rater looks at token 1, the other word at token 0
    view = LayerView(torch.arange(2), text_attention=lambda: attention, embeds=lambda: (visual, text))
    assert SparseVLM(cut("sparsevlm", 1), GEOMETRY).select(view, 1).tolist() == [1]


def test_fitprune_by_hand() -> None:
    # Head maxima of text: rows (.2, .5), (.4, .1), mean (.3, .3). Of visual tokens: (.6, .2), (.1, .7), sums (.7, .9).
    text = torch.tensor([[[0.2, 0.5], [0.1, 0.1]], [[0.1, 0.2], [0.4, 0.0]]])
    visual = torch.tensor([[[0.6, 0.1], [0.1, 0.7]], [[0.5, 0.2], [0.0, 0.3]]])
    view = LayerView(torch.arange(2), text_attention=lambda: text, visual_attention=lambda: visual)
    cross, within = attention_received(view)
    assert cross.tolist() == pytest.approx([0.3, 0.3])
    assert within.tolist() == pytest.approx([0.7, 0.9])
    assert FitPrune(cut("fitprune", 1), GEOMETRY).select(view, 1).tolist() == [1]


def test_vtw_keeps_nothing_and_says_so() -> None:
    assert VTW(cut("vtw", 0), GEOMETRY).select(LayerView(torch.arange(6)), 0).tolist() == []
    with pytest.raises(PlanError, match="cannot keep 3"):
        VTW(cut("vtw", 3), GEOMETRY)


@pytest.mark.parametrize("name", ["pyramiddrop", "sparsevlm", "fitprune"])
def test_no_image_breaks_nothing(name: str) -> None:
    from edgeprune.registry import method_class

    view = LayerView(
        torch.arange(0),
        text_attention=lambda: torch.zeros(2, 3, 0),
        visual_attention=lambda: torch.zeros(2, 0, 0),
        next_attention=lambda: torch.zeros(2, 0),
        embeds=lambda: (torch.zeros(0, 4), torch.ones(3, 4)),
    )
    assert method_class(name)(cut(name, 5), GEOMETRY).select(view, 5).tolist() == []
