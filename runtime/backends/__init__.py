"""Backends: one interface, implemented on ONNX Runtime and TensorRT. Independent of conversations and prompts."""
