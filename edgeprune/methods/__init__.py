"""Pruning methods: which visual tokens a cut keeps, one paper a file. How many is the plan's; imports plan and torch alone."""
