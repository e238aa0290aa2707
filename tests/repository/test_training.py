"""The packs that the bundled model is trained on: each question is what transformers make of it asked alone."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from repository import ROOT
from tokenizers import Tokenizer

from edgeprune.checkpoint.loading import LoadedModel, load_model, resolve_model
from edgeprune.checkpoint.processor import processor_inputs
from edgeprune.tabletop.drawing import draw_scene

IMAGES = (1, 2)


@pytest.fixture(scope="module")
def tabletop() -> LoadedModel:
    return load_model(resolve_model("tabletop"))


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "train_tabletop"))
    return import_module("batches")


def drawn(batches: Any, images: int, seed: int = 0) -> tuple[Any, list[Any], Any]:
    """Return the scenes of a row, its questions with their names, and the batch of that row, all of one seed."""
    tokenizer = Tokenizer.from_file(str(ROOT / "edgeprune" / "tabletop" / "model" / "tokenizer.json"))
    rng = np.random.default_rng(seed)
    scenes = batches.sample_scenes(rng, images)
    return scenes, batches.choose_questions(scenes, rng), batches.make_batch(np.random.default_rng(seed), tokenizer, 1, images)


def asked_alone(loaded: LoadedModel, scenes: Any, prompt: str) -> Any:
    content = [*[{"type": "image"}] * len(scenes), {"type": "text", "text": prompt}]
    return processor_inputs(loaded.processor, [{"role": "user", "content": content}], [draw_scene(scene) for scene in scenes])


def places(batch: Any, segment: int) -> torch.Tensor:
    """Return where the images and one question lie in a row, without the answer's end mark, which nothing follows."""
    segments: torch.Tensor = batch.segments[0]
    return ((segments == 0) | (segments == segment)).nonzero().flatten()


@pytest.mark.parametrize("images", IMAGES)
def test_packs_have_the_ids_and_positions_of_transformers(tabletop: LoadedModel, batches: Any, images: int) -> None:
    scenes, asked, batch = drawn(batches, images)
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
    trainee = import_module("forward").Trainee(tabletop.model)
    scenes, asked, batch = drawn(batches, images)
    with torch.no_grad():
        hidden, ordinals, differences = trainee.read(batch, trainee.see(batch.patches))
        for segment in (1, 4, 7):
            inputs = asked_alone(tabletop, scenes, asked[segment - 1][1].prompt)
            expected = tabletop.model(**inputs).logits[0, -1]
            last = places(batch, segment)[inputs["input_ids"].shape[1] - 1]
            assert torch.allclose(tabletop.model.lm_head(hidden[0, last]), expected, atol=1e-3, rtol=0)
    assert ordinals.shape == (1, images, batches.TOKENS, 2)
    assert differences.shape == (1, batches.TOKENS, len(batches.DIFFERENCES))


def test_a_question_does_not_see_another(tabletop: LoadedModel, batches: Any) -> None:
    trainee = import_module("forward").Trainee(tabletop.model)
    _, _, batch = drawn(batches, 2)
    with torch.no_grad():
        visual = trainee.see(batch.patches)
        before, *_ = trainee.read(batch, visual)
        batch.ids[batch.segments == 1] = 0
        after, *_ = trainee.read(batch, visual)
    others = batch.segments[0] > 1
    assert torch.equal(before[0, others], after[0, others])
    assert not torch.equal(before[0, batch.segments[0] == 1], after[0, batch.segments[0] == 1])


def test_changed_tokens_are_those_that_differ(batches: Any) -> None:
    for seed in range(20):
        (first, second), _, batch = drawn(batches, 2, seed)
        differ = np.abs(batches.patchify(np.asarray(draw_scene(first))) - batches.patchify(np.asarray(draw_scene(second)))).mean(
            axis=1
        )
        labelled = batch.changes[0].numpy() > 0
        if batches.change_between((first, second)):
            assert labelled.any()
            assert np.median(differ[labelled]) > 1.5 * differ[~labelled].max()
    assert not drawn(batches, 1)[2].changes.any()


def test_later_words_are_one_token_and_leave_the_others(batches: Any) -> None:
    words = import_module("checkpoint").train_tokenizer()
    bundled = Tokenizer.from_file(str(ROOT / "edgeprune" / "tabletop" / "model" / "tokenizer.json"))
    assert words.get_vocab() == bundled.get_vocab()
    assert words.encode("Are there more red objects in the first or the second picture?").tokens[-5:] == [
        *("Ġor", "Ġthe", "Ġsecond", "Ġpicture", "?")
    ]
