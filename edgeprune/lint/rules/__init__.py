"""The rules, grouped by what they look at. Each is a function from a graph to findings; imports nothing but the lint's graph view."""
