"""Decode steps of several threads as one pass of the decoder.

The thread that comes first leads: it waits a moment for the steps of the conversations in the last pass, waits for the engine's
turn, and runs all steps that have come by then. Who comes later leads next. The moment is a share of a pass, so that a
conversation that ends, or whose reader is slow, costs the others no more than that.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

from edgeprune.runtime.backends.interface import CancellationToken, Cancelled, DecoderOutput
from edgeprune.runtime.backends.kv_cache import DecoderInput, KvCache

Steps = Sequence[tuple[DecoderInput, KvCache]]
Turn = Callable[[CancellationToken | None], AbstractContextManager[None]]
_PATIENCE = 0.1  # of the time of a pass


class StepBatches:
    """Joins steps to passes.

    `run`: runs the steps of different conversations. `turn`: holds the engine meanwhile; raises Cancelled where a request is
    cancelled first. `most`: steps of one pass.
    """

    def __init__(self, run: Callable[[Steps], list[DecoderOutput]], turn: Turn, most: int) -> None:
        self._run_steps, self._turn, self._most = run, turn, most
        self._changed = threading.Condition()
        self._waiting: list[_Step] = []  # the leader's is the first
        self._led = False
        self._recent: set[int] = set()  # the conversations of the last pass
        self._pass_s = 0.0

    def forward(self, tokens: DecoderInput, cache: KvCache, cancellation: CancellationToken | None = None) -> DecoderOutput:
        """Run a step with those of other threads. Raises Cancelled if the request is cancelled before the pass begins."""
        step = _Step(tokens, cache)
        with self._changed:
            step.leads, self._led = not self._led, True
            self._waiting.append(step)
            self._changed.notify()
        try:
            if not step.leads:
                with cancellation.on_cancel(partial(self._withdraw, step)) if cancellation else nullcontext():
                    step.gate.acquire()
            if step.leads:
                self._lead(step, cancellation)
        except BaseException:  # Cancelled, or KeyboardInterrupt
            self._withdraw(step)
            if step.leads:
                self._hand_over(step, [])
            raise
        if step.error is not None:
            raise step.error
        if step.output is None:
            raise Cancelled
        return step.output

    def _lead(self, step: _Step, cancellation: CancellationToken | None) -> None:
        with self._changed:
            self._changed.wait_for(self._all_came, timeout=_PATIENCE * self._pass_s)
        batch: list[_Step] = []
        try:
            with self._turn(cancellation):
                with self._changed:
                    batch, self._waiting = self._waiting[: self._most], self._waiting[self._most :]
                    self._recent = {each.conversation for each in batch}
                started = time.perf_counter()
                self._run(batch)
                self._pass_s = time.perf_counter() - started
        finally:
            self._hand_over(step, batch)

    def _all_came(self) -> bool:
        return len(self._waiting) >= self._most or self._recent <= {step.conversation for step in self._waiting}

    def _run(self, batch: list[_Step]) -> None:
        try:
            outputs = self._run_steps([(step.tokens, step.cache) for step in batch])
        except Exception as error:
            if len(batch) == 1:
                batch[0].error = error
                return
            for step in batch:  # what one of them cannot do ends no other answer
                self._run([step])
        else:
            for step, output in zip(batch, outputs, strict=True):
                step.output = output

    def _hand_over(self, leader: _Step, batch: list[_Step]) -> None:
        # Wakes those whose step has run, and the next leader. Steps that an interrupt kept from running wait on.
        others = [step for step in batch if step is not leader]
        with self._changed:
            leader.leads = False
            self._waiting = [step for step in (*others, *self._waiting) if step is not leader and not step.has_run]
            self._led = bool(self._waiting)
            if self._led:
                self._waiting[0].leads = True
                self._waiting[0].gate.release()
        for step in others:
            if step.has_run:
                step.gate.release()

    def _withdraw(self, step: _Step) -> None:
        with self._changed:
            if step in self._waiting and not step.leads:
                self._waiting.remove(step)
                step.gate.release()


class _Step:
    # The step of one thread. `gate`: held until the step has run, leads or is withdrawn.
    def __init__(self, tokens: DecoderInput, cache: KvCache) -> None:
        self.tokens, self.cache, self.conversation = tokens, cache, id(cache.buffers[0])
        self.leads = False
        self.output: DecoderOutput | None = None
        self.error: Exception | None = None
        self.gate = threading.Lock()
        self.gate.acquire()

    @property
    def has_run(self) -> bool:
        return self.output is not None or self.error is not None
