"""Idefics3's and SmolVLM's image processors: tiles and the whole image, bit for bit transformers' own."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from processor_parity import SIZES, assert_patches, noise, pair, source_function
from transformers import Idefics3ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import get_resize_output_image_size

from edgeprune.errors import BundleError, ImageError
from edgeprune.plan import Geometry, View
from edgeprune.processors import fit, image_spec

SMOLVLM2 = {
    "do_convert_rgb": True,
    "do_image_splitting": True,
    "do_normalize": True,
    "do_pad": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "SmolVLMImageProcessor",
    "image_std": [0.5, 0.5, 0.5],
    "max_image_size": {"longest_edge": 512},
    "processor_class": "SmolVLMProcessor",
    "resample": 1,
    "rescale_factor": 0.00392156862745098,
    "size": {"longest_edge": 2048},
    "video_sampling": {"fps": 1, "max_frames": 64, "video_size": {"longest_edge": 512}},
}
ADDED = {"patch_size": 14, "merge_size": 2}
SMALL = {"size": {"longest_edge": 168}, "max_image_size": {"longest_edge": 56}}
SETTINGS: list[dict[str, Any]] = [
    SMALL,
    SMALL | {"size": {"longest_edge": 150}, "resample": 3, "image_mean": [0.1, 0.2, 0.3]},
    SMALL | {"size": {"longest_edge": 56}},
    SMALL | {"size": {"longest_edge": 31}},
    SMALL | {"do_image_splitting": False},
]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("kind", ["Idefics3ImageProcessor", "SmolVLMImageProcessor"])
def test_patches_and_tiles_equal_transformers(kind: str, settings: dict[str, Any], size: tuple[int, int]) -> None:
    spec, processor = pair(kind, ADDED, **settings)
    image = noise(*size)
    expected = processor(images=image, return_row_col_info=True)
    assert_patches(spec, [image], expected["pixel_values"][0], 14)
    (((rows,),), ((columns,),)) = expected["rows"], expected["cols"]
    made = spec.geometry(*size)
    assert (made.height, made.width, made.patch, made.merge) == (*size, 14, 2)
    assert len(made.layout) == rows * columns + 1
    assert {(view.rows, view.columns) for view in made.layout} == {(2, 2)}
    assert spec.canvas(image).size == (max(columns, 1) * 56, max(rows, 1) * 56)


@pytest.mark.parametrize("longest", [2048, 1456, 999, 5000])
def test_tiles_equal_transformers_everywhere(longest: int) -> None:
    spec, _ = pair("SmolVLMImageProcessor", ADDED, size={"longest_edge": longest})
    rng = np.random.default_rng(7)
    for height, width in np.exp(rng.uniform(0, np.log(5000), (500, 2))).astype(int).tolist():
        whole = spec.geometry(height, width).layout[-1]
        assert (whole.height, whole.width) == upstream_size(height, width, longest, 364), (height, width)


def upstream_size(height: int, width: int, longest: int, tile: int) -> tuple[int, int]:
    """Return what transformers resizes an image to before it is split, without making one."""
    asked: list[tuple[int, int]] = []
    recorder = SimpleNamespace(resize=lambda image, size, resample: asked.append((size.height, size.width)))
    scaled = get_resize_output_image_size(np.empty((3, height, width), np.bool_), longest)
    Idefics3ImageProcessorPil.resize_for_vision_encoder(recorder, np.empty((3, *scaled), np.bool_), tile)
    return asked[0]


def test_real_settings() -> None:
    spec = image_spec(SMOLVLM2 | {"patch_size": 16, "merge_size": 4})
    keep = ("size", "max_image_size", "resample", "image_mean", "image_std")
    _, processor = pair("SmolVLMImageProcessor", {"patch_size": 16}, **{key: SMOLVLM2[key] for key in keep})
    image = noise(480, 640)
    assert_patches(spec, [image], processor(images=image)["pixel_values"][0], 16)
    made = spec.geometry(480, 640)
    assert made.tokens == 13 * 64
    assert made.layout[5] == View(512, 512, 512, 512, 8, 8)
    assert made.layout[-1] == View(0, 0, 1536, 2048, 8, 8)
    assert spec.default_size() is None
    assert spec.spatial
    eight_b, _ = pair("Idefics3ImageProcessor", ADDED, max_image_size={"longest_edge": 364}, size={"longest_edge": 1456})
    assert eight_b.geometry(364, 364).tokens == 17 * 169


def test_one_tile_is_a_plain_image() -> None:
    spec, _ = pair("Idefics3ImageProcessor", ADDED, **SMALL | {"do_image_splitting": False})
    assert spec.default_size() == (56, 56)
    assert spec.geometry(56, 56) == Geometry(56, 56, 14, 2)
    assert spec.geometry(300, 400).layout == (View(0, 0, 56, 56, 2, 2),)
    assert pair("Idefics3ImageProcessor", ADDED, **SMALL | {"size": {"longest_edge": 56}})[0].default_size() == (56, 56)


@pytest.mark.parametrize("size", [(56, 56), (37, 153), (641, 479)])
def test_frames_are_images_without_splitting(size: tuple[int, int]) -> None:
    spec, processor = pair("SmolVLMImageProcessor", ADDED, **SMALL)
    frames = [noise(*size).rotate(90 * turn) for turn in range(3)]
    views = [processor(images=frame, do_image_splitting=False)["pixel_values"][0][0] for frame in frames]
    assert_patches(spec, frames, views, 14)
    made = spec.geometry(*size, frames=3, fps=2.0)
    assert made.layout == tuple(View(0, 0, 56, 56, 2, 2, time=time) for time in range(3))
    assert (made.frames, made.fps) == (3, 2.0)
    assert spec.canvas(frames[0], frames=3).size == (56, 56)


def test_frames_are_scaled_as_the_video_processor_does() -> None:
    # It needs torchvision, so its function alone is run.
    path = "models/smolvlm/video_processing_smolvlm.py"
    size_of = source_function(path, "get_resize_output_image_size", MAX_IMAGE_SIZE=4096)
    spec, _ = pair("SmolVLMImageProcessor", ADDED, size={"longest_edge": 2048})
    for height, width in SIZES:
        video = SimpleNamespace(size=lambda height=height, width=width: (3, height, width))
        assert spec._scaled(height, width) == size_of(video, 2048)  # type: ignore[attr-defined]


def test_idefics3_has_no_video() -> None:
    spec, _ = pair("Idefics3ImageProcessor", ADDED, **SMALL)
    with pytest.raises(ImageError, match="takes one image, not 2 frames"):
        spec.geometry(56, 56, frames=2)
    with pytest.raises(ImageError, match="takes one image, not 2 frames"):
        spec.patches([noise(56, 56)] * 2)


@pytest.mark.parametrize(
    "change",
    [{"mean": (0.5, 0.5, 0.51)}, {"std": (0.5, 0.51, 0.5)}, {"resample": 3}, {"longest": 112}, {"tile": 28}, {"splits": False}],
)
def test_parity_check_can_fail(change: dict[str, Any]) -> None:
    spec, processor = pair("Idefics3ImageProcessor", ADDED, **SMALL)
    image = noise(200, 300)
    views = processor(images=image)["pixel_values"][0]
    assert_patches(spec, [image], views, 14)
    with pytest.raises(AssertionError):
        assert_patches(dataclasses.replace(spec, **change), [image], views, 14)  # type: ignore[type-var]


def test_exact_takes_images_of_the_same_tiles() -> None:
    spec, _ = pair("Idefics3ImageProcessor", ADDED, **SMALL)
    geometry = spec.geometry(120, 168)
    image = noise(235, 330)
    assert fit(image, geometry, "exact", spec) is image
    with pytest.raises(ImageError, match="120x168 px in 10 views = 40 visual tokens, but this 56x168 image makes"):
        fit(noise(56, 168), geometry, "exact", spec)
    assert spec.patches([fit(noise(56, 168), geometry, "pad", spec)]).shape == (10 * 16, 588)


@pytest.mark.parametrize("kind", ["Idefics3ImageProcessor", "SmolVLMImageProcessor"])
@pytest.mark.parametrize("suffix", ["", "Fast", "Pil"])
def test_class_names(kind: str, suffix: str) -> None:
    assert image_spec({"image_processor_type": kind + suffix} | ADDED) == pair(kind, ADDED)[0]


def test_images_need_pixels_and_three_colours() -> None:
    spec, _ = pair("Idefics3ImageProcessor", ADDED, **SMALL)
    with pytest.raises(ImageError, match="is empty"):
        spec.geometry(5, 0)
    with pytest.raises(ImageError, match="read_image"):
        spec.patches([Image.new("L", (60, 50))])


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"do_pad": False}, "do_pad is False, but must be true"),
        ({"do_resize": False}, "do_resize is False"),
        ({"do_convert_rgb": False}, "do_convert_rgb is False"),
        ({"do_image_splitting": 1}, "do_image_splitting is 1, but must be true or false"),
        ({"size": {"height": 364, "width": 364}}, "size is {'height': 364, 'width': 364}, but must be longest_edge"),
        ({"max_image_size": {"height": 364, "width": 364}}, "max_image_size is {'height': 364, 'width': 364}"),
        ({"max_image_size": 364}, "max_image_size is {'height': 364, 'width': 364}, but must be longest_edge"),
        ({"max_image_size": {"longest_edge": 1.5}}, "max_image_size is {'longest_edge': 1.5}"),
        ({"merge_size": 3}, "merge_size is 3, but must be a divisor of the 32 patches along a view"),
        ({"patch_size": None}, "patch_size is None"),
        ({"resample": "lanczos"}, "resample is 'lanczos'"),
    ],
)
def test_config_that_cannot_be_honoured(config: dict[str, Any], words: str) -> None:
    with pytest.raises(BundleError) as caught:
        image_spec(SMOLVLM2 | {"patch_size": 16, "merge_size": 4} | config)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
