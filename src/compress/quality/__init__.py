"""How good a checkpoint is: the measures of `evaluation`, taken of one model after another."""
