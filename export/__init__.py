"""From a model folder and a keep plan to a bundle of ONNX graphs, and the proof that both agree. Imports no report and no cli."""

if __name__ != "edgeprune.export":
    raise ImportError("Import edgeprune.export: export/ is a folder of the package edgeprune, which links to it.")
