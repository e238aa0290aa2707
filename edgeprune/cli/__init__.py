"""The `edgeprune` command. Each command parses, calls one library function and prints; heavy imports live inside the bodies."""

from edgeprune.cli.app import main

__all__ = ["main"]
