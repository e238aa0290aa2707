"""transformers' image processor of LFM2-VL, which needs torchvision, with Pillow in the one place where it resizes.

Everything else of it runs as it is: the choice of tiles, the sizes, the patches and their masks.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import image_processing_backends

_MODULE = "transformers.models.lfm2_vl.image_processing_lfm2_vl"
_TORCHVISION = ("torchvision", "torchvision.transforms", "torchvision.transforms.v2", "torchvision.transforms.v2.functional")


class PillowBackend:
    """What the class inherits from TorchvisionBackend, for images [n, 3, height, width] of uint8."""

    def __init__(self, **settings: Any) -> None:
        for name, value in settings.items():
            setattr(self, name, value)

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


def upstream_processor(settings: Path | dict[str, Any]) -> Callable[[list[Image.Image]], dict[str, torch.Tensor]]:
    """Return a function from the images of one prompt to what the model takes, by the settings of a preprocessor_config.json."""
    given = json.loads(settings.read_text()) if isinstance(settings, Path) else settings
    kind = upstream_class()
    names = kind.valid_kwargs.__annotations__.keys() | {"do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"}
    names |= {"resample", "do_resize"}
    chosen = {name: given.get(name, getattr(kind, name)) for name in names if hasattr(kind, name)}

    def process(images: list[Image.Image]) -> dict[str, torch.Tensor]:
        processor = kind(**chosen)
        made = processor._preprocess([pixels_of(image) for image in images], **chosen, return_tensors="pt", disable_grouping=True)
        return {name: made[name] for name in ("pixel_values", "pixel_attention_mask", "spatial_shapes")}

    return process


def pixels_of(image: Image.Image) -> torch.Tensor:
    """Return an image as uint8 [3, height, width]."""
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)


def image_of(pixels: torch.Tensor) -> Image.Image:
    """Return uint8 [3, height, width] as an image."""
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
