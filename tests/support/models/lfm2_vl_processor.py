"""transformers' image processor of LFM2-VL, which needs torchvision, with Pillow in the one place where it resizes.

Everything else of it runs as it is: the choice of tiles, the sizes, the patches and their masks.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import BatchFeature, image_processing_backends

_MODULE = "transformers.models.lfm2_vl.image_processing_lfm2_vl"
_BASE = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std", "resample", "do_resize")
_TORCHVISION = ("torchvision", "torchvision.transforms", "torchvision.transforms.v2", "torchvision.transforms.v2.functional")


class PillowBackend:
    """What the class inherits from TorchvisionBackend, for images [n, 3, height, width] of uint8."""

    def __init__(self, **settings: Any) -> None:
        for name, value in settings.items():
            setattr(self, name, value)

    def __call__(self, images: Sequence[Any], **changed: Any) -> BatchFeature:
        """Return what the model takes, given the images of one prompt or a list for each prompt."""
        flat = [image for each in images for image in (each if isinstance(each, list) else [each])]
        kind: Any = type(self)
        names = {*kind.valid_kwargs.__annotations__, *_BASE}
        settings = {name: changed.get(name, getattr(self, name)) for name in names if hasattr(self, name)}
        made: BatchFeature = kind._preprocess(
            self, [pixels_of(image) for image in flat], **settings, return_tensors="pt", disable_grouping=True
        )
        return made

    def fetch_images(self, images: Any) -> Any:
        """Return the images, which are loaded already."""
        return images

    def resize(self, images: torch.Tensor, size: Any, resample: Any = None, antialias: bool = True) -> torch.Tensor:
        """Return the images resized by Pillow."""
        shape = (size.width, size.height)
        return torch.stack([pixels_of(image_of(image).resize(shape, Image.Resampling(resample))) for image in images])

    def rescale_and_normalize(
        self, images: torch.Tensor, rescale: bool, factor: float, normalize: bool, mean: Sequence[float], std: Sequence[float]
    ) -> torch.Tensor:
        """Return the images in the order of TorchvisionBackend's steps."""
        assert rescale and normalize
        means, deviations = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (mean, std))
        return ((images.double() * factor - means) / deviations).float()


@cache
def upstream_class() -> Any:
    """Return the class, imported with stand-ins for torchvision."""
    stubs = {name: mock.MagicMock(spec=ModuleType) for name in _TORCHVISION}
    for name, module in stubs.items():
        module.__path__ = []
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(stubs[parent], child, module)
    with (
        mock.patch.dict(sys.modules, stubs),
        mock.patch.object(image_processing_backends, "TorchvisionBackend", PillowBackend),
        mock.patch.object(transformers.utils, "auto_docstring", lambda kind: kind),
    ):
        return importlib.import_module(_MODULE).Lfm2VlImageProcessor


def upstream_processor(settings: Path | dict[str, Any]) -> Any:
    """Return transformers' image processor of the settings in a preprocessor_config.json."""
    given = json.loads(settings.read_text()) if isinstance(settings, Path) else settings
    return upstream_class()(**given)


def pixels_of(image: Image.Image) -> torch.Tensor:
    """Return an image as uint8 [3, height, width]."""
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)


def image_of(pixels: torch.Tensor) -> Image.Image:
    """Return uint8 [3, height, width] as an image."""
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
