"""The last stage of a search: a rate for the decode steps, behind the plan that was found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from edgeprune.calibration.agreement import Agreement
from edgeprune.calibration.calibrating import Calibration, RateRequest
from edgeprune.calibration.dyrate import FORMS
from edgeprune.calibration.pareto import Point


def decode_points(
    found: Point, reads: float, calibration: Calibration, held_out: Agreement, progress: Callable[[str], None]
) -> list[Point]:
    """Return the plan found with DyRate behind it in each of its forms, the best first.

    Steps read `reads` of the visual tokens that the plan leaves in the caches, on the average of the calibration's answers. Prefill
    and what is held stay as they are, so that the other costs are those of `found`. Raises PlanError where answers are too short to
    learn a rate from.
    """
    points = []
    for form in FORMS:
        plan = calibration.rate(reads, found.plan, RateRequest(form))
        progress(f"dyrate ({form}), {len(held_out)} samples")
        score = held_out.score(plan, len(held_out))
        points.append(replace(found, name=f"{found.name} + dyrate ({form})", group="composed", plan=plan, score=score))
    return sorted(points, key=lambda point: -point.score)
