"""Measure and check a bundle on this machine. Imports the runtime but no torch; only the command line imports it."""
