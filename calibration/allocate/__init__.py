"""From a budget and statistics to one plan. Imports nothing of search."""
