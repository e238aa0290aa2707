"""Cuts inside a vision encoder: which visual tokens stay before a block, and how its rows are reduced to them.

All shapes are constants: a cut lowers to TopK and Gather. Every view keeps equally many tokens, so views still attend in one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import nn

from edgeprune.errors import PlanError
from edgeprune.plan import Cut, Geometry
from edgeprune.registry import method_class


@dataclass(frozen=True)
class RowLayout:
    """The layout of an encoder's rows: view after view, each with `first` rows that make no visual token, and its patches.

    Those rows are class tokens, or patches that the model leaves out (`left_out`). The `merged` patches of a visual token are
    adjacent.
    """

    views: int
    first: int = 0
    merged: int = 1
    left_out: bool = False

    def patches(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the rows of patches [views * patches, width]."""
        return rows.view(self.views, -1, rows.shape[1])[:, self.first :].flatten(0, 1) if self.first else rows

    def means(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the mean over the patches of each visual token: [V, width] for rows, [V] for one number per patch."""
        patches = rows if rows.ndim == 1 else self.patches(rows)
        return patches.reshape(-1, self.merged, *rows.shape[1:]).mean(dim=1) if self.merged > 1 else patches

    def received(self, weights: torch.Tensor) -> torch.Tensor:
        """Return the attention that each visual token receives [V], given weights [views, heads, rows, rows].

        It comes from the class token, or is averaged over all queries if there is none. It is averaged over heads and over the
        token's patches.
        """
        judges = None if self.left_out else self.first or None
        # Over queries first: of one view, ONNX Runtime takes thirty times as long over both axes at once.
        return self.means(weights[:, :, :judges, self.first :].mean(dim=2).mean(dim=1).flatten())

    def best(self, scores: torch.Tensor, each: int) -> torch.Tensor:
        """Return the ascending positions [views * each] of the highest scores [V] of every view."""
        by_view = scores.view(self.views, -1)
        best = torch.topk(by_view, each, dim=1).indices
        return (_ascending(best)[0] + _starts(self.views, by_view.shape[1], best)).flatten()


@dataclass(frozen=True)
class UnequalViews(RowLayout):
    """The layout of views of different sizes: `tokens` of each view, until a cut leaves every view as many.

    Attention weights come as one tensor for each of `runs`, the lengths of successive views of equal size.
    """

    tokens: tuple[int, ...] = ()

    @property
    def runs(self) -> tuple[int, ...]:
        """How many views there are in each run of equal ones."""
        return tuple(len(list(run)) for _, run in groupby(self.tokens))

    def received(self, weights: Any) -> torch.Tensor:
        """Return the attention that each visual token receives [V]."""
        return torch.cat([super(UnequalViews, self).received(part) for part in weights])

    def best(self, scores: torch.Tensor, each: int) -> torch.Tensor:
        """Return the ascending positions [views * each] of the highest scores [V] of every view."""
        if scores.shape[0] != sum(self.tokens):
            return super().best(scores, each)
        parts, starts = torch.split(scores, list(self.tokens)), accumulate(self.tokens, initial=0)
        best = [_ascending(torch.topk(part[None], each, dim=1).indices)[0][0] for part in parts]
        return torch.cat([positions + start for positions, start in zip(best, starts, strict=False)])


@dataclass(frozen=True)
class SurvivingTokens:
    """The view of a method: the remaining tokens' indices in the image `order` [V], and the attention that each received [V]."""

    order: torch.Tensor
    attention: Callable[[], torch.Tensor]


@dataclass(frozen=True)
class TokenSelection:
    """The kept visual tokens: `chosen` [K], positions among the tokens of all views."""

    chosen: torch.Tensor
    rows: RowLayout

    def tokens(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the kept rows, given one row per visual token."""
        return rows.index_select(0, self.chosen)

    def patches(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the kept rows, given an encoder's rows; those that make no token are kept."""
        width, first = rows.shape[1], self.rows.first
        kept = self.tokens(self.rows.patches(rows).reshape(-1, self.rows.merged * width)).reshape(-1, width)
        if not first:
            return kept
        before = rows.view(self.rows.views, -1, width)[:, :first]
        return torch.cat([before, kept.view(self.rows.views, -1, width)], dim=1).flatten(0, 1)


class EncoderPruning(nn.Module):
    """The vision cuts of one geometry, keyed by the block before which they act.

    `order` [V]: the index in the image of each visual token, in the order of the encoder. `views`: how many views the encoder
    takes, by default those of the geometry. Raises PlanError for a count that does not divide among them.
    """

    order: torch.Tensor

    def __init__(self, cuts: Sequence[Cut], geometry: Geometry, views: int | None = None) -> None:
        super().__init__()
        views = len(geometry.layout) if views is None else views
        for cut in cuts:
            if cut.keep % views:
                raise PlanError(
                    f"{cut} keeps {cut.keep} tokens, which do not divide among {views} views.",
                    hint=f"Every view keeps as many: {_near(cut.keep, views)}.",
                )
        self.cuts = {cut.layer: (cut, method_class(cut.method)(cut, geometry)) for cut in cuts}
        self.register_buffer("order", torch.arange(geometry.tokens), persistent=False)

    def check(self, depth: int) -> None:
        """Raise PlanError for a cut beyond an encoder of `depth` blocks."""
        for cut, _ in self.cuts.values():
            if cut.layer >= depth:
                raise PlanError(f"{cut} lies beyond the vision encoder's {depth} blocks.", hint=f"Give 1 to {depth - 1}.")

    def pick(self, index: int, living: SurvivingTokens, rows: RowLayout) -> TokenSelection:
        """Return the tokens that the cut before block `index` keeps of the remaining ones."""
        cut, method = self.cuts[index]
        return TokenSelection(rows.best(method.score(living), cut.keep // rows.views), rows)


def _ascending(numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return integers [views, K] sorted in each row, and their previous positions; lowers to TopK."""
    result = torch.topk(numbers, numbers.shape[1], dim=1, largest=False, sorted=True)
    return result.values, result.indices


def in_image_order(order: torch.Tensor, views: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the indices in the image [V], given view after view, in ascending order, and their previous positions [V]."""
    values, positions = _ascending(order.view(views, -1))
    return values.flatten(), (positions + _starts(views, values.shape[1], order)).flatten()


def _starts(views: int, each: int, like: torch.Tensor) -> torch.Tensor:
    # The position of the first token of each view [views, 1].
    return torch.arange(views, device=like.device)[:, None] * each


def _near(keep: int, views: int) -> str:
    low = keep // views * views
    return f"{low} or {low + views}" if low else f"{views}"
