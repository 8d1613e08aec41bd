__version__ = "0.1.0"
FORMAT = 3  # of checkpoints; it rises when those of before can no longer be read
