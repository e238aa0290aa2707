"""Registers the command with optimum-cli: installed as optimum/commands/register/register_edgeprune.py, without __init__.py."""

from optimum.commands.export.base import ExportCommand

from edgeprune.cli.optimum_plugin import ExportEdgePrune

REGISTER_COMMANDS = [(ExportEdgePrune, ExportCommand)]
