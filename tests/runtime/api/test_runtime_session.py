"""The runtime: answers equal transformers' own, receipts tell the truth, turns share their caches."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from edgeprune.bundle import Bundle
from edgeprune.calibration.replay.reference import reference_model
from edgeprune.checkpoint.loading import LoadedModel
from edgeprune.errors import ImageError, UsageError
from edgeprune.export.exporter import export_bundle
from edgeprune.plan import KeepPlan
from edgeprune.plan.presets import unpruned_plan
from edgeprune.runtime import Feed, Runtime, Turn, load
from edgeprune.runtime.generation.conversation import Stream

PROMPT = "What colour is the cube?"


@pytest.fixture(scope="module")
def runtime(tiny_bundle: Bundle) -> Runtime:
    return load(tiny_bundle.path, threads=1)


def finishes(stream: Stream) -> bool:
    """Read a stream to its end and tell whether it came to a proper one."""
    for _ in stream:
        pass
    return stream.receipt.finish_reason in ("end", "length") and stream.receipt.generated_tokens > 0


def transformers_answer(loaded: LoadedModel, image: Image.Image, prompt: str, tokens: int) -> str:
    """Return what transformers' own processor, template and generate answer."""
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(loaded.folder.path, backend="pil")
    pixels = processor(images=[image], return_tensors="pt")
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
    text = loaded.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    merge = loaded.model.config.vision_config.spatial_merge_size
    count = int(pixels["image_grid_thw"].prod()) // merge**2
    ids = loaded.tokenizer(text.replace("<|image_pad|>", "<|image_pad|>" * count), return_tensors="pt").input_ids
    types = (ids == loaded.model.config.image_token_id).long()
    with torch.no_grad():
        output = loaded.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=types,
            max_new_tokens=tokens,
            do_sample=False,
            **pixels,
        )
    answer: str = loaded.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    return answer


def test_unpruned_text_equals_transformers_generate(runtime: Runtime, tiny: LoadedModel, tiny_image: Image.Image) -> None:
    expected = transformers_answer(tiny, tiny_image, PROMPT, 24)
    assert runtime.generate(tiny_image, PROMPT, prune=False, max_tokens=24).text == expected


def test_the_eager_reference_equals_transformers_generate(tiny: LoadedModel, tiny_image: Image.Image) -> None:
    plan = unpruned_plan("qwen2_vl", 3, tiny.geometry((84, 112)))
    answer = Runtime(reference_model(tiny, plan)).generate(tiny_image, PROMPT, max_tokens=24)
    assert answer.text == transformers_answer(tiny, tiny_image, PROMPT, 24)


def test_an_unpruned_bundle_equals_pruning_switched_off(
    runtime: Runtime, tiny: LoadedModel, tiny_image: Image.Image, tmp_path: Path
) -> None:
    whole = load(export_bundle(tiny, unpruned_plan("qwen2_vl", 3, tiny.geometry((84, 112))), tmp_path / "whole").path)
    answer = whole.generate(tiny_image, PROMPT, max_tokens=16)
    assert answer.text == runtime.generate(tiny_image, PROMPT, prune=False, max_tokens=16).text
    assert (answer.receipt.pruned, answer.receipt.reason) == (False, "the plan has no cuts")


def test_the_receipt_tells_what_was_kept(runtime: Runtime, tiny_image: Image.Image, tiny_plan: KeepPlan) -> None:
    receipt = runtime.generate(tiny_image, PROMPT, max_tokens=5).receipt
    assert receipt.pruned
    assert [(cut.before, cut.after) for cut in receipt.cuts] == [(12, 6), (6, 3)]
    assert set(receipt.cuts[1].kept) <= set(receipt.cuts[0].kept) <= set(range(12))
    assert receipt.visual_tokens == 12
    assert receipt.times.ttft_ms > 0
    assert receipt.finish_reason in ("end", "length")
    assert receipt.to_dict()["cuts"][0]["cut"] == str(tiny_plan.cuts[0])


def test_switched_off_is_said(runtime: Runtime, tiny_image: Image.Image) -> None:
    receipt = runtime.generate(tiny_image, PROMPT, prune=False, max_tokens=2).receipt
    assert (receipt.pruned, receipt.reason) == (False, "pruning was switched off")


def test_pruning_shortens_the_cache(runtime: Runtime, tiny_image: Image.Image) -> None:
    pruned, whole = (runtime.generate(tiny_image, PROMPT, prune=p, max_tokens=1).receipt for p in (True, False))
    a_token = 2 * 4 * 2 * 8  # keys and values, float32, 2 KV heads of 8
    assert whole.kv_bytes - pruned.kv_bytes == a_token * (6 + 9)


def test_turns_share_the_caches(runtime: Runtime, tiny_image: Image.Image) -> None:
    chat = runtime.chat(prune=False)
    "".join(chat.ask(PROMPT, tiny_image, max_tokens=4))
    second = chat.ask("And the ball?", max_tokens=6)
    answer = "".join(second)
    assert (second.receipt.visual_tokens, second.receipt.reason) == (0, "this turn has no image")
    # The same conversation without shared caches: everything is read again in one forward.
    again = runtime.chat(prune=False)
    "".join(again.ask(PROMPT, tiny_image, max_tokens=4))
    again._conversation._reset()
    assert "".join(again.ask("And the ball?", max_tokens=6)) == answer


def test_a_second_image_may_come_later(runtime: Runtime, tiny_image: Image.Image) -> None:
    chat = runtime.chat()
    "".join(chat.ask(PROMPT, tiny_image, max_tokens=3))
    stream = chat.ask("And here?", tiny_image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), max_tokens=3)
    "".join(stream)
    assert stream.receipt.visual_tokens == 12
    assert [cut.after for cut in stream.receipt.cuts] == [6, 3]


def test_streamed_pieces_make_the_answer(runtime: Runtime, tiny_image: Image.Image) -> None:
    stream = runtime.stream(tiny_image, PROMPT, max_tokens=12)
    assert "".join(stream) == stream.text == runtime.generate(tiny_image, PROMPT, max_tokens=12).text


def test_a_stream_closed_early_is_cancelled(runtime: Runtime, tiny_image: Image.Image) -> None:
    chat = runtime.chat()
    stream = chat.ask(PROMPT, tiny_image, max_tokens=50)
    pieces = iter(stream)
    next(pieces)
    stream.close()
    assert stream.receipt.finish_reason == "cancelled"
    assert finishes(chat.ask("And now?", max_tokens=2))


def test_an_unread_stream_leaves_no_trace(runtime: Runtime, tiny_image: Image.Image) -> None:
    chat = runtime.chat()
    chat.ask("What is nearest to the gripper?", tiny_image)
    answer = "".join(chat.ask(PROMPT, tiny_image, max_tokens=6))
    assert answer == runtime.generate(tiny_image, PROMPT, max_tokens=6).text


def test_asking_again_ends_the_running_stream(runtime: Runtime, tiny_image: Image.Image) -> None:
    chat = runtime.chat()
    stream = chat.ask(PROMPT, tiny_image, max_tokens=50)
    next(stream)
    assert finishes(chat.ask("And now?", max_tokens=2))
    assert stream.receipt.finish_reason == "cancelled"


def test_a_failing_engine_leaves_the_conversation_usable(
    runtime: Runtime, tiny_image: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = runtime.chat()
    engine = runtime._pipeline.backend
    step, calls = engine.forward, iter(range(3))

    def fail(*arguments: Any, **given: Any) -> Any:
        if next(calls) == 2:
            raise MemoryError
        return step(*arguments, **given)

    monkeypatch.setattr(engine, "forward", fail)
    stream = chat.ask(PROMPT, tiny_image, max_tokens=9)
    with pytest.raises(MemoryError):
        "".join(stream)
    assert stream.receipt.finish_reason == "error"
    monkeypatch.undo()
    assert finishes(chat.ask("And now?", max_tokens=2))


def test_seeds_repeat(runtime: Runtime, tiny_image: Image.Image) -> None:
    texts = [runtime.generate(tiny_image, PROMPT, temperature=1.5, top_p=0.9, seed=seed, max_tokens=12).text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_max_tokens_ends_by_length(runtime: Runtime, tiny_image: Image.Image) -> None:
    receipt = runtime.generate(tiny_image, PROMPT, max_tokens=1).receipt
    assert receipt.generated_tokens == 1
    assert receipt.finish_reason in ("length", "end")


def test_paths_arrays_and_pictures_are_the_same(runtime: Runtime, tiny_image: Image.Image, tmp_path: Path) -> None:
    tiny_image.save(tmp_path / "image.png")
    sources = (tmp_path / "image.png", str(tmp_path / "image.png"), tiny_image, np.asarray(tiny_image))
    assert len({runtime.generate(source, PROMPT, max_tokens=8).text for source in sources}) == 1


def test_another_aspect_is_refused_unless_asked(runtime: Runtime) -> None:
    tall = Image.new("RGB", (60, 200), "red")
    with pytest.raises(ImageError, match="stretch"):
        runtime.generate(tall, PROMPT)
    for fit in ("stretch", "pad"):
        assert runtime.generate(tall, PROMPT, fit=fit, max_tokens=1).receipt.visual_tokens == 12


@pytest.mark.parametrize("prompt", ["", "  \n"])
def test_an_empty_prompt_is_refused(prompt: str, runtime: Runtime, tiny_image: Image.Image) -> None:
    with pytest.raises(UsageError, match="prompt is empty"):
        runtime.generate(tiny_image, prompt)


@pytest.mark.parametrize("text", ["\ud800", "What \udc80 is it?", b"What?", 5, None])
def test_texts_that_no_tokenizer_can_read_are_refused(text: Any, runtime: Runtime, tiny_image: Image.Image) -> None:
    chat = runtime.chat()
    for ask in (
        lambda: runtime.generate(tiny_image, text),
        lambda: chat.ask(text, tiny_image),
        lambda: runtime.chat(history=[Turn("system", text)]),
        lambda: runtime.chat(history=[Turn("user", "What?"), Turn("assistant", text)]),
        lambda: runtime.generate(tiny_image, PROMPT, stop=[text]),
        lambda: runtime.generate(tiny_image, PROMPT, choices=[text]),
    ):
        with pytest.raises(UsageError, match=r"surrogate|must be") as refused:
            ask()
        assert "\n" not in str(refused.value)
        str(refused.value).encode()
    assert "".join(chat.ask(PROMPT, tiny_image, max_tokens=2)) is not None


def test_no_image_is_refused(runtime: Runtime) -> None:
    with pytest.raises(UsageError, match="no image"):
        runtime.generate(None, PROMPT)  # type: ignore[arg-type]


def test_control_tokens_in_the_prompt_are_refused(runtime: Runtime, tiny_image: Image.Image) -> None:
    with pytest.raises(UsageError, match="image_pad"):
        runtime.generate(tiny_image, "What is <|image_pad|>?")


def test_an_unknown_option_is_refused(runtime: Runtime, tiny_image: Image.Image) -> None:
    with pytest.raises(UsageError, match="min_p"):
        runtime.generate(tiny_image, PROMPT, min_p=0.1)  # type: ignore[call-arg]


def test_the_drawing_has_a_panel_for_each_cut(runtime: Runtime, tiny_image: Image.Image) -> None:
    receipt = runtime.generate(tiny_image, PROMPT, max_tokens=1).receipt
    picture = runtime.draw(tiny_image, receipt)
    assert picture.width > 2.5 * picture.height * 112 / 84 * 0.7


def held_in_memory(image: Image.Image) -> dict[str, Callable[[], Any]]:
    """Return ways to give an image file without a path, each anew."""
    file = io.BytesIO()
    image.save(file, "PNG")
    data = file.getvalue()
    return {
        "bytes": lambda: data,
        "bytearray": lambda: bytearray(data),
        "view": lambda: memoryview(data),
        "file": lambda: io.BytesIO(data),
    }


@pytest.mark.parametrize("way", ["bytes", "bytearray", "view", "file"])
def test_an_image_file_in_memory_is_taken_wherever_an_image_is(way: str, tiny_bundle: Bundle, tiny_image: Image.Image) -> None:
    model, given = load(tiny_bundle.path, threads=1), held_in_memory(tiny_image)[way]
    expected = model.generate(tiny_image, PROMPT, max_tokens=3)
    feed = Feed()
    feed.put(given())
    chat, later = model.chat(), model.chat(history=[Turn("user", PROMPT, (given(),)), Turn("assistant", "a cup")])
    answers = {
        "generate": model.generate(given(), PROMPT, max_tokens=3).text,
        "stream": "".join(model.stream([given()], PROMPT, max_tokens=3)),
        "ask_latest": "".join(model.ask_latest(feed, PROMPT, max_tokens=3)),
        "chat": "".join(chat.ask(PROMPT, given(), max_tokens=3)),
        "parts": "".join(model.chat().ask([given(), PROMPT], max_tokens=3)),
        "prepare": "".join(model.stream(model.prepare(given()), PROMPT, max_tokens=3)),
    }
    assert answers == dict.fromkeys(answers, expected.text)
    assert "".join(later.ask("And now?", max_tokens=1)) is not None
    drawn = model.draw(given(), expected.receipt)
    assert drawn.tobytes() == model.draw(tiny_image, expected.receipt).tobytes()


def test_a_file_object_is_read_from_its_beginning_each_time(tiny_bundle: Bundle, tiny_image: Image.Image) -> None:
    model, file = load(tiny_bundle.path, threads=1), held_in_memory(tiny_image)["file"]()
    texts = {model.generate(file, PROMPT, max_tokens=3).text for _ in range(2)}
    assert texts == {model.generate(tiny_image, PROMPT, max_tokens=3).text}
