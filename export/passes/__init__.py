"""Passes over one traced graph: fusion, precision, attention, stored weights. Independent of the bundle folder."""
