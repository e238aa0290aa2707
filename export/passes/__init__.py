"""Passes over one traced graph: fusion, precision, attention, stored weights. Know no bundle folder."""
