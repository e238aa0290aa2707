"""Read pruning settings of other tools as keep plans. Torch-free; imports no other package of calibration."""
