"""Record answers: receipts, Prometheus metrics, OpenTelemetry spans. Imports nothing else of the runtime."""
