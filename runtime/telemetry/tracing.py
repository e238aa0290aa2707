"""OpenTelemetry spans of each answer and its stages."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opentelemetry.trace import Status, StatusCode, set_span_in_context

from edgeprune.runtime.telemetry.receipt import Receipt

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer


class Spans:
    """Writes spans to a tracer. Attach it with `model.watch(Spans(tracer))`.

    Spans are written when an answer has ended, with the original times. Their parent is the span that is current where the answer
    was consumed, such as a span around the handling of a frame.
    """

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer

    def __call__(self, receipt: Receipt) -> None:
        """Write the spans of a finished answer. An answer that failed before its first stage has none."""
        stages = receipt.times.stages
        if not stages:
            return
        answer = self._tracer.start_span("edgeprune.answer", start_time=min(stage.began_ns for stage in stages))
        answer.set_attributes(_attributes(receipt))
        if receipt.finish_reason == "error":
            answer.set_status(Status(StatusCode.ERROR))
        context = set_span_in_context(answer)
        for stage in stages:
            span = self._tracer.start_span(f"edgeprune.{stage.name}", context=context, start_time=stage.began_ns)
            span.end(end_time=stage.ended_ns)
        answer.end(end_time=max(stage.ended_ns for stage in stages))


def _attributes(receipt: Receipt) -> dict[str, str | int | float | bool | tuple[str, ...]]:
    # Names follow OpenTelemetry's semantic conventions for generative AI where they define one.
    attributes: dict[str, str | int | float | bool | tuple[str, ...] | None] = {
        "gen_ai.usage.input_tokens": receipt.text_tokens + receipt.visual_tokens,
        "gen_ai.usage.output_tokens": receipt.generated_tokens,
        "gen_ai.response.finish_reasons": (receipt.finish_reason,),
        "edgeprune.pruned": receipt.pruned,
        "edgeprune.tier": receipt.tier,
        "edgeprune.tier_reason": receipt.tier_reason,
        "edgeprune.reused": receipt.reused,
        "edgeprune.visual_tokens": receipt.visual_tokens,
        "edgeprune.visual_kv_share": receipt.visual_kv_share,
        "edgeprune.kv_bytes": receipt.kv_bytes,
        "edgeprune.ttft_ms": receipt.times.ttft_ms,
        "edgeprune.frame_age_ms": receipt.frame_age_ms,
        "edgeprune.energy_j": receipt.energy_j,
    }
    return {name: value for name, value in attributes.items() if value is not None}
