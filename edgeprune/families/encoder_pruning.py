"""Visual tokens leave inside a vision encoder: which stay before a block, and what goes on with them.

All shapes are constants: a cut is TopK and Gather. Every view keeps as many tokens, so that views still attend in one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from edgeprune.errors import PlanError
from edgeprune.plan import Cut, Geometry
from edgeprune.registry import method_class


@dataclass(frozen=True)
class RowLayout:
    """How the rows of an encoder lie: view after view, in each `first` rows that stand for no place (a class token), and then the
    patches, the `merged` ones of a visual token together.
    """

    views: int
    first: int = 0
    merged: int = 1

    def patches(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the rows that are patches [views * patches, width]."""
        return rows.view(self.views, -1, rows.shape[1])[:, self.first :].flatten(0, 1) if self.first else rows

    def means(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the mean over the patches of each visual token: [V, width] of all rows, [V] of one number for each patch."""
        patches = rows if rows.ndim == 1 else self.patches(rows)
        return patches.reshape(-1, self.merged, *rows.shape[1:]).mean(dim=1) if self.merged > 1 else patches

    def received(self, weights: torch.Tensor) -> torch.Tensor:
        """Return the attention that each visual token receives [V], of weights [views, heads, rows, rows].

        From the class token, or averaged over queries where there is none; averaged over heads and over the token's patches.
        """
        return self.means(weights[:, :, : self.first or None, self.first :].mean(dim=(1, 2)).flatten())


@dataclass(frozen=True)
class SurvivingTokens:
    """What a method is told: the indices in the image `order` [V], and the attention that each of these tokens received [V]."""

    order: torch.Tensor
    attention: Callable[[], torch.Tensor]


@dataclass(frozen=True)
class TokenSelection:
    """The visual tokens that stay: `chosen` [K], positions among those of all views."""

    chosen: torch.Tensor
    rows: RowLayout

    def tokens(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the rows that stay of one row for each visual token."""
        return rows.index_select(0, self.chosen)

    def patches(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the rows that stay of an encoder's rows; those that stand for no place do."""
        width, first = rows.shape[1], self.rows.first
        kept = self.tokens(self.rows.patches(rows).reshape(-1, self.rows.merged * width)).reshape(-1, width)
        if not first:
            return kept
        before = rows.view(self.rows.views, -1, width)[:, :first]
        return torch.cat([before, kept.view(self.rows.views, -1, width)], dim=1).flatten(0, 1)


class EncoderPruning(nn.Module):
    """The vision cuts of one geometry, by the number of the block before which they act.

    `order` [V]: the index in the image of each visual token, as the encoder has them. Raises PlanError for a count that does not
    divide among the views.
    """

    order: torch.Tensor

    def __init__(self, cuts: Sequence[Cut], geometry: Geometry) -> None:
        super().__init__()
        views = len(geometry.layout)
        for cut in cuts:
            if cut.keep % views:
                raise PlanError(
                    f"{cut} keeps {cut.keep} tokens, which do not divide among {views} views.",
                    hint=f"Every view keeps as many: {_near(cut.keep, views)}.",
                )
        self.cuts = {cut.layer: (cut, method_class(cut.method)(cut, geometry)) for cut in cuts}
        self.register_buffer("order", torch.arange(geometry.tokens), persistent=False)

    def check(self, depth: int) -> None:
        """Raise PlanError for a cut beyond an encoder of so many blocks."""
        for cut, _ in self.cuts.values():
            if cut.layer >= depth:
                raise PlanError(f"{cut} lies beyond the vision encoder's {depth} blocks.", hint=f"Give 1 to {depth - 1}.")

    def pick(self, index: int, living: SurvivingTokens, rows: RowLayout) -> TokenSelection:
        """Return what stays before block `index` of the tokens that are still there."""
        cut, method = self.cuts[index]
        scores = method.score(living).view(rows.views, -1)
        best = torch.topk(scores, cut.keep // rows.views, dim=1).indices
        return TokenSelection((_ascending(best)[0] + _starts(rows.views, scores.shape[1], best)).flatten(), rows)


def _ascending(numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return integers [views, K] ascending in each row, and where they were; lowers to TopK."""
    found = torch.topk(numbers, numbers.shape[1], dim=1, largest=False, sorted=True)
    return found.values, found.indices


def in_image_order(order: torch.Tensor, views: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return indices in the image [V], which lie view after view, ascending; and the positions [V] they had."""
    values, places = _ascending(order.view(views, -1))
    return values.flatten(), (places + _starts(views, values.shape[1], order)).flatten()


def _starts(views: int, each: int, like: torch.Tensor) -> torch.Tensor:
    # Where the tokens of each view begin [views, 1].
    return torch.arange(views, device=like.device)[:, None] * each


def _near(keep: int, views: int) -> str:
    low = keep // views * views
    return f"{low} or {low + views}" if low else f"{views}"
