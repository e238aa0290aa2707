"""Keep plans: cuts, counts, geometry and tiers. Imports no model, no bundle and no torch."""

from edgeprune.plan.geometry import Geometry, View
from edgeprune.plan.keep_plan import SITES, Cut, KeepPlan, keep_count, kept_of

__all__ = ["SITES", "Cut", "Geometry", "KeepPlan", "View", "keep_count", "kept_of"]
