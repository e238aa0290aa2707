"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL beyond the contract of all families: towers, videos and positions against transformers' own."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

from edgeprune.calibration.replay.reference import reference_model
from edgeprune.checkpoint.loading import LoadedModel, load_model, resolve_model
from edgeprune.errors import UnsupportedModelError
from edgeprune.plan import Cut, Geometry
from edgeprune.plan.presets import unpruned_plan
from edgeprune.processors import image_spec
from edgeprune.registry import family_class
from edgeprune.runtime import Runtime
from edgeprune.runtime.generation.pipeline import Pipeline
from edgeprune.runtime.generation.sequence import span_positions, text_positions

NAMES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
PROMPT = "What colour is the cube?"
FPS = 2.0
families = pytest.mark.parametrize("name", NAMES)
# In units of one visual token; the first has windows of all four kinds.
SIZES = ((3, 5), (2, 2), (1, 7), (5, 3))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], LoadedModel]:
    """Return a function from a family's name to its tiny model."""

    @cache
    def loaded(name: str) -> LoadedModel:
        folder = import_module(f"tiny_{name}").folder(tmp_path_factory.mktemp(name))
        return load_model(resolve_model(str(folder)))

    return loaded


@pytest.fixture
def model(name: str, models: Callable[[str], LoadedModel]) -> LoadedModel:
    return models(name)


def clip(model: LoadedModel, steps: int, size: tuple[int, int] = SIZES[0], fps: float = FPS) -> Geometry:
    """Return the geometry of an image, or of a video of so many steps in time."""
    patch = model.model.config.vision_config.patch_size
    pixels = (size[0] * 2 * patch, size[1] * 2 * patch)
    return model.geometry(pixels) if steps == 1 else model.geometry(pixels, 2 * steps, fps)


def grid(geometry: Geometry) -> torch.Tensor:
    return torch.tensor([[len(geometry.layout), geometry.rows * 2, geometry.columns * 2]])


def patches(tower: Any) -> torch.Tensor:
    return torch.randn(tower.takes, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def apart(model: LoadedModel, tower: Any, geometry: Geometry) -> float:
    """Return how far the tower's tokens, and each plane, are from transformers' own, relative to the largest."""
    pixels = patches(tower)
    seen = model.model.model.visual(pixels, grid(geometry))
    expected = torch.stack([seen.pooler_output, *getattr(seen, "deepstack_features", ())])
    actual = tower(pixels)[0].unflatten(1, (len(expected), -1)).transpose(0, 1)
    return float(((actual - expected).abs().amax(dim=(1, 2)) / expected.abs().amax(dim=(1, 2))).max())


@families
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_tower_equals_transformers(name: str, model: LoadedModel, size: tuple[int, int], steps: int) -> None:
    geometry = clip(model, steps, size)
    assert apart(model, model.family.vision(geometry), geometry) < 1e-5


@families
@pytest.mark.parametrize("steps", [1, 3])
def test_the_signals_of_every_frame(name: str, model: LoadedModel, steps: int) -> None:
    geometry = clip(model, steps)
    tower = model.family.vision(geometry, signals=True)
    with torch.no_grad():
        visual, received, keys = tower(patches(tower))
    assert visual.shape == (1, 15 * steps, 48 * (1 + model.family.decoder().planes))
    assert received.shape == (15 * steps,) and keys.shape == (15 * steps, 16)
    # Patches of a token are averaged, and a query gives 1 to the 60 patches of its frame.
    assert received.view(steps, 15).sum(dim=1).tolist() == pytest.approx([15 / 60] * steps, rel=1e-4)


def test_wrong_windows_would_be_noticed(models: Callable[[str], LoadedModel]) -> None:
    model = models("qwen2_5_vl")
    tower = model.family.vision(clip(model, 2))
    tower.whole = frozenset(range(3))
    assert apart(model, tower, clip(model, 2)) > 1e-3  # a hundred times the tolerance


@families
def test_frames_that_see_each_other_would_be_noticed(name: str, model: LoadedModel) -> None:
    geometry = clip(model, 2)
    tower = model.family.vision(geometry)
    tower.frames = 1
    if name == "qwen3_vl":
        tower.places = tower.places.repeat(2, 1)
    tower.whole = frozenset(range(3))  # windows lie within a frame, too
    assert apart(model, tower, geometry) > 1e-3


def test_planes_in_another_order_would_be_noticed(models: Callable[[str], LoadedModel]) -> None:
    model = models("qwen3_vl")
    tower = model.family.vision(clip(model, 1))
    tower.mergers = tower.mergers[1:2] + tower.mergers[:1] + tower.mergers[2:]
    assert apart(model, tower, clip(model, 1)) > 1e-3


def test_interleaved_positions_rotate_as_in_transformers(models: Callable[[str], LoadedModel]) -> None:
    model = models("qwen3_vl")
    positions = torch.randint(0, 500, (3, 40), generator=torch.Generator().manual_seed(1))
    ours = model.family.decoder().rope(positions)
    theirs = model.model.model.language_model.rotary_emb(ours[0], positions[:, None])
    assert all(torch.equal(a, b[0]) for a, b in zip(ours, theirs, strict=True))


def asked(model: LoadedModel, geometry: Geometry, images: int) -> tuple[Pipeline, list[int]]:
    """Return the unpruned model and the ids of a prompt with images, each with one token for a span."""
    reference = reference_model(model, unpruned_plan(model.folder.model_type, len(model.family.decoder().layers), geometry))
    content = [{"type": reference.image.kind}] * images + [{"type": "text", "text": PROMPT}]
    turn: Any = [{"role": "user", "content": content}]
    return reference, reference.prompts.ids(turn)


def inputs(model: Pipeline, ids: list[int]) -> dict[str, Any]:
    """Return the arguments of transformers that say what and where the images are."""
    layout = model.prompts.placeholders
    images, tokens = layout.count(ids), [sum(view.tokens for view in views) for views in layout.spans]
    counts = iter(tokens * images)
    whole = torch.tensor([[token for id_ in ids for token in [id_] * (next(counts) if id_ == model.image.token else 1)]])
    kind, geometry = model.image.kind, model.plan.geometry
    marks = (whole == model.image.token).long() * (2 if kind == "video" else 1)
    given = {"input_ids": whole, "mm_token_type_ids": marks, f"{kind}_grid_thw": grid(geometry).repeat(images, 1)}
    if kind == "video" and model.plan.family == "qwen2_5_vl":
        given["second_per_grid_ts"] = torch.tensor([2 / geometry.fps] * images)
    return given


@families
@pytest.mark.parametrize(("steps", "images", "fps"), [(1, 1, FPS), (1, 2, FPS), (2, 1, FPS), (3, 2, FPS), (3, 1, 3.0), (4, 1, 7.0)])
def test_positions_equal_transformers(name: str, model: LoadedModel, steps: int, images: int, fps: float) -> None:
    reference, ids = asked(model, clip(model, steps, fps=fps), images)
    spans = iter(reference.prompts.placeholders.spans * images)
    parts, position = [], 0
    for token in ids:
        if token == reference.image.token:
            part, position = span_positions(position, next(spans), 3)
        else:
            part, position = text_positions(position, 1, 3), position + 1
        parts.append(part)
    ours = np.concatenate(parts, axis=1)
    theirs, behind = model.model.model.get_rope_index(**inputs(reference, ids))
    assert ours.tolist() == theirs[:, 0].tolist()
    assert position == ours.shape[1] + int(behind)


@pytest.mark.parametrize("frames", [2, 5, 8])
@pytest.mark.parametrize("fps", [1.0, 2.0, 3.0, 30.0])
def test_frames_are_told_their_times(models: Callable[[str], LoadedModel], frames: int, fps: float) -> None:
    model = models("qwen3_vl")
    geometry = model.geometry((64, 64), frames, fps)
    processor: Any = SimpleNamespace(
        video_processor=SimpleNamespace(merge_size=2, temporal_patch_size=2),
        video_token="<|video_pad|>",
        vision_start_token="<|vision_start|>",
        vision_end_token="<|vision_end|>",
        _calculate_timestamps=lambda *given: Qwen3VLProcessor._calculate_timestamps(processor, *given),
    )
    metadata = SimpleNamespace(fps=fps, frames_indices=list(range(frames)))
    shown = {"video_grid_thw": grid(geometry), "video_metadata": [metadata]}
    expected = Qwen3VLProcessor.replace_video_token(processor, shown, 0)
    assert model.family.image_text(geometry).text.replace("<|video_pad|>", "<|video_pad|>" * 4) == expected


@pytest.mark.parametrize("frames", [4, 5])
def test_patches_of_a_video_are_those_of_its_frames(models: Callable[[str], LoadedModel], frames: int) -> None:
    # The processor of videos needs torchvision; that of images makes each patch of two equal frames.
    model = models("qwen3_vl")
    geometry = model.geometry((96, 160), frames, FPS)
    pixels = np.random.default_rng(7).integers(0, 256, (frames, 96, 160, 3), dtype=np.uint8)
    pictures = [Image.fromarray(frame) for frame in pixels]
    made = image_spec(model.settings(geometry)).patches(pictures).reshape(-1, 60, 3, 2, 16 * 16)
    apart = (
        import_module("tiny_qwen3_vl").inputs(model.folder.path, pictures)["pixel_values"].numpy().reshape(-1, 60, 3, 2, 16 * 16)
    )
    assert len(made) == len(geometry.views)
    for step, both in enumerate(made):
        for half in (0, 1):
            assert np.array_equal(both[:, :, half], apart[min(2 * step + half, frames - 1)][:, :, half])


@families
def test_answers_about_a_video_equal_transformers(name: str, model: LoadedModel) -> None:
    height, width = import_module(f"tiny_{name}").SIZE
    geometry = model.geometry((height, width), 5, FPS)
    pixels = np.random.default_rng(8).integers(0, 256, (5, height, width, 3), dtype=np.uint8)
    frames = [Image.fromarray(frame) for frame in pixels]
    reference, ids = asked(model, geometry, 1)
    answer = Runtime(reference).generate(frames, PROMPT, max_tokens=16)
    given = inputs(reference, ids)
    values = torch.from_numpy(reference.image_spec.patches(frames))
    with torch.no_grad():
        generated = model.model.generate(
            **given,
            attention_mask=torch.ones_like(given["input_ids"]),
            pixel_values_videos=values,
            max_new_tokens=16,
            do_sample=False,
        )
    said = generated[0, given["input_ids"].shape[1] :].tolist()
    assert answer.text == reference.tokenizer.decode(said[: said.index(2)] if 2 in said else said)


@families
def test_a_video_is_pruned_where_it_does_not_change(name: str, model: LoadedModel) -> None:
    height, width = import_module(f"tiny_{name}").SIZE
    whole = unpruned_plan(name, len(model.family.decoder().layers), model.geometry((height, width), 6, FPS))
    still = np.random.default_rng(9).integers(0, 256, (height, width, 3), dtype=np.uint8)
    other = np.random.default_rng(10).integers(0, 256, (height, width, 3), dtype=np.uint8)
    frames = [Image.fromarray(frame) for frame in (still, still, still, still, other, other)]
    runtime = Runtime(reference_model(model, whole.with_cuts(Cut("input", "evs", 30))))
    (cut,) = runtime.generate(frames, PROMPT, max_tokens=2).receipt.cuts
    assert list(cut.kept) == [*range(15), *range(30, 45)]  # the second step is the first again


@families
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda config: setattr(config.text_config, "layer_types", ["full_attention", "sliding_attention"]), "sliding"),
        (lambda config: config.text_config.rope_parameters.update(rope_type="longrope"), "longrope"),
    ],
)
def test_twists_are_refused(name: str, model: LoadedModel, change: Callable[[Any], None], reason: str) -> None:
    config = type(model.model.config)(**model.model.config.to_dict())
    family_class(name).check(config)
    change(config)
    with pytest.raises(UnsupportedModelError, match=reason):
        family_class(name).check(config)


def test_mixtures_of_experts_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="qwen3_vl_moe"):
        family_class("qwen3_vl_moe")


def test_a_size_takes_the_place_of_the_limits() -> None:
    config = SimpleNamespace(vision_config=SimpleNamespace(tokens_per_second=2))
    own = {"min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14}
    settings = {name: family_class(name).settings for name in NAMES}
    assert all(settings[name](config, own).items() >= own.items() for name in NAMES)
    area = {"patch_size": 14, "size": {"shortest_edge": 784, "longest_edge": 784}}
    assert settings["qwen2_vl"](config, own, (28, 28)) == settings["qwen3_vl"](config, own, (28, 28)) == area
    assert settings["qwen2_5_vl"](config, own, (28, 28)) == area | {"tokens_per_second": 2}
