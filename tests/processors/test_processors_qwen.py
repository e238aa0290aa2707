"""Qwen2-VL's image processor: equal to transformers' own, and a fixed geometry is never met by accident."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from processor_parity import SIZES, noise
from processor_parity import pair as any_pair
from transformers.image_utils import load_image

from edgeprune.errors import BundleError, ImageError, UsageError
from edgeprune.plan import Geometry
from edgeprune.processors import fit, image_spec
from edgeprune.processors.qwen import GridSpec
from edgeprune.runtime.media.images import read_image

KIND = "Qwen2VLImageProcessor"
AREAS = {"shortest_edge": 56 * 56, "longest_edge": 14 * 14 * 4 * 200}
FIXED = Geometry(192, 192, 16, 2)


def pair(**settings: Any) -> tuple[GridSpec, Any]:
    """Return our spec and transformers' processor of the same configuration, through its JSON."""
    spec, processor = any_pair(KIND, {}, **settings)
    assert isinstance(spec, GridSpec)
    return spec, processor


def assert_equal(spec: GridSpec, ours: Image.Image, processor: Any, theirs: Image.Image) -> None:
    """Fail unless both make the same patches, to 1e-5, and the same grid."""
    patches, grid = spec.patches([ours]), spec.grid(ours.height, ours.width)
    expected = processor(images=theirs)
    assert expected["image_grid_thw"].tolist() == [[1, *grid]]
    assert spec.geometry(ours.height, ours.width).layout[0].tokens * spec.merge_size**2 == len(patches)
    assert patches.dtype == np.float32
    assert patches.flags["C_CONTIGUOUS"]
    np.testing.assert_allclose(patches, expected["pixel_values"], rtol=0, atol=1e-5)


@pytest.fixture
def fixed() -> GridSpec:
    """The bundled model's kind of spec: every image becomes about 192 x 192 pixels."""
    return pair(patch_size=16, size={"shortest_edge": 192 * 192, "longest_edge": 192 * 192})[0]


@pytest.mark.parametrize("size", [*SIZES, (14, 42)])
@pytest.mark.parametrize("merge", [1, 2])
@pytest.mark.parametrize("patch", [14, 16])
def test_patches_equal_transformers(patch: int, merge: int, size: tuple[int, int]) -> None:
    spec, processor = pair(patch_size=patch, merge_size=merge, size=AREAS)
    image = noise(*size)
    assert_equal(spec, image, processor, image)


@pytest.mark.parametrize(
    "settings",
    [
        {"temporal_patch_size": 1},
        {"resample": 2, "rescale_factor": 1 / 127.5, "image_mean": [1.0, 1.0, 1.0], "image_std": [0.5, 0.4, 0.3]},
        {"min_pixels": 28 * 28 * 9, "max_pixels": 28 * 28 * 9},
        {"image_mean": 0.5, "image_std": 0.25},
    ],
)
def test_other_settings_equal_transformers(settings: dict[str, Any]) -> None:
    spec, processor = pair(**settings)
    image = noise(123, 77)
    assert_equal(spec, image, processor, image)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_modes_on_disk_equal_transformers(mode: str, tmp_path: Path) -> None:
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    noise(61, 83, mode).save(path)
    spec, processor = pair()
    with Image.open(path) as opened:  # load_image would drop alpha before the processor lays it on white
        assert_equal(spec, read_image(path), processor, opened)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_rotations_on_disk_equal_transformers(orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    noise(61, 123).save(tmp_path / "image.jpg", exif=exif)
    spec, processor = pair()
    assert_equal(spec, read_image(tmp_path / "image.jpg"), processor, load_image(str(tmp_path / "image.jpg")))


@pytest.mark.parametrize(
    "change",
    [
        {"mean": (0.48145466, 0.4578275, 0.40831073)},
        {"std": (0.26862954, 0.26140258, 0.27577711)},
        {"rescale_factor": 1 / 256},
        {"resample": 2},
        {"merge_size": 1},
        {"patch_size": 28, "merge_size": 1},
        {"temporal_patch_size": 1},
        {"max_pixels": 60 * 60},
    ],
)
def test_parity_check_can_fail(change: dict[str, Any]) -> None:
    spec, processor = pair()
    image = noise(120, 90)
    assert_equal(spec, image, processor, image)
    with pytest.raises((AssertionError, ValueError)):
        assert_equal(dataclasses.replace(spec, **change), image, processor, image)


def test_parity_check_sees_one_pixel() -> None:
    spec, processor = pair()
    image = noise(56, 56)
    other = image.copy()
    red, green, blue = np.asarray(image)[30, 20].tolist()
    other.putpixel((20, 30), (red, green ^ 1, blue))
    with pytest.raises(AssertionError):
        assert_equal(spec, other, processor, image)


def test_all_levels_are_bit_equal() -> None:
    spec, processor = pair(size={"shortest_edge": 56 * 56, "longest_edge": 56 * 56})
    levels = np.resize(np.arange(256, dtype=np.uint8), (56, 56))
    image = Image.fromarray(np.stack([levels, levels.T, levels[::-1]], axis=-1))
    np.testing.assert_array_equal(spec.patches([image]), processor(images=image)["pixel_values"])


@pytest.mark.parametrize("areas", [AREAS, {"shortest_edge": 1, "longest_edge": 28 * 28 * 20}])
def test_grid_equals_transformers_everywhere(areas: dict[str, int]) -> None:
    spec, processor = pair(size=areas)
    rng = np.random.default_rng(7)
    for height, width in np.exp(rng.uniform(0, np.log(5000), (2000, 2))).astype(int).tolist():
        if max(height, width) / min(height, width) <= 200:
            rows, columns = spec.grid(height, width)
            assert rows * columns == processor.get_number_of_image_patches(height, width), (height, width)


def test_oblong_limit_is_that_of_transformers() -> None:
    spec, processor = pair()
    assert spec.grid(1, 200) == spec.grid(200, 1)[::-1]
    for size in [(1, 201), (300, 1)]:
        with pytest.raises(ImageError, match=r"too oblong: the limit is 200:1\. Crop"):
            spec.grid(*size)
        with pytest.raises(ValueError, match="200"):
            processor(images=noise(*size))


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (-1, 5)])
def test_empty_image(size: tuple[int, int]) -> None:
    with pytest.raises(ImageError, match="is empty"):
        pair()[0].grid(*size)


def test_patches_want_rgb() -> None:
    with pytest.raises(ImageError, match="read_image"):
        pair()[0].patches([noise(60, 60, "L")])


def test_patch_order_by_hand() -> None:
    # 4 x 4 pixels, patch 1, merge 2: the four pixels of a 2 x 2 block come first, then the block to its right.
    spec = GridSpec(1, 2, 1, 16, 16, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), 1.0, 3)
    grey = np.arange(16, dtype=np.uint8).reshape(4, 4)
    patches = spec.patches([read_image(grey)])
    assert patches[:, 0].tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]


def test_config_spellings_of_the_area() -> None:
    def area(**config: Any) -> tuple[int, int]:
        spec = GridSpec.from_settings(config)
        return spec.min_pixels, spec.max_pixels

    assert area() == (3136, 1003520)
    assert area(min_pixels=4000, max_pixels=50000) == (4000, 50000)
    assert area(size={"shortest_edge": 4000, "longest_edge": 50000}) == (4000, 50000)
    assert area(size={"min_pixels": 4000, "max_pixels": 50000}) == (4000, 50000)
    assert area(size={"shortest_edge": 1, "longest_edge": 9000}, min_pixels=4000, max_pixels=None) == (4000, 9000)
    assert area(min_pixels=4000) == (4000, 1003520)


def test_config_defaults_are_those_of_transformers() -> None:
    assert GridSpec.from_settings({}) == pair()[0]


@pytest.mark.parametrize("suffix", ["", "Fast", "Pil"])
def test_config_of_a_processor_class(suffix: str) -> None:
    assert image_spec({"image_processor_type": KIND + suffix}) == image_spec({}) == pair()[0]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"image_processor_type": "BlipImageProcessor"}, "image_processor_type is 'BlipImageProcessor'"),
        ({"do_resize": False}, "do_resize is False, but must be true"),
        ({"do_rescale": False}, "do_rescale"),
        ({"do_normalize": False}, "do_normalize"),
        ({"do_convert_rgb": False}, "do_convert_rgb"),
        ({"patch_size": 0}, "patch_size is 0, but must be a positive integer"),
        ({"patch_size": "14"}, "patch_size is '14'"),
        ({"merge_size": True}, "merge_size"),
        ({"temporal_patch_size": 1.5}, "temporal_patch_size"),
        ({"size": {"height": 224, "width": 224}}, "min_pixels is None"),
        ({"size": {"shortest_edge": 224}}, "max_pixels is None"),
        ({"size": 224}, "size is 224"),
        ({"min_pixels": 9000, "max_pixels": 4000}, "min_pixels is 9000"),
        ({"image_mean": [0.5, 0.5]}, "image_mean"),
        ({"image_mean": "0.5"}, "image_mean"),
        ({"image_std": [0.5, 0.0, 0.5]}, "image_std"),
        ({"image_std": [0.5, float("nan"), 0.5]}, "image_std"),
        ({"rescale_factor": 0}, "rescale_factor"),
        ({"rescale_factor": "1/255"}, "rescale_factor"),
        ({"resample": 99}, "resample is 99"),
        ({"resample": "bicubic"}, "resample is 'bicubic'"),
        ({"tokens_per_second": "2"}, "tokens_per_second is '2', but must be a number, zero or above"),
        ({"tokens_per_second": -1}, "tokens_per_second is -1"),
    ],
)
def test_config_that_cannot_be_honoured(config: dict[str, Any], words: str) -> None:
    with pytest.raises(BundleError) as caught:
        image_spec(config)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("side", [192, 96, 500])
def test_exact_returns_the_image_itself(side: int, fixed: GridSpec) -> None:
    image = noise(side, side)
    assert fit(image, FIXED, "exact", fixed) is image
    assert fixed.geometry(side, side).layout == FIXED.layout


def test_exact_names_the_choices(fixed: GridSpec) -> None:
    with pytest.raises(ImageError) as caught:
        fit(noise(100, 200), FIXED, "exact", fixed)
    message = str(caught.value)
    assert (
        "192x192 px = 6 x 6 visual tokens, but this 100x200 image makes 160x288 px = 5 x 9 visual tokens (height x width)."
        in message
    )
    assert "--fit stretch" in message and "--fit pad" in message
    assert '"pad"' in message


@pytest.mark.parametrize("how", ["stretch", "pad"])
@pytest.mark.parametrize("size", [(1, 1), (100, 200), (200, 1), (1, 200), (641, 479), (192, 192)])
def test_stretch_and_pad_fill_the_geometry(size: tuple[int, int], how: str, fixed: GridSpec) -> None:
    fitted = fit(noise(*size), FIXED, how, fixed)
    assert fitted.size == (192, 192)
    assert fixed.geometry(192, 192) == FIXED


def test_stretch_equals_the_direct_resize(fixed: GridSpec) -> None:
    image = noise(300, 300)
    np.testing.assert_array_equal(fixed.patches([image]), fixed.patches([fit(image, FIXED, "stretch", fixed)]))


def test_pad_keeps_the_aspect_in_the_middle_on_grey(fixed: GridSpec) -> None:
    pixels = np.asarray(fit(Image.new("RGB", (100, 50), "red"), FIXED, "pad", fixed))
    assert (pixels[:48] == 128).all()
    assert (pixels[48:144] == (255, 0, 0)).all()
    assert (pixels[144:] == 128).all()


@pytest.mark.parametrize("size", [(200, 1), (1, 200)])
def test_pad_never_loses_a_thin_image(size: tuple[int, int]) -> None:
    spec = pair(patch_size=16, size={"shortest_edge": 1024, "longest_edge": 1024})[0]
    pixels = np.asarray(fit(Image.new("RGB", size, "red"), Geometry(32, 32, 16, 2), "pad", spec))
    assert (pixels == (255, 0, 0)).all(axis=-1).sum() == 32


def test_only_exact_needs_an_image_that_the_processor_takes(fixed: GridSpec) -> None:
    thin = Image.new("RGB", (201, 1))
    with pytest.raises(ImageError, match="too oblong"):
        fit(thin, FIXED, "exact", fixed)
    for how in ("stretch", "pad"):
        assert fit(thin, FIXED, how, fixed).size == (192, 192)


@pytest.mark.parametrize("geometry", [Geometry(224, 224, 16, 2), Geometry(192, 192, 16, 1), Geometry(192, 192, 8, 4)])
def test_fit_refuses_a_geometry_of_another_processor(geometry: Geometry, fixed: GridSpec) -> None:
    with pytest.raises(BundleError, match="never makes"):
        fit(noise(192, 192), geometry, "stretch", fixed)


def test_fit_refuses_an_unknown_way(fixed: GridSpec) -> None:
    with pytest.raises(UsageError, match="Fits are: exact, stretch, pad"):
        fit(noise(192, 192), FIXED, "crop", fixed)
