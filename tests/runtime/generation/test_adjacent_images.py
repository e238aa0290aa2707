"""Images with no text between them, as LLaVA-OneVision's template places them: no forward pass lacks a text token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from device_simulation import SimulatedDriver
from PIL import Image
from simulated_device import on_device, prepare

from edgeprune.bundle import Bundle
from edgeprune.checkpoint.loading import LoadedModel
from edgeprune.errors import UsageError
from edgeprune.export.exporter import export_bundle
from edgeprune.plan import Cut
from edgeprune.plan.presets import unpruned_plan
from edgeprune.runtime import Runtime, Turn, load
from edgeprune.runtime.backends.compare import RecordingBackend
from edgeprune.runtime.backends.tensorrt.profiles import ProfileLimits
from edgeprune.runtime.generation.sequence import SequenceState
from edgeprune.runtime.text.prompt import ChatTemplate

PROMPT = "What colour is the cube?"
PAD = "<|image_pad|>"
ADJACENT = (
    "{% for m in messages %}{% if m['role'] != 'bare' %}<|im_start|>{{ m['role'] }}\n{% endif %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}" + PAD + "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)


@pytest.fixture(scope="module")
def withdrawn(tiny: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Return a bundle whose later layers keep no visual token."""
    plan = unpruned_plan("qwen2_vl", 3, tiny.geometry((84, 112))).with_cuts(Cut("layer", "vtw", 0, layer=1))
    return export_bundle(tiny, plan, tmp_path_factory.mktemp("withdrawn") / "bundle")


def adjacent(bundle: Bundle, template: str = ADJACENT) -> tuple[Runtime, RecordingBackend]:
    """Return a model whose template puts nothing around an image, and the recorder of its forward passes."""
    return with_template(load(bundle.path, threads=1), template)


def with_template(runtime: Runtime, template: str = ADJACENT) -> tuple[Runtime, RecordingBackend]:
    pipeline = runtime._pipeline
    recorder = RecordingBackend(pipeline.backend)
    image = replace(pipeline.image, text=PAD, placeholder=PAD)
    prompts = replace(pipeline.prompts, image=image, template=ChatTemplate(template))
    return Runtime(replace(pipeline, backend=recorder, prompts=prompts)), recorder


def turned(image: Image.Image, count: int) -> list[Image.Image]:
    return [image.transpose(Image.Transpose(number)) if number < 2 else image for number in range(count)]


def suffixes(recorder: RecordingBackend) -> list[int]:
    return [tokens.suffix.embeds.shape[1] for tokens, _ in recorder.inputs]


@pytest.mark.parametrize("prune", [True, False])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_forward_pass_ends_with_text(count: int, prune: bool, withdrawn: Bundle, tiny_image: Image.Image) -> None:
    runtime, recorder = adjacent(withdrawn)
    answer = runtime.generate(turned(tiny_image, count), PROMPT, max_tokens=4, prune=prune)
    assert answer.receipt.visual_tokens == 12 * count
    assert len(suffixes(recorder)) == count + answer.receipt.generated_tokens - 1
    assert min(suffixes(recorder)) >= 1
    assert [cut.after for cut in answer.receipt.cuts] == [0] * count * prune


@pytest.mark.parametrize("prune", [True, False])
def test_engines_take_adjacent_images(prune: bool, withdrawn: Bundle, tiny_image: Image.Image) -> None:
    prepare(withdrawn, ProfileLimits(context=512, turn=256, images=3, unpruned=True))
    runtime, _ = with_template(on_device(withdrawn, SimulatedDriver()))
    expected, _ = adjacent(withdrawn)
    images = turned(tiny_image, 3)
    text = runtime.generate(images, PROMPT, max_tokens=4, prune=prune).text
    assert text == expected.generate(images, PROMPT, max_tokens=4, prune=prune).text


def test_positions_follow_the_unpruned_sequence(withdrawn: Bundle, tiny_image: Image.Image) -> None:
    runtime, recorder = adjacent(withdrawn)
    runtime.generate(turned(tiny_image, 3), PROMPT, max_tokens=1)
    first, second, third = (tokens for tokens, _ in recorder.inputs)
    starts = [int(tokens.visual.positions[0, 0]) for tokens in (first, second, third)]
    assert starts == [starts[0], starts[0] + 4, starts[0] + 8]  # a grid of 3 x 4 advances by its longer side
    assert third.suffix.positions[0, 0] == starts[2] + 4
    borrowed = [tokens.suffix.positions[0].tolist() for tokens in (first, second)]
    assert borrowed == [[starts[2] + 4]] * 2  # at its own place, behind all images


def test_the_borrowed_token_leaves_nothing_behind(
    withdrawn: Bundle, tiny_image: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []
    ahead = SequenceState._ahead
    for borrowed in (None, 7, 300):
        if borrowed is not None:

            def other(*given: Any, token: int = borrowed, **kind: bool) -> tuple[list[int], np.ndarray]:
                ids, places = ahead(*given, **kind)
                return [token] * len(ids), places

            monkeypatch.setattr(SequenceState, "_ahead", other)
        runtime, recorder = adjacent(withdrawn)
        answer = runtime.generate(turned(tiny_image, 3), PROMPT, max_tokens=6)
        runs.append((answer.text, answer.receipt.kv_bytes, np.stack([step.logits for step in recorder.steps[2:]])))
    for text, size, logits in runs[1:]:
        assert (text, size) == runs[0][:2]
        np.testing.assert_allclose(logits, runs[0][2], rtol=1e-5, atol=1e-5)


def test_methods_rank_by_the_text_that_follows(tiny_bundle: Bundle, tiny_image: Image.Image) -> None:
    runtime, recorder = adjacent(tiny_bundle)
    runtime.generate(turned(tiny_image, 3), PROMPT, max_tokens=1)
    for tokens, _ in recorder.inputs[:2]:
        np.testing.assert_array_equal(tokens.suffix.embeds, recorder.inputs[2][0].suffix.embeds)


def test_a_prompt_that_ends_with_an_image_is_refused_or_answered_whole(withdrawn: Bundle, tiny_image: Image.Image) -> None:
    last = "{% for m in messages %}{% for p in m['content']|reverse %}{{ p['text'] or '" + PAD + "' }}{% endfor %}{% endfor %}"
    runtime, _ = adjacent(withdrawn, last)
    with pytest.raises(UsageError, match="prune=False"):
        runtime.generate(tiny_image, PROMPT)
    texts = {runtime.generate(tiny_image, PROMPT, prune=False, max_tokens=3).text for _ in range(2)}  # again from the prefix
    assert len(texts) == 1


def test_a_template_that_leaves_the_new_turn_out_still_has_something_to_run(withdrawn: Bundle, tiny_image: Image.Image) -> None:
    runtime, _ = adjacent(withdrawn, ADJACENT.replace("{% for m in messages %}", "{% for m in messages[:1] %}"))
    chat = runtime.chat()
    answers = ["".join(chat.ask(prompt, image, max_tokens=1)) for prompt, image in ((PROMPT, tiny_image), ("And now?", None))]
    assert answers[0] == answers[1]


def test_an_image_without_a_question_is_selected_by_the_next_one(tiny_bundle: Bundle, tiny_image: Image.Image) -> None:
    runtime = load(tiny_bundle.path, threads=1)

    def questions(history: Sequence[Turn]) -> list[str]:
        chat = runtime.chat(history=history)
        "".join(chat.ask("And now?", tiny_image, max_tokens=1))
        return [image.question for image in chat._conversation._images]

    silent = Turn("user", " ", [tiny_image])
    assert questions([silent]) == ["And now?"] * 2
    assert questions([silent, Turn("assistant", "Yes."), Turn("user", "Why?")]) == ["Why?", "And now?"]
    assert questions([Turn("user", PROMPT, [tiny_image])]) == [PROMPT, "And now?"]
