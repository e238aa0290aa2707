"""Derive one plan from a budget and statistics. Imports nothing from search."""
