"""Prometheus metrics of answers, in seconds and bytes."""

from __future__ import annotations

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from edgeprune.runtime.telemetry.receipt import Receipt

STAGES = ("preprocess", "vision", "select", "prefill")
_STAGE_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_TOKEN_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


class Metrics:
    """Counters and histograms of answers. Attach them with `model.watch(metrics.observe)`.

    `registry`: by default a new one.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry = registry or CollectorRegistry()
        self._answers = Counter(
            "edgeprune_answers", "Answers that ended, by why and by tier.", ["finish_reason", "tier"], registry=registry
        )
        self._stages = Histogram(
            "edgeprune_stage_seconds", "Stages of the first token, those that ran.", ["stage"], buckets=_STAGE_S, registry=registry
        )
        self._first = Histogram(
            "edgeprune_ttft_seconds",
            "Time to first token: cold, or with something recalled.",
            ["image"],
            buckets=_STAGE_S,
            registry=registry,
        )
        self._token = Histogram("edgeprune_token_seconds", "Decode steps.", buckets=_TOKEN_S, registry=registry)
        self._age = Histogram(
            "edgeprune_frame_age_seconds", "Age of the frame at the first token.", buckets=_STAGE_S, registry=registry
        )
        self._tokens = Counter("edgeprune_tokens", "Tokens, by kind.", ["kind"], registry=registry)
        self._entries = Counter(
            "edgeprune_visual_kv_entries", "Visual KV entries without pruning, and kept.", ["kind"], registry=registry
        )
        self._reused = Counter("edgeprune_reused", "What had been computed for an earlier question.", ["what"], registry=registry)
        self._dropped = Counter("edgeprune_frames_dropped", "Frames that nobody looked at.", registry=registry)
        self._unlike = Counter(
            "edgeprune_images_unlike", "Images unlike those that the choice of tokens was learned from.", registry=registry
        )
        self._joules = Counter("edgeprune_answer_joules", "Energy of the machine while it answered.", registry=registry)
        self._cache = Gauge("edgeprune_kv_cache_bytes", "KV caches of the newest answer when it ended.", registry=registry)

    def observe(self, receipt: Receipt) -> None:
        """Record a finished answer."""
        times = receipt.times
        self._answers.labels(receipt.finish_reason, receipt.tier or "").inc()
        if receipt.generated_tokens:
            self._first.labels("recalled" if receipt.reused else "cold").observe(times.ttft_ms / 1e3)
            self._cache.set(receipt.kv_bytes)
        for stage in STAGES:
            if milliseconds := getattr(times, f"{stage}_ms"):
                self._stages.labels(stage).observe(milliseconds / 1e3)
        for step in times.decode_ms:
            self._token.observe(step / 1e3)
        tokens = {"text": receipt.text_tokens, "visual": receipt.visual_tokens, "generated": receipt.generated_tokens}
        for kind, count in tokens.items():
            self._tokens.labels(kind).inc(count)
        self._entries.labels("whole").inc(receipt.visual_whole)
        self._entries.labels("kept").inc(receipt.visual_stored)
        for what in receipt.reused:
            self._reused.labels(what).inc()
        self._dropped.inc(receipt.frames_dropped or 0)
        self._unlike.inc(receipt.images_unlike)
        self._joules.inc(receipt.energy_j or 0.0)
        if receipt.frame_age_ms is not None:
            self._age.observe(receipt.frame_age_ms / 1e3)

    def render(self) -> tuple[bytes, str]:
        """Return the exposition text for a scrape, and its content type."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST
