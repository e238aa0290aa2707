"""From a model folder and a keep plan to a bundle of ONNX graphs, and the proof that both agree."""
