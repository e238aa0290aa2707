"""CLIP's, SigLIP's and LLaVA's image processors: bit for bit transformers' own, one view whatever the image."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from PIL import Image
from processor_parity import SIZES, assert_patches, noise, pair

from edgeprune.errors import BundleError, ImageError
from edgeprune.plan import Geometry, View
from edgeprune.processors import fit, image_spec

LLAVA_1_5 = {
    "crop_size": {"height": 336, "width": 336},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "CLIPImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "processor_class": "LlavaProcessor",
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": 336},
}
PALIGEMMA = {
    "do_convert_rgb": None,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "SiglipImageProcessor",
    "image_seq_length": 256,
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "PaliGemmaProcessor",
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"height": 224, "width": 224},
}
EIGHTY = {"height": 80, "width": 80}
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("CLIPImageProcessor", {"size": {"shortest_edge": 70}, "crop_size": {"height": 56, "width": 70}}),
    ("CLIPImageProcessor", {"size": 61, "crop_size": 84}),  # the middle is larger than the image
    ("CLIPImageProcessor", {"size": {"height": 90, "width": 71}, "crop_size": 70, "resample": 2}),
    ("CLIPImageProcessor", {"size": 70, "default_to_square": True, "do_center_crop": False}),
    ("SiglipImageProcessor", {"size": EIGHTY, "image_mean": [0.1, 0.2, 0.3], "rescale_factor": 1 / 127.5}),
    ("SiglipImageProcessor", {"size": {"height": 100, "width": 80}, "do_center_crop": True, "crop_size": [70, 60]}),
    ("Gemma3ImageProcessor", {"size": EIGHTY}),
    ("Gemma3ImageProcessor", {"size": 80, "do_pan_and_scan": False, "image_std": [0.4, 0.5, 0.6]}),
    ("LlavaImageProcessor", {"size": 70, "crop_size": 70}),
    ("LlavaImageProcessor", {"size": 70, "crop_size": 70, "do_pad": True}),
    ("LlavaImageProcessor", {"size": EIGHTY, "do_center_crop": False, "do_pad": True, "image_mean": [0.7, 0.01, 0.999]}),
]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("kind", "settings"), KINDS)
def test_patches_equal_transformers(kind: str, settings: dict[str, Any], size: tuple[int, int]) -> None:
    spec, processor = pair(kind, {"patch_size": 14}, **settings)
    image = noise(*size)
    views = processor(images=image)["pixel_values"]
    assert_patches(spec, [image], views, 14)
    made = spec.geometry(*size)
    assert (made.height, made.width, made.patch, made.merge) == (*size, 14, 1)
    assert spec.canvas(image).size == views[0].shape[:0:-1]
    (view,) = made.layout
    assert (view.height, view.width) == views[0].shape[1:]
    assert (view.rows, view.columns) == (views[0].shape[1] // 14, views[0].shape[2] // 14)


@pytest.mark.parametrize("config", [LLAVA_1_5, PALIGEMMA])
def test_real_settings(config: dict[str, Any]) -> None:
    spec = image_spec(config | {"patch_size": 14})
    side = config["size"].get("height", 336)
    settings = {key: value for key, value in config.items() if key not in ("image_processor_type", "feature_extractor_type")}
    _, processor = pair(config["image_processor_type"], {"patch_size": 14}, **settings)
    assert_patches(spec, [noise(500, 375)], processor(images=noise(500, 375))["pixel_values"], 14)
    assert spec.default_size() == (side, side)
    assert spec.geometry(side, side) == Geometry(side, side, 14, 1)
    assert spec.geometry(480, 640).layout == (View(0, 0, side, side, side // 14, side // 14),)
    assert spec.spatial


def test_pixels_that_fill_no_patch_are_left_out() -> None:
    # SigLIP so400m of LLaVA-OneVision and PaliGemma's sibling: 384 pixels, patches of 14.
    spec = image_spec({"image_processor_type": "SiglipImageProcessor", "size": 384, "default_to_square": True, "patch_size": 14})
    assert spec.geometry(384, 384) == Geometry(384, 384, 14, 1)
    assert spec.geometry(384, 384).tokens == 729
    assert spec.patches([noise(384, 384)]).shape == (729, 588)


@pytest.mark.parametrize(
    ("change", "size"),
    [
        ({"mean": (0.48145466, 0.4578275, 0.40831073)}, (70, 70)),
        ({"std": (0.26862954, 0.26140258, 0.27577711)}, (70, 70)),
        ({"rescale_factor": 1 / 256}, (70, 70)),
        ({"resample": 2}, (90, 120)),
        ({"patch": 7}, (70, 70)),
        ({"whole": (70, 70)}, (90, 120)),
        ({"height": 84}, (70, 70)),
        ({"squared": True}, (90, 120)),
    ],
)
def test_parity_check_can_fail(change: dict[str, Any], size: tuple[int, int]) -> None:
    spec, processor = pair("CLIPImageProcessor", {"patch_size": 14}, size=70, crop_size=70)
    image = noise(*size)
    views = processor(images=image)["pixel_values"]
    assert_patches(spec, [image], views, 14)
    with pytest.raises(AssertionError):
        assert_patches(dataclasses.replace(spec, **change), [image], views, 14)  # type: ignore[type-var]


def test_exact_takes_every_image() -> None:
    spec = image_spec(LLAVA_1_5 | {"patch_size": 14})
    image = noise(33, 44)
    for size in [(336, 336), (480, 640)]:
        assert fit(image, spec.geometry(*size), "exact", spec) is image


@pytest.mark.parametrize(
    ("size", "words"),
    [((0, 5), "is empty"), ((1, 201), r"1x201 image is too oblong: the limit is 200:1\. Crop"), ((300, 1), "too oblong")],
)
def test_sizes_not_taken(size: tuple[int, int], words: str) -> None:
    with pytest.raises(ImageError, match=words):
        image_spec(LLAVA_1_5 | {"patch_size": 14}).geometry(*size)


def test_stretched_and_squared_images_may_be_oblong() -> None:
    spec = image_spec(PALIGEMMA | {"patch_size": 14})
    assert spec.geometry(1, 5000).tokens == 256
    squared = image_spec({"image_processor_type": "LlavaImageProcessor", "do_pad": True, "patch_size": 14})
    assert squared.geometry(1, 5000).tokens == 256
    with pytest.raises(ImageError, match="the limit is 16384 pixels"):
        squared.geometry(1, 20000)


def test_there_is_no_video() -> None:
    spec = image_spec(LLAVA_1_5 | {"patch_size": 14})
    with pytest.raises(ImageError, match="takes one image, not 4 frames"):
        spec.geometry(336, 336, frames=4)
    with pytest.raises(ImageError, match="takes one image, not 2 frames"):
        spec.patches([noise(30, 30)] * 2)


def test_patches_want_rgb() -> None:
    for config in (LLAVA_1_5, {"image_processor_type": "LlavaImageProcessor", "do_pad": True}):
        with pytest.raises(ImageError, match="read_image"):
            image_spec(config | {"patch_size": 14}).patches([Image.new("L", (60, 50))])


@pytest.mark.parametrize("kind", ["CLIPImageProcessor", "SiglipImageProcessor", "Gemma3ImageProcessor", "LlavaImageProcessor"])
@pytest.mark.parametrize("suffix", ["", "Fast", "Pil"])
def test_class_names(kind: str, suffix: str) -> None:
    spec, _ = pair(kind, {"patch_size": 14})
    assert image_spec({"image_processor_type": kind + suffix, "patch_size": 14}) == spec


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"do_resize": False}, "do_resize is False, but must be true"),
        ({"do_convert_rgb": False}, "do_convert_rgb is False"),
        ({"do_pad": True}, "do_pad is True, but must be false"),
        ({"use_square_size": True}, "use_square_size is True"),
        ({"image_processor_type": "Gemma3ImageProcessor", "do_pan_and_scan": True}, "do_pan_and_scan is True"),
        ({"do_center_crop": "no"}, "do_center_crop is 'no', but must be true or false"),
        ({"do_center_crop": False}, "size is {'shortest_edge': 336}, but must be height and width, since nothing is cropped"),
        ({"size": {"shortest_edge": 336, "longest_edge": 500}}, "size is {'shortest_edge': 336, 'longest_edge': 500}"),
        ({"size": {"max_height": 9, "max_width": 9}}, "must be shortest_edge, or height and width"),
        ({"size": {"shortest_edge": 0}}, "size is {'shortest_edge': 0}, but must be sides of at least one pixel"),
        ({"size": {}}, "size is {}"),
        ({"size": "336"}, "size is '336', but must be an object with the sides in pixels"),
        ({"size": True}, "size is True"),
        ({"crop_size": {"shortest_edge": 336}}, "crop_size is {'shortest_edge': 336}, but must be height and width"),
        ({"crop_size": 13}, "patch_size is 14, but must be at most the size of a view (13)"),
        ({"patch_size": None}, "patch_size is None"),
        ({"merge_size": 5}, "merge_size is 5, but must be a divisor of the 24 patches along a view"),
        ({"resample": 99}, "resample is 99"),
        ({"image_std": [0.5, 0.0, 0.5]}, "image_std"),
        ({"image_processor_type": "BlipImageProcessor"}, "image_processor_type is 'BlipImageProcessor', but must be Qwen2VL"),
    ],
)
def test_config_that_cannot_be_honoured(config: dict[str, Any], words: str) -> None:
    with pytest.raises(BundleError) as caught:
        image_spec(LLAVA_1_5 | {"patch_size": 14} | config)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_null_is_the_default() -> None:
    null = dict.fromkeys(
        ("image_mean", "image_std", "resample", "rescale_factor", "size", "crop_size", "do_center_crop", "do_resize")
    )
    for kind in ("CLIPImageProcessor", "SiglipImageProcessor", "Gemma3ImageProcessor"):
        assert image_spec({"image_processor_type": kind, "patch_size": 14} | null) == pair(kind, {"patch_size": 14})[0]


def test_without_its_first_patch_an_image_is_two_views() -> None:
    spec = image_spec(PALIGEMMA | {"patch_size": 14, "drop_first_patch": True})
    assert spec.geometry(500, 300).layout == (View(0, 14, 14, 210, 1, 15), View(14, 0, 210, 224, 15, 16))
    narrow = image_spec(PALIGEMMA | {"patch_size": 14, "drop_first_patch": True, "size": {"height": 28, "width": 14}})
    assert narrow.geometry(500, 300).layout == (View(14, 0, 14, 14, 1, 1),)
    with pytest.raises(BundleError, match="drop_first_patch is 1"):
        image_spec(PALIGEMMA | {"patch_size": 14, "drop_first_patch": 1})
