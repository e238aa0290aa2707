"""What was computed once is not computed again, and gives the same answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgeprune.bundle import Bundle
from edgeprune.checkpoint.loading import LoadedModel
from edgeprune.errors import UsageError
from edgeprune.export.exporter import export_bundle
from edgeprune.plan import Cut, KeepPlan
from edgeprune.plan.presets import unpruned_plan
from edgeprune.plan.tiers import Tiers
from edgeprune.runtime import Runtime, Turn, load
from edgeprune.runtime.generation.pipeline import LruCache
from edgeprune.runtime.media.images import image_hash

PROMPT, OTHER = "What colour is the cube?", "How many balls are there?"


def test_the_one_not_asked_for_the_longest_makes_room() -> None:
    recall = LruCache(10)
    for key in "abc":
        recall.put(key, key.upper(), 3)
    assert recall.get("a") == "A"
    recall.put("d", "D", 3)
    assert [recall.get(key) for key in "abcd"] == ["A", None, "C", "D"]
    assert recall.bytes == 9


def test_a_value_may_be_replaced_and_one_that_is_too_large_is_not_kept() -> None:
    recall = LruCache(10)
    recall.put("a", 1, 4)
    recall.put("a", 2, 6)
    recall.put("b", 3, 11)
    assert (recall.get("a"), recall.get("b"), recall.bytes, len(recall)) == (2, None, 6, 1)
    recall.clear()
    assert (recall.get("a"), recall.bytes) == (None, 0)


def test_a_digest_knows_pixels_sizes_and_settings(tiny_image: Image.Image) -> None:
    changed = tiny_image.copy()
    changed.putpixel((0, 0), (1, 2, 3))
    turned = Image.frombytes("RGB", tiny_image.size[::-1], tiny_image.tobytes())
    several = [[tiny_image], [changed], [turned], [tiny_image, tiny_image]]
    assert len({image_hash(frames, "exact") for frames in several} | {image_hash([tiny_image], "pad")}) == 5
    assert image_hash([tiny_image.copy()], "exact") == image_hash([tiny_image], "exact")


@pytest.fixture(scope="module")
def plans(tiny: LoadedModel) -> dict[str, KeepPlan]:
    whole = unpruned_plan("qwen2_vl", 3, tiny.geometry((84, 112)))
    cuts = {
        "no cuts": (),
        "free": (Cut("input", "divprune", 6),),
        "asking": (Cut("input", "zspaprune", 6),),
        "layer": (Cut("layer", "fastv", 6, 1),),
        "encoder": (Cut("vision", "evit", 6, 1),),
    }
    return {name: replace(whole, cuts=each) for name, each in cuts.items()}


def bundle(tiny: LoadedModel, plan: KeepPlan, folder: Path) -> Path:
    return export_bundle(tiny, plan, folder / "bundle").path


@pytest.mark.parametrize(
    ("name", "reused"),
    [
        ("no cuts", {"vision", "prefix"}),
        pytest.param("free", {"vision", "prefix"}, marks=pytest.mark.slow),
        ("asking", {"vision"}),
        ("layer", {"vision"}),
        pytest.param("encoder", {"vision", "prefix"}, marks=pytest.mark.slow),
    ],
)
def test_an_image_that_was_seen_is_not_seen_again(
    name: str, reused: set[str], tiny: LoadedModel, plans: dict[str, KeepPlan], tiny_image: Image.Image, tmp_path: Path
) -> None:
    path = bundle(tiny, plans[name], tmp_path)
    cold, warm = load(path, cache_bytes=0), load(path)
    first = warm.generate(tiny_image, PROMPT, max_tokens=8)
    again = warm.generate(tiny_image, OTHER, max_tokens=8)
    expected = cold.generate(tiny_image, OTHER, max_tokens=8)
    assert (first.receipt.reused, set(again.receipt.reused), expected.receipt.reused) == ((), reused, ())
    assert again.text == expected.text
    assert again.receipt.times.vision_ms == 0 < expected.receipt.times.vision_ms
    assert again.receipt.kv_bytes == expected.receipt.kv_bytes
    one, other = again.receipt, expected.receipt
    assert (one.visual_tokens, one.visual_stored, one.visual_whole) == (
        other.visual_tokens,
        other.visual_stored,
        other.visual_whole,
    )
    assert [cut.kept.tolist() for cut in one.cuts] == [cut.kept.tolist() for cut in other.cuts]


def test_a_selection_that_does_not_ask_is_reused_where_the_text_before_differs(
    tiny: LoadedModel, plans: dict[str, KeepPlan], tiny_image: Image.Image, tmp_path: Path
) -> None:
    runtime = load(bundle(tiny, plans["free"], tmp_path))
    runtime.generate(tiny_image, PROMPT, max_tokens=2)
    stream = runtime.chat(history=[Turn("system", "Be short.")]).ask(PROMPT, tiny_image, max_tokens=2)
    "".join(stream)
    assert stream.receipt.reused == ("vision", "input cut")


def test_a_prefix_is_gone_on_from_again_and_again(tiny_bundle: Bundle, tiny_image: Image.Image) -> None:
    cold, warm = load(tiny_bundle.path, cache_bytes=0), load(tiny_bundle.path)
    asked = [PROMPT, OTHER, PROMPT, "And the table?"]
    expected = [cold.generate(tiny_image, prompt, prune=False, max_tokens=12).text for prompt in asked]
    chats = [warm.chat(prune=False) for _ in asked]
    streams = [chat.ask(prompt, tiny_image, max_tokens=12) for chat, prompt in zip(chats, asked, strict=True)]
    for _ in range(12):  # all at once: their caches must not be one another's
        for stream in streams:
            next(stream, "")
    assert [stream.text + "".join(stream) for stream in streams] == expected
    assert streams[-1].receipt.reused == ("vision", "prefix")


def test_two_images_share_what_they_have_in_common(tiny_bundle: Bundle, tiny_image: Image.Image) -> None:
    other = tiny_image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    cold, warm = load(tiny_bundle.path, cache_bytes=0), load(tiny_bundle.path)

    def answer(runtime: Runtime, *images: Image.Image) -> tuple[str, Sequence[str]]:
        stream = runtime.chat(prune=False).ask(PROMPT, list(images), max_tokens=8)
        return "".join(stream), stream.receipt.reused

    answer(warm, tiny_image, tiny_image)
    found = [answer(warm, tiny_image, other), answer(warm, tiny_image, other), answer(warm, other, other)]
    assert [reused for _, reused in found] == [("vision", "prefix"), ("vision", "prefix"), ("vision",)]
    assert [text for text, _ in found] == [answer(cold, *images)[0] for images in 2 * [(tiny_image, other)] + [(other, other)]]


def test_pruned_and_unpruned_answers_share_nothing(tiny_bundle: Bundle, tiny_image: Image.Image) -> None:
    runtime = load(tiny_bundle.path)
    runtime.generate(tiny_image, PROMPT, max_tokens=2)
    assert runtime.generate(tiny_image, PROMPT, prune=False, max_tokens=2).receipt.reused == ()


def test_what_was_forgotten_is_computed_again(tiny_bundle: Bundle, tiny_image: Image.Image) -> None:
    runtime = load(tiny_bundle.path)
    runtime.generate(tiny_image, PROMPT, max_tokens=2)
    runtime.forget()
    assert runtime.generate(tiny_image, PROMPT, max_tokens=2).receipt.reused == ()


def test_the_budget_is_kept(tiny_bundle: Bundle) -> None:
    runtime = load(tiny_bundle.path, cache_bytes=5000)  # an image's embeddings are 12 x 48 floats
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 255, (84, 112, 3), np.uint8) for _ in range(4)]
    for picture in [*pictures, pictures[-1]]:
        reused = runtime.generate(picture, PROMPT, max_tokens=2).receipt.reused
    assert reused == ("vision",)
    assert runtime.generate(pictures[0], PROMPT, max_tokens=2).receipt.reused == ()
    assert 0 < runtime._pipeline.state.feature_cache.bytes <= 5000


def test_a_budget_below_zero_is_refused(tiny_bundle: Bundle) -> None:
    with pytest.raises(UsageError, match="cache_bytes"):
        load(tiny_bundle.path, cache_bytes=-1)


def test_a_prefix_of_several_tiers_is_not_taken_for_one_of_the_last(
    tiny: LoadedModel, tiny_image: Image.Image, tmp_path: Path
) -> None:
    base = unpruned_plan("qwen2_vl", 3, tiny.geometry((84, 112)))
    tiers = Tiers.of({name: base.with_cuts(Cut("input", "uniform", keep)) for name, keep in (("quality", 9), ("fast", 3))})
    bundle = export_bundle(tiny, tiers, tmp_path / "bundle")
    other, stored = tiny_image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), []
    for cache_bytes in (1 << 20, 0):
        runtime = load(bundle.path, threads=1, cache_bytes=cache_bytes)
        chat = runtime.chat()
        first = "".join(chat.ask(PROMPT, tiny_image, tier="fast", max_tokens=1))
        "".join(chat.ask(OTHER, other, tier="quality", max_tokens=1))
        history = [Turn("user", PROMPT, [tiny_image]), Turn("assistant", first)]
        again = runtime.chat(history=history).ask(OTHER, other, tier="quality", max_tokens=1)
        "".join(again)
        stored.append(again.receipt.visual_stored)
    assert stored == [2 * 9 * 3] * 2
