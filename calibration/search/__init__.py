"""From many plans to the best. Only calibrate imports it; it imports nothing above allocate."""
