"""How results are printed: tables, progress, lines. Imports no command."""
