"""From many plans to the best. Imported by calibrate alone."""
