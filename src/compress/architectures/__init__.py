"""What a result can be written as: a class of transformers, or our own."""
