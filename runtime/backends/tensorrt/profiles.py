"""Optimization profiles: the shape ranges for which engines are built.

A decoder has one profile for prefill with an image in each tier, one for text prefill, and one for decode steps of exactly one
token, if it is told how many rows of its caches are real (ROWS); other decoders take steps as text. The visual segment has a fixed
length with an image and length 0 without, so that every keep budget is a constant. Ranges are keyed by the names of the graph's
dynamic dimensions, as recorded in the manifest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgeprune.bundle import DECODER, PREDICTOR, SELECTOR, VISION, VISION_UNPRUNED, Bundle, Tensor, tier_selector
from edgeprune.bundle.graph_io import ROWS, TIER
from edgeprune.errors import UsageError
from edgeprune.plan import KeepPlan
from edgeprune.plan.tiers import cache_group
from edgeprune.runtime.backends.kv_cache import CAPACITY

IMAGE_PREFILL, TEXT, STEP = 0, 1, -1  # indices of the decoder's profiles; image prefills of lower tiers follow TEXT
Range = tuple[int, int, int]  # minimum, optimum, maximum
Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
ShapeProfile = Mapping[str, Shapes]  # by input name


@dataclass(frozen=True)
class ProfileLimits:
    """The maximum lengths that the engines of a bundle support.

    `context`: text tokens in the KV caches, generated ones included. `turn`: new text tokens in one forward pass. `images`: images
    in one conversation. `unpruned`: also support unpruned answers, whose visual tokens are run as text.
    """

    context: int = 2048
    turn: int = 512
    images: int = 1
    unpruned: bool = False

    def __post_init__(self) -> None:
        if self.turn < 1 or self.images < 1 or self.context < self.turn:
            raise UsageError(
                f"Engines for {self.context} tokens of context, {self.turn} a turn and {self.images} images make no sense.",
                hint="Give at least one image and one token, and no more tokens a turn than of context.",
            )


def shape_profiles(bundle: Bundle, limits: ProfileLimits) -> dict[str, tuple[ShapeProfile, ...]]:
    """Return the profiles of each graph that becomes an engine, by graph path. A graph of fixed shapes has one empty profile.

    The vision encoder without cuts is included only with `limits.unpruned`. The token embedding is not: its rows are read from its
    file, where as an engine the whole table would take memory.
    """
    selectors, graphs = map(tier_selector, bundle.manifest.tiers[1:]), bundle.manifest.graphs
    plans, layers = (bundle.plan, *bundle.lower_tiers), bundle.manifest.decoder.attention_layers
    ranges: dict[str, tuple[Mapping[str, Range], ...]] = {
        VISION: ({},),
        **({VISION_UNPRUNED: ({},)} if limits.unpruned else {}),
        **{name: ({"words": (1, min(16, limits.turn), limits.turn)},) for name in (SELECTOR, *selectors)},
        PREDICTOR: ({},),
        DECODER: decoder_ranges(plans, limits, layers, steps=ROWS in graphs[DECODER].inputs),
    }
    return {name: tuple(_profile(graphs[name].inputs, each) for each in ranges[name]) for name in ranges if name in graphs}


def image_prefill_of(tier: int) -> int:
    """Return the index of the decoder's profile for a prefill with an image under a tier."""
    return 1 + tier if tier else IMAGE_PREFILL


def decoder_ranges(
    plans: Sequence[KeepPlan], limits: ProfileLimits, layers: Sequence[int] | None = None, *, steps: bool = False
) -> tuple[dict[str, Range], ...]:
    """Return the ranges of each decoder profile in order.

    `plans`: the plans of all tiers. `layers`: the layers with a KV cache, by default all. `steps`: whether decode steps have a
    profile of their own, the last.
    """
    layers = range(plans[0].layers) if layers is None else layers
    turns = [_image_prefill_profile(plans, limits, layers, tier) for tier in range(len(plans))]
    text = _text_profile(plans, limits, layers)
    return (turns[0], text, *turns[1:], *([_step_profile(text)] if steps else []))


def _image_prefill_profile(plans: Sequence[KeepPlan], limits: ProfileLimits, layers: Sequence[int], tier: int) -> dict[str, Range]:
    # The ranges of a prefill with an image under a tier: text, visual tokens, text.
    ranges = {
        "prefix": (0, min(16, limits.turn), limits.turn),
        "visual": (plans[tier].tokens_entering_decoder,) * 3,
        "suffix": (1, min(32, limits.turn), limits.turn),
        "past_text": (1, 1, 1 + limits.context),
        TIER: (1 + tier,) * 3,
    }
    ranges |= {name: (1, 1, 1 + (limits.images - 1) * stored) for name, stored in _caches(plans, layers).items()}
    return ranges | {"text": _text(ranges)}


def _text_profile(plans: Sequence[KeepPlan], limits: ProfileLimits, layers: Sequence[int]) -> dict[str, Range]:
    # The ranges of a forward pass without an image. The optimum is a decode step.
    image_tokens = plans[0].geometry.tokens if limits.unpruned else 0
    context = limits.context + image_tokens * limits.images
    ranges = {
        "prefix": (0, 0, limits.turn + image_tokens if limits.unpruned else 0),
        "visual": (0, 0, 0),
        "suffix": (1, 1, limits.turn),
        "past_text": (1, 1 + context // 4, 1 + context),
        TIER: (1, 1, 1),  # no cut applies
    }
    ranges |= {name: (1, 1 + stored, 1 + limits.images * stored) for name, stored in _caches(plans, layers).items()}
    return ranges | {"text": _text(ranges)}


def _step_profile(text: Mapping[str, Range]) -> dict[str, Range]:
    # The ranges of one token on text caches of a capacity, given those of text.
    minimum, optimum, maximum = (capacity_for(rows) for rows in text["past_text"])
    ranges = {**text, "prefix": (0, 0, 0), "suffix": (1, 1, 1), "past_text": (minimum, optimum, maximum)}
    return ranges | {"text": _text(ranges)}


def capacity_for(rows: int) -> int:
    """Return the capacity of the text caches that a step on `rows` of them binds: it writes one more."""
    return (rows // CAPACITY + 1) * CAPACITY


def shapes_of(shape: tuple[int | str, ...], ranges: Mapping[str, Range]) -> Shapes:
    """Return the minimum, optimum and maximum shape of an input. `ranges`: by the name of a dynamic dimension."""
    minimum, optimum, maximum = (tuple(axis if isinstance(axis, int) else ranges[axis][end] for axis in shape) for end in range(3))
    return minimum, optimum, maximum


def _profile(inputs: Mapping[str, Tensor], ranges: Mapping[str, Range]) -> ShapeProfile:
    dynamic = {name: at.shape for name, at in inputs.items() if any(isinstance(axis, str) for axis in at.shape)}
    return {name: shapes_of(shape, ranges) for name, shape in dynamic.items()}


def _caches(plans: Sequence[KeepPlan], layers: Sequence[int]) -> dict[str, int]:
    # Cached visual tokens by dimension name. Layers whose caches have equal lengths share a dimension. The first tier has the
    # longest caches.
    stages = {cache_group(plans, layer): plans[0].tokens_cached(layer) for layer in layers}
    return {f"past_visual_{number}": stored for number, stored in enumerate(stages.values())}


def _text(ranges: Mapping[str, Range]) -> Range:
    # All text, past and new, without the null row of the text cache.
    minimum, optimum, maximum = (sum(ranges[name][end] for name in ("past_text", "prefix", "suffix")) - 1 for end in range(3))
    return minimum, optimum, maximum
