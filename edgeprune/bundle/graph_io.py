"""Names of the graphs' inputs and outputs: the interface between export, the runtime's backends and the TensorRT profiles."""

from __future__ import annotations

from edgeprune.plan import KeepPlan

SEGMENTS = ("prefix", "visual", "suffix")
TIER = "tier"  # a marker: one long for the first tier, two for the second, and so on
GROUPS = "text_groups"  # to which group each text token belongs, where the rate of a plan follows attention
SIGNALS = ("vision_attention", "vision_keys")


def cache_name(layer: int, part: str) -> str:
    """Return the graph's name for the "key" or "value" cache of a layer's text [1 + T, kv heads, head_dim]."""
    return f"past_key_values.{layer}.{part}"


def visual_cache_name(layer: int, part: str) -> str:
    """Return the graph's name for the "key" or "value" cache of a layer's visual tokens [1 + K, kv heads, head_dim]."""
    return f"visual_{cache_name(layer, part)}"


def rows_name(layer: int, part: str) -> str:
    """Return the graph's name for what a step adds to a layer's "key" or "value" caches [n, kv heads, head_dim]."""
    return f"present.{layer}.{part}"


def kept_name(cut: int) -> str:
    """Return the graph's name for the kept indices of the plan's cut of that number."""
    return f"kept.{cut}"


def kept_names(plan: KeepPlan, *sites: str) -> list[str]:
    """Return the graphs' names for the kept indices of the plan's cuts at some sites."""
    return [kept_name(index) for index, cut in enumerate(plan.cuts) if cut.site in sites]


def decoder_inputs(plan: KeepPlan, *, tiers: bool = False) -> list[str]:
    """Return the names of the decoder's inputs, in its order; `tiers`: there are several."""
    layers = [(layer, part) for layer in range(plan.layers) for part in ("key", "value")]
    names = [f"{name}_embeds" for name in SEGMENTS] + [f"{name}_positions" for name in SEGMENTS]
    names += ["visual_order", *([TIER] if tiers else []), *([GROUPS] if plan.follows_attention else [])]
    return names + [cache_name(*layer) for layer in layers] + [visual_cache_name(*layer) for layer in layers]


def decoder_outputs(plan: KeepPlan) -> list[str]:
    """Return the names of the decoder's outputs, in its order."""
    layers = [(layer, part) for layer in range(plan.layers) for part in ("key", "value")]
    names = ["logits", *(rows_name(*layer) for layer in layers), *kept_names(plan, "layer", "cache")]
    return names + (["attention_split"] if plan.follows_attention else [])
