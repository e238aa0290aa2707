"""The `edgeprune` command: it parses, calls one library function, prints. Nothing imports it; heavy imports live in the bodies."""

from edgeprune.cli.app import main

__all__ = ["main"]
