"""The decode loop: generates an answer token by token and checks every stop condition."""

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
    """Generates one answer after its prefill. `room`: limit for the KV cache in bytes. `token_ids`: the answer so far."""

    def __init__(
        self, pipeline: Pipeline, sequence: SequenceState, request: Request, keep_ratio: DecodeKeepRatio | None, room: int | None
    ) -> None:
        self._pipeline, self._sequence, self._request = pipeline, sequence, request
        self._keep_ratio, self._max_kv_bytes = keep_ratio, room
        sampling = request.sampler.sampling
        self._detokenizer = IncrementalDetokenizer(pipeline.tokenizer, skip_special=sampling.skip_special_tokens)
        self._stop_filter = StopStringFilter(sampling.stop)
        self._receipt, self._deadline_s = request.receipt, request.deadline_s
        self.token_ids: list[int] = []

    def run(self, step: DecoderOutput, token: int) -> Generator[str]:
        """Yield the text of the answer, whose first `token` was sampled from `step`; set the receipt's finish reason."""
        if self._receipt.captured is not None:
            self._receipt.frame_age_ms = max(0.0, 1e3 * (time.monotonic() - self._receipt.captured))
        start_ns, started = time.time_ns(), time.perf_counter_ns()
        try:
            while True:
                reason = yield from self._emit(token)
                result = None if reason else self._decode_step(step, token)
                if result is None:
                    reason = reason or str(self._request.cancellation.reason)
                    self._receipt.finish_reason = reason
                    yield "" if reason == "stop" else self._stop_filter.push(self._detokenizer.flush()) + self._stop_filter.flush()
                    return
                step, token = result
        finally:
            self._receipt.times.stages.append(StageSpan("decode", start_ns, start_ns + time.perf_counter_ns() - started))

    def _emit(self, token: int) -> Generator[str, None, str]:
        # Yields the text of a token and returns the finish reason, or "" to continue.
        self._receipt.generated_tokens += 1
        self._receipt.kv_bytes = self._sequence.cache.bytes
        if token in self._pipeline.eos_token_ids:
            return "end"
        self.token_ids.append(token)
        yield self._stop_filter.push(self._detokenizer.push(token))
        if self._stop_filter.stopped:
            return "stop"
        return "end" if self._request.sampler.done else self._stop_reason()

    def _stop_reason(self) -> str:
        sampling, decoder = self._request.sampler.sampling, self._pipeline.decoder
        if self._request.cancellation.reason is not None:
            return self._request.cancellation.reason
        if self._receipt.generated_tokens >= sampling.max_tokens or self._sequence.length >= decoder.context:
            return "length"
        if self._max_kv_bytes is not None and self._receipt.kv_bytes + self._pipeline.kv_bytes_per_token > self._max_kv_bytes:
            return "kv_limit"
        return DEADLINE if self._misses_deadline() else ""

    def _misses_deadline(self) -> bool:
        # Stop before a decode step that is expected to miss the deadline.
        if self._deadline_s is None:
            return False
        times = self._receipt.times.decode_ms
        step_ms = times[-1] if times else self._pipeline.state.latency.token_ms
        return 1e3 * (self._deadline_s - time.monotonic()) < step_ms

    def _decode_step(self, step: DecoderOutput, token: int) -> tuple[DecoderOutput, int] | None:
        # Returns None, with no state changed, if the request was cancelled while it waited for the lock.
        started, times = time.perf_counter(), self._receipt.times
        try:
            with self._pipeline.step_turn(self._request.cancellation):
                step = self._sequence.append_generated(
                    token,
                    step,
                    self._keep_ratio,
                    self._receipt,
                    self._request.cancellation if self._pipeline.shared_steps else None,
                )
        except Cancelled:
            return None
        token = self._request.sampler.sample(step.logits)
        times.decode_ms.append(1e3 * (time.perf_counter() - started))
        times.graph_ms += [] if step.graph_ms is None else [step.graph_ms]
        return step, token
