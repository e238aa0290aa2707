"""Keep plans: cuts, keep budgets, geometry and tiers. Imports no model, no bundle and no torch."""

from edgeprune.plan.geometry import Geometry, View
from edgeprune.plan.keep_plan import CLASSES, SITES, Cut, KeepPlan, check_keep_ratio, keep_count, keep_count_up
from edgeprune.plan.options import Option
from edgeprune.plan.weights import Weights

__all__ = [
    "CLASSES",
    "SITES",
    "Cut",
    "Geometry",
    "KeepPlan",
    "Option",
    "View",
    "Weights",
    "check_keep_ratio",
    "keep_count",
    "keep_count_up",
]
