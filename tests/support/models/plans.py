"""Plans of the tiny model with cuts at every site."""

from __future__ import annotations

from typing import Any

from tiny_models import TINY_GEOMETRY

from edgeprune.plan import Cut
from edgeprune.plan.presets import ranked_plan, unpruned_plan

PROMPT = "What colour is the cube?"
BASE = unpruned_plan("qwen2_vl", 3, TINY_GEOMETRY)
RANKED: dict[str, Any] = {"rows": "peak", "reduce": "max", "spread": True}
PREDICTOR_OPTIONS: dict[str, Any] = {
    "form": "predictor",
    "weight": [[0.0] * 13, [*[0.0, 0.0, 0.0, 1.0] * 3, 9.0], [0.0] * 13],
    "bias": [0.5, 0.0, 0.0],
    "shares": [1.0, 0.4, 0.2],
}
PLANS = {
    "input, layers": BASE.with_cuts(
        Cut("input", "zspaprune", 9), Cut("layer", "sparsevlm", 6, layer=1), Cut("layer", "fitprune", 3, layer=2)
    ),
    "everything": BASE.with_cuts(
        Cut("input", "visionzip", 10),
        Cut("layer", "pyramiddrop", 7, layer=1),
        *(Cut("cache", "plphp", keep, layer, options=RANKED) for layer, keep in enumerate((8, 7, 3))),
        Cut("decode", "dyrate", 0, layer=1, options=PREDICTOR_OPTIONS),
    ),
    "cache, schedule": ranked_plan(BASE, [5, 9, 12]).with_cuts(
        Cut("decode", "dyrate", 0, options={"form": "schedule", "steps": [1, 3], "shares": [0.5, 0.25]})
    ),
    "live classes": ranked_plan(BASE, [8, 8, 8]).with_cuts(
        Cut("decode", "plphp", 0, options={"form": "classes", "thresholds": [0.3, 0.6], "shares": [0.25, 0.5, 1.0]})
    ),
    "withdrawn, map": BASE.with_cuts(
        Cut("layer", "vtw", 0, layer=2),
        *(Cut("cache", method, keep, layer) for layer, (method, keep) in enumerate((("random", 6), ("uniform", 6), ("plphp", 0)))),
        Cut("decode", "dyrate", 0, options={"form": "map", "attention": [0.2, 0.4], "shares": [0.3, 0.6, 1.0]}),
    ),
}
