"""Plan a run from config.json alone: sizes, choices under a budget, memory and disk."""
