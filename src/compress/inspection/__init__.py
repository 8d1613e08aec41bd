"""What is in a checkpoint, read from its files: shapes, ranks, bits, zeros, errors, bytes; as tables and as plots."""
