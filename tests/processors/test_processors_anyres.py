"""The image processors of LLaVA-OneVision and LLaVA-NeXT: views bit for bit transformers' own, tokens as their models pack them."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from processor_parity import SIZES, assert_patches, noise, pair
from transformers import LlavaNextModel, LlavaNextProcessor, LlavaOnevisionModel, LlavaOnevisionProcessor

from edgeprune.errors import BundleError, ImageError
from edgeprune.plan import Geometry, View
from edgeprune.processors import fit, image_spec

KIND, NEXT = "LlavaOnevisionImageProcessor", "LlavaNextImageProcessor"
ADDED = {"patch_size": 14, "vision_aspect_ratio": "anyres_max_9"}
PINPOINTS = [[48 * rows, 48 * columns] for rows in range(1, 7) for columns in range(1, 7)]
SMALL = {"size": {"height": 48, "width": 48}, "image_grid_pinpoints": PINPOINTS}  # 3 x 3 patches a tile, 6 pixels left over
SMALL_NEXT = {"size": {"shortest_edge": 48}, "crop_size": {"height": 48, "width": 48}, "image_grid_pinpoints": PINPOINTS}
ONEVISION = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_pad": True,
    "do_rescale": True,
    "do_resize": True,
    "image_grid_pinpoints": [[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)],
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "LlavaOnevisionImageProcessor",
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "LlavaOnevisionProcessor",
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"height": 384, "width": 384},
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (KIND, SMALL),
        (KIND, SMALL | {"image_grid_pinpoints": [[96, 48], [48, 144]], "resample": 2}),
        (KIND, SMALL | {"size": {"shortest_edge": 48}, "crop_size": 48, "image_mean": [0.1, 0.2, 0.3]}),
        (NEXT, SMALL_NEXT),
        (NEXT, SMALL_NEXT | {"size": {"height": 48, "width": 48}, "do_center_crop": False, "image_std": [0.1, 0.2, 0.3]}),
    ],
)
def test_patches_equal_transformers(kind: str, settings: dict[str, Any], size: tuple[int, int]) -> None:
    spec, processor = pair(kind, ADDED, **settings)
    image = noise(*size)
    views = processor(images=image)["pixel_values"][0]
    assert_patches(spec, [image], views, 14)
    width, height = spec.canvas(image).size
    assert 1 + height // 48 * (width // 48) == len(views)


def features(height: int, width: int, side: int, pinpoints: list[list[int]], limit: int | None) -> int:
    """Return how many tokens the processor of text and images together writes for an image; LLaVA-NeXT's has no `limit`."""
    processor: Any = LlavaNextProcessor if limit is None else LlavaOnevisionProcessor
    me = SimpleNamespace(num_image_tokens=(side // 14) ** 2, vision_aspect_ratio=f"anyres_max_{limit}")
    me.image_processor, me.patch_size, me.num_additional_image_tokens = SimpleNamespace(image_grid_pinpoints=pinpoints), 14, 0
    me._get_unpadded_features = partial(processor._get_unpadded_features, me)
    tokens: int = processor._get_number_of_features(me, height, width, side, side)
    return tokens


@pytest.mark.parametrize("limit", [9, 4, None])
@pytest.mark.parametrize("side", [384, 48])
def test_tokens_equal_transformers_everywhere(side: int, limit: int | None) -> None:
    pinpoints = [[side * rows, side * columns] for rows in range(1, 7) for columns in range(1, 7)]
    settings = {"size": {"height": side, "width": side}, "image_grid_pinpoints": pinpoints}
    if limit is None:
        spec, _ = pair(NEXT, {"patch_size": 14}, **settings, crop_size=side)
    else:
        spec, _ = pair(KIND, {"patch_size": 14, "vision_aspect_ratio": f"anyres_max_{limit}"}, **settings)
    rng = np.random.default_rng(7)
    for height, width in np.exp(rng.uniform(0, np.log(4000), (1000, 2))).astype(int).tolist():
        made = spec.geometry(height, width)
        assert made.tokens == features(height, width, side, pinpoints, limit), (height, width)
        assert (made.height, made.width, made.patch, made.merge) == (height, width, 14, 1)


@pytest.mark.parametrize("size", [(48, 48), (100, 130), (130, 100), (700, 180), (290, 280), (33, 300)])
def test_views_are_what_the_model_packs(size: tuple[int, int]) -> None:
    spec, processor = pair(KIND, ADDED, **SMALL)
    tiles = len(processor(images=noise(*size))["pixel_values"][0])
    vision = SimpleNamespace(image_size=48, patch_size=14)
    model = SimpleNamespace(config=SimpleNamespace(vision_config=vision, image_grid_pinpoints=PINPOINTS))
    newline = torch.full((2,), -1.0)
    packed, _ = LlavaOnevisionModel.pack_image_features(model, [torch.rand(tiles, 9, 2)], [size], newline)
    assert_packed(spec.geometry(*size), packed)
    spec, _ = pair(NEXT, ADDED, **SMALL_NEXT)
    packed, _ = LlavaNextModel.pack_image_features(model, [torch.rand(tiles, 9, 2)], [size], "full", newline)
    assert_packed(spec.geometry(*size), packed)


def assert_packed(geometry: Geometry, packed: list[torch.Tensor]) -> None:
    base, grid = geometry.layout
    assert (base.rows, base.columns, base.separators) == (3, 3, 0)
    assert len(packed[0]) == base.tokens + grid.tokens
    ends = base.tokens + (grid.columns + 1) * np.arange(1, grid.rows + 1) - 1
    assert (packed[0][:, 0] < 0).nonzero()[:, 0].tolist() == ends.tolist()


@pytest.mark.parametrize("size", [(100, 130), (130, 100), (700, 180), (290, 280), (48, 48), (211, 97)])
def test_box_is_what_is_not_bars(size: tuple[int, int]) -> None:
    spec, _ = pair(KIND, ADDED, **SMALL)
    canvas = np.asarray(spec.canvas(Image.new("RGB", size[::-1], "white")))
    rows, columns = (np.any(canvas, axis=axes).nonzero()[0] for axes in ((1, 2), (0, 2)))
    base, grid = spec.geometry(*size).layout
    assert (base.top, base.left, base.height, base.width) == (grid.top, grid.left, grid.height, grid.width)
    token = 16  # pixels: a tile of 48 has 3 of them
    assert abs(grid.top - rows[0]) < token
    assert abs(grid.left - columns[0]) < token
    assert abs(grid.top + grid.height - 1 - rows[-1]) < token
    assert abs(grid.left + grid.width - 1 - columns[-1]) < token


def test_real_settings() -> None:
    spec = image_spec(ONEVISION | ADDED)
    image = noise(480, 640)
    keep = ("size", "image_mean", "image_std", "image_grid_pinpoints")
    _, processor = pair(KIND, ADDED, **{key: ONEVISION[key] for key in keep})
    assert_patches(spec, [image], processor(images=image)["pixel_values"][0], 14)
    made = spec.geometry(480, 640)
    # 2 x 2 tiles of 384 pixels; 640 x 480 fills 768 x 576 of them.
    assert made.layout == (View(100, 0, 569, 768, 27, 27), View(100, 0, 569, 768, 40, 54, separators=1))
    assert made.tokens == 729 + 40 * 55
    # 4 x 4 tiles are more than nine of them.
    assert spec.geometry(1536, 1536).layout[1] == View(0, 0, 1536, 1536, 81, 81, separators=1)
    assert spec.default_size() is None
    assert spec.spatial


@pytest.mark.parametrize("size", [(48, 48), (37, 153), (641, 479)])
def test_frames_are_overviews_of_half_the_tokens(size: tuple[int, int]) -> None:
    spec, _ = pair(KIND, ADDED, **SMALL)
    _, stretching = pair("SiglipImageProcessor", {"patch_size": 14}, size=SMALL["size"])
    stretching.image_mean, stretching.image_std = spec.mean, spec.std  # type: ignore[attr-defined]
    frames = [noise(*size).rotate(90 * turn) for turn in range(3)]
    assert_patches(spec, frames, stretching(images=frames)["pixel_values"], 14)
    made = spec.geometry(*size, frames=3, fps=2.0)
    assert made.layout[:-1] == tuple(View(0, 0, 48, 48, 2, 2, time=time) for time in range(3))
    assert made.layout[-1].tokens == made.layout[-1].separators == 1
    assert spec.canvas(frames[0], frames=3).size == (48, 48)


def test_tokens_of_a_video_equal_transformers() -> None:
    spec = image_spec(ONEVISION | ADDED)
    pooled = LlavaOnevisionModel.apply_pooling(
        SimpleNamespace(config=SimpleNamespace(vision_config=SimpleNamespace(image_size=384, patch_size=14))),
        torch.zeros(8, 729, 2),
    )
    text = LlavaOnevisionProcessor.replace_video_token(
        SimpleNamespace(num_image_tokens=729, video_token="x"), {"pixel_values_videos": [np.zeros(8)]}, 0
    )
    made = spec.geometry(480, 640, frames=8, fps=1.0)
    assert made.tokens == len(text) == pooled.shape[0] * pooled.shape[1] + 1
    assert math.isqrt(made.layout[0].tokens) == 14


@pytest.mark.parametrize(
    "change", [{"mean": (0.5, 0.5, 0.5)}, {"std": (0.3, 0.3, 0.3)}, {"resample": 2}, {"side": 24}, {"pinpoints": ((48, 96),)}]
)
def test_parity_check_can_fail(change: dict[str, Any]) -> None:
    spec, processor = pair(KIND, ADDED, **SMALL)
    image = noise(200, 300)
    views = processor(images=image)["pixel_values"][0]
    assert_patches(spec, [image], views, 14)
    with pytest.raises(AssertionError):
        assert_patches(dataclasses.replace(spec, **change), [image], views, 14)  # type: ignore[type-var]


def test_exact_takes_images_of_the_same_views() -> None:
    spec, _ = pair(KIND, ADDED, **SMALL)
    geometry = spec.geometry(400, 600)
    image = noise(600, 900)
    assert fit(image, geometry, "exact", spec) is image
    with pytest.raises(ImageError, match="400x600 px in 2 views"):
        fit(noise(300, 200), geometry, "exact", spec)
    video = spec.geometry(200, 300, frames=2, fps=1.0)
    assert fit(noise(300, 200), video, "exact", spec).size == (200, 300)


def test_sizes_not_taken() -> None:
    spec, _ = pair(KIND, ADDED, **SMALL | {"image_grid_pinpoints": [[96, 96]]})
    assert spec.geometry(20, 40).tokens
    for size in [(1, 4000), (2600, 5)]:
        with pytest.raises(ImageError, match=f"{size[0]}x{size[1]} image is too oblong: nothing would be left of its tiles"):
            spec.geometry(*size)
    with pytest.raises(ImageError, match="is empty"):
        spec.geometry(0, 5)
    with pytest.raises(ImageError, match="read_image"):
        spec.patches([Image.new("L", (60, 50))])


def test_a_large_grid_of_llava_next_is_not_shrunk() -> None:
    spec = image_spec({"image_processor_type": NEXT, "patch_size": 14, "size": {"shortest_edge": 336}, "crop_size": 336})
    assert spec.geometry(672, 672).layout[1] == View(0, 0, 672, 672, 48, 48, separators=1)
    # 480 x 640 fills 672 x 504 of the published 2 x 2 tiles of 336 pixels.
    assert spec.geometry(480, 640).layout == (View(84, 0, 504, 672, 24, 24), View(84, 0, 504, 672, 36, 48, separators=1))
    assert spec.default_size() is None


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"crop_size": None}, "crop_size is None, but must be 336 pixels as the size is"),
        ({"crop_size": 224}, "crop_size is 224, but must be 336 pixels as the size is"),
        ({"size": None}, "crop_size is 336, but must be 224 pixels as the size is"),
        ({"image_grid_pinpoints": [[384, 384]]}, "must be pairs of multiples of 336 pixels"),
    ],
)
def test_config_of_llava_next_that_cannot_be_honoured(config: dict[str, Any], words: str) -> None:
    own = {"image_processor_type": NEXT, "patch_size": 14, "size": {"shortest_edge": 336}, "crop_size": 336}
    with pytest.raises(BundleError, match=words):
        image_spec(own | config)


@pytest.mark.parametrize("suffix", ["", "Fast", "Pil"])
def test_class_names(suffix: str) -> None:
    assert image_spec({"image_processor_type": KIND + suffix} | ADDED) == pair(KIND, ADDED)[0]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"do_resize": False}, "do_resize is False"),
        ({"do_convert_rgb": False}, "do_convert_rgb is False"),
        ({"do_center_crop": True}, "do_center_crop is True, but must be false"),
        ({"crop_size": 224}, "crop_size is 224, but must be 384 pixels as the size is"),
        ({"size": {"height": 384, "width": 300}}, "size is {'height': 384, 'width': 300}, but must be equal height and width"),
        ({"size": {"shortest_edge": 384, "longest_edge": 384}}, "size is"),
        ({"size": 380}, "image_grid_pinpoints is"),
        ({"image_grid_pinpoints": []}, "image_grid_pinpoints is []"),
        ({"image_grid_pinpoints": [[384, 400]]}, "must be pairs of multiples of 384 pixels"),
        ({"image_grid_pinpoints": [384]}, "image_grid_pinpoints is [384]"),
        ({"vision_aspect_ratio": None}, "vision_aspect_ratio is None, but must be anyres_max_9"),
        ({"vision_aspect_ratio": "anyres"}, "vision_aspect_ratio is 'anyres'"),
        ({"vision_aspect_ratio": "anyres_max_0"}, "vision_aspect_ratio is 'anyres_max_0'"),
        ({"patch_size": 400}, "patch_size is 400, but must be at most the size of a view (384)"),
        ({"merge_size": 2}, "merge_size is 2, but must be 1"),
    ],
)
def test_config_that_cannot_be_honoured(config: dict[str, Any], words: str) -> None:
    with pytest.raises(BundleError) as caught:
        image_spec(ONEVISION | ADDED | config)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
