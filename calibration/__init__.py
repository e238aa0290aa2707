"""From samples to budgets: reading samples, measuring a model over them, making keep plans."""

if __name__ != "edgeprune.calibration":
    raise ImportError("Import edgeprune.calibration: calibration/ is a folder of the package edgeprune, which links to it.")
