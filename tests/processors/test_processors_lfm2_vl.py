"""LFM2-VL's image processor: views, tiles and patches of transformers' own, which is run with Pillow in place of torchvision."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from lfm2_vl_processor import image_of, pixels_of, upstream_processor
from PIL import Image
from processor_parity import noise

from edgeprune.errors import BundleError, ImageError
from edgeprune.processors import fit, image_spec

PUBLISHED = {
    "do_image_splitting": True,
    "do_normalize": True,
    "do_pad": True,
    "do_rescale": True,
    "do_resize": True,
    "downsample_factor": 2,
    "encoder_patch_size": 16,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "Lfm2VlImageProcessorFast",
    "image_std": [0.5, 0.5, 0.5],
    "max_image_tokens": 256,
    "max_pixels_tolerance": 2.0,
    "max_tiles": 10,
    "min_image_tokens": 64,
    "min_tiles": 2,
    "resample": 2,
    "rescale_factor": 1 / 255,
    "tile_size": 512,
    "use_thumbnail": True,
}
SMALL = PUBLISHED | {"encoder_patch_size": 8, "min_image_tokens": 4, "max_image_tokens": 8, "tile_size": 32}
SETTINGS: list[dict[str, Any]] = [
    SMALL,
    SMALL | {"use_thumbnail": False, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]},
    SMALL | {"do_image_splitting": False},
    SMALL | {"min_tiles": 1, "max_tiles": 4, "resample": 3, "max_pixels_tolerance": 1.0},
    SMALL | {"min_tiles": 1, "max_tiles": 1},
]
SIZES = [(1, 1), (9, 31), (37, 53), (64, 96), (96, 64), (100, 100), (48, 320), (320, 33), (200, 160), (641, 479)]


def views_of(processor: Any, image: Image.Image) -> tuple[np.ndarray, list[list[int]]]:
    """Return transformers' patches without padding, and the rows and columns of each view."""
    made = processor([image])
    return made["pixel_values"][made["pixel_attention_mask"].bool()].numpy(), made["spatial_shapes"].tolist()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("settings", SETTINGS)
def test_patches_and_views_equal_transformers(settings: dict[str, Any], size: tuple[int, int]) -> None:
    image, spec = noise(*size), image_spec(settings)
    patches, grids = views_of(upstream_processor(settings), image)
    np.testing.assert_allclose(spec.patches([image]), patches, atol=1e-6)
    made = spec.geometry(*size)
    assert [[2 * view.rows, 2 * view.columns] for view in made.layout] == grids
    canvas = spec.canvas(image)
    assert all(view.top + view.height <= canvas.height and view.left + view.width <= canvas.width for view in made.layout)


@pytest.mark.parametrize("size", [(480, 640), (1080, 1920), (1500, 500), (512, 512), (724, 724), (725, 725), (3000, 600)])
def test_the_published_settings_make_the_same_views(size: tuple[int, int]) -> None:
    made = upstream_processor(PUBLISHED)([noise(*size)])["spatial_shapes"].tolist()
    assert [[2 * view.rows, 2 * view.columns] for view in image_spec(PUBLISHED).geometry(*size).layout] == made


@pytest.mark.parametrize("size", [(64, 96), (31, 200), (500, 333)])
def test_torch_resizes_as_pillow_but_for_one_level(size: tuple[int, int]) -> None:
    # What torchvision's resize does with bytes on a CPU.
    image = noise(320, 240)
    resized = torch.nn.functional.interpolate(pixels_of(image)[None], size=size, mode="bilinear", antialias=True)[0]
    ours = pixels_of(image.resize(size[::-1], Image.Resampling.BILINEAR))
    assert (resized.int() - ours.int()).abs().max() <= 1
    assert image_of(resized).size == size[::-1]


def test_a_size_of_one_view_is_kept_for_all_images() -> None:
    spec = image_spec(SMALL | {"fixed_size": [32, 64]})
    assert spec.geometry(320, 640).layout == spec.geometry(32, 64).layout
    assert (spec.geometry(320, 640).height, spec.geometry(320, 640).width) == (32, 64)
    assert fit(noise(320, 640), spec.geometry(32, 64), "exact", spec).size == (640, 320)
    split = image_spec(SMALL | {"fixed_size": [64, 96]})
    assert len(split.geometry(64, 96).layout) == 7  # tiles stay tiles
    other = image_spec(SMALL | {"fixed_size": [64, 64]})
    assert other.geometry(64, 64).height == 32  # what the processor changes stays changed


def test_only_one_number_of_tokens_has_a_default_size() -> None:
    assert image_spec(SMALL).default_size() is None
    assert image_spec(SMALL | {"do_image_splitting": False, "min_image_tokens": 4, "max_image_tokens": 4}).default_size() == (
        32,
        32,
    )


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"min_image_tokens": 9}, "min_image_tokens"),
        ({"min_tiles": 11}, "min_tiles"),
        ({"max_pixels_tolerance": 0}, "max_pixels_tolerance"),
        ({"tile_size": 24}, "merge_size"),
        ({"do_pad": False}, "do_pad"),
        ({"encoder_patch_size": 0}, "encoder_patch_size"),
    ],
)
def test_other_settings_are_refused(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(BundleError, match=words):
        image_spec(SMALL | changed)


def test_videos_and_empty_images_are_refused() -> None:
    spec = image_spec(SMALL)
    with pytest.raises(ImageError, match="one image"):
        spec.geometry(64, 64, 4, 2.0)
    with pytest.raises(ImageError, match="empty"):
        spec.geometry(0, 64)
