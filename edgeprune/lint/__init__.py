"""Lint exported graphs for a target's engine. Imports onnx, never torch or the runtime."""
