"""Optimization profiles: for which lengths an engine is built.

A decoder has two. The image turn has a visual segment of one fixed length, so that every kept count is a constant; text turns and
decode steps have none. Lengths are named as the graph's dimensions are, which the manifest records.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgeprune.bundle import DECODER, EMBED, PREDICTOR, SELECTOR, VISION, VISION_UNPRUNED, Bundle, Tensor, tier_selector
from edgeprune.bundle.graph_io import TIER
from edgeprune.errors import UsageError
from edgeprune.plan import KeepPlan
from edgeprune.plan.tiers import cache_group

IMAGE_PREFILL, TEXT = 0, 1  # the decoder's profiles; image turns of lower tiers follow
Range = tuple[int, int, int]  # least, usual, greatest
Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
ShapeProfile = Mapping[str, Shapes]  # by input


@dataclass(frozen=True)
class ProfileLimits:
    """How long things may get in the engines of a bundle.

    `context`: text tokens in the caches, generated ones included; `turn`: new text tokens in one forward; `images` in one
    conversation; `unpruned`: answers with pruning switched off too, whose image lies among the text.
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
    """Return the profiles of the graphs of a bundle, by path; a graph of fixed shapes has one, without inputs.

    The encoder without its cuts is wanted for unpruned answers alone.
    """
    selectors = map(tier_selector, bundle.manifest.tiers[1:])
    wanted: dict[str, tuple[Mapping[str, Range], ...]] = {
        VISION: ({},),
        **({VISION_UNPRUNED: ({},)} if limits.unpruned else {}),
        EMBED: ({"length": (1, min(16, limits.turn), limits.turn)},),
        **{name: ({"words": (1, min(16, limits.turn), limits.turn)},) for name in (SELECTOR, *selectors)},
        PREDICTOR: ({},),
        DECODER: decoder_ranges((bundle.plan, *bundle.lower_tiers), limits),
    }
    graphs = bundle.manifest.graphs
    return {name: tuple(_profile(graphs[name].inputs, ranges) for ranges in wanted[name]) for name in wanted if name in graphs}


def image_prefill_of(tier: int) -> int:
    """Return the number of the decoder's profile for an image turn under a tier."""
    return 1 + tier if tier else IMAGE_PREFILL


def decoder_ranges(plans: Sequence[KeepPlan], limits: ProfileLimits) -> tuple[dict[str, Range], ...]:
    """Return the ranges of the decoder's profiles, in their order, for the plans of its tiers."""
    turns = [image_prefill_profile(plans, limits, tier) for tier in range(len(plans))]
    return (turns[0], text_profile(plans, limits), *turns[1:])


def image_prefill_profile(plans: Sequence[KeepPlan], limits: ProfileLimits, tier: int = 0) -> dict[str, Range]:
    """Return the ranges of a forward with an image under a tier: text before it, the image, text after it."""
    usual = min(32, limits.turn)
    ranges = {
        "prefix": (0, min(16, limits.turn), limits.turn),
        "visual": (plans[tier].tokens_entering_decoder,) * 3,
        "suffix": (1, usual, limits.turn),
        "past_text": (1, 1, 1 + limits.context),
        TIER: (1 + tier,) * 3,
    }
    ranges |= {name: (1, 1, 1 + (limits.images - 1) * stored) for name, stored in _caches(plans).items()}
    return ranges | {"text": _text(ranges)}


def text_profile(plans: Sequence[KeepPlan], limits: ProfileLimits) -> dict[str, Range]:
    """Return the ranges of a forward without an image; the usual one is a decode step."""
    whole = plans[0].geometry.tokens if limits.unpruned else 0
    most = limits.turn + whole if limits.unpruned else 0
    context = limits.context + whole * limits.images
    ranges = {
        "prefix": (0, 0, most),
        "visual": (0, 0, 0),
        "suffix": (1, 1, limits.turn),
        "past_text": (1, 1 + context // 4, 1 + context),
        TIER: (1, 1, 1),  # nothing is cut
    }
    ranges |= {name: (1, 1 + stored, 1 + limits.images * stored) for name, stored in _caches(plans).items()}
    return ranges | {"text": _text(ranges)}


def shapes_of(shape: tuple[int | str, ...], ranges: Mapping[str, Range]) -> Shapes:
    """Return the least, usual and greatest shape of an input whose dynamic lengths have ranges."""
    least, usual, greatest = (tuple(axis if isinstance(axis, int) else ranges[axis][end] for axis in shape) for end in range(3))
    return least, usual, greatest


def _profile(inputs: Mapping[str, Tensor], ranges: Mapping[str, Range]) -> ShapeProfile:
    dynamic = {name: at.shape for name, at in inputs.items() if any(isinstance(axis, str) for axis in at.shape)}
    return {name: shapes_of(shape, ranges) for name, shape in dynamic.items()}


def _caches(plans: Sequence[KeepPlan]) -> dict[str, int]:
    # The lengths that the exporter named, one for each stage: layers that hold as many visual tokens share one. The first tier's
    # are the longest.
    stages = {cache_group(plans, layer): plans[0].tokens_cached(layer) for layer in range(plans[0].layers)}
    return {f"past_visual_{number}": stored for number, stored in enumerate(stages.values())}


def _text(ranges: Mapping[str, Range]) -> Range:
    # All text, past and new, without the null row of its cache.
    least, usual, greatest = (sum(ranges[name][end] for name in ("past_text", "prefix", "suffix")) - 1 for end in range(3))
    return least, usual, greatest
