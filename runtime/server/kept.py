"""Which visual tokens each cut kept, as a page can draw them: grids over the picture, and a share for each token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from edgeprune.plan import KeepPlan
from edgeprune.runtime.telemetry.receipt import CutReceipt, Receipt

_CACHES = "KV caches"  # all cuts of caches are one drawing


def kept_pictures(plan: KeepPlan, receipt: Receipt) -> list[dict[str, Any]]:
    """Return for each image of an answer, or for its video, the views of the prepared picture and what the cuts kept of them.

    A cut's `shares`: for each visual token 1 where it was kept and 0 where not; of KV caches the share of the heads' caches that
    hold it. Nothing where nothing was cut.
    """
    tokens = plan.geometry.tokens
    count = receipt.visual_tokens // tokens
    if not count or not receipt.cuts:
        return []
    each = len(receipt.cuts) // count
    parts = [receipt.cuts[each * number : each * (number + 1)] for number in range(count)]
    return [_board(plan) | {"cuts": _cuts(cuts, tokens)} for cuts in parts]


def _board(plan: KeepPlan) -> dict[str, Any]:
    views = plan.geometry.layout
    names = ("top", "left", "height", "width", "rows", "columns", "separators", "time")
    return {
        "height": max(view.top + view.height for view in views),
        "width": max(view.left + view.width for view in views),
        "views": [{name: getattr(view, name) for name in names} for view in views],
    }


def _cuts(cuts: Sequence[CutReceipt], tokens: int) -> list[dict[str, Any]]:
    plain = [_drawn(cut.cut, cut.before, cut.after, _share([cut.kept], tokens)) for cut in cuts if np.ndim(cut.kept) == 1]
    kept = [cut for cut in cuts if np.ndim(cut.kept) == 2]  # [heads, after]: of a cache
    if not kept:
        return plain
    heads = [head for cut in kept for head in cut.kept]
    after = round(float(np.mean([cut.after for cut in kept])))
    return [*plain, _drawn(_CACHES, max(cut.before for cut in kept), after, _share(heads, tokens))]


def _drawn(name: str, before: int, after: int, shares: np.ndarray) -> dict[str, Any]:
    return {"cut": name, "before": before, "after": after, "shares": [round(float(share), 3) for share in shares]}


def _share(kept: Sequence[np.ndarray], tokens: int) -> np.ndarray:
    # [tokens]: of how many of the lists a token is part.
    held = np.zeros(tokens)
    for indices in kept:
        held[np.asarray(indices, np.int64).reshape(-1)] += 1
    return held / len(kept)
