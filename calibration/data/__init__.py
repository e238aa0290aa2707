"""Samples and the statistics collected over them. Torch-free; imports no other package of calibration."""
