"""How good a model is: perplexity, tasks and code, and how fast."""
