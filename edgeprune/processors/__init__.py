"""Image processors: from RGB pictures to the patches that a vision encoder takes, as transformers' own do, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgeprune.processors import anyres, idefics2, idefics3, qwen, square, tiles
from edgeprune.processors.base import ImageSpec
from edgeprune.processors.fitting import FITS, fit
from edgeprune.processors.settings import refusal

__all__ = ["FITS", "ImageSpec", "fit", "image_spec"]

_SPECS: dict[str, type[ImageSpec]] = {
    **dict.fromkeys(qwen.KINDS, qwen.GridSpec),
    **dict.fromkeys(square.KINDS, square.SquareSpec),
    **dict.fromkeys(idefics2.KINDS, idefics2.Idefics2Spec),
    **dict.fromkeys(idefics3.KINDS, idefics3.Idefics3Spec),
    **dict.fromkeys(anyres.KINDS, anyres.AnyResSpec),
    **dict.fromkeys(tiles.KINDS, tiles.TileSpec),
}


def image_spec(settings: Mapping[str, Any]) -> ImageSpec:
    """Return the spec that a preprocessor_config.json asks for; raise BundleError for what cannot be honoured."""
    kind = settings.get("image_processor_type", qwen.KINDS[0])
    if kind not in _SPECS:
        raise refusal("image_processor_type", kind, " or ".join(_SPECS))
    return _SPECS[kind].from_settings(settings)
