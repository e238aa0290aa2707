"""Output of commands: tables, progress and JSON. Imports no command."""
