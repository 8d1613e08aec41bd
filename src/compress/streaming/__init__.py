"""One walk over a decoder: weights in, one block at a time, activations beside it, finished blocks out."""
