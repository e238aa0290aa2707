"""One pass over the samples, giving statistics. Imports nothing of allocate or search."""
