"""Our own model class. Both modules are carried in the checkpoints that need them: they import nothing else of ours."""
