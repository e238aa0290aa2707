"""The `edgeprune` command: parse arguments, call one library function, print the result. No other package imports it."""

from edgeprune.cli.app import main

__all__ = ["main"]
