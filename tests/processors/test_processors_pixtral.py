"""Pixtral's image processor: bit for bit transformers' own, with visual tokens of one patch or of several."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from PIL import Image
from processor_parity import SIZES, assert_patches, noise
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

from edgeprune.errors import BundleError, ImageError
from edgeprune.plan import Geometry
from edgeprune.processors import fit, image_spec
from edgeprune.processors.pixtral import PixtralSpec

MISTRAL_SMALL = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "PixtralImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "patch_size": 14,
    "processor_class": "PixtralProcessor",
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"longest_edge": 1540},
}


def both(patch: int, merge: int, **settings: Any) -> tuple[PixtralSpec, PixtralImageProcessorPil]:
    """Return our spec and transformers' processor, whose patch is that of a visual token."""
    processor = PixtralImageProcessorPil(patch_size={"height": patch * merge, "width": patch * merge}, **settings)
    spec = image_spec(json.loads(processor.to_json_string()) | {"patch_size": patch, "merge_size": merge})
    assert isinstance(spec, PixtralSpec)
    return spec, processor


@pytest.mark.parametrize("size", [size for size in SIZES if max(size) < 2600] + [(1540, 1541), (2001, 1333)])
@pytest.mark.parametrize(
    ("patch", "merge", "settings"),
    [
        (14, 2, {"size": {"longest_edge": 150}}),
        (16, 1, {"size": {"longest_edge": 150}, "resample": 2, "image_std": [0.1, 0.2, 0.3]}),
        (14, 2, {"size": {"height": 90, "width": 200}}),
        (14, 2, {"size": 150}),
    ],
)
def test_patches_equal_transformers(patch: int, merge: int, settings: dict[str, Any], size: tuple[int, int]) -> None:
    spec, processor = both(patch, merge, **settings)
    image = noise(*size)
    made = processor(images=[image])
    assert_patches(spec, [image], made["pixel_values"], patch)
    geometry = spec.geometry(*size)
    assert (geometry.height, geometry.width) == tuple(made["image_sizes"][0]) == spec.canvas(image).size[::-1]
    assert geometry.tokens == geometry.height * geometry.width // (patch * merge) ** 2 and geometry.views == ()


@pytest.mark.parametrize("change", [{"mean": (0.5, 0.5, 0.5)}, {"resample": 2}, {"height": 100, "width": 100}, {"merge": 1}])
def test_parity_check_can_fail(change: dict[str, Any]) -> None:
    spec, processor = both(14, 2, size={"longest_edge": 150})
    image = noise(200, 300)
    views = processor(images=[image])["pixel_values"]
    assert_patches(spec, [image], views, 14)
    with pytest.raises(AssertionError):
        assert_patches(dataclasses.replace(spec, **change), [image], views, 14)


def test_real_settings() -> None:
    spec = image_spec(MISTRAL_SMALL | {"merge_size": 2})
    assert spec.geometry(480, 640) == Geometry(504, 644, 14, 2)  # rounded up
    assert spec.geometry(3000, 4000) == Geometry(1176, 1540, 14, 2)  # shrunk to 1155 x 1540, and rounded up
    assert spec.geometry(1, 1) == Geometry(28, 28, 14, 2)
    assert spec.default_size() is None and spec.spatial
    assert image_spec({"image_processor_type": "PixtralImageProcessor", "patch_size": 16}).geometry(2000, 1000).height == 1024


def test_exact_takes_images_of_the_same_grid() -> None:
    spec = image_spec(MISTRAL_SMALL | {"merge_size": 2, "size": {"height": 336, "width": 448}})
    geometry = spec.geometry(336, 448)
    for size in [(1200, 1600), (320, 440), (1510, 2000)]:
        image = noise(*size)
        assert fit(image, geometry, "exact", spec) is image
    with pytest.raises(ImageError, match="300x300 image makes 308x308 px"):
        fit(noise(300, 300), geometry, "exact", spec)


def test_images_not_taken() -> None:
    spec, _ = both(14, 2, size={"longest_edge": 100})
    with pytest.raises(ImageError, match="3x900 image is too oblong: nothing would be left of it"):
        spec.geometry(900, 3)
    with pytest.raises(ImageError, match="is empty"):
        spec.geometry(0, 5)
    with pytest.raises(ImageError, match="takes one image, not 2 frames"):
        spec.geometry(50, 50, 2, 1.0)
    with pytest.raises(ImageError, match="takes one image, not 2 frames"):
        spec.patches([noise(30, 30)] * 2)
    with pytest.raises(ImageError, match="read_image"):
        spec.patches([Image.new("L", (60, 50))])


@pytest.mark.parametrize("suffix", ["", "Fast", "Pil"])
def test_class_names(suffix: str) -> None:
    assert image_spec(MISTRAL_SMALL | {"image_processor_type": "PixtralImageProcessor" + suffix}) == image_spec(MISTRAL_SMALL)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"do_resize": False}, "do_resize is False"),
        ({"do_center_crop": True}, "do_center_crop is True, but must be false"),
        ({"size": {"shortest_edge": 300}}, "size is {'shortest_edge': 300}, but must be longest_edge, or height and width"),
        ({"size": {"longest_edge": 300, "height": 300, "width": 300}}, "but must be longest_edge, or height and width"),
        ({"size": {"longest_edge": 0}}, "size is"),
        ({"patch_size": {"height": 14, "width": 14}}, "patch_size is"),
        ({"merge_size": 0}, "merge_size is 0"),
    ],
)
def test_config_that_cannot_be_honoured(config: dict[str, Any], words: str) -> None:
    with pytest.raises(BundleError) as caught:
        image_spec(MISTRAL_SMALL | config)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
