"""Compressed models trained further: what compressing them lost is learned back from the dense model."""
