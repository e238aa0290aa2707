"""One chat or stream in several threads, and watchers that fail, ask or close: nothing crashes, hangs or loses an answer."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from PIL import Image

from edgeprune.bundle import Bundle
from edgeprune.errors import UsageError
from edgeprune.runtime import Receipt, Runtime, Stream, load

PROMPT = "What colour is the cube?"
LONG = 200


@pytest.fixture
def runtime(tiny_bundle: Bundle) -> Runtime:
    """Return a model that never ends an answer by itself."""
    return Runtime(replace(load(tiny_bundle.path, threads=1)._pipeline, eos_token_ids=()))


def in_thread(work: Callable[[], Any]) -> Any:
    """Return what `work` returns or raises in another thread, which has ended."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(work())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    return found[0]


def test_a_chat_that_two_threads_ask_answers_whole_or_refuses(runtime: Runtime, tiny_image: Image.Image) -> None:
    chat, found, barrier = runtime.chat(), list[str | UsageError](), threading.Barrier(3)

    def ask() -> None:
        barrier.wait(60)
        for turn in range(12):
            try:
                stream = chat.ask("And?", tiny_image if turn == 0 else None, max_tokens=4)
                text = "".join(stream)
                assert (stream.receipt.finish_reason, stream.receipt.generated_tokens) == ("length", 4)
                found.append(text)
            except UsageError as error:
                found.append(error)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert len(found) == 36  # no thread met another error
    assert any(isinstance(each, str) for each in found)
    assert all("thread" in str(each) for each in found if isinstance(each, UsageError))
    roles = [message["role"] for message in chat._conversation._messages]
    assert roles == ["user", "assistant"] * (len(roles) // 2)


def test_another_thread_cannot_ask_before_an_answer_has_ended(runtime: Runtime, tiny_image: Image.Image) -> None:
    chat = runtime.chat()
    stream = chat.ask(PROMPT, tiny_image, max_tokens=4)
    for _ in range(2):  # unread, then half read
        assert "not finished" in str(in_thread(lambda: chat.ask("And now?")))
        next(stream)
    assert len([*stream]) == 3
    assert isinstance(in_thread(lambda: "".join(chat.ask("And now?", max_tokens=2))), str)


def test_an_answer_that_was_closed_or_whose_threads_ended_is_in_nobodys_way(runtime: Runtime, tiny_image: Image.Image) -> None:
    chat = runtime.chat()
    closed = chat.ask(PROMPT, tiny_image)
    closed.close()
    assert closed.receipt.finish_reason == "cancelled"
    left = in_thread(lambda: chat.ask(PROMPT, tiny_image, max_tokens=LONG))
    assert "".join(chat.ask(PROMPT, tiny_image, max_tokens=2))
    assert (list(left), left.receipt.finish_reason) == ([], "cancelled")


def test_whoever_asked_may_ask_again_while_another_thread_reads(runtime: Runtime, tiny_image: Image.Image) -> None:
    chat, started = runtime.chat(), threading.Event()
    stream = chat.ask(PROMPT, tiny_image, max_tokens=LONG)

    def read() -> None:
        for _ in stream:
            started.set()

    reader = threading.Thread(target=read)
    reader.start()
    assert started.wait(60)
    second = chat.ask("And now?", max_tokens=3)
    text = "".join(second)
    reader.join(60)
    assert not reader.is_alive()
    assert (stream.receipt.finish_reason, second.receipt.finish_reason) == ("cancelled", "length")
    told = [str(message["content"]) for message in chat._conversation._messages]
    assert stream.text in told[1] and text in told[3]


def test_threads_that_read_one_stream_share_its_pieces(runtime: Runtime, tiny_image: Image.Image) -> None:
    stream = runtime.stream(tiny_image, PROMPT, max_tokens=40)
    pieces = list[str]()
    threads = [threading.Thread(target=lambda: pieces.extend(stream)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert (len(pieces), stream.receipt.generated_tokens) == (41, 40)  # and the last, which is empty
    assert sorted("".join(pieces)) == sorted(runtime.generate(tiny_image, PROMPT, max_tokens=40).text)


def test_a_watcher_that_fails_changes_no_answer(
    runtime: Runtime, tiny_image: Image.Image, caplog: pytest.LogCaptureFixture
) -> None:
    told = list[Receipt]()

    def fail(receipt: Receipt) -> None:
        raise RuntimeError("the disk is full")

    expected = runtime.generate(tiny_image, PROMPT, max_tokens=4).text
    for watcher in (fail, told.append):
        runtime.watch(watcher)
    with caplog.at_level(logging.ERROR, "edgeprune"):
        assert runtime.generate(tiny_image, PROMPT, max_tokens=4).text == expected
        with pytest.raises(UsageError, match="max_kv_bytes"):
            runtime.generate(tiny_image, PROMPT, max_kv_bytes=1)
    assert [receipt.finish_reason for receipt in told] == ["length", "error"]
    assert [(record.name, "disk is full" in str(record.exc_text)) for record in caplog.records] == [("edgeprune", True)] * 2
    assert runtime.phase == "ready"


@pytest.mark.parametrize("closing", [True, False])
def test_a_watcher_may_ask_on(closing: bool, runtime: Runtime, tiny_image: Image.Image) -> None:
    chat, inner = runtime.chat(), list[str]()

    def ask_on(receipt: Receipt) -> None:
        if not inner:
            inner.append("")
            inner.append("".join(chat.ask("And now?", max_tokens=3)))
            inner.append(runtime.generate(tiny_image, PROMPT, max_tokens=3).text)

    runtime.watch(ask_on)

    def outer() -> None:
        stream = chat.ask(PROMPT, tiny_image, max_tokens=4)
        if closing:
            next(stream)
            chat.ask("And then?", max_tokens=2).close()  # ends the first, whose watcher asks before this question
        else:
            "".join(stream)

    in_thread(outer)
    assert len(inner) == 3 and inner[1] and inner[2]
    assert len(chat._conversation._messages) == 4
    assert "".join(chat.ask("And?", max_tokens=2))


def test_a_watcher_may_close_and_read_its_own_answer(runtime: Runtime, tiny_image: Image.Image) -> None:
    streams, found = list[Stream](), list[list[str]]()

    def close(receipt: Receipt) -> None:
        streams[0].cancel()
        streams[0].close()
        found.append(list(streams[0]))

    runtime.watch(close)
    streams.append(runtime.stream(tiny_image, PROMPT, max_tokens=3))
    text = in_thread(lambda: "".join(streams[0]))
    assert (text, found, streams[0].receipt.finish_reason) == (streams[0].text, [[]], "length")


def test_a_stream_closed_after_its_last_piece_has_ended_by_itself(runtime: Runtime, tiny_image: Image.Image) -> None:
    stream = runtime.stream(tiny_image, PROMPT, max_tokens=2)
    for _ in range(3):
        next(stream)
    stream.close()
    assert stream.receipt.finish_reason == "length"
