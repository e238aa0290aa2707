"""Pruning methods, one paper per file: they choose which visual tokens a cut keeps. Plans set how many. Imports plan and torch."""
