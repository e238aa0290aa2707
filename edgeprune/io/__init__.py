"""Files, JSON and threads for every other room. Imports errors alone."""
