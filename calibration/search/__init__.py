"""Search for the best plan. Only `calibrate` imports this package; it imports nothing above allocate."""
