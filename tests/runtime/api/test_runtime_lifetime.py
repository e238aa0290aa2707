"""A model is closed when its block ends, an answer may be read in an event loop, and objects introduce themselves in a line."""

from __future__ import annotations

import asyncio
import gc
import weakref
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
from device_simulation import SimulatedDriver
from garbage import left_to_collect
from PIL import Image
from simulated_device import on_device, prepare

from edgeprune.bundle import Bundle
from edgeprune.errors import UsageError
from edgeprune.runtime import Runtime, load
from edgeprune.runtime.backends.shared import GuardedBackend
from edgeprune.runtime.backends.tensorrt.profiles import ProfileLimits

PROMPT = "What is it?"


def test_a_closed_model_frees_its_graphs_and_takes_no_question(tiny_bundle: Bundle, tiny_image: Image.Image) -> None:
    with load(tiny_bundle.path, threads=1) as model:
        chat = model.chat()
        assert "".join(chat.ask(PROMPT, tiny_image, max_tokens=2)) is not None
        graphs = weakref.ref(model._pipeline.backend._backend)  # type: ignore[attr-defined]
        assert "ready" in repr(model)
    gc.collect()
    assert graphs() is None and "closed" in repr(model)
    asks = (lambda: model.generate(tiny_image, PROMPT), lambda: chat.ask("And now?"), lambda: model.chat().ask(PROMPT))
    for ask in asks:
        with pytest.raises(UsageError, match="was closed"):
            ask()
    model.close()


def test_an_answer_that_has_not_ended_ends_with_the_error(tiny_bundle: Bundle, tiny_image: Image.Image) -> None:
    model = load(tiny_bundle.path, threads=1)
    stream = model.stream(tiny_image, PROMPT, max_tokens=8)
    next(stream)
    model.close()
    with pytest.raises(UsageError, match="closed"):
        list(stream)
    assert stream.receipt.finish_reason == "error"


def test_engines_are_destroyed_too(altered_bundle: Path, tiny_image: Image.Image) -> None:
    bundle = Bundle.load(altered_bundle)
    prepare(bundle, ProfileLimits(context=512, turn=256, images=1))
    driver = SimulatedDriver()
    pipeline = on_device(bundle, driver)._pipeline
    with Runtime(replace(pipeline, backend=GuardedBackend(pipeline.backend, pipeline.lock))) as model:
        model.generate(tiny_image, PROMPT, max_tokens=2)
    assert driver.closed


@pytest.mark.parametrize("read", [1, 8], ids=["left", "whole"])
def test_a_forgotten_chat_frees_its_memory(tiny_bundle: Bundle, tiny_image: Image.Image, read: int) -> None:
    def talk() -> None:
        chat = model.chat()
        for question in (tiny_image, PROMPT), (PROMPT,):
            for _ in islice(chat.ask([*question], max_tokens=8), read):
                pass

    with load(tiny_bundle.path, threads=1) as model:
        assert left_to_collect(talk) == []


def test_an_engine_frees_what_an_answer_held(altered_bundle: Path, tiny_image: Image.Image) -> None:
    bundle = Bundle.load(altered_bundle)
    prepare(bundle, ProfileLimits(context=512, turn=256, images=1))
    with on_device(bundle, SimulatedDriver()) as model:
        assert left_to_collect(lambda: model.generate(tiny_image, PROMPT, max_tokens=4)) == []


async def read(model: Runtime, image: Image.Image) -> tuple[list[str], int]:
    ticks, running = 0, True

    async def tick() -> None:
        nonlocal ticks
        while running:
            ticks += 1
            await asyncio.sleep(0)

    other = asyncio.create_task(tick())
    pieces = [piece async for piece in model.stream(image, PROMPT, max_tokens=8)]
    running = False
    await other
    return pieces, ticks


def test_an_event_loop_goes_on_while_an_answer_is_read(tiny_bundle: Bundle, tiny_image: Image.Image) -> None:
    with load(tiny_bundle.path, threads=1, cache_bytes=0) as model:
        expected = list(model.stream(tiny_image, PROMPT, max_tokens=8))
        pieces, ticks = asyncio.run(read(model, tiny_image))
    assert pieces == expected and ticks > len(pieces)


def test_a_cancelled_task_cancels_its_answer(tiny_bundle: Bundle, tiny_image: Image.Image) -> None:
    async def begin_and_leave(model: Runtime) -> str:
        stream = model.stream(tiny_image, PROMPT, max_tokens=64)

        async def whole() -> None:
            async for _ in stream:
                pass

        task = asyncio.create_task(whole())
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.to_thread(stream.close)
        return stream.receipt.finish_reason

    with load(tiny_bundle.path, threads=1) as model:
        assert asyncio.run(begin_and_leave(model)) == "cancelled"


def test_objects_introduce_themselves_in_a_line(tiny_bundle: Bundle, tiny_image: Image.Image) -> None:
    with load(tiny_bundle.path, threads=1) as model:
        answer, chat = model.generate(tiny_image, PROMPT, max_tokens=3), model.chat()
        stream = chat.ask(PROMPT, tiny_image, max_tokens=3)
        text = "".join(stream)
        for each in (model, answer, answer.receipt, chat, stream):
            assert "\n" not in repr(each) and 10 < len(repr(each)) < 300, each
        assert "3 tokens" in repr(answer) and repr(text)[:20] in repr(stream) and "2 turns" in repr(chat)
        assert str(answer) == answer.text
