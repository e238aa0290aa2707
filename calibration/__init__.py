"""From samples to budgets: reading samples, measuring a model over them, making keep plans."""
