"""Calibration: read samples, measure a model over them, derive keep plans. Imports no export, report or benchmark."""

if __name__ != "edgeprune.calibration":
    raise ImportError("Import edgeprune.calibration: calibration/ is a folder of the package edgeprune, which links to it.")
