"""The loop that generates an answer, token by token, and everything that may end it."""

from __future__ import annotations

import time
from collections.abc import Generator

from edgeprune.runtime.backends.interface import DEADLINE, Cancelled, DecoderOutput
from edgeprune.runtime.generation.pipeline import Pipeline
from edgeprune.runtime.generation.request import Request
from edgeprune.runtime.generation.sequence import DecodeKeepRatio, SequenceState
from edgeprune.runtime.telemetry.receipt import StageSpan
from edgeprune.runtime.text.tokenizer import IncrementalDetokenizer, StopStringFilter


class DecodeLoop:
    """One answer after its prefill. `token_ids`: its tokens so far."""

    def __init__(
        self, pipeline: Pipeline, sequence: SequenceState, request: Request, keep_ratio: DecodeKeepRatio | None, room: int | None
    ) -> None:
        self._pipeline, self._sequence, self._request, self._keep_ratio, self._room = pipeline, sequence, request, keep_ratio, room
        self._decoder, self._watch = IncrementalDetokenizer(pipeline.tokenizer), StopStringFilter(request.sampler.sampling.stop)
        self._receipt, self._due = request.receipt, request.deadline_s
        self.token_ids: list[int] = []

    def run(self, step: DecoderOutput, token: int) -> Generator[str]:
        """Yield the answer that begins with `token`, which came from `step`; the receipt says at the end why it ended."""
        self._first_token()
        began_ns, started = time.time_ns(), time.perf_counter_ns()
        try:
            while True:
                reason = yield from self._emit(token)
                following = None if reason else self._decode_step(step, token)
                if following is None:
                    reason = reason or str(self._request.cancellation.reason)
                    self._receipt.finish_reason = reason
                    yield "" if reason == "stop" else self._watch.push(self._decoder.flush()) + self._watch.flush()
                    return
                step, token = following
        finally:
            self._receipt.times.stages.append(StageSpan("decode", began_ns, began_ns + time.perf_counter_ns() - started))

    def _first_token(self) -> None:
        captured = self._receipt.captured
        if captured is not None:
            self._receipt.frame_age_ms = max(0.0, 1e3 * (time.monotonic() - captured))

    def _emit(self, token: int) -> Generator[str, None, str]:
        # Yields the text of a token and returns why the answer ends with it, or "".
        self._receipt.generated_tokens += 1
        self._receipt.kv_bytes = self._sequence.cache.bytes
        if token in self._pipeline.eos_token_ids:
            return "end"
        self.token_ids.append(token)
        yield self._watch.push(self._decoder.push(token))
        if self._watch.stopped:
            return "stop"
        return "end" if self._request.sampler.done else self._stop_reason()

    def _stop_reason(self) -> str:
        sampling, decoder = self._request.sampler.sampling, self._pipeline.decoder
        if self._request.cancellation.reason is not None:
            return self._request.cancellation.reason
        if self._receipt.generated_tokens >= sampling.max_tokens or self._sequence.length >= decoder.context:
            return "length"
        if (
            self._room is not None
            and self._receipt.kv_bytes + self._pipeline.kv_bytes_per_token_layer * decoder.layers > self._room
        ):
            return "kv_limit"
        return DEADLINE if self._misses_deadline() else ""

    def _misses_deadline(self) -> bool:
        # Before the token that would miss the deadline, not after it.
        if self._due is None:
            return False
        times = self._receipt.times.decode_ms
        step_ms = times[-1] if times else self._pipeline.state.latency.token_ms
        return 1e3 * (self._due - time.monotonic()) < step_ms

    def _decode_step(self, step: DecoderOutput, token: int) -> tuple[DecoderOutput, int] | None:
        # None if the answer was to end while others had their turns: then nothing of the step was done.
        started, times = time.perf_counter(), self._receipt.times
        try:
            with self._pipeline.lock.acquire(self._request.cancellation):
                step = self._sequence.append_generated(token, step, self._keep_ratio, self._receipt)
        except Cancelled:
            return None
        token = self._request.sampler.sample(step.logits)
        times.decode_ms.append(1e3 * (time.perf_counter() - started))
        times.graph_ms += [] if step.graph_ms is None else [step.graph_ms]
        return step, token
