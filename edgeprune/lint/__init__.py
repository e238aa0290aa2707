"""A lint of exported graphs against what each TensorRT accepts. Needs onnx, never torch."""
