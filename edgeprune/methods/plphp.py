"""PLPHP: prune the visual KV cache, with a budget per layer by its attention to vision and separate tokens per head.

Meng et al., "PLPHP: Per-Layer Per-Head Vision Token Pruning for Efficient Large Vision-Language Models", arXiv 2502.14504. By its
vision attention score a layer is attentive (alpha or more), balanced or indifferent (below beta), and keeps r + delta, r or r -
delta of its visual cache. Each head of a layer keeps its own tokens.

Made static: with classes = "frozen" the class of each layer comes from a calibration set, and its cache is as long as its class.
With classes = "live" every input picks the classes, as in the paper: all caches hold what an attentive layer keeps, and since
tokens are in descending order of score, a layer of another class reads a prefix. Prefill does not change, the cache shrinks.

Reconstruction: no formula, threshold or rate of the paper was available to us. The vision attention score is the last prompt
token's share of attention to visual tokens, averaged over heads. Tokens are ranked by that token's attention (rows = "last").
alpha and beta are quantiles of the layers' mean scores. Query heads that share a KV head, which the paper does not cover, are
averaged (reduce = "mean") or the highest counts ("max"). Our additions, since the last prompt token does not predict what a long
answer will need: rows = "text" averages over every token of the instruction; rows = "peak" alternates a token's highest attention
from any of them with its highest from any visual token; rows = "learned" takes the attention that the answer will give, as
calibration learned to predict it (`edgeprune.methods.ranking`); spread also alternates with an even lattice, shifted from head to
head; prior alternates with the order in which the answers of a calibration set attended to the image (one list of all tokens per
KV head).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch

from edgeprune.errors import PlanError
from edgeprune.methods.base import LayerView, in_turns
from edgeprune.methods.ranking import Ranking, grouped
from edgeprune.methods.uniform import earliness, ranked
from edgeprune.plan import CLASSES, Cut, Geometry, Option


class PLPHP:
    """Rank the visual tokens of each KV head by the attention of the last prompt token; at site "decode", read by classes."""

    sites: ClassVar[tuple[str, ...]] = ("cache", "decode")
    needs: ClassVar[tuple[str, ...]] = ()
    options: ClassVar[tuple[Option, ...]] = (
        Option(
            "rows",
            "last",
            "whose attention ranks: the last prompt token's, all the text's, peaks of text and image, or the answer's as learned",
            ("last", "text", "peak", "learned"),
        ),
        Option("reduce", "mean", "how query heads that share a KV head count: by their mean or their maximum", ("mean", "max")),
        Option("spread", False, "rank also by an even lattice, shifted from head to head"),
    )
    calibration_options: ClassVar[tuple[Option, ...]] = (
        Option(
            "allocate",
            "classes",
            "the paper's classes, the least cost by measured divergence, or the same for all layers",
            ("classes", "least-cost", "even"),
        ),
        Option("classes", "frozen", "whether calibration or every input picks a layer's class", ("frozen", "live")),
        Option(
            "r", None, "retention rate of balanced layers", least=0.0, most=1.0, kind="float", unset="so that --budget is the mean"
        ),
        Option(
            "delta",
            None,
            "by how much the other classes differ from r",
            least=0.0,
            most=1.0,
            kind="float",
            unset="half of r or 1 - r",
        ),
        Option("alpha", None, "score from which a layer is attentive", least=0.0, most=1.0, kind="float", unset="upper quartile"),
        Option("beta", None, "score below which a layer is indifferent", least=0.0, most=1.0, kind="float", unset="lower quartile"),
        Option("prior", False, "rank also by where the samples' answers looked"),
    )

    def __init__(self, cut: Cut, geometry: Geometry) -> None:
        if cut.site == "decode":
            _check_classes(cut)
            cut = replace(cut, options={})  # it ranks nothing
        settings = cut.settings(*self.options, prior=[])
        self._reduce, self._rows, self._spread = settings["reduce"], settings["rows"], settings["spread"]
        self._geometry = geometry
        if cut.weights is not None and self._rows != "learned":
            raise PlanError(f"{cut} names weights, which its rows = {self._rows} does not use.")
        self._ranking = Ranking(cut, geometry) if self._rows == "learned" else None
        self.header: dict[str, Any] = {} if self._ranking is None else self._ranking.header
        if any(sorted(order) != list(range(geometry.tokens)) for order in settings["prior"]):
            raise PlanError(f"The prior of {cut} must list every visual token once for each KV head.")
        # The argsort of an order is each token's rank in it.
        self._prior = torch.tensor(settings["prior"], dtype=torch.int64).argsort(dim=-1).neg().float()

    @property
    def width(self) -> int:
        """The width of the values that a learned ranking is for, over all KV heads."""
        return 0 if self._ranking is None else self._ranking.width

    def width_in(self, parts: Any) -> int:
        """Return the width of the values in a model."""
        return int(parts.kv_heads * parts.head_dim)

    def score_heads(self, view: LayerView) -> torch.Tensor:
        """Return a score per KV head and visual token [kv heads, V], the highest for the token to keep first."""
        if self._ranking is not None:
            rankings = [self._ranking.scores(view, self._reduce)]
        else:
            rankings = [grouped(rows, view.kv_heads, self._reduce) for rows in self._attention(view)]
        if self._spread:
            rankings.append(self._lattice(view))
        if len(self._prior):
            rankings.append(self._prior.to(view.order.device).index_select(1, view.order))
        return rankings[0] if len(rankings) == 1 else in_turns(rankings)

    def _attention(self, view: LayerView) -> list[torch.Tensor]:
        if self._rows == "last":
            return [view.attention()]
        text = view.text_attention()  # [heads, T, V]
        if self._rows == "text":
            return [text.mean(dim=1)]
        # Without an image there is no visual row to take the maximum over, hence the row of zeros.
        visual = torch.cat([torch.zeros_like(text[:, :1]), view.visual_attention()], dim=1)
        return [text.amax(dim=1), visual.amax(dim=1)]

    def _lattice(self, view: LayerView) -> torch.Tensor:
        grids = [earliness(part) for part in self._geometry.layout]
        shifted = [ranked([np.roll(grid, (head, head), (0, 1)) for grid in grids]) for head in range(view.kv_heads)]
        return torch.from_numpy(np.stack(shifted)).to(view.order.device).index_select(1, view.order)


def _check_classes(cut: Cut) -> None:
    settings = cut.settings(form=CLASSES, thresholds=[], shares=[])
    numbers = [*settings["thresholds"], *settings["shares"]]
    counts = len(settings["thresholds"]), len(settings["shares"])
    if settings["form"] != CLASSES or counts != (2, 3) or not all(isinstance(n, (int, float)) and 0 <= n <= 1 for n in numbers):
        raise PlanError(
            f"{cut} has form {CLASSES}, two thresholds and three shares, all from 0 to 1.",
            hint="Make one: edgeprune calibrate MODEL --data FILE --method plphp --budget 0.5 --option classes=live -o PLAN",
        )
    if any(sorted(settings[name]) != list(settings[name]) for name in ("thresholds", "shares")):
        raise PlanError(f"The thresholds and the shares of {cut} must ascend.")


def vision_attention_score(attention: torch.Tensor) -> torch.Tensor:
    """Return gamma [], the last prompt token's share of attention [heads, V] to visual tokens, averaged over heads.

    Reconstruction: the paper's formula for the score was not available to us.
    """
    return attention.sum(dim=1).mean()
