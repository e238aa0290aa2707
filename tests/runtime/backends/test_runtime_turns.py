"""Threads that share an engine: first come, first served, and nobody waits for a turn that he no longer wants."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from PIL import Image

from edgeprune.bundle import Bundle
from edgeprune.runtime import load
from edgeprune.runtime.backends.interface import CANCELLED, CancellationToken, Cancelled
from edgeprune.runtime.backends.shared import FifoLock

PROMPT = "What is it?"


@contextmanager
def held(turns: FifoLock) -> Iterator[None]:
    """Have another thread hold the turn while the block runs."""
    taken, enough = threading.Event(), threading.Event()

    def hold() -> None:
        with turns.acquire():
            taken.set()
            enough.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    taken.wait(60)
    try:
        yield
    finally:
        enough.set()
        thread.join(60)


def line_up(turns: FifoLock, count: int, order: list[int]) -> list[threading.Thread]:
    """Start threads that wait for the turn one after the other, and note in which order they had it."""

    def take(number: int) -> None:
        with turns.acquire():
            order.append(number)

    threads, before = [], len(turns._waiting)
    for number in range(count):
        threads.append(threading.Thread(target=take, args=(number,)))
        threads[-1].start()
        while len(turns._waiting) <= before + number:
            time.sleep(0.001)
    return threads


def join(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


def test_turns_come_in_the_order_of_asking() -> None:
    turns, order = FifoLock(), list[int]()
    with held(turns):
        threads = line_up(turns, 5, order)
        assert order == []
    join(threads)
    assert order == [0, 1, 2, 3, 4]


def test_whoever_has_the_turn_may_take_it_again() -> None:
    turns, order = FifoLock(), list[int]()
    with turns.acquire():
        with turns.acquire():
            pass
        threads = line_up(turns, 2, order)
        with turns.acquire():
            assert order == []
    join(threads)
    assert order == [0, 1]


@pytest.mark.parametrize("before", [True, False])
def test_a_wait_ends_with_its_answer(before: bool) -> None:
    turns, interrupt, order = FifoLock(), CancellationToken(), list[int]()
    with held(turns):
        threads = line_up(turns, 2, order)
        if before:
            interrupt.cancel(CANCELLED)
        else:
            threading.Timer(0.05, interrupt.cancel, (CANCELLED,)).start()
        with pytest.raises(Cancelled), turns.acquire(interrupt):
            raise AssertionError("the other has the turn")
        assert order == []
    join(threads)
    assert order == [0, 1]


class Stopped(CancellationToken):
    """Ctrl-C at the wait, `late`: when the turn has just been given."""

    def __init__(self, turns: FifoLock, *, late: bool) -> None:
        super().__init__()
        self._turns, self._late = turns, late

    @contextmanager
    def on_cancel(self, stop: object) -> Iterator[None]:
        """End the wait with an error."""
        if self._late:
            self._turns._release()
        raise KeyboardInterrupt
        yield


@pytest.mark.parametrize("late", [False, True])
def test_ctrl_c_leaves_no_turn_to_nobody(late: bool) -> None:
    turns, order = FifoLock(), list[int]()
    turns._owner = 0  # some other thread
    with pytest.raises(KeyboardInterrupt), turns.acquire(Stopped(turns, late=late)):
        raise AssertionError("it never came to its turn")
    if not late:
        turns._release()
    assert turns._owner is None and not turns._waiting
    with turns.acquire():
        threads = line_up(turns, 1, order)
    join(threads)


def test_an_answer_that_is_cancelled_in_line_ends_there(tiny_bundle: Bundle, tiny_image: Image.Image) -> None:
    runtime = load(tiny_bundle.path, threads=1)
    chat = runtime.chat()
    stream = chat.ask(PROMPT, tiny_image, max_tokens=40)
    for _ in range(3):
        next(stream)
    with held(runtime._pipeline.lock):
        threading.Timer(0.05, stream.cancel).start()
        "".join(stream)
        assert stream.receipt.finish_reason == "cancelled"
        assert stream.receipt.generated_tokens == 3
    assert chat._conversation._sequence.ids  # what was taken in is whole, and the conversation goes on from it
    following = chat.ask("And now?", max_tokens=3)
    assert "".join(following) and not following.receipt.visual_tokens


def test_a_prefill_that_is_cancelled_in_line_never_begins(tiny_bundle: Bundle, tiny_image: Image.Image) -> None:
    runtime = load(tiny_bundle.path, threads=1)
    for image in (tiny_image, None):  # before the encoder, and before the decoder
        stream = runtime.chat().ask(PROMPT, image, max_tokens=5)
        with held(runtime._pipeline.lock):
            threading.Timer(0.05, stream.cancel).start()
            assert "".join(stream) == ""
            assert stream.receipt.finish_reason == "cancelled"
    assert runtime.generate(tiny_image, PROMPT, max_tokens=3).text
