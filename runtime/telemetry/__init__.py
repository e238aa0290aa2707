"""What is recorded of an answer: receipt, metrics, spans. Imports nothing else of the runtime."""
