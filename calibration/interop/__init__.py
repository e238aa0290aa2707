"""Plans of other tools, read as keep plans. Torch-free; imports no other room of calibration."""
