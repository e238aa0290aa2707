"""Videos for Qwen's encoders. Their processors need torchvision, so their functions are run one by one, and a plain loop beside."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from processor_parity import noise, pair, source_function
from transformers import Qwen2_5_VLModel

from edgeprune.errors import ImageError
from edgeprune.plan import Geometry, View
from edgeprune.processors import ImageSpec, fit, image_spec

KIND = "Qwen2VLImageProcessor"
AREA = {"shortest_edge": 112 * 112, "longest_edge": 112 * 112}


def spec_of(**settings: Any) -> ImageSpec:
    return pair(KIND, {}, size=AREA, **settings)[0]


def film(frames: int, height: int = 90, width: int = 130) -> list[Image.Image]:
    return [noise(height, width).rotate(90 * number).resize((width, height)) for number in range(frames)]


def looped(processor: Any, frames: list[Image.Image], patch: int, merge: int, step: int) -> np.ndarray:
    """Return the patches of frames, each pixel put where it belongs, from what transformers makes of each as an image."""
    whole = frames + [frames[-1]] * (-len(frames) % step)
    stills = [processor(images=frame, temporal_patch_size=1) for frame in whole]
    _, rows, columns = stills[0]["image_grid_thw"][0]
    patches = []
    for time in range(0, len(whole), step):
        for index in range(rows * columns):
            cubes = [still["pixel_values"][index].reshape(3, patch, patch) for still in stills[time : time + step]]
            patches.append([cube[channel] for channel in range(3) for cube in cubes])
    return np.array(patches, np.float32).reshape(len(patches), -1)


@pytest.mark.parametrize("frames", [2, 3, 5, 6])
@pytest.mark.parametrize(("patch", "merge", "step"), [(14, 2, 2), (16, 2, 2), (14, 1, 3), (14, 2, 1)])
def test_patches_equal_a_plain_loop(patch: int, merge: int, step: int, frames: int) -> None:
    spec, processor = pair(KIND, {}, size=AREA, patch_size=patch, merge_size=merge, temporal_patch_size=step)
    patches = spec.patches(film(frames))
    np.testing.assert_array_equal(patches, looped(processor, film(frames), patch, merge, step))
    made = spec.geometry(90, 130, frames, fps=2.0)
    assert len(made.layout) == -(-frames // step)
    assert made.tokens * merge**2 == len(patches)


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen3_vl"])
@pytest.mark.parametrize("frames", [2, 3, 8])
def test_patches_equal_the_video_processor(kind: str, frames: int) -> None:
    spec = image_spec({"size": AREA, "image_mean": [0.0] * 3, "image_std": [1.0] * 3})
    pixels = [np.asarray(spec.canvas(frame, frames), np.float32).transpose(2, 0, 1) for frame in film(frames)]
    scaled = torch.from_numpy((np.stack(pixels)[None].astype(np.float64) / 255).astype(np.float32))
    patchify = source_function(f"models/{kind}/video_processing_{kind}.py", "patchify")
    expected, times, rows, columns = patchify(None, scaled, patch_size=14, merge_size=2, temporal_patch_size=2)
    np.testing.assert_allclose(spec.patches(film(frames)), expected[0].numpy(), rtol=0, atol=1e-7)
    made = spec.geometry(90, 130, frames, fps=1.0)
    assert (len(made.layout), made.layout[0].rows * 2, made.layout[0].columns * 2) == (times, rows, columns)


def test_frames_are_scaled_as_the_video_processor_does() -> None:
    smart_resize = source_function("models/qwen2_vl/video_processing_qwen2_vl.py", "smart_resize", math=math)
    spec = pair(KIND, {}, size={"shortest_edge": 128 * 28 * 28, "longest_edge": 28 * 28 * 768})[0]
    for height, width in [(480, 640), (90, 130), (1080, 1920), (20, 3000)]:
        made = spec.geometry(height, width, frames=4)
        assert (made.height, made.width) == smart_resize(height, width, 28, 128 * 28 * 28, 28 * 28 * 768)
        assert made.views[0] == View(0, 0, made.height, made.width, made.height // 28, made.width // 28)


@pytest.mark.parametrize("fps", [0.5, 1.0, 2.0, 3.0, 7.0, 23.976, 24.0, 30.0])
@pytest.mark.parametrize("rate", [2, 4, 25])
def test_times_equal_the_model(rate: int, fps: float) -> None:
    spec = image_spec({"size": AREA, "tokens_per_second": rate})
    seconds = torch.tensor([2 / fps])  # as the processor of text and videos gives them
    grid = torch.tensor([40, 8, 8])
    expected = Qwen2_5_VLModel.get_vision_position_ids(SimpleNamespace(), 0, grid, 1, 2, rate * next(iter(seconds)))
    made = spec.geometry(112, 112, frames=80, fps=fps)
    assert [view.time for view in made.layout] == expected[0].view(40, -1)[:, 0].tolist()


def test_times_count_frames_without_a_rate() -> None:
    assert [view.time for view in spec_of().geometry(112, 112, frames=5, fps=0.1).layout] == [0, 1, 2]


def test_times_need_frames_per_second() -> None:
    spec = image_spec({"size": AREA, "tokens_per_second": 2})
    with pytest.raises(ImageError, match="needs its frames per second"):
        spec.geometry(112, 112, frames=4)
    assert spec.geometry(112, 112).layout == (View(0, 0, 112, 112, 4, 4),)


def test_a_video_geometry_by_hand() -> None:
    views = (View(0, 0, 112, 112, 4, 4), View(0, 0, 112, 112, 4, 4, time=1))
    made = spec_of().geometry(200, 200, frames=3, fps=4.0)
    assert made == Geometry(112, 112, 14, 2, views, 3, 4.0)
    assert Geometry.from_dict(json.loads(json.dumps(dataclass_dict(made)))) == made


def dataclass_dict(geometry: Geometry) -> dict[str, Any]:
    return {**vars(geometry), "views": [vars(view) for view in geometry.views]}


def test_frames_are_fitted_one_by_one() -> None:
    spec = spec_of()
    geometry = spec.geometry(112, 112, frames=2, fps=1.0)
    image = noise(112, 112)
    assert fit(image, geometry, "exact", spec) is image
    with pytest.raises(ImageError, match="takes 2 frames of 112x112 px in one view"):
        fit(noise(60, 200), geometry, "exact", spec)
    assert spec.patches([fit(noise(60, 200), geometry, "pad", spec)] * 2).shape == (64, 3 * 2 * 14 * 14)


def test_parity_check_sees_the_order_of_frames() -> None:
    spec, processor = pair(KIND, {}, size=AREA)
    frames = film(4)
    expected = looped(processor, frames, 14, 2, 2)
    for wrong in (frames[::-1], [frames[1], frames[0], *frames[2:]], frames[:3]):
        with pytest.raises(AssertionError):
            np.testing.assert_array_equal(spec.patches(wrong), expected)
