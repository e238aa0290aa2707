"""Several images of one question: each is ranked after the question, as one forward pass over all of them would rank them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from importlib import import_module
from itertools import combinations
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from device_simulation import SimulatedDriver
from PIL import Image
from simulated_device import on_device, prepare

from edgeprune.bundle import Bundle
from edgeprune.calibration.replay.reference import reference_model
from edgeprune.checkpoint.loading import LoadedModel, load_model, resolve_model
from edgeprune.errors import EngineError, UsageError
from edgeprune.export.exporter import export_bundle
from edgeprune.plan import Cut, Geometry, KeepPlan
from edgeprune.plan.presets import ranked_plan, staircase_plan, unpruned_plan
from edgeprune.runtime import Answer, Runtime, Turn, load
from edgeprune.runtime.backends.compare import RecordingBackend
from edgeprune.runtime.backends.interface import BackendProxy, DecoderOutput
from edgeprune.runtime.backends.kv_cache import DecoderInput, KvCache
from edgeprune.runtime.backends.tensorrt.profiles import ProfileLimits
from edgeprune.runtime.generation.pipeline import Pipeline
from edgeprune.runtime.generation.sequence import SequenceState
from edgeprune.runtime.text.prompt import Message
from edgeprune.tabletop.dataset import scenes
from edgeprune.tabletop.drawing import draw_scene

QUESTIONS = ("What colour is the cube?", "How many balls are there?", "Where is the label?", "Is the ring small or large?")
AWARE = ("fastv", "pyramiddrop", "sparsevlm", "fitprune", "plphp")
Sets = list[frozenset[int]]
Exported = Callable[[str], Bundle]


def pictures(geometry: Geometry, count: int) -> list[Image.Image]:
    size = (geometry.height, geometry.width, 3)
    return [Image.fromarray(np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)) for seed in range(count)]


def plan_of(method: str, base: KeepPlan) -> KeepPlan:
    if method == "plphp":
        return ranked_plan(base, [base.geometry.tokens // 4] * base.layers)
    return staircase_plan(base, method, [0.25], [2])  # the last token of layer 0 has seen nothing yet


def new_folder(parent: Path) -> Path:
    (parent / "model").mkdir()
    return parent / "model"


def kept(answer: Answer, images: int) -> list[Sets]:
    """Return what the cuts of each image kept, for cache cuts by head."""
    return [
        [frozenset(row.tolist()) for cut in (*cuts.tokens, *cuts.caches) for row in np.atleast_2d(cut.kept)]
        for cuts in answer.receipt.cuts_by_image(images)
    ]


def overlap(sets: Sequence[Sets]) -> float:
    """Return the mean share of tokens that the sets of two questions have in common."""
    pairs = [(a, b) for left, right in combinations(sets, 2) for a, b in zip(left, right, strict=True)]
    return float(np.mean([len(a & b) / len(a) for a, b in pairs]))


def first_overlap(runtime: Runtime, images: Sequence[Any]) -> float:
    """Return the overlap of the first image's kept sets over the questions."""
    return overlap([kept(runtime.generate(images, question, max_tokens=1), len(images))[0] for question in QUESTIONS])


@contextmanager
def ranked_apart() -> Iterator[None]:
    """Rank each image by the text up to the next one, as if its step saw nothing of the question."""
    ahead = SequenceState._ahead
    with mock.patch.object(SequenceState, "_ahead", lambda self, start, later, **kind: ahead(self, start, later[:0], **kind)):
        yield


@pytest.fixture(scope="module")
def base(tiny: LoadedModel) -> KeepPlan:
    return unpruned_plan("qwen2_vl", 3, tiny.geometry((168, 224)))


@pytest.fixture(scope="module")
def bundles(tiny: LoadedModel, base: KeepPlan, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Return a function from a method's name to its bundle, exported once."""
    folder = tmp_path_factory.mktemp("bundles")
    return cache(lambda method: export_bundle(tiny, plan_of(method, base), folder / method))


@pytest.mark.parametrize("method", AWARE)
def test_the_first_image_is_ranked_by_the_question(method: str) -> None:
    bundled = load_model(resolve_model("tabletop"))
    whole = unpruned_plan("qwen2_vl", len(bundled.family.decoder().layers), bundled.geometry(None))
    runtime = Runtime(reference_model(bundled, plan_of(method, whole)))
    images = [draw_scene(scene) for scene, _ in scenes(77, 8)]
    alone = first_overlap(runtime, images[:1])
    for count in (2, 3, 8):
        assert first_overlap(runtime, images[:count]) < min(1, alone + 0.1)
    with ranked_apart():
        assert first_overlap(runtime, images[:2]) == 1


def ranked_by_transformers(loaded: LoadedModel, pipeline: Pipeline, images: list[Image.Image], number: int) -> list[torch.Tensor]:
    """Return the last token's attention [heads, V] to one image, layer by layer, in transformers without the images after it."""
    parts: list[Any] = [{"type": "image"}] * len(images) + [{"type": "text", "text": QUESTIONS[0]}]
    messages: list[Message] = [{"role": "user", "content": parts}]
    ids = torch.tensor([pipeline.prompts.every_id(messages)])
    visual, tokens = ids == loaded.model.config.image_token_id, pipeline.plan.geometry.tokens
    geometry = pipeline.plan.geometry
    grid = torch.tensor([[1, geometry.height // geometry.patch, geometry.width // geometry.patch]] * len(images))
    rope = {"image_grid_thw": grid, "mm_token_type_ids": visual.long()}
    mask, places = torch.ones_like(ids), torch.nonzero(visual[0])[:, 0].view(len(images), tokens)
    mask[0, places[number + 1 :].flatten()] = 0
    patches = torch.cat([torch.from_numpy(pipeline.image_spec.patches([image])) for image in images])
    loaded.model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            positions = loaded.model.model.get_rope_index(ids, **rope)[0]
            given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "pixel_values": patches, **rope}
            seen = loaded.model(**given, output_attentions=True).attentions
    finally:
        loaded.model.set_attn_implementation("sdpa")
    return [layer[0, :, -1, places[number]] for layer in seen]


@pytest.mark.parametrize("number", [0, 1, 2])
def test_an_image_is_ranked_as_transformers_attends_to_it(number: int, tiny: LoadedModel, base: KeepPlan) -> None:
    images = pictures(base.geometry, 3)
    found = {}
    for method in ("fastv", "plphp"):
        pipeline = reference_model(tiny, plan_of(method, base))
        found[method] = kept(Runtime(pipeline).generate(images, QUESTIONS[0], max_tokens=1), 3)[number]
    if number:  # what a cut of an earlier image dropped is seen in later layers by transformers alone
        found["plphp"] = found["plphp"][:0]
    attention = ranked_by_transformers(tiny, pipeline, images, number)
    count = base.geometry.tokens // 4
    assert found["fastv"] == [frozenset(attention[1].mean(0).topk(count).indices.tolist())]
    by_head = [group.mean(0) for layer in attention for group in layer.chunk(2)]
    assert found["plphp"] == [frozenset(each.topk(count).indices.tolist()) for each in by_head][: len(found["plphp"])]


def messages_of(text: str, images: int) -> list[Any]:
    return [{"type": "image"}] * images + [{"type": "text", "text": text}]


def test_no_row_of_the_later_text_stays(tiny: LoadedModel, base: KeepPlan) -> None:
    images = pictures(base.geometry, 3)
    runs = []
    for plan in (plan_of("fastv", base), staircase_plan(base, "uniform", [0.25], [2])):
        pipeline = reference_model(tiny, plan)
        recorder = RecordingBackend(pipeline.backend)
        answer = Runtime(replace(pipeline, backend=recorder)).generate(images, QUESTIONS[0], max_tokens=1)
        text = pipeline.prompts.ids([{"role": "user", "content": messages_of(QUESTIONS[0], 3)}])
        question = len(recorder.inputs[2][0].suffix.positions[0])
        between = len(recorder.inputs[1][0].suffix.positions[0]) - question
        assert between > 0
        assert answer.receipt.repeated_tokens == (between + question) + question
        assert [cache.length for _, cache in recorder.inputs] == [1, *np.cumsum([len(text) - 3 - question - between, between]) + 1]
        np.testing.assert_array_equal(recorder.inputs[0][0].suffix.positions[:, -question:], recorder.inputs[2][0].suffix.positions)
        runs.append(answer.receipt)
    assert runs[0].kv_bytes == runs[1].kv_bytes and runs[0].text_tokens == runs[1].text_tokens
    assert runs[0].to_dict()["repeated_tokens"] > 0


def test_nothing_is_repeated_where_nothing_is_ranked(tiny: LoadedModel, base: KeepPlan) -> None:
    images = pictures(base.geometry, 2)
    asked = Runtime(reference_model(tiny, plan_of("fastv", base)))
    by_input = Runtime(reference_model(tiny, base.with_cuts(Cut("input", "divprune", 12))))
    withdrawn = Runtime(reference_model(tiny, base.with_cuts(Cut("layer", "vtw", 0, 1))))
    answers = [
        asked.generate(images[:1], QUESTIONS[0], max_tokens=1),
        asked.generate(images, QUESTIONS[0], max_tokens=1, prune=False),
    ]
    answers += [model.generate(images, QUESTIONS[0], max_tokens=1) for model in (by_input, withdrawn)]
    assert [answer.receipt.repeated_tokens for answer in answers] == [0] * 4


def test_text_and_images_in_any_order(tiny: LoadedModel, base: KeepPlan) -> None:
    first, second = pictures(base.geometry, 2)
    runtime = Runtime(reference_model(tiny, plan_of("fastv", base)))

    def sets(*prompt: Any) -> Sets:
        stream = runtime.chat().ask(prompt, max_tokens=1)
        return kept(Answer("".join(stream), stream.receipt), 2)[0]

    asked = [sets(question, first, second) for question in QUESTIONS]  # the text before an image was always seen
    between = [sets("Here:", first, question, second, "And now?") for question in QUESTIONS]
    behind = [sets("Here:", first, "and:", second, question) for question in QUESTIONS]
    assert max(map(overlap, (asked, between, behind))) < 1


def test_a_turn_is_ranked_by_its_own_question_and_a_replay_by_the_newest(tiny: LoadedModel, base: KeepPlan) -> None:
    first, second, third = pictures(base.geometry, 3)
    runtime = Runtime(reference_model(tiny, plan_of("fastv", base)))
    own, later = [], []
    for question in QUESTIONS:
        chat = runtime.chat()
        said = "".join(chat.ask(QUESTIONS[0], [first], max_tokens=2))
        stream = chat.ask(question, [second, third], max_tokens=1)
        own.append(kept(Answer("".join(stream), stream.receipt), 2)[0])
        history = [Turn("user", QUESTIONS[0], [first]), Turn("assistant", said)]
        replayed = runtime.chat(history=history).ask(question, [second, third], max_tokens=1)
        later.append(kept(Answer("".join(replayed), replayed.receipt), 3)[0])
    assert overlap(own) < 1 and overlap(later) < 1


def test_rerank_chooses_as_a_replayed_history_does(tiny: LoadedModel, base: KeepPlan) -> None:
    images = pictures(base.geometry, 2)
    runtime = Runtime(reference_model(tiny, plan_of("fastv", base)))
    chat = runtime.chat()
    said = "".join(chat.ask(QUESTIONS[0], images, max_tokens=1))
    again = chat.ask(QUESTIONS[1], rerank=True, max_tokens=1)
    text = "".join(again)
    history = [Turn("user", QUESTIONS[0], images), Turn("assistant", said)]
    replayed = runtime.chat(history=history).ask(QUESTIONS[1], max_tokens=1)
    assert text == "".join(replayed)
    assert kept(Answer(text, again.receipt), 2) == kept(Answer(text, replayed.receipt), 2)
    assert again.receipt.visual_tokens == 2 * base.geometry.tokens and again.receipt.times.vision_ms == 0
    after = chat.ask(QUESTIONS[2], max_tokens=1)  # goes on from what was chosen
    "".join(after)
    assert after.receipt.visual_tokens == 0


def test_rerank_selects_at_the_input_by_the_new_question(tiny: LoadedModel, base: KeepPlan) -> None:
    images = pictures(base.geometry, 2)
    pipeline = reference_model(tiny, base.with_cuts(Cut("input", "zspaprune", 12)))
    recorder = RecordingBackend(pipeline.backend)
    runtime = Runtime(replace(pipeline, backend=recorder))

    def embedded(text: str) -> np.ndarray:
        return pipeline.backend.embed_tokens(pipeline.tokenizer.encode(text))

    chat = runtime.chat()
    "".join(chat.ask(QUESTIONS[0], images, max_tokens=1))
    "".join(chat.ask(["This:", images[0], "or this:", images[1], "Which?"], max_tokens=1))
    asked = [QUESTIONS[0]] * 2 + ["This:\nor this:\nWhich?"] * 2
    "".join(chat.ask(QUESTIONS[1], rerank=True, max_tokens=1))
    asked += [QUESTIONS[1]] * 4
    assert len(recorder.prompts) == len(asked)
    for prompt, text in zip(recorder.prompts, asked, strict=True):
        np.testing.assert_array_equal(prompt, embedded(text))
    history = [Turn("user", QUESTIONS[2], images[:1]), Turn("assistant", "Yes.")]
    "".join(runtime.chat(history=history).ask(QUESTIONS[3], images[1:], rerank=True, max_tokens=1))
    "".join(runtime.chat(history=history).ask(QUESTIONS[3], images[1:], max_tokens=1))
    for prompt, text in zip(recorder.prompts[-4:], [QUESTIONS[3]] * 2 + [QUESTIONS[2], QUESTIONS[3]], strict=True):
        np.testing.assert_array_equal(prompt, embedded(text))


def test_what_cannot_be_ranked_again_is_refused(tiny: LoadedModel, base: KeepPlan) -> None:
    image = pictures(base.geometry, 1)[0]
    asking = Runtime(reference_model(tiny, plan_of("fastv", base)))
    deaf = Runtime(reference_model(tiny, base))
    for chat, message in (
        (asking.chat(), "no earlier image"),
        (asking.chat(prune=False), "Without pruning"),
        (deaf.chat(), "looks at the question"),
    ):
        with pytest.raises(UsageError, match=message):
            chat.ask(QUESTIONS[0], image, rerank=True)
        assert chat._conversation.turns == 0


@pytest.mark.parametrize("method", ["fastv", "plphp"])
def test_the_exported_decoder_keeps_the_same(method: str, tiny: LoadedModel, base: KeepPlan, bundles: Exported) -> None:
    exported, eager = load(bundles(method).path, threads=1), Runtime(reference_model(tiny, plan_of(method, base)))
    images = pictures(base.geometry, 8)
    for count in (2, 8):
        answers = [model.generate(images[:count], QUESTIONS[0], max_tokens=4) for model in (exported, eager)]
        assert answers[0].text == answers[1].text
        assert kept(answers[0], count) == kept(answers[1], count)


# A tiled image has text between its tiles, a video is one image of many views.
KINDS: dict[str, Callable[[LoadedModel], Geometry]] = {
    "smolvlm": lambda loaded: loaded.geometry((128, 256)),
    "llava_next": lambda loaded: loaded.geometry(import_module("tiny_llava_next").SIZE),
    "gemma3": lambda loaded: loaded.geometry(import_module("tiny_gemma3").SIZE),
    "qwen2_5_vl video": lambda loaded: loaded.geometry(import_module("tiny_qwen2_5_vl").SIZE, frames=4, fps=2.0),
}


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind in ("gemma3", "smolvlm"))) for kind in KINDS])
def test_tiles_windows_and_videos(kind: str, tmp_path: Path) -> None:
    loaded = load_model(resolve_model(str(import_module(f"tiny_{kind.split()[0]}").folder(new_folder(tmp_path)))))
    geometry = KINDS[kind](loaded)
    plan = unpruned_plan(loaded.folder.model_type, len(loaded.family.decoder().layers), geometry)
    plan = plan.with_cuts(Cut("layer", "fastv", max(1, geometry.tokens // 4), len(loaded.family.decoder().layers) - 1))
    frames = pictures(geometry, 2 * geometry.frames)
    inputs: Any = frames if geometry.frames == 1 else [frames[:4], frames[4:]]
    runtime = Runtime(reference_model(loaded, plan))

    def sets(model: Runtime, question: str) -> list[Sets]:
        stream = model.chat().ask([*inputs, question], max_tokens=2)
        return kept(Answer("".join(stream), stream.receipt), 2)

    chosen = [sets(runtime, question) for question in QUESTIONS]
    assert overlap([each[0] for each in chosen]) < 1
    with ranked_apart():
        assert overlap([sets(runtime, question)[0] for question in QUESTIONS]) == 1
    exported = load(export_bundle(loaded, plan, tmp_path / "bundle").path, threads=1)
    assert [sets(exported, question) for question in QUESTIONS[:2]] == chosen[:2]


@pytest.mark.parametrize("name", ["lfm2_vl", "qwen3_5"])
def test_models_with_states_say_that_they_rank_early(name: str, tmp_path: Path) -> None:
    tiny = import_module(f"tiny_{name}")
    loaded = load_model(resolve_model(str(tiny.folder(new_folder(tmp_path)))))
    plan = unpruned_plan(name, 4, loaded.geometry(tiny.SIZE)).with_cuts(Cut("layer", "fastv", 4, 2))
    runtime, images = Runtime(reference_model(loaded, plan)), pictures(plan.geometry, 3)
    receipts = [runtime.generate(images[:count], QUESTIONS[0], max_tokens=1).receipt for count in (1, 3)]
    assert [(each.ranked_early, each.repeated_tokens) for each in receipts] == [(0, 0), (2, 0)]


def test_engines_that_are_too_short_for_the_later_text_say_so(base: KeepPlan, bundles: Exported) -> None:
    bundle = bundles("fastv")
    prepare(bundle, ProfileLimits(context=512, turn=24, images=3))
    runtime, images = on_device(bundle, SimulatedDriver()), pictures(base.geometry, 3)
    assert runtime.generate(images[:2], "What?", max_tokens=1).receipt.repeated_tokens
    with pytest.raises(EngineError, match="--turn") as error:
        runtime.generate(images, " ".join(QUESTIONS), max_tokens=1)
    assert "\n" not in str(error.value)


class Stopping(BackendProxy):
    """A backend whose request is cancelled during the forward pass `at`."""

    at, passes, cancel = -1, 0, staticmethod(lambda: None)

    def forward(self, tokens: DecoderInput, cache: KvCache, **options: Any) -> DecoderOutput:
        self.passes += 1
        if self.passes == self.at:
            self.cancel()
        return super().forward(tokens, cache, **options)


@pytest.mark.parametrize("at", [1, 2])
def test_a_cancelled_prefill_leaves_a_chat_that_goes_on(at: int, tiny: LoadedModel, base: KeepPlan) -> None:
    images = pictures(base.geometry, 3)
    pipeline = reference_model(tiny, plan_of("fastv", base))
    backend = Stopping(pipeline.backend)
    chat = Runtime(replace(pipeline, backend=backend)).chat()
    stream = chat.ask(QUESTIONS[0], images, max_tokens=4)
    backend.at, backend.cancel = at, stream.cancel
    assert "".join(stream) == "" and stream.receipt.finish_reason == "cancelled"
    history = [Turn("user", QUESTIONS[0], images), Turn("assistant", "")]
    expected = Runtime(pipeline).chat(history=history).ask(QUESTIONS[1], max_tokens=4)
    assert "".join(chat.ask(QUESTIONS[1], max_tokens=4)) == "".join(expected)
