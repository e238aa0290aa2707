"""Image processors from RGB images to patches, equivalent to those of transformers. Imports neither torch nor bundle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from edgeprune.processors.base import FITS, ImageSpec, fit
from edgeprune.processors.settings import refusal, variants

__all__ = ["FITS", "ImageSpec", "fit", "image_spec", "named_processor", "read_image_spec"]

_QWEN = variants("Qwen2VLImageProcessor", "Qwen2_5_VLImageProcessor", "Qwen3VLImageProcessor")
_SQUARES = variants("CLIPImageProcessor", "Gemma3ImageProcessor", "LlavaImageProcessor", "SiglipImageProcessor")
# Modules are imported on demand: a runtime that serves one bundle needs one.
_SPECS: dict[str, str] = {
    **dict.fromkeys(_QWEN, "qwen:GridSpec"),
    **dict.fromkeys(_SQUARES, "square:SquareSpec"),
    **dict.fromkeys(variants("Idefics2ImageProcessor"), "idefics:Idefics2Spec"),
    **dict.fromkeys(variants("Idefics3ImageProcessor", "SmolVLMImageProcessor"), "idefics:Idefics3Spec"),
    **dict.fromkeys(variants("LlavaNextImageProcessor", "LlavaOnevisionImageProcessor"), "tiling:AnyResSpec"),
    **dict.fromkeys(variants("GotOcr2ImageProcessor"), "tiling:TileSpec"),
    **dict.fromkeys(variants("PixtralImageProcessor"), "pixtral:PixtralSpec"),
    **dict.fromkeys(variants("Lfm2VlImageProcessor"), "lfm2_vl:NaflexSpec"),
}

# By model_type: the class that transformers takes where the settings name none.
_BY_FAMILY = {
    "gemma3": "Gemma3ImageProcessor",
    "idefics2": "Idefics2ImageProcessor",
    "idefics3": "Idefics3ImageProcessor",
    "internvl": "GotOcr2ImageProcessor",
    "lfm2_vl": "Lfm2VlImageProcessor",
    "llava": "LlavaImageProcessor",
    "llava_next": "LlavaNextImageProcessor",
    "llava_onevision": "LlavaOnevisionImageProcessor",
    "mistral3": "PixtralImageProcessor",
    "paligemma": "SiglipImageProcessor",
    "qwen2_5_vl": "Qwen2VLImageProcessor",
    "qwen2_vl": "Qwen2VLImageProcessor",
    "qwen3_5": "Qwen2VLImageProcessor",
    "qwen3_vl": "Qwen2VLImageProcessor",
    "smolvlm": "SmolVLMImageProcessor",
    "vipllava": "CLIPImageProcessor",
}


def named_processor(settings: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    """Return the settings of a family's image processor with the name of its class, which older checkpoints leave out."""
    default = _BY_FAMILY.get(model_type)
    return dict(settings) if default is None else {"image_processor_type": default, **settings}


def image_spec(settings: Mapping[str, Any]) -> ImageSpec:
    """Return the spec of the settings in a preprocessor_config.json; raise BundleError for unsupported ones."""
    kind = settings.get("image_processor_type", _QWEN[0])
    if kind not in _SPECS:
        raise refusal("image_processor_type", kind, " or ".join(_SPECS))
    module, name = _SPECS[kind].split(":")
    spec: type[ImageSpec] = getattr(import_module(f"{__name__}.{module}"), name)
    return spec.from_settings(settings)


def read_image_spec(path: Path) -> ImageSpec:
    """Return the `image_spec` of the preprocessor_config.json at `path`."""
    return image_spec(json.loads(path.read_text(encoding="utf-8")))
