"""Answers whose decode steps share passes say what each says alone, whoever joins, leaves, grows, is cancelled or fails."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
from garbage import left_to_collect
from PIL import Image
from plans import BASE, PLANS

from edgeprune.bundle import Bundle
from edgeprune.checkpoint.loading import LoadedModel
from edgeprune.errors import EngineError, UsageError
from edgeprune.export.exporter import export_bundle
from edgeprune.runtime import Runtime, load
from edgeprune.runtime.backends.onnxruntime_steps import BoundSteps
from edgeprune.runtime.backends.step_buffers import StepBuffers
from edgeprune.targets import TARGETS, Lowering

CPU = Lowering(TARGETS["cpu"], "fp32")
# Of different lengths, before the answer and in it.
ASKED = {
    "What colour is the cube?": 20,
    "And how many balls of which colour lie to the left of it?": 37,
    "Where?": 28,
    "Which is it?": 16,
}
_PASS_S = 0.004  # that a pass takes at least, so that others come meanwhile


class Shared:
    """A model that never ends an answer by itself, and how many steps each of its passes had."""

    def __init__(self, bundle: Bundle, parallel: int) -> None:
        model = load(bundle.path, threads=1, parallel=parallel)
        self.runtime = Runtime(replace(model._pipeline, eos_token_ids=()))
        self.sizes: list[int] = []
        backend: Any = model._pipeline.backend
        self.shares, self.lock = backend.shared_steps, model._pipeline.lock
        if self.shares:
            run = backend._batches._run_steps

            def counted(steps: Sequence[Any]) -> Any:
                self.sizes.append(len(steps))
                time.sleep(_PASS_S)
                return run(steps)

            backend._batches._run_steps = counted


@pytest.fixture(scope="module")
def bundle(even: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Return a bundle for CPUs without cuts, whose steps rotate inside their attention."""
    return export_bundle(even, replace(BASE, layers=2), tmp_path_factory.mktemp("bundles") / "cpu", lowering=CPU)


@pytest.fixture
def shared(bundle: Bundle) -> Iterator[Shared]:
    """Yield a model whose passes take four steps."""
    model = Shared(bundle, 4)
    with model.runtime:
        yield model


def together(*work: Callable[[], Any]) -> list[Any]:
    """Return what each piece of work returns or raises, each in a thread of its own, begun at once."""
    found: list[Any] = [None] * len(work)
    barrier = threading.Barrier(len(work))

    def run(number: int) -> None:
        barrier.wait(60)
        try:
            found[number] = work[number]()
        except Exception as error:
            found[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    return found


def asking(runtime: Runtime, image: Image.Image, prompt: str, tokens: int) -> Callable[[], tuple[str, list[float], list[int]]]:
    """Return a function that holds a conversation of two turns and returns what was said and read."""

    def ask() -> tuple[str, list[float], list[int]]:
        chat = runtime.chat()
        first = chat.ask(prompt, image, max_tokens=tokens)
        said = "".join(first)
        second = chat.ask("And the ball?", max_tokens=4)
        return said + "".join(second), first.receipt.decode_shares, first.receipt.visual_reads

    return ask


def check_same(bundle: Bundle, image: Image.Image) -> list[int]:
    """Ask four questions alone and at once, and return the sizes of the passes."""
    alone, shared = Shared(bundle, 1), Shared(bundle, 4)
    with alone.runtime, shared.runtime:
        expected = [asking(alone.runtime, image, *asked)() for asked in ASKED.items()]
        actual = together(*(asking(shared.runtime, image, *asked) for asked in ASKED.items()))
    assert actual == expected
    assert not alone.shares and (shared.shares or not shared.sizes)
    return shared.sizes


def test_four_answers_say_what_each_says_alone(bundle: Bundle, tiny_image: Image.Image) -> None:
    sizes = check_same(bundle, tiny_image)
    assert {2, 3} & set(sizes) and 4 in sizes and 2 * len(sizes) < sum(sizes)


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in ("cache, schedule", "live classes")])
def test_so_they_do_with_decode_cuts(name: str, tiny: LoadedModel, tiny_image: Image.Image, tmp_path: Any) -> None:
    assert 4 in check_same(export_bundle(tiny, PLANS[name], tmp_path / "bundle", lowering=CPU), tiny_image)


@pytest.mark.slow
def test_what_has_no_such_steps_takes_turns(
    tiny: LoadedModel, even: LoadedModel, tiny_bundle: Bundle, tiny_image: Image.Image, tmp_path: Any
) -> None:
    live = export_bundle(tiny, PLANS["everything"], tmp_path / "live", lowering=CPU)
    for each in (tiny_bundle, live):  # another target; a predictor that follows every step
        assert check_same(each, tiny_image) == []
    small = export_bundle(even, replace(BASE, layers=2), tmp_path / "8 bits", lowering=replace(CPU, kv="int8"))
    assert check_same(small, tiny_image) == []  # scales of each conversation's own


def test_more_than_four_may_ask(shared: Shared, tiny_image: Image.Image) -> None:
    asks = [asking(shared.runtime, tiny_image, f"What is number {number}?", 8 + 3 * number) for number in range(6)]
    expected = [ask() for ask in asks]
    assert together(*asks) == expected
    assert max(shared.sizes) == 4


def test_an_answer_outgrows_the_room_of_all(shared: Shared, tiny_image: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    long = "Tell me everything that can be seen there, " + "and more, " * 60
    asks = [asking(shared.runtime, tiny_image, *asked) for asked in [(long, 6), *list(ASKED.items())[:2]]]
    expected, capacities, room = [ask() for ask in asks], set[int](), BoundSteps._binding

    def seen(own: Any, first: int, end: int) -> Any:
        capacities.add(own._slots.arrays[0].shape[2])
        return room(own, first, end)

    monkeypatch.setattr(BoundSteps, "_binding", seen)

    def later() -> Any:
        time.sleep(0.03)  # while the others answer
        return asks[0]()

    assert together(later, *asks[1:]) == expected
    assert len(capacities) == 2 and max(shared.sizes) == 3


def test_who_is_cancelled_leaves_the_others_and_can_go_on(shared: Shared, tiny_image: Image.Image) -> None:
    (prompt, tokens), (cut, _), (other, more), _ = ASKED.items()
    expected = [asking(shared.runtime, tiny_image, prompt, tokens)(), asking(shared.runtime, tiny_image, other, more)()]
    whole = "".join(shared.runtime.stream(tiny_image, cut, max_tokens=4))
    chat = shared.runtime.chat()

    def cancelled() -> str:
        stream = chat.ask(cut, tiny_image, max_tokens=200)
        said = "".join(piece for piece, _ in zip(stream, range(4), strict=False))
        stream.cancel()
        rest = list(stream)
        assert stream.receipt.finish_reason == "cancelled" and len(rest) <= 2
        return said

    first, said, second = together(
        asking(shared.runtime, tiny_image, prompt, tokens), cancelled, asking(shared.runtime, tiny_image, other, more)
    )
    assert [first, second] == expected
    assert whole.startswith(said) and said
    assert "".join(chat.ask("And now?", max_tokens=3))


def test_who_is_cancelled_in_line_has_taken_nothing_in(shared: Shared, tiny_image: Image.Image) -> None:
    chat = shared.runtime.chat()
    stream = chat.ask("Where?", tiny_image, max_tokens=40)
    for _ in range(3):
        next(stream)
    sequence = chat._conversation._sequence
    before = sequence.length, sequence.cache.length, len(sequence.ids)
    taken, enough = threading.Event(), threading.Event()

    def hold() -> None:
        with shared.lock.acquire():
            taken.set()
            enough.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    assert taken.wait(60)
    threading.Timer(0.05, stream.cancel).start()
    "".join(stream)
    enough.set()
    holder.join(60)
    assert (stream.receipt.finish_reason, stream.receipt.generated_tokens) == ("cancelled", 3)
    assert (sequence.length, sequence.cache.length, len(sequence.ids)) == before
    following = chat.ask("And now?", max_tokens=3)
    assert "".join(following) and not following.receipt.visual_tokens


def test_an_error_in_one_is_no_error_in_another(shared: Shared, tiny_image: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    (prompt, tokens), (broken, _), (other, more), _ = ASKED.items()
    expected = [asking(shared.runtime, tiny_image, prompt, tokens)(), asking(shared.runtime, tiny_image, other, more)()]
    follow, chat = StepBuffers.follow, shared.runtime.chat()

    def fail(own: StepBuffers, cache: Any, *room: Any) -> None:
        if cache.buffers[0] is chat._conversation.cache.buffers[0] and chat._conversation._sequence.ids:
            raise MemoryError("no room for this one")
        follow(own, cache, *room)

    monkeypatch.setattr(StepBuffers, "follow", fail)
    first, error, second = together(
        asking(shared.runtime, tiny_image, prompt, tokens),
        lambda: "".join(chat.ask(broken, tiny_image, max_tokens=30)),
        asking(shared.runtime, tiny_image, other, more),
    )
    assert [first, second] == expected
    assert isinstance(error, EngineError) and "no room for this one" in str(error)
    monkeypatch.setattr(StepBuffers, "follow", follow)
    assert "".join(chat.ask(broken, tiny_image, max_tokens=3))


def test_a_prefill_comes_between_two_passes(shared: Shared, tiny_image: Image.Image) -> None:
    streams = [shared.runtime.stream(tiny_image, prompt, max_tokens=60) for prompt in list(ASKED)[:2]]
    passes = len(shared.sizes)
    came: list[int] = []

    def late() -> str:
        stream = shared.runtime.stream(tiny_image, "Which is it?", max_tokens=3)
        piece = next(stream)
        came.append(len(shared.sizes) - passes)
        return piece + "".join(stream)

    *_, said = together(*(lambda stream=stream: "".join(stream) for stream in streams), late)
    assert said == shared.runtime.generate(tiny_image, "Which is it?", max_tokens=3).text
    assert came[0] < 60  # it did not wait for their ends


def test_parallel_is_at_least_one(bundle: Bundle) -> None:
    with pytest.raises(UsageError, match="parallel must be 1 or more, not 0"):
        load(bundle.path, parallel=0)


def test_a_closed_model_says_so_to_all(shared: Shared, tiny_image: Image.Image) -> None:
    streams = [shared.runtime.stream(tiny_image, prompt, max_tokens=60) for prompt in list(ASKED)[:2]]
    for stream in streams:
        next(stream)
    shared.runtime.close()
    for error in together(*(lambda stream=stream: "".join(stream) for stream in streams)):
        assert isinstance(error, UsageError) and "closed" in str(error)


@pytest.mark.parametrize("parallel", [1, 4])
def test_an_answer_frees_its_memory_when_it_is_forgotten(bundle: Bundle, tiny_image: Image.Image, parallel: int) -> None:
    with load(bundle.path, threads=1, parallel=parallel) as model:
        assert left_to_collect(lambda: model.generate(tiny_image, "Where?", max_tokens=4)) == []
