"""What metrics and spans say of answers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from PIL import Image

from edgeprune.bundle import Bundle
from edgeprune.errors import UsageError
from edgeprune.runtime import Feed, Runtime, load
from edgeprune.runtime.telemetry.metrics import Metrics
from edgeprune.runtime.telemetry.tracing import Spans

PROMPT = "What colour is the cube?"


@pytest.fixture
def runtime(tiny_bundle: Bundle) -> Runtime:
    return load(tiny_bundle.path, threads=1)


@pytest.fixture
def spans() -> Iterator[tuple[TracerProvider, InMemorySpanExporter]]:
    provider, exporter = TracerProvider(), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    yield provider, exporter
    provider.shutdown()


def test_metrics_count_answers_tokens_and_what_was_pruned(runtime: Runtime, tiny_image: Image.Image) -> None:
    metrics = Metrics()
    runtime.watch(metrics.observe)
    receipts = [runtime.generate(tiny_image, PROMPT, max_tokens=4).receipt for _ in range(2)]
    read = metrics.registry.get_sample_value
    reason = receipts[0].finish_reason
    assert read("edgeprune_answers_total", {"finish_reason": reason, "tier": ""}) == 2
    assert (
        read("edgeprune_ttft_seconds_count", {"image": "cold"}) == read("edgeprune_ttft_seconds_count", {"image": "recalled"}) == 1
    )
    assert read("edgeprune_ttft_seconds_sum", {"image": "cold"}) == pytest.approx(receipts[0].times.ttft_ms / 1e3)
    assert read("edgeprune_stage_seconds_count", {"stage": "vision"}) == 1
    assert read("edgeprune_stage_seconds_count", {"stage": "prefill"}) == 2
    assert read("edgeprune_token_seconds_count") == sum(len(receipt.times.decode_ms) for receipt in receipts)
    assert read("edgeprune_tokens_total", {"kind": "visual"}) == 24
    assert read("edgeprune_visual_kv_entries_total", {"kind": "whole"}) == 2 * 12 * 3
    assert read("edgeprune_visual_kv_entries_total", {"kind": "kept"}) == 2 * receipts[0].visual_stored
    assert read("edgeprune_reused_total", {"what": "vision"}) == 1
    assert read("edgeprune_kv_cache_bytes") == receipts[1].kv_bytes


def test_a_scrape_is_text(runtime: Runtime, tiny_image: Image.Image) -> None:
    metrics = Metrics()
    runtime.watch(metrics.observe)
    feed = Feed()
    for _ in range(3):
        feed.put(tiny_image)
    stream = runtime.ask_latest(feed, PROMPT, max_tokens=2)
    "".join(stream)
    page, kind = metrics.render()
    assert kind.startswith("text/plain")
    assert b"edgeprune_frames_dropped_total 2.0" in page
    assert metrics.registry.get_sample_value("edgeprune_frame_age_seconds_count") == 1
    assert (stream.receipt.frames_dropped, stream.receipt.frame_age_ms is not None) == (2, True)


def test_an_answer_is_a_span_with_its_stages_inside(
    runtime: Runtime, tiny_image: Image.Image, spans: tuple[TracerProvider, InMemorySpanExporter]
) -> None:
    provider, exporter = spans
    tracer = provider.get_tracer("test")
    runtime.watch(Spans(tracer))
    with tracer.start_as_current_span("frame"):
        runtime.generate(tiny_image, PROMPT, max_tokens=3)
    named = {span.name: span for span in exporter.get_finished_spans()}
    answer = named["edgeprune.answer"]
    assert set(named) == {
        "frame",
        "edgeprune.answer",
        *(f"edgeprune.{name}" for name in ("preprocess", "vision", "prefill", "decode")),
    }
    assert answer.parent is not None and named["frame"].context is not None
    assert answer.parent.span_id == named["frame"].context.span_id
    for name in ("vision", "prefill", "decode"):
        stage = named[f"edgeprune.{name}"]
        assert stage.parent is not None and answer.context is not None
        assert stage.parent.span_id == answer.context.span_id
        assert answer.start_time <= stage.start_time <= stage.end_time <= answer.end_time  # type: ignore[operator]
    assert answer.attributes is not None
    assert answer.attributes["edgeprune.visual_tokens"] == 12
    assert answer.attributes["gen_ai.usage.output_tokens"] == 3


def test_an_error_is_told_and_a_refusal_is_no_span(
    runtime: Runtime, tiny_image: Image.Image, spans: tuple[TracerProvider, InMemorySpanExporter]
) -> None:
    provider, exporter = spans
    runtime.watch(Spans(provider.get_tracer("test")))
    with pytest.raises(UsageError):
        runtime.generate(tiny_image, PROMPT, max_kv_bytes=1)
    answer = next(span for span in exporter.get_finished_spans() if span.name == "edgeprune.answer")
    assert answer.status.status_code is StatusCode.ERROR
    exporter.clear()
    with pytest.raises(UsageError):
        runtime.generate(tiny_image, "")
    assert exporter.get_finished_spans() == ()
