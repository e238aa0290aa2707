"""Learned: keep the tokens that matter and differ, where calibration learned from this model what both mean.

Our own method, no paper: `edgeprune calibrate --method learned` learns it offline (`edgeprune.calibration.learn`). A visual token v
has a score s = v·θ + gelu(v H + h)·o and a place f = (v M + m) / |v M + m| in a space of few dimensions. The first token has the
highest score. Each further one has the highest gain exp(s) (1.001 - max over the chosen c of f·f_c): greedy max-min diversity,
weighted by importance. A set for fewer tokens is a part of every set for more. Option weigh: see `base.represented`, by the learned
metric.

With a share p of the position, f·f_c is (1 - p) times that, plus p times a number that falls from 1 to 0 as the distance of the two
in the image grows (`position_features`): things that look alike at different positions are different things.

With a weight q for the question, s gains q·(v M)·B g, where g = (mean of the question's words - ω) C: a direction that depends on
what is asked. ω is the mean word of the calibration's questions, C takes few dimensions of words, and B is fitted to which tokens
mattered to the answer of each question.

Option merge: a kept token c gains what the tokens N(c) hold whose nearest kept one it is, by the metric: gelu(u)·A + a, where
u = c·O + (mean of N(c) - c)·P + (mean of N(c) weighted by exp(s) - c)·Q + b, s without the question. If the cut weighs too, the
logarithm of how many c stands for counts p times, plus gelu(u)·w + w₀: what a decoder makes of fewer tokens is learned as well.

Related: DivPrune (arXiv 2503.02175) has the same search with cosines of the tokens themselves and no score. CDPruner (2506.10967)
weighs by relevance to the prompt and maximizes a determinant. Both learn nothing. VisionSelector (2510.16598) and other trained
pruners learn scores with answers and much data, and take the highest, of which neighbours say the same. ToMe (2210.09461) and
VisionZip (2412.04467) merge tokens by their mean, which nothing learns.

Static by nature: constant shapes, products and the greedy chain that DivPrune has. Weights belong to one model, and to the counts
that they were learned for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch.nn import functional

from edgeprune.errors import PlanError
from edgeprune.methods.base import InputView, add_least_similar, ascending, nearest_chosen, unit
from edgeprune.methods.weights import pack, unpack
from edgeprune.plan import Cut, Geometry, Option, View, Weights

MARGIN = 1.001  # keeps the gain of tokens that equal a chosen one above 0, so that their scores still count
_LEAST, _MOST = -60.0, 1e30
_NONE = 1e-30  # below exp(_LEAST)
_TINY = 1e-9
_NEAR = 0.1  # of the height or width of an image: the standard deviation of the Gaussian that says what is near
_CENTRES = 8  # along each side, so close that all positions are seen alike
_AGAIN = "Learn it: edgeprune calibrate MODEL --data FILE --method learned --budget 0.25 -o PLAN"
_SHAPES = {"theta": "d", "hidden": "dh", "hidden_bias": "h", "out": "h", "metric": "dr", "metric_bias": "r"}
_SHAPES |= {"mean_word": "d", "words": "dw", "asked": "rw"}
_MERGING = {"own": "dm", "near": "dm", "mattering": "dm", "merge_bias": "m", "added": "md", "added_bias": "d"}
_MERGING |= {"attended": "m", "attended_bias": "1", "power": "1"}


class Learned:
    """Keep a set of tokens by a learned score and a learned metric."""

    sites: ClassVar[tuple[str, ...]] = ("input",)
    needs: ClassVar[tuple[str, ...]] = ()
    options: ClassVar[tuple[Option, ...]] = (
        Option("weigh", False, "the decoder attends to each kept token by how many it stands for; no later cut may follow"),
        Option("merge", False, "kept tokens gain what the dropped ones nearest to them hold, by a map that calibration trains"),
    )
    calibration_options: ClassVar[tuple[Option, ...]] = (
        Option("train", False, "train score and metric further, through the frozen decoder; takes longer"),
        Option("question", True, "also learn what questions ask for; without, all questions about an image get the same tokens"),
        Option("position", True, "also learn how far positions tell tokens apart that look alike"),
        Option("rank", 64, "dimensions of the learned metric", least=1, most=1024),
    )

    def __init__(self, cut: Cut, geometry: Geometry) -> None:
        settings = cut.settings(*self.options)  # all else, calibration sets
        if cut.weights is None or cut.weights.content is None:
            raise PlanError(f"{cut} has no weights.", hint=_AGAIN)
        self.header, self.tensors = read(cut.weights)
        self.position = float(self.header.get("position", 0.0))  # earlier versions learned none
        self.position_features = position_features(geometry) if self.position else None
        self.merges = bool(settings["merge"])
        if self.merges and "own" not in self.tensors:
            raise PlanError(f"{cut} merges; its weights were learned without.", hint=f"{_AGAIN} --option merge=yes")
        columns = [self.tensors["metric"], self.tensors["hidden"], self.tensors["theta"][:, None]]
        columns += [self.tensors["near"], self.tensors["mattering"]] if self.merges else []
        self._columns, self._widths = torch.cat(columns, dim=1), [part.shape[1] for part in columns]
        least, most = self.header["keeps"]
        if not least <= cut.keep <= most:
            learned = f"{least} to {most}" if least < most else f"{least}"
            raise PlanError(f"{cut} keeps {cut.keep} tokens; its weights were learned for {learned}.", hint=_AGAIN)

    @property
    def width(self) -> int:
        """The width of visual tokens that the weights are for."""
        return int(self.tensors["theta"].shape[0])

    def width_in(self, parts: Any) -> int:
        """Return the width of visual tokens in a model."""
        return int(parts.hidden)

    def select(self, view: InputView, keep: int) -> torch.Tensor:
        """Return the ascending positions [min(keep, V)] of the set."""
        scores, places = self.score(view), self.places(view)
        gain = torch.exp((scores - scores.amax(dim=0)).clamp_min(_LEAST))[:, None]
        # What the shared search takes for similarity is minus the gain of all tokens, given a chosen one.
        chosen = torch.cat([places, torch.full_like(gain, -MARGIN)], dim=1)
        candidates = (torch.cat([places, torch.ones_like(gain)], dim=1) * gain).transpose(0, 1)
        positions = torch.arange(view.visual.shape[0], device=scores.device)

        def similarity_of(token: torch.Tensor) -> torch.Tensor:
            return torch.where(positions == token, float("inf"), chosen.index_select(0, token) @ candidates)

        first, others = torch.topk(scores, 1).indices, min(keep, view.visual.shape[0]) - 1
        return ascending(add_least_similar(similarity_of, first, others))

    def score(self, view: InputView) -> torch.Tensor:
        """Return how much each visual token matters [V], as a logarithm."""
        score = self.matter(view.visual)
        if self.header["question"]:
            score = score + self.header["question"] * self.asked_for(view)
        return torch.where(score.abs() <= _MOST, score, 0.0)

    def asked_for(self, view: InputView) -> torch.Tensor:
        """Return how much each visual token matters to what is asked [V], as a logarithm, from any offset."""
        mean_word, words, asked = (self.tensors[name].to(view.prompt.device) for name in ("mean_word", "words", "asked"))
        wanted = asked @ ((view.prompt.float().mean(dim=0) - mean_word) @ words)
        return self._products(view.visual)[0] @ torch.where(wanted.abs() <= _MOST, wanted, 0.0)

    def places(self, view: InputView) -> torch.Tensor:
        """Return each visual token's place on the unit sphere [V, n]: that of the metric, and its position in the image."""
        looks = unit(self._products(view.visual)[0] + self.tensors["metric_bias"].to(view.visual.device))
        return self.placed(looks, view.kept)

    def placed(self, looks: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
        """Return places [V, n] of tokens with places `looks` [V, rank] of the metric; `kept` [V]: as in InputView."""
        if self.position_features is None:
            return looks
        of_all = self.position_features.to(looks.device)
        seen = of_all if kept is None else of_all.index_select(0, kept)
        return torch.cat([math.sqrt(1 - self.position) * looks, math.sqrt(self.position) * seen], dim=1)

    def merge(self, view: InputView, chosen: torch.Tensor) -> torch.Tensor:
        """Return the embeddings [K, hidden] of the chosen tokens [K], with what the dropped tokens hold."""
        return self.merged(view, chosen)[0]

    def log_weights(self, view: InputView, chosen: torch.Tensor) -> torch.Tensor:
        """Return what is added to the attention scores towards each of the chosen tokens [K]."""
        if self.merges:
            return self.merged(view, chosen)[1]
        return self.nearest(view, chosen).sum(dim=0).clamp_min(1.0).log()

    def merged(self, view: InputView, chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the embeddings of the chosen tokens [K, hidden] and their logarithmic weights [K], by the option merge."""
        near, mattering = self._products(view.visual)[3:]
        tensors = {name: self.tensors[name].to(view.visual.device) for name in _MERGING}
        nearest, matter = self.nearest(view, chosen), self.matter(view.visual)
        return take_in(view.visual.index_select(0, chosen), chosen, nearest, matter, near, mattering, tensors)

    def nearest(self, view: InputView, chosen: torch.Tensor) -> torch.Tensor:
        """Return 1 where a chosen token [K] is the nearest one of a token [V] by its place, and 0 elsewhere [V, K]."""
        return nearest_chosen(self.places(view), chosen)

    def matter(self, visual: torch.Tensor) -> torch.Tensor:
        """Return how much each visual token matters [V], as a logarithm, whatever is asked."""
        _, hidden, linear, *_ = self._products(visual)
        bias, out = (self.tensors[name].to(visual.device) for name in ("hidden_bias", "out"))
        return linear[:, 0] + functional.gelu(hidden + bias) @ out

    def _products(self, visual: torch.Tensor) -> tuple[torch.Tensor, ...]:
        # With metric [V, rank], hidden [V, h], θ [V, 1] and, to merge, P and Q [V, m], by one product that reads a large image
        # once: the graph has one for all of them. For tokens that are no finite numbers they are 0, since NaN compares false.
        products = visual.float() @ self._columns.to(visual.device)
        return torch.split(torch.where(products.abs() <= _MOST, products, 0.0), self._widths, dim=1)


def position_features(geometry: Geometry) -> torch.Tensor:
    """Return features [V, 64], of length 1, of the positions of all visual tokens in the image.

    The product of two is close to a Gaussian of their distance, in shares of the image's height and width, with a deviation of
    _NEAR. Views that overlap show the same positions, and so do the frames of a video.
    """
    down, right = zip(*(_middles(view) for view in geometry.layout), strict=True)
    rows, columns = _features(torch.cat(down) / geometry.height), _features(torch.cat(right) / geometry.width)
    return functional.normalize((rows[:, :, None] * columns[:, None]).flatten(1)).float()


def _middles(view: View) -> tuple[torch.Tensor, torch.Tensor]:
    # The pixels in the middle of each token of a view [tokens], from the top and from the left; separators are at the right.
    row, column = torch.meshgrid(torch.arange(view.rows), torch.arange(view.columns + view.separators), indexing="ij")
    down, right = (row.flatten().double() + 0.5) / view.rows, (column.flatten().double() + 0.5) / view.columns
    return view.top + view.height * down, view.left + view.width * right.clamp_max(1.0)


def _features(values: torch.Tensor) -> torch.Tensor:
    # Vectors [n, _CENTRES] whose products are close to a Gaussian of the distance of two values from 0 to 1 (Nyström's method).
    centres = (torch.arange(_CENTRES, dtype=values.dtype) + 0.25) / (_CENTRES - 0.5)
    eigenvalues, vectors = torch.linalg.eigh(_gaussian(centres, centres))
    found: torch.Tensor = _gaussian(values, centres) @ vectors / eigenvalues.clamp_min(_TINY).sqrt()
    return found


def _gaussian(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return torch.exp(-(one[:, None] - other[None]).square() / (2 * _NEAR**2))


def take_in(
    own: torch.Tensor,
    chosen: torch.Tensor,
    nearest: torch.Tensor,
    matter: torch.Tensor,
    near: torch.Tensor,
    mattering: torch.Tensor,
    tensors: Mapping[str, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what kept tokens `own` [K, d] become, and their logarithmic weights [K]: option merge, with `tensors` by name.

    `chosen` [K]: their positions. `nearest` [V, K]: 1 for the nearest chosen token of each. `matter` [V]: the scores. `near` and
    `mattering` [V, m]: all tokens times P and Q.
    """
    shares = nearest * torch.exp((matter - matter.amax(dim=0)).clamp_min(_LEAST))[:, None]
    count = nearest.sum(dim=0)
    inner = own.float() @ tensors["own"] + tensors["merge_bias"]
    for rows, weights in ((near, nearest), (mattering, shares)):
        total = weights.sum(dim=0)[:, None]
        mean = weights.transpose(0, 1) @ rows / total.clamp_min(_NONE)
        # A token equal to another chosen one may have none of its own.
        inner = inner + torch.where(count[:, None] > 0, mean - rows.index_select(0, chosen), 0.0)
    inner = functional.gelu(inner)
    logs = tensors["power"] * count.clamp_min(1.0).log() + inner @ tensors["attended"] + tensors["attended_bias"]
    return (own.float() + inner @ tensors["added"] + tensors["added_bias"]).to(own.dtype), logs


def write(tensors: dict[str, torch.Tensor], header: dict[str, Any]) -> Weights:
    """Return the weights of a cut.

    `tensors`: `theta` [d], `hidden` [d, h], `hidden_bias` and `out` [h], `metric` [d, r], `metric_bias` [r], ω `mean_word` [d], C
    `words` [d, w] and B `asked` [r, w], for tokens of width d. To merge also O `own`, P `near` and Q `mattering` [d, m], b
    `merge_bias` [m], A `added` [m, d], a `added_bias` [d], w `attended` [m], w₀ `attended_bias` [1] and p `power` [1].
    `header`: `weights_sha256` of the model, the fewest and the most `keeps` that were learned, the weight of the `question`, the
    share of the `position`, and, if known, what images were `seen` (`edgeprune.calibration.learn.run.seen`).
    """
    return pack(tensors, header)


def read(weights: Weights) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return header and tensors of a cut's weights, checked; raise PlanError if they are not those of this method."""
    header, tensors = unpack(weights, _AGAIN)
    keeps, share = header.get("keeps"), header.get("position", 0.0)
    counted = isinstance(keeps, list) and [type(keep) is int and keep > 0 for keep in keeps] == [True, True]
    counted = counted and isinstance(header.get("question"), (int, float)) and isinstance(share, (int, float)) and 0 <= share < 1
    known = set(tensors) in (set(_SHAPES), {*_SHAPES, *_MERGING})
    if not counted or not known or not _fit(tensors):
        raise PlanError("The weights are not those of the method learned.", hint=_AGAIN)
    return header, tensors


def _fit(tensors: dict[str, torch.Tensor]) -> bool:
    # Whether the tensors have shapes that belong together.
    sizes = {"1": 1}
    for name, tensor in tensors.items():
        axes = (_SHAPES | _MERGING)[name]
        if tensor.ndim != len(axes):
            return False
        if any(sizes.setdefault(axis, length) != length for axis, length in zip(axes, tensor.shape, strict=True)):
            return False
    return True
