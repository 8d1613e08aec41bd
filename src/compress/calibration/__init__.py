"""Walk over a decoder once: read a block's weights, propagate the calibration activations, write the finished block."""
