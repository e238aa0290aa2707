"""Prompts, tokens and grammars. Knows no model and no sampling."""
