"""The operations that the roofline counts, against those of transformers' own modules, and against what our decoder runs.

The oracle is torch's FlopCounterMode over eager attention, on each family's tiny model. Encoders and products with weights are
equal, without a tolerance. Attention of a prompt has the pairs of tokens that transformers' masks leave.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from edgeprune.bundle import Operations
from edgeprune.checkpoint.loading import LoadedModel, load_model, resolve_model
from edgeprune.device.roofline import decode_operations, prefill_operations
from edgeprune.device.workload import Workload, workload
from edgeprune.export.sizes import sizes_of
from edgeprune.families import encoder, lfm2_vl
from edgeprune.families.base import encoder_work
from edgeprune.model import PrunedDecoder, Segment
from edgeprune.plan import Cut, Geometry, KeepPlan
from edgeprune.plan.presets import unpruned_plan
from edgeprune.registry import FAMILIES
from edgeprune.runtime.generation.sequence import text_positions
from edgeprune.targets import PLAIN

# One of each kind of encoder and of decoder; the others are counted by `make test-all`.
QUICK = ("gemma3", "idefics2", "internvl", "lfm2_vl", "qwen2_5_vl", "qwen3_5")
families = pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in sorted([*FAMILIES, "paligemma2"])],
)
BEFORE, AFTER = 3, 9  # text tokens around the image
WORD = 20  # of no special meaning in any tiny vocabulary


@dataclass(frozen=True)
class Tiny:
    """A family's tiny model with eager attention, the geometry of its image, and what transformers makes of the image."""

    loaded: LoadedModel
    geometry: Geometry
    given: dict[str, torch.Tensor]

    @property
    def plan(self) -> KeepPlan:
        return unpruned_plan(self.loaded.folder.model_type, self.loaded.decoder_shape().layers, self.geometry)

    def work(self, plan: KeepPlan) -> Workload:
        return workload(sizes_of(self.loaded, plan, PLAIN), plan, text_tokens=BEFORE + AFTER, generated=1)

    def features(self) -> None:
        """Run transformers' own encoder and projector on the image."""
        run, given = self.loaded.model.model.get_image_features, self.given
        if "spatial_shapes" not in given:
            run(**given)
            return
        # LFM2-VL's views are padded to the largest one and masked: here each goes alone, unpadded.
        for view, sides in enumerate(given["spatial_shapes"]):
            patches = int(sides.prod())
            one = {name: given[name][view : view + 1, :patches] for name in ("pixel_values", "pixel_attention_mask")}
            run(**one, spatial_shapes=sides[None])


@pytest.fixture(scope="module")
def tinies(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function from a family's name to its tiny model, loaded once."""

    @cache
    def made(name: str) -> Tiny:
        module = import_module(f"tiny_{name}")
        folder: Path = module.folder(tmp_path_factory.mktemp(name))
        loaded = load_model(resolve_model(str(folder)))
        loaded.model.set_attn_implementation("eager")
        pixels = np.random.default_rng(0).integers(0, 256, (*module.SIZE, 3), dtype=np.uint8)
        return Tiny(loaded, loaded.geometry(module.SIZE), module.inputs(folder, [Image.fromarray(pixels)]))

    return made


@pytest.fixture
def tiny(name: str, tinies: Any) -> Tiny:
    found: Tiny = tinies(name)
    return found


def counted(run: Callable[[], Any], blocks: int = 10**6) -> Operations:
    """Return the operations of a call, without those of encoder layers from number `blocks` on, whose outputs nobody reads.

    Gradients stay on: without them torch makes batched products, as those of attention, of some products with weights.
    """
    with FlopCounterMode(display=False) as counter:
        run()
    found = counter.get_flop_counts()
    total = {str(operator): count for operator, count in found["Global"].items()}
    for module, counts in found.items():
        path, _, number = module.rpartition(".")
        if path.endswith("encoder.layers") and number.isdigit() and int(number) >= blocks:
            total = {
                operator: count - counts.get(of, 0) for (operator, count), of in zip(total.items(), found["Global"], strict=True)
            }
    return Operations(sum(count for operator, count in total.items() if "bmm" not in operator), total.get("aten.bmm", 0))


def encoder_of_transformers(tiny: Tiny) -> Operations:
    tower: Any = tiny.loaded.family.vision(tiny.geometry)
    return counted(tiny.features, tower.blocks)


@families
def test_an_encoder_does_what_transformers_does(tiny: Tiny) -> None:
    assert encoder_work(tiny.loaded.family.vision(tiny.geometry)) == encoder_of_transformers(tiny)


@pytest.mark.parametrize("name", ["idefics2", "idefics3", "internvl", "lfm2_vl", "llava_onevision"])
def test_views_as_one_sequence_are_seen(tiny: Tiny, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def as_one(query: Any, key: Any, value: Any, heads: int, views: int) -> Any:
        return encoder_attends(query, key, value, heads, 1)

    encoder_attends = encoder.attend_within
    for module in (encoder, lfm2_vl):
        monkeypatch.setattr(module, "attend_within", as_one)
    work, expected = encoder_work(tiny.loaded.family.vision(tiny.geometry)), encoder_of_transformers(tiny)
    assert work.products == expected.products
    assert work.attention > expected.attention or len(tiny.geometry.layout) == 1


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"])
@pytest.mark.parametrize(("rows", "columns", "frames"), [(2, 7, 1), (5, 3, 1), (3, 4, 4)])
def test_grids_and_frames_of_any_size(tiny: Tiny, name: str, rows: int, columns: int, frames: int) -> None:
    side = tiny.geometry.patch * tiny.geometry.merge
    geometry = tiny.loaded.geometry((rows * side, columns * side), frames, 2.0 if frames > 1 else 0.0)
    tower: Any = tiny.loaded.family.vision(geometry)
    grid = [[len(geometry.layout), geometry.height // geometry.patch, geometry.width // geometry.patch]]
    model = tiny.loaded.model.model
    features = model.get_video_features if frames > 1 else model.get_image_features
    assert encoder_work(tower) == counted(partial(features, torch.zeros(tower.takes), torch.tensor(grid)))


def test_a_window_that_is_not_counted_is_seen(tinies: Any) -> None:
    tiny: Tiny = tinies("qwen2_5_vl")
    tower: Any = tiny.loaded.family.vision(tiny.geometry)
    tower.whole = frozenset(range(tower.blocks))
    assert encoder_work(tower).attention > encoder_of_transformers(tiny).attention


@families
def test_a_cut_inside_the_encoder_is_counted_behind_it(tiny: Tiny) -> None:
    family, tokens = tiny.loaded.family, tiny.geometry.tokens
    whole = encoder_work(family.vision(tiny.geometry))
    if family.no_encoder_cuts_reason:
        assert tiny.work(tiny.plan).tower.work == whole
        return
    plan = tiny.plan.with_cuts(Cut("vision", "evit", tokens // 2 // len(tiny.geometry.layout) * len(tiny.geometry.layout), layer=1))
    tower = tiny.work(plan).tower
    assert tower.whole == whole == tiny.work(plan).unpruned().tower.work
    assert tower.work.products < whole.products and tower.work.attention < whole.attention
    assert tower.work == counted(
        partial(family.vision(tiny.geometry, cuts=plan.vision_cuts), torch.zeros(family.vision(tiny.geometry).takes))
    )


@families
def test_a_prompt_costs_what_it_costs_in_transformers(tiny: Tiny, name: str) -> None:
    model, work = tiny.loaded.model, tiny.work(tiny.plan)
    image, visual = model.config.image_token_id, tiny.geometry.tokens
    ids = torch.tensor([[WORD] * BEFORE + [image] * visual + [WORD] * AFTER])
    kinds = (ids == image).long()
    others = 0 * kinds if name.startswith("paligemma") else kinds  # what is prompt and what is answer, not what is an image
    accepted = inspect.signature(model.forward).parameters
    typed = {kind: each for kind, each in {"mm_token_type_ids": kinds, "token_type_ids": others}.items() if kind in accepted}
    run = partial(model, input_ids=ids, attention_mask=torch.ones_like(ids), logits_to_keep=1, **typed, **tiny.given)
    with masks_of(model) as masks:
        everything, features = counted(run), counted(partial(model.model.get_image_features, **tiny.given))
    found = prefill_operations(work)
    convolved = {"lfm2_vl": convolutions(tiny, ids.shape[1]), "qwen3_5": convolutions(tiny, ids.shape[1])}.get(name, 0)
    assert found.products == everything.products - features.products - convolved
    assert set(masks) == set(range(work.decoder.layers)) - work.decoder.without_cache
    for layer, mask in masks.items():
        assert work.decoder.pairs(layer, visual, BEFORE + AFTER) == int((mask == 0).sum()), layer
    assert found.attention <= everything.attention - features.attention


@contextmanager
def masks_of(model: Any) -> Iterator[dict[int, torch.Tensor]]:
    """Collect the masks, 0 where a query sees a key, that the attention of each decoder layer is given."""
    text = getattr(model.model, "language_model", None) or model.model.text_model
    masks, hooks = dict[int, torch.Tensor](), []
    for index, layer in enumerate(text.layers):

        def keep(_: Any, given: Any, named: dict[str, Any], index: int = index) -> None:
            masks[index] = named["attention_mask"][0, 0]

        if hasattr(layer, "self_attn"):
            hooks.append(layer.self_attn.register_forward_pre_hook(keep, with_kwargs=True))
    try:
        yield masks
    finally:
        for hook in hooks:
            hook.remove()


def convolutions(tiny: Tiny, tokens: int) -> int:
    """Return the operations of short convolutions in transformers, which pad a prompt on both sides; the roofline has none."""
    shapes = [state.shape for state in tiny.loaded.decoder_shape().states if len(state.shape) == 2]
    return sum(2 * (kept + 1) * width * (tokens + kept) for kept, width in shapes)


@families
def test_the_roofline_is_at_most_what_the_decoder_runs(tiny: Tiny) -> None:
    parts, visual = tiny.loaded.family.decoder(), tiny.geometry.tokens
    for plan in (tiny.plan, tiny.plan.with_cuts(Cut("layer", "random", visual // 2, layer=1))):
        work, decoder = tiny.work(plan), PrunedDecoder(parts, plan)
        prompt = counted(partial(decoder, *segments(tiny, BEFORE, visual, AFTER), decoder.empty_caches()))
        found = prefill_operations(work)
        assert found.products == prompt.products
        assert 0 < found.attention <= prompt.attention
        step = counted(partial(decoder, *segments(tiny, 0, 0, 1), decoder.empty_caches()))
        assert decode_operations(work, 1).products == step.products


def segments(tiny: Tiny, *lengths: int) -> list[Segment]:
    shape = tiny.loaded.decoder_shape()
    return [
        Segment(torch.zeros(1, length, shape.width), torch.from_numpy(text_positions(0, length, shape.position_axes)))
        for length in lengths
    ]
