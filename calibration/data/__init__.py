"""Samples and the statistics gathered over them. Torch-free; imports no other room of calibration."""
