"""The rules, grouped by what they look at. Each takes a graph and gives findings. Imports nothing but the lint's graph view."""
