"""GotOcr2's image processor, InternVL3's: the grid of tiles and its overview, bit for bit transformers' own."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
from PIL import Image
from processor_parity import SIZES, assert_patches, noise, pair

from edgeprune.errors import BundleError, ImageError
from edgeprune.plan import Geometry, View
from edgeprune.processors import fit, image_spec

INTERNVL3 = {
    "crop_size": None,
    "crop_to_patches": False,
    "data_format": "channels_first",
    "default_to_square": True,
    "device": None,
    "do_center_crop": None,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_processor_type": "GotOcr2ImageProcessorFast",
    "image_std": [0.229, 0.224, 0.225],
    "input_data_format": None,
    "max_patches": 12,
    "min_patches": 1,
    "processor_class": "InternVLProcessor",
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "return_tensors": None,
    "size": {"height": 448, "width": 448},
}
ADDED = {"patch_size": 14, "merge_size": 2}
KIND = "GotOcr2ImageProcessor"
SMALL = {"size": {"height": 56, "width": 56}, "crop_to_patches": True}
SETTINGS: list[dict[str, Any]] = [
    SMALL,
    SMALL | {"crop_to_patches": False},
    SMALL | {"max_patches": 1, "min_patches": 3},
    SMALL | {"max_patches": 6, "min_patches": 2, "resample": 2},
    SMALL | {"size": {"height": 84, "width": 56}, "image_mean": [0.485, 0.456, 0.406]},
    SMALL | {"size": 56},
]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("settings", SETTINGS)
def test_patches_and_tiles_equal_transformers(settings: dict[str, Any], size: tuple[int, int]) -> None:
    spec, processor = pair(KIND, ADDED, **settings)
    image = noise(*size)
    expected = processor(images=image)
    assert_patches(spec, [image], expected["pixel_values"], 14)
    made = spec.geometry(*size)
    assert (made.height, made.width, made.patch, made.merge) == (*size, 14, 2)
    assert [len(made.layout)] == expected["num_patches"]
    high, wide = expected["pixel_values"][0].shape[1:]
    assert {(view.rows, view.columns) for view in made.layout} == {(high // 28, wide // 28)}
    last = made.layout[-1]
    assert spec.canvas(image).size == (last.width, last.height)
    assert sum(view.height * view.width for view in made.layout[:-1]) in (0, last.height * last.width)


@pytest.mark.parametrize(("fewest", "most"), [(1, 12), (1, 6), (3, 7), (4, 4)])
def test_tiles_equal_transformers_everywhere(fewest: int, most: int) -> None:
    spec, processor = pair(
        KIND, ADDED, size={"height": 448, "width": 448}, crop_to_patches=True, min_patches=fewest, max_patches=most
    )
    rng = np.random.default_rng(7)
    sizes = np.exp(rng.uniform(0, np.log(5000), (500, 2))).astype(int).tolist()
    ties = [(448 * rows // 2, 448 * columns // 2) for rows, columns in itertools.product(range(1, 9), repeat=2)]
    for height, width in sizes + ties:
        assert len(spec.geometry(height, width).layout) == processor.get_number_of_image_patches(height, width), (height, width)


def test_real_settings() -> None:
    config = INTERNVL3 | ADDED
    spec = image_spec(config)
    assert spec.default_size() == (448, 448)
    assert spec.geometry(448, 448) == Geometry(448, 448, 14, 2)
    assert spec.geometry(448, 448).tokens == 256
    tiled = image_spec(config | {"crop_to_patches": True})
    assert tiled.default_size() is None
    made = tiled.geometry(480, 640)
    assert made.layout[:2] == (View(0, 0, 448, 448, 16, 16), View(0, 448, 448, 448, 16, 16))
    assert made.layout[-1] == View(0, 0, 1344, 1792, 16, 16)
    assert made.tokens == 13 * 256
    keep = ("size", "resample", "image_mean", "image_std")
    _, processor = pair(KIND, ADDED, crop_to_patches=True, **{key: INTERNVL3[key] for key in keep})
    assert_patches(tiled, [noise(480, 640)], processor(images=noise(480, 640))["pixel_values"], 14)
    assert tiled.spatial


@pytest.mark.parametrize("size", [(56, 56), (37, 153), (641, 479)])
def test_frames_are_single_tiles(size: tuple[int, int]) -> None:
    spec, processor = pair(KIND, ADDED, **SMALL)
    frames = [noise(*size).rotate(90 * turn) for turn in range(3)]
    views = [processor(images=frame, crop_to_patches=False)["pixel_values"][0] for frame in frames]
    assert_patches(spec, frames, views, 14)
    made = spec.geometry(*size, frames=3, fps=0.5)
    assert made.layout == tuple(View(0, 0, 56, 56, 2, 2, time=time) for time in range(3))
    assert (made.frames, made.fps) == (3, 0.5)
    assert spec.canvas(frames[0], frames=3).size == (56, 56)


@pytest.mark.parametrize(
    "change",
    [{"mean": (0.5, 0.5, 0.5)}, {"std": (0.3, 0.3, 0.3)}, {"resample": 2}, {"height": 28}, {"most": 3}, {"fewest": 7, "most": 7}],
)
def test_parity_check_can_fail(change: dict[str, Any]) -> None:
    spec, processor = pair(KIND, ADDED, **SMALL)
    image = noise(200, 300)
    views = processor(images=image)["pixel_values"]
    assert_patches(spec, [image], views, 14)
    with pytest.raises(AssertionError):
        assert_patches(dataclasses.replace(spec, **change), [image], views, 14)  # type: ignore[type-var]


def test_exact_takes_images_of_the_same_tiles() -> None:
    spec, _ = pair(KIND, ADDED, **SMALL)
    geometry = spec.geometry(200, 300)
    image = noise(400, 600)
    assert fit(image, geometry, "exact", spec) is image
    with pytest.raises(ImageError, match="200x300 px in 7 views"):
        fit(noise(600, 400), geometry, "exact", spec)
    video = spec.geometry(200, 300, frames=2, fps=1.0)
    assert fit(noise(600, 400), video, "exact", spec).size == (400, 600)


@pytest.mark.parametrize("suffix", ["", "Fast", "Pil"])
def test_class_names(suffix: str) -> None:
    assert image_spec({"image_processor_type": KIND + suffix, "patch_size": 16}) == pair(KIND, {"patch_size": 16})[0]


def test_images_need_pixels_and_three_colours() -> None:
    spec, _ = pair(KIND, ADDED, **SMALL)
    with pytest.raises(ImageError, match="is empty"):
        spec.geometry(0, 5)
    with pytest.raises(ImageError, match="read_image"):
        spec.patches([Image.new("L", (60, 50))])


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"do_resize": False}, "do_resize is False"),
        ({"do_convert_rgb": False}, "do_convert_rgb is False"),
        ({"crop_to_patches": "yes"}, "crop_to_patches is 'yes', but must be true or false"),
        ({"crop_to_patches": True, "min_patches": 13}, "min_patches is 13, but must be max_patches (12) or less"),
        ({"max_patches": 0}, "max_patches is 0, but must be a positive integer"),
        ({"size": {"shortest_edge": 448}}, "size is {'shortest_edge': 448}, but must be height and width"),
        ({"size": 448, "default_to_square": False}, "size is {'shortest_edge': 448}"),
        ({"merge_size": 3}, "merge_size is 3, but must be a divisor of the 32 patches along a view"),
        ({"patch_size": [14, 14]}, "patch_size is [14, 14], but must be a positive integer"),
        ({"image_mean": [0.5]}, "image_mean"),
    ],
)
def test_config_that_cannot_be_honoured(config: dict[str, Any], words: str) -> None:
    with pytest.raises(BundleError) as caught:
        image_spec(INTERNVL3 | ADDED | config)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
