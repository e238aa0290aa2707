"""Steps of several threads are one pass, and whoever leaves, is cancelled, fails or is interrupted leaves the others theirs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from edgeprune.bundle import DecoderShape
from edgeprune.plan import Geometry, KeepPlan
from edgeprune.runtime.backends.interface import CANCELLED, CancellationToken, Cancelled, DecoderOutput
from edgeprune.runtime.backends.kv_cache import DecoderInput, KvCache
from edgeprune.runtime.backends.shared import FifoLock
from edgeprune.runtime.backends.step_batches import StepBatches

SHAPE = DecoderShape(layers=1, hidden=16, kv_heads=2, head_dim=8, vocabulary=100, context=64, position_axes=3)
PLAN = KeepPlan("qwen2_vl", 1, Geometry(height=84, width=112, patch=14, merge=2))
TOKENS: Any = None  # nothing looks at it


class Passes:
    """An engine that notes how many steps each pass had. A conversation's output is the length of its cache."""

    def __init__(self, *, most: int = 4, takes_s: float = 0.0) -> None:
        self.sizes: list[int] = []
        self.turns = FifoLock()
        self.batches = StepBatches(self.run, self.turns.acquire, most)
        self.broken: dict[int, BaseException] = {}
        self._takes_s = takes_s

    def run(self, steps: Sequence[tuple[DecoderInput, KvCache]]) -> list[DecoderOutput]:
        self.sizes.append(len(steps))
        time.sleep(self._takes_s)
        for _, cache in steps:
            if cache.length in self.broken:
                raise self.broken[cache.length]
        return [DecoderOutput(np.array([cache.length]), (), (), None) for _, cache in steps]

    def waiting(self, count: int) -> None:
        """Wait until so many steps do."""
        while len(self.batches._waiting) < count:
            time.sleep(0.001)


def cache(length: int) -> KvCache:
    empty = KvCache.empty(SHAPE, PLAN)
    return replace(empty, length=length, buffers=tuple(rows.copy() for rows in empty.buffers))


class Asker:
    """A thread that runs one step, and what came of it."""

    def __init__(self, passes: Passes, length: int) -> None:
        self.cancellation, self.found = CancellationToken(), list[Any]()
        self._passes, self._length = passes, length
        self._thread = threading.Thread(target=self._ask)
        self._thread.start()

    def _ask(self) -> None:
        try:
            output = self._passes.batches.forward(TOKENS, cache(self._length), self.cancellation)
            self.found.append(int(output.logits[0]))
        except BaseException as error:
            self.found.append(error)

    def result(self) -> Any:
        self._thread.join(10)
        assert not self._thread.is_alive()
        return self.found[0]


def line_up(passes: Passes, *lengths: int) -> list[Asker]:
    """Start one thread after the other, the first of which leads."""
    askers = list[Asker]()
    for number, length in enumerate(lengths):
        askers.append(Asker(passes, length))
        passes.waiting(number + 1)
    return askers


def held(passes: Passes, then: Callable[[], None]) -> None:
    """Do something while the engine is in use, and wait for its end."""
    with passes.turns.acquire():
        then()


@pytest.mark.parametrize(("most", "sizes"), [(4, [4, 1]), (8, [5])])
def test_steps_that_wait_are_one_pass(most: int, sizes: list[int]) -> None:
    passes, askers = Passes(most=most), list[Asker]()
    held(passes, lambda: askers.extend(line_up(passes, 1, 2, 3, 4, 5)))
    assert [asker.result() for asker in askers] == [1, 2, 3, 4, 5]
    assert passes.sizes == sizes
    assert not passes.batches._led and not passes.batches._waiting


@pytest.mark.parametrize("number", [0, 1, 2])
def test_who_is_cancelled_in_line_leaves_it(number: int) -> None:
    passes, askers = Passes(), list[Asker]()

    def cancel() -> None:
        askers.extend(line_up(passes, 1, 2, 3))
        askers[number].cancellation.cancel(CANCELLED)
        assert isinstance(askers[number].result(), Cancelled)

    held(passes, cancel)
    assert [asker.result() for asker in askers if asker is not askers[number]] == [n for n in (1, 2, 3) if n != number + 1]
    assert sum(passes.sizes) == 2 and not passes.batches._led


def test_all_may_leave() -> None:
    passes, askers = Passes(), list[Asker]()

    def cancel() -> None:
        askers.extend(line_up(passes, 1, 2, 3))
        for asker in askers:
            asker.cancellation.cancel(CANCELLED)
            assert isinstance(asker.result(), Cancelled)

    held(passes, cancel)
    assert passes.sizes == [] and not passes.batches._led
    assert Asker(passes, 4).result() == 4


@pytest.mark.parametrize("number", [0, 2])
def test_what_one_cannot_do_ends_no_other(number: int) -> None:
    passes, askers = Passes(), list[Asker]()
    passes.broken[number + 1] = MemoryError("no room")
    held(passes, lambda: askers.extend(line_up(passes, 1, 2, 3)))
    results = [asker.result() for asker in askers]
    assert results[number] is passes.broken[number + 1]
    assert [each for each in results if isinstance(each, int)] == [n for n in (1, 2, 3) if n != number + 1]
    assert passes.sizes == [3, 1, 1, 1]


def test_ctrl_c_in_a_pass_leaves_the_others_theirs() -> None:
    passes, askers = Passes(), list[Asker]()
    passes.broken[1] = KeyboardInterrupt()
    held(passes, lambda: askers.extend(line_up(passes, 1, 2, 3)))
    assert isinstance(askers[0].result(), KeyboardInterrupt)
    assert [asker.result() for asker in askers[1:]] == [2, 3]
    assert passes.sizes == [3, 2] and not passes.batches._led


def test_a_pass_waits_for_those_of_the_last_but_not_long() -> None:
    passes, ended = Passes(takes_s=0.2), threading.Event()

    def talk(length: int, steps: int, pause: float) -> None:
        own = cache(length)
        for _ in range(steps):
            assert passes.batches.forward(TOKENS, own).logits == [length]
            time.sleep(pause)
        ended.set()

    passes.sizes.clear()
    threads = [threading.Thread(target=talk, args=(length, 4, 0.002 * length)) for length in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    # The first pass has whoever came first, and the others are together from the third on at the latest.
    assert sum(passes.sizes) == 12 and max(passes.sizes) == 3 and len(passes.sizes) <= 7
    started = time.monotonic()
    talk(1, 2, 0.0)
    assert passes.sizes[-2:] == [1, 1]
    assert time.monotonic() - started < 2 * 0.2 + 0.3  # waits a part of a pass for two that never come
