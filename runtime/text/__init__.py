"""Prompts, tokenization and grammars. Independent of models and sampling."""
