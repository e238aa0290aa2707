"""The lint rules by subject. Each maps a RuleContext to findings. Imports only the lint's graph view."""
