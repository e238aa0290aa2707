"""The packs that the bundled model is trained on: each question is what transformers make of it asked alone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from repository import ROOT
from tokenizers import Tokenizer

from edgeprune.checkpoint.loading import LoadedModel, load_model, resolve_model
from edgeprune.checkpoint.processor import processor_inputs
from edgeprune.tabletop import MODEL_FOLDER
from edgeprune.tabletop.dataset import pairs, scenes
from edgeprune.tabletop.drawing import draw_scene
from edgeprune.tabletop.questions import describe

IMAGES = (1, 2)


@pytest.fixture(scope="module")
def batches() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "examples" / "train_tabletop"))
        yield import_module("batches")


@pytest.fixture(scope="module")
def tabletop(batches: Any, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """Return what a run with --from the bundled model starts with."""
    folder, checkpoint = tmp_path_factory.mktemp("start"), import_module("checkpoint")
    model = checkpoint.new_model(checkpoint.save_processor(folder))
    checkpoint.adopt_weights(model, MODEL_FOLDER)
    model.save_pretrained(folder)
    return load_model(resolve_model(str(folder)))


def drawn(batches: Any, loaded: LoadedModel, images: int, seed: int = 0) -> tuple[Any, list[Any], Any]:
    """Return the scenes of a row, its questions with their names, and the batch of that row, all of one seed."""
    tokenizer = loaded.tokenizer.backend_tokenizer
    rng = np.random.default_rng(seed)
    scenes = batches.sample_scenes(rng, images)
    return (
        scenes,
        batches.choose_questions(scenes, rng),
        batches.make_batch(np.random.default_rng(seed), tokenizer, layout(), 1, images),
    )


def layout() -> Any:
    return import_module("forward").SmallTrainee.layout


def asked_alone(loaded: LoadedModel, scenes: Any, prompt: str) -> Any:
    content = [*[{"type": "image"}] * len(scenes), {"type": "text", "text": prompt}]
    return processor_inputs(loaded.processor, [{"role": "user", "content": content}], [draw_scene(scene) for scene in scenes])


def places(batch: Any, segment: int) -> torch.Tensor:
    """Return where the images and one question lie in a row, without the answer's end mark, which nothing follows."""
    segments: torch.Tensor = batch.segments[0]
    return ((segments == 0) | (segments == segment)).nonzero().flatten()


@pytest.mark.parametrize("images", IMAGES)
def test_packs_have_the_ids_and_positions_of_transformers(tabletop: LoadedModel, batches: Any, images: int) -> None:
    scenes, asked, batch = drawn(batches, tabletop, images)
    packed = int(batch.segments.max())
    assert packed > 8
    for segment in range(1, packed + 1):
        name, question = asked[segment - 1]
        inputs = asked_alone(tabletop, scenes, question.prompt)
        mine = places(batch, segment)[: inputs["input_ids"].shape[1]]
        assert torch.equal(batch.ids[0, mine], inputs["input_ids"][0]), question
        grids, types = inputs["image_grid_thw"], inputs["mm_token_type_ids"]
        positions, _ = tabletop.model.model.get_rope_index(inputs["input_ids"], image_grid_thw=grids, mm_token_type_ids=types)
        assert torch.equal(batch.positions[:, 0, mine], positions[:, 0]), question
        labels = batch.labels[0][(batch.segments[0] == segment) & (batch.labels[0] != batches.IGNORE)]
        assert tabletop.tokenizer.decode(labels.tolist()) == f"{question.answer}<|im_end|>"
        kinds = batch.kinds[0, batch.segments[0] == segment].tolist()
        assert {batches.NAMES[kind] for kind in kinds if kind != batches.IGNORE} == {name}


@pytest.mark.parametrize("images", IMAGES)
def test_the_training_forward_is_that_of_transformers(tabletop: LoadedModel, batches: Any, images: int) -> None:
    trainee = import_module("forward").SmallTrainee(tabletop.model)
    scenes, asked, batch = drawn(batches, tabletop, images)
    with torch.no_grad():
        hidden, ordinals, differences = trainee.read(batch, trainee.see(batch.pixels))
        for segment in (1, 4, 7):
            inputs = asked_alone(tabletop, scenes, asked[segment - 1][1].prompt)
            expected = tabletop.model(**inputs).logits[0, -1]
            last = places(batch, segment)[inputs["input_ids"].shape[1] - 1]
            assert torch.allclose(tabletop.model.lm_head(hidden[0, last]), expected, atol=1e-3, rtol=0)
    assert ordinals.shape == (1, images, batches.TOKENS, 2)
    assert differences.shape == (1, batches.TOKENS, len(batches.DIFFERENCES))


def test_a_question_does_not_see_another(tabletop: LoadedModel, batches: Any) -> None:
    trainee = import_module("forward").SmallTrainee(tabletop.model)
    _, _, batch = drawn(batches, tabletop, 2)
    with torch.no_grad():
        visual = trainee.see(batch.pixels)
        before, *_ = trainee.read(batch, visual)
        batch.ids[batch.segments == 1] = 0
        after, *_ = trainee.read(batch, visual)
    others = batch.segments[0] > 1
    assert torch.equal(before[0, others], after[0, others])
    assert not torch.equal(before[0, batch.segments[0] == 1], after[0, batch.segments[0] == 1])


def test_changed_tokens_are_those_that_differ(tabletop: LoadedModel, batches: Any) -> None:
    for seed in range(20):
        (first, second), _, batch = drawn(batches, tabletop, 2, seed)
        differ = np.abs(layout().pixels(draw_scene(first)) - layout().pixels(draw_scene(second))).mean(axis=1)
        labelled = batch.changes[0].numpy() > 0
        if batches.change_between((first, second)):
            assert labelled.any()
            assert np.median(differ[labelled]) > 1.5 * differ[~labelled].max()
    assert not drawn(batches, tabletop, 1)[2].changes.any()


def test_later_words_are_one_token_and_leave_the_others(tabletop: LoadedModel) -> None:
    words = tabletop.tokenizer.backend_tokenizer
    bundled = Tokenizer.from_file(str(MODEL_FOLDER / "tokenizer.json"))
    assert bundled.get_vocab().items() <= words.get_vocab().items()
    for scene, questions in scenes(1, 40):
        for text in (describe(scene), *(question.prompt for question in questions)):
            assert words.encode(text).ids == bundled.encode(text).ids
    for _, questions in pairs(1, 40):
        for text in (text for question in questions if question.kind != "picture" for text in (question.prompt, question.answer)):
            assert len(words.encode(text).ids) <= len(re.findall(r"[^\W\d]+|\d|[.,?]", text))


def test_a_start_answers_as_the_model_it_starts_with(tabletop: LoadedModel) -> None:
    bundled = load_model(resolve_model("tabletop"))
    scene, questions = next(iter(scenes(1, 1)))
    for question in questions:
        inputs = asked_alone(bundled, [scene], question.prompt)
        with torch.no_grad():
            whole, part = (loaded.model(**inputs).logits[0, -1] for loaded in (tabletop, bundled))
        assert torch.equal(whole[: len(part)], part)
