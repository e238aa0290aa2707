"""Learning a selection from a model's own answers, for the method learned. Imports nothing from search, and no command."""
