"""One interface and what computes behind it: ONNX Runtime or TensorRT. Knows no conversation, no prompt."""
