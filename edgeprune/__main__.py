"""`python -m edgeprune`: the command line without an installed script."""

from edgeprune.cli import main

main(prog_name="edgeprune")
