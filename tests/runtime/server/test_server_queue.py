"""The line is bounded and fair."""

from __future__ import annotations

import threading

import pytest

from edgeprune.errors import UsageError
from edgeprune.runtime.server.errors import ApiError, ServerLimits
from edgeprune.runtime.server.jobs import FairQueue


def test_clients_are_served_in_turns() -> None:
    queue = FairQueue[str](ServerLimits())
    for client, item in ("a", "a1"), ("a", "a2"), ("a", "a3"), ("b", "b1"), ("c", "c1"), ("b", "b2"):
        queue.push(client, item)
    assert [queue.take() for _ in range(6)] == ["a1", "b1", "c1", "a2", "b2", "a3"]


def test_a_client_that_comes_back_waits_its_turn() -> None:
    queue = FairQueue[str](ServerLimits())
    queue.push("a", "a1")
    queue.push("a", "a2")
    assert queue.take() == "a1"
    queue.push("b", "b1")
    assert [queue.take(), queue.take()] == ["a2", "b1"]


def test_the_queue_is_bounded() -> None:
    queue = FairQueue[str](ServerLimits(queue=1), parallel=2)
    with queue.admit("a"), queue.admit("b"), queue.admit("c"):
        with pytest.raises(ApiError, match="--queue") as caught, queue.admit("d"):
            pass
        assert caught.value.status == 429 and int(caught.value.headers["retry-after"]) >= 1
    with queue.admit("d"):
        pass


def test_a_client_is_bounded() -> None:
    queue = FairQueue[str](ServerLimits(per_client=1))
    with queue.admit("a"), queue.admit("b"):
        with pytest.raises(ApiError, match="--per-client") as caught, queue.admit("a"):
            pass
        assert caught.value.status == 429


def test_retry_after_follows_recent_answers() -> None:
    queue = FairQueue[str](ServerLimits(queue=8), parallel=2)
    for _ in range(20):
        queue.answered(6.0)
    with queue.admit("a"), queue.admit("b"), queue.admit("c"), queue.admit("d"):
        assert queue.retry_after == pytest.approx(12.0)


def test_dropped_items_are_gone() -> None:
    queue = FairQueue[str](ServerLimits())
    for item in "123":
        queue.push("a", item)
    assert queue.drop("a", "2") and not queue.drop("a", "2") and not queue.drop("b", "1")
    assert (queue.waiting, queue.take(), queue.take(), queue.waiting) == (2, "1", "3", 0)


def test_closing_ends_those_who_wait() -> None:
    queue = FairQueue[str](ServerLimits())
    taken: list[str | None] = []
    thread = threading.Thread(target=lambda: taken.append(queue.take()))
    thread.start()
    assert queue.close() == []
    thread.join(10)
    assert taken == [None] and queue.take() is None
    with pytest.raises(ApiError, match="shutting down"):
        queue.push("a", "late")


def test_limits_that_make_no_sense() -> None:
    assert ServerLimits(queue=0).queue == 0
    for name in ("max_body_bytes", "max_pixels", "max_images", "per_client"):
        with pytest.raises(UsageError, match=f"--{name.replace('_', '-')}"):
            ServerLimits(**{name: 0})
