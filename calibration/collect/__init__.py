"""Collect statistics in one pass over the samples. Imports nothing from allocate or search."""
