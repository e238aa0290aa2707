"""A lint of exported graphs against what each TensorRT accepts. Imports onnx, never torch or the runtime."""
