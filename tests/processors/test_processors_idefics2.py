"""Idefics2's image processor: bit for bit transformers' own where all views are of one size, refused elsewhere."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from PIL import Image
from processor_parity import SIZES, assert_patches, noise, pair

from edgeprune.errors import BundleError, ImageError
from edgeprune.plan import Geometry, View
from edgeprune.processors import image_spec

KIND = "Idefics2ImageProcessor"
ADDED = {"patch_size": 14, "latents": 64}
SMALL = {"size": {"shortest_edge": 45, "longest_edge": 120}}
IDEFICS2 = {
    "do_convert_rgb": True,
    "do_image_splitting": True,
    "do_normalize": True,
    "do_pad": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "Idefics2ImageProcessor",
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "Idefics2Processor",
    "resample": 2,
    "rescale_factor": 0.00392156862745098,
    "size": {"longest_edge": 980, "shortest_edge": 378},
}


def views_of(processor: Any, image: Image.Image) -> tuple[Any, bool]:
    """Return the views that transformers makes, and whether they are of one size."""
    expected = processor(images=image)
    return expected["pixel_values"][0], bool(np.all(expected["pixel_attention_mask"]))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "settings",
    [
        SMALL,
        SMALL | {"resample": 3, "image_mean": [0.1, 0.2, 0.3]},
        {"size": {"height": 60, "width": 45}},
        {"size": {"height": 60, "width": 45}, "do_image_splitting": True},
    ],
)
def test_patches_equal_transformers(settings: dict[str, Any], size: tuple[int, int]) -> None:
    spec, processor = pair(KIND, ADDED, **settings)
    image = noise(*size)
    if min(size) == 1 and settings.get("do_image_splitting"):
        with pytest.raises(ImageError, match="other sizes"):
            spec.geometry(*size)
        return
    views, alike = views_of(processor, image)
    assert alike
    assert_patches(spec, [image], views, 14)
    made = spec.geometry(*size)
    assert (made.height, made.width, made.patch, made.merge) == (*size, 14, 1)
    assert made.tokens == 64 * len(views)
    assert (made.layout[-1].height, made.layout[-1].width) == views.shape[2:]
    assert spec.canvas(image).size == views.shape[:1:-1]


def test_split_images_are_taken_where_views_are_of_one_size() -> None:
    spec, processor = pair(KIND, ADDED, do_image_splitting=True, **SMALL)
    taken = 0
    rng = np.random.default_rng(7)
    for height, width in np.exp(rng.uniform(1, np.log(500), (150, 2))).astype(int).tolist():
        image = noise(height, width)
        views, alike = views_of(processor, image)
        taken += alike
        if alike:
            assert_patches(spec, [image], views, 14)
            assert len(spec.geometry(height, width).layout) == 5
        else:
            with pytest.raises(ImageError, match=rf"quarters of a {height}x{width} image become other sizes"):
                spec.patches([image])
    assert 30 < taken < 120


def test_real_settings() -> None:
    spec = image_spec(IDEFICS2 | ADDED)
    _, processor = pair(KIND, ADDED, do_image_splitting=True)
    made = spec.geometry(1470, 1960)
    assert made.layout[1:] == (
        View(0, 490, 367, 490, 1, 64),
        View(367, 0, 368, 490, 1, 64),
        View(367, 490, 368, 490, 1, 64),
        View(0, 0, 735, 980, 1, 64),
    )
    assert made.tokens == 320
    image = noise(1470, 1960)
    assert_patches(spec, [image], views_of(processor, image)[0], 14)
    with pytest.raises(ImageError, match="The quarters of a 480x640 image become other sizes"):
        spec.geometry(480, 640)
    whole = image_spec(IDEFICS2 | ADDED | {"do_image_splitting": False})
    assert whole.geometry(480, 640) == Geometry(480, 640, 14, 1, (View(0, 0, 480, 640, 1, 64),))
    assert whole.default_size() is None
    assert not whole.spatial


def test_a_fixed_size_is_the_default() -> None:
    assert image_spec(IDEFICS2 | ADDED | {"size": {"height": 70, "width": 98}}).default_size() == (70, 98)


@pytest.mark.parametrize(
    "change",
    [{"mean": (0.5, 0.5, 0.51)}, {"std": (0.5, 0.51, 0.5)}, {"resample": 3}, {"longest": 112}, {"splits": False}, {"shortest": 90}],
)
def test_parity_check_can_fail(change: dict[str, Any]) -> None:
    spec, processor = pair(KIND, ADDED, do_image_splitting=True, **SMALL)
    image = noise(200, 300)
    views, _ = views_of(processor, image)
    assert_patches(spec, [image], views, 14)
    with pytest.raises(AssertionError):
        assert_patches(dataclasses.replace(spec, **change), [image], views, 14)  # type: ignore[type-var]


def test_there_is_no_video() -> None:
    spec, _ = pair(KIND, ADDED, **SMALL)
    with pytest.raises(ImageError, match="takes one image, not 2 frames"):
        spec.geometry(56, 56, frames=2)
    with pytest.raises(ImageError, match="takes one image, not 2 frames"):
        spec.patches([noise(56, 56)] * 2)


def test_images_need_pixels_and_three_colours() -> None:
    spec, _ = pair(KIND, ADDED, do_image_splitting=True, **SMALL)
    with pytest.raises(ImageError, match="is empty"):
        spec.geometry(0, 5)
    with pytest.raises(ImageError, match="read_image"):
        spec.patches([Image.new("L", (240, 240))])


@pytest.mark.parametrize("suffix", ["", "Fast", "Pil"])
def test_class_names(suffix: str) -> None:
    assert image_spec({"image_processor_type": KIND + suffix} | ADDED) == pair(KIND, ADDED)[0]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"do_pad": False}, "do_pad is False, but must be true"),
        ({"do_resize": False}, "do_resize is False"),
        ({"do_convert_rgb": False}, "do_convert_rgb is False"),
        ({"do_image_splitting": "yes"}, "do_image_splitting is 'yes'"),
        ({"size": {"longest_edge": 980}}, "size is {'longest_edge': 980}, but must be shortest_edge and longest_edge"),
        ({"size": 378}, "size is {'shortest_edge': 378}"),
        ({"size": {"shortest_edge": 10, "longest_edge": 980}}, "patch_size is 14, but must be at most the size of a view (10)"),
        ({"size": {"shortest_edge": 378, "longest_edge": 70}}, "shortest_edge is 378, but must be longest_edge (70) or less"),
        ({"latents": None}, "latents is None, but must be a positive integer"),
        ({"patch_size": None}, "patch_size is None"),
        ({"merge_size": 2}, "merge_size is 2, but must be 1"),
    ],
)
def test_config_that_cannot_be_honoured(config: dict[str, Any], words: str) -> None:
    with pytest.raises(BundleError) as caught:
        image_spec(IDEFICS2 | ADDED | config)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
