"""Pruning methods: which visual tokens a cut keeps. How many is the plan's matter, never a method's."""
