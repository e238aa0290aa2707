"""Export a model under a keep plan as a bundle of ONNX graphs, and verify their parity. Imports no report and no cli."""

if __name__ != "edgeprune.export":
    raise ImportError("Import edgeprune.export: export/ is a folder of the package edgeprune, which links to it.")
