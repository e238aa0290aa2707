"""Measures and checks a bundle on this machine. Stands above the runtime, without torch; only the command line imports it."""
