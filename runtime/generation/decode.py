"""The loop that generates an answer, token by token, and everything that may end it."""

from __future__ import annotations

import time
from collections.abc import Generator

from edgeprune.runtime.backends.interface import DEADLINE, Interrupted, Step
from edgeprune.runtime.generation.pipeline import Model
from edgeprune.runtime.generation.request import Asked
from edgeprune.runtime.generation.sequence import Intake, Rate
from edgeprune.runtime.telemetry.receipt import Stage
from edgeprune.runtime.text.tokenizer import StopWatch, StreamDecoder


class Generation:
    """One answer after its prefill. `said`: its tokens so far."""

    def __init__(self, model: Model, intake: Intake, asked: Asked, rate: Rate | None, room: int | None) -> None:
        self._model, self._intake, self._asked, self._rate, self._room = model, intake, asked, rate, room
        self._decoder, self._watch = StreamDecoder(model.codec), StopWatch(asked.sampler.sampling.stop)
        self._receipt, self._due = asked.receipt, asked.due
        self.said: list[int] = []

    def pieces(self, step: Step, token: int) -> Generator[str]:
        """Yield the answer that begins with `token`, which came from `step`; the receipt says at the end why it ended."""
        self._first_token()
        began_ns, started = time.time_ns(), time.perf_counter_ns()
        try:
            while True:
                reason = yield from self._say(token)
                following = None if reason else self._next(step, token)
                if following is None:
                    reason = reason or str(self._asked.interrupt.reason)
                    self._receipt.finish_reason = reason
                    yield "" if reason == "stop" else self._watch.push(self._decoder.flush()) + self._watch.flush()
                    return
                step, token = following
        finally:
            self._receipt.times.stages.append(Stage("decode", began_ns, began_ns + time.perf_counter_ns() - started))

    def _first_token(self) -> None:
        captured = self._receipt.captured
        if captured is not None:
            self._receipt.frame_age_ms = max(0.0, 1e3 * (time.monotonic() - captured))

    def _say(self, token: int) -> Generator[str, None, str]:
        # Yields the text of a token and returns why the answer ends with it, or "".
        self._receipt.generated_tokens += 1
        self._receipt.kv_bytes = self._intake.cache.bytes
        if token in self._model.end_tokens:
            return "end"
        self.said.append(token)
        yield self._watch.push(self._decoder.push(token))
        if self._watch.stopped:
            return "stop"
        return "end" if self._asked.sampler.done else self._limit()

    def _limit(self) -> str:
        sampling, decoder = self._asked.sampler.sampling, self._model.decoder
        if self._asked.interrupt.reason is not None:
            return self._asked.interrupt.reason
        if self._receipt.generated_tokens >= sampling.max_tokens or self._intake.length >= decoder.context:
            return "length"
        if self._room is not None and self._receipt.kv_bytes + self._model.entry_bytes * decoder.layers > self._room:
            return "kv_limit"
        return DEADLINE if self._too_late() else ""

    def _too_late(self) -> bool:
        # Before the token that would miss the deadline, not after it.
        if self._due is None:
            return False
        times = self._receipt.times.decode_ms
        step_ms = times[-1] if times else self._model.state.pace.token_ms
        return 1e3 * (self._due - time.monotonic()) < step_ms

    def _next(self, step: Step, token: int) -> tuple[Step, int] | None:
        # None if the answer was to end while others had their turns: then nothing of the step was done.
        started, times = time.perf_counter(), self._receipt.times
        try:
            with self._model.turns.taken(self._asked.interrupt):
                step = self._intake.generated(token, step, self._rate, self._receipt)
        except Interrupted:
            return None
        token = self._asked.sampler.pick(step.logits)
        times.decode_ms.append(1e3 * (time.perf_counter() - started))
        times.graph_ms += [] if step.run_ms is None else [step.run_ms]
        return step, token
