"""TensorRT on the device: optimization profiles, the build of engines, their store, and the engine that runs them.

NVIDIA's Python package is imported by nothing here but `api`, and handed on: the same code drives TensorRT 10.3 to 11.4,
TensorRT-RTX in checks without a GPU, and recordings in tests.
"""
