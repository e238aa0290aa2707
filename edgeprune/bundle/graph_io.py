"""Names of the graphs' inputs and outputs: the interface between export, the runtime's backends and the TensorRT profiles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edgeprune.bundle.manifest import LayerState, Tensor, attention_layers
from edgeprune.plan import KeepPlan

SEGMENTS = ("prefix", "visual", "suffix")
TIER = "tier"  # an input whose length selects the tier: 1 for the first, 2 for the second, and so on
GROUPS = "text_groups"  # the group of each text token, if the decode cut follows attention
SIGNALS = ("vision_attention", "vision_keys", "vision_features")
WEIGHTS = "visual_weights"  # the logarithms of how many tokens each visual token stands for, if the input cut weighs
WEIGHT = "weight"  # the part of a cache that holds them
LENGTHS = "cache_lengths"  # [layers * n], int32: the valid rows of the buffers of n conversations, layer by layer
ROWS = "cache_rows"  # [1 + lengths]: the real rows of the text caches, and of the visual caches of each length; see `length_slots`
PLACE = "place"  # the part of a cache that holds the tokens' places in the sequence, for layers with a window


def cache_name(layer: int, part: str) -> str:
    """Return the input name of a layer's "key" or "value" cache of text tokens [1 + T, kv heads, head_dim].

    The "place" cache of a layer is [1 + T, 1], or [1 + T, kv heads] if a cache cut gives each head tokens of its own. The "weight"
    cache is [1 + T, 1].
    """
    return f"past_key_values.{layer}.{part}"


def visual_cache_name(layer: int, part: str) -> str:
    """Return the input name of a layer's cache of visual tokens [1 + K, ...], with the parts of `cache_name`."""
    return f"visual_{cache_name(layer, part)}"


def rows_name(layer: int, part: str) -> str:
    """Return the output name of the rows [n, ...] that a step adds to a layer's cache, with the parts of `cache_name`."""
    return f"present.{layer}.{part}"


def buffer_name(layer: int, part: str) -> str:
    """Return the input name of a layer's buffer of all keys ("key") or values [n, kv heads, capacity, head_dim] for single tokens.

    The tokens of the suffix are then steps of n conversations, each with its own logits [1, n, vocabulary]. LENGTHS counts the
    valid rows. A capacity of 1 stands for no buffers. Not every decoder has them, and older ones
    take n = 1.
    """
    return f"cache_{part}.{layer}"


def scale_name(layer: int, part: str) -> str:
    """Return the input name of what one step of an 8-bit buffer is, for each channel of its rows [kv heads * head_dim]."""
    return f"cache_{part}_scale.{layer}"


def grown_name(layer: int, part: str) -> str:
    """Return the output name of a layer's buffer with the row that a step adds; it is bound to the memory of the input."""
    return f"grown_{part}.{layer}"


def state_names(states: Sequence[LayerState], when: str) -> list[str]:
    """Return the input names ("past") or output names ("present") of the states of layers without a KV cache."""
    layers = [state.layer for state in states]
    return [f"{when}_state.{layer}.{layers[:index].count(layer)}" for index, layer in enumerate(layers)]


def kept_name(cut: int) -> str:
    """Return the output name of the kept indices of the plan's cut with this index."""
    return f"kept.{cut}"


def kept_names(plan: KeepPlan, *sites: str) -> list[str]:
    """Return the output names of the kept indices of the plan's cuts at the given sites."""
    return [kept_name(index) for index, cut in enumerate(plan.cuts) if cut.site in sites]


def cache_slots(plan: KeepPlan, local: Sequence[int] = (), states: Sequence[LayerState] = ()) -> list[tuple[int, str]]:
    """Return the layer and the part of each cache, in graph order; `local`: the layers whose attention has a window.

    Keys and values of all layers without `states` come first. Local layers whose caches hold the same tokens share one cache of
    places. If the input cut weighs, all layers share one cache of weights.
    """
    layers = [(layer, part) for layer in attention_layers(plan.layers, states) for part in ("key", "value")]
    places = [(layer, PLACE) for layer in sorted(set(plan.place_layers(local).values()))]
    return layers + places + ([(layers[0][0], WEIGHT)] if plan.weighs else [])


def place_heads(plan: KeepPlan, layer: int, kv_heads: int) -> int:
    """Return the columns of a layer's cache of places: one for each head if each keeps tokens of its own, otherwise one."""
    return kv_heads if any(cut.layer == layer for cut in plan.cache_cuts) else 1


def decoder_inputs(
    plan: KeepPlan, local: Sequence[int] = (), states: Sequence[LayerState] = (), *, tiers: bool = False, rows: bool = False
) -> list[str]:
    """Return the decoder's input names in graph order.

    `local` and `states` as in `cache_slots`, `tiers`: whether there are several tiers. `rows`: whether caches may be longer than
    what is real, as ROWS says.
    """
    slots = cache_slots(plan, local, states)
    names = [f"{name}_embeds" for name in SEGMENTS] + [f"{name}_positions" for name in SEGMENTS]
    names += [
        "visual_order",
        *([WEIGHTS] if plan.weighs else []),
        *([TIER] if tiers else []),
        *([GROUPS] if plan.follows_attention else []),
        *([ROWS] if rows else []),
    ]
    names += [cache_name(*slot) for slot in slots] + [visual_cache_name(*slot) for slot in slots]
    return names + state_names(states, "past")


def length_slots(inputs: Mapping[str, Tensor], slots: Sequence[tuple[int, str]]) -> tuple[int, ...]:
    """Return the index of the first of the `slots` for each length of visual caches, in the order of ROWS; () without ROWS.

    `inputs`: those of the decoder, as recorded in the manifest.
    """
    first: dict[int | str, int] = {}
    for index, slot in enumerate(slots):
        first.setdefault(inputs[visual_cache_name(*slot)].shape[0], index)
    return tuple(first.values()) if ROWS in inputs else ()


def decoder_outputs(plan: KeepPlan, local: Sequence[int] = (), states: Sequence[LayerState] = ()) -> list[str]:
    """Return the decoder's output names in graph order; `local` and `states` as in `cache_slots`."""
    names = ["logits", *(rows_name(*slot) for slot in cache_slots(plan, local, states)), *state_names(states, "present")]
    return [*names, *kept_names(plan, "layer", "cache"), *(["attention_split"] if plan.follows_attention else [])]
